"""denoscope: read what diffusion models know about your photos.

import denoscope as ds

denoiser = ds.load("seedling")
matches = ds.match(denoiser, "one.jpg", "other.jpg", [(120, 80), (200, 140)])
matches.draw().save("matches.png")
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from denoscope.correspondence import (
        GeometricMatches,
        Matches,
        Mutual,
        Propagated,
        Tracked,
        Tracks,
        match,
        match_geometric,
        mutual_nearest,
        propagate_edit,
        propagate_labels,
        track,
        transfer,
    )
    from denoscope.denoisers import Condition, Denoiser, Noise, NoiseSchedule, Site, Watch, load
    from denoscope.denoisers.classifiers import Classifier, load_classifier
    from denoscope.denoisers.winograd import winograd
    from denoscope.encoders import Encoder, load_encoder
    from denoscope.errors import DenoscopeError, InputError, MissingError
    from denoscope.features import (
        Amalgam,
        Control,
        Extractor,
        FeatureMap,
        Lora,
        amalgamate,
        as_extractor,
        feature_sets,
        features,
    )
    from denoscope.images import Clip, Frame, Picture, read, read_clip, write
    from denoscope.images.video import Frames
    from denoscope.sampling import (
        APG,
        CFGZeroStar,
        ClassifierFree,
        ClassifierGuidance,
        GuidanceSchedule,
        Respaced,
        Samples,
        Step,
        diagnose,
        sample,
        trajectory,
    )
    from denoscope.sampling.guider import CompressGuidance
    from denoscope.sampling.pipelines import compress_guidance
    from denoscope.segmentation import Examples, FewShot, Masks, read_examples

__version__ = "0.1.0"

# names are imported when first used, so that `import denoscope` and `denoscope --help` stay quick
_HOMES = {
    "denoscope.correspondence": (
        "GeometricMatches",
        "Matches",
        "Mutual",
        "Propagated",
        "Tracked",
        "Tracks",
        "match",
        "match_geometric",
        "mutual_nearest",
        "propagate_edit",
        "propagate_labels",
        "track",
        "transfer",
    ),
    "denoscope.denoisers": ("Condition", "Denoiser", "Noise", "NoiseSchedule", "Site", "Watch", "load"),
    "denoscope.denoisers.classifiers": ("Classifier", "load_classifier"),
    "denoscope.denoisers.winograd": ("winograd",),
    "denoscope.encoders": ("Encoder", "load_encoder"),
    "denoscope.errors": ("DenoscopeError", "InputError", "MissingError"),
    "denoscope.features": (
        "Amalgam",
        "Control",
        "Extractor",
        "FeatureMap",
        "Lora",
        "amalgamate",
        "as_extractor",
        "feature_sets",
        "features",
    ),
    "denoscope.images": ("Clip", "Frame", "Picture", "read", "read_clip", "write"),
    "denoscope.images.video": ("Frames",),
    "denoscope.sampling": (
        "APG",
        "CFGZeroStar",
        "ClassifierFree",
        "ClassifierGuidance",
        "GuidanceSchedule",
        "Respaced",
        "Samples",
        "Step",
        "diagnose",
        "sample",
        "trajectory",
    ),
    "denoscope.sampling.guider": ("CompressGuidance",),
    "denoscope.sampling.pipelines": ("compress_guidance",),
    "denoscope.segmentation": ("Examples", "FewShot", "Masks", "read_examples"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "APG",
    "Amalgam",
    "CFGZeroStar",
    "Classifier",
    "ClassifierFree",
    "ClassifierGuidance",
    "Clip",
    "CompressGuidance",
    "Condition",
    "Control",
    "Denoiser",
    "DenoscopeError",
    "Encoder",
    "Examples",
    "Extractor",
    "FeatureMap",
    "FewShot",
    "Frame",
    "Frames",
    "GeometricMatches",
    "GuidanceSchedule",
    "InputError",
    "Lora",
    "Masks",
    "Matches",
    "MissingError",
    "Mutual",
    "Noise",
    "NoiseSchedule",
    "Picture",
    "Propagated",
    "Respaced",
    "Samples",
    "Site",
    "Step",
    "Tracked",
    "Tracks",
    "Watch",
    "amalgamate",
    "as_extractor",
    "compress_guidance",
    "diagnose",
    "feature_sets",
    "features",
    "load",
    "load_classifier",
    "load_encoder",
    "match",
    "match_geometric",
    "mutual_nearest",
    "propagate_edit",
    "propagate_labels",
    "read",
    "read_clip",
    "read_examples",
    "sample",
    "track",
    "trajectory",
    "transfer",
    "winograd",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'denoscope' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


class _Front(ModuleType):
    """`denoscope.features` is a package and a function; the import system must not hide the function behind the package."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOME and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Front
