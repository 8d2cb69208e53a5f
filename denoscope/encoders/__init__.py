"""Dense networks that are no diffusion models: DINO, CLIP, SAM, read like denoisers."""

from denoscope.encoders.loading import is_encoder, load_encoder
from denoscope.encoders.protocol import Encoder
from denoscope.encoders.vision import VisionEncoder

__all__ = ["Encoder", "VisionEncoder", "is_encoder", "load_encoder"]
