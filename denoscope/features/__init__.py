"""Dense features of pictures from diffusion models and other networks."""

from denoscope.features.baselines import BASELINES, Baseline
from denoscope.features.dift import feature_maps, recipe, resolve_size
from denoscope.features.encoding import EncoderFeatures
from denoscope.features.extractor import Dift, Extractor, as_extractor, features
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import Joined, concatenate, paired, reduce_together
from denoscope.features.joint import Joint
from denoscope.features.loading import load_extractor, load_model
from denoscope.features.presets import PRESETS

__all__ = [
    "BASELINES",
    "PRESETS",
    "Baseline",
    "Dift",
    "EncoderFeatures",
    "Extractor",
    "FeatureMap",
    "Joined",
    "Joint",
    "as_extractor",
    "concatenate",
    "feature_maps",
    "features",
    "load_extractor",
    "load_model",
    "paired",
    "recipe",
    "reduce_together",
    "resolve_size",
]
