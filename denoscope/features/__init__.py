"""Dense features of pictures from diffusion models."""

from denoscope.features.dift import feature_maps, recipe, resolve_size
from denoscope.features.extractor import Dift, Extractor, as_extractor, features
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import concatenate
from denoscope.features.presets import PRESETS

__all__ = [
    "PRESETS",
    "Dift",
    "Extractor",
    "FeatureMap",
    "as_extractor",
    "concatenate",
    "feature_maps",
    "features",
    "recipe",
    "resolve_size",
]
