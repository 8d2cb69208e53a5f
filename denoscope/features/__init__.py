"""Dense features of pictures from diffusion models and other networks."""

from denoscope.features.amalgam import Amalgam
from denoscope.features.amalgamation import amalgamate
from denoscope.features.baselines import BASELINES, Baseline
from denoscope.features.dift import Recipe, feature_maps, feature_sets, member_maps, recipe, resolve_size, varied
from denoscope.features.encoding import EncoderFeatures
from denoscope.features.extractor import Dift, Extractor, as_extractor, features
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import Joined, concatenate, paired, reduce_together
from denoscope.features.joint import Joint
from denoscope.features.loading import load_extractor, load_model
from denoscope.features.presets import PRESETS
from denoscope.features.recipes import read_recipe, read_techniques, write_recipe
from denoscope.features.technique import Control, Lora

__all__ = [
    "BASELINES",
    "PRESETS",
    "Amalgam",
    "Baseline",
    "Control",
    "Dift",
    "EncoderFeatures",
    "Extractor",
    "FeatureMap",
    "Joined",
    "Joint",
    "Lora",
    "Recipe",
    "amalgamate",
    "as_extractor",
    "concatenate",
    "feature_maps",
    "feature_sets",
    "features",
    "load_extractor",
    "load_model",
    "member_maps",
    "paired",
    "read_recipe",
    "read_techniques",
    "recipe",
    "reduce_together",
    "resolve_size",
    "varied",
    "write_recipe",
]
