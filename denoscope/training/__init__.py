"""Small trainers for what must be trained."""

from denoscope.training.config import DenoiserConfig, read_denoiser_config
from denoscope.training.denoiser import train_denoiser

__all__ = ["DenoiserConfig", "read_denoiser_config", "train_denoiser"]
