"""From a name on the command line to an `Extractor`: diffusion models, encoders, baselines, and several of them joined."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from denoscope.denoisers import load
from denoscope.denoisers.protocol import Denoiser
from denoscope.encoders import Encoder, is_encoder, load_encoder
from denoscope.errors import InputError
from denoscope.features.amalgam import Amalgam
from denoscope.features.baselines import BASELINES, Baseline
from denoscope.features.extractor import Dift, Extractor, as_extractor
from denoscope.features.joint import Joint


def load_model(
    name: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype | None = None
) -> Denoiser | Encoder | Baseline:
    """What a name stands for: a baseline ("rgb", "sift", "sift-fine", "position"), an encoder (a transformers folder or hub id,
    whose config.json says model_type), or else a diffusion model (see `denoscope.load`).

    Raises MissingError when there is no such model, InputError when it is of a kind that cannot be read.
    """
    if str(name) in BASELINES:
        return BASELINES[str(name)]()
    return load_encoder(name, device, dtype) if is_encoder(name) else load(name, device, dtype)


def load_extractor(
    name: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    join: Sequence[str] = (),
    pca: int | None = None,
    amalgamate: str | None = None,
    techniques: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Extractor:
    """The model behind a name with the settings of `features`, ready to be called with pictures.

    amalgamate, techniques: the features under several techniques as one, see `Amalgam`.

    join: further models whose features are put beside, "MODEL", "MODEL@SITE", "MODEL@SITE@SIZE" or "MODEL@SITE@SIZE@WEIGHT";
        what is empty or left out is the preset's, and 1. The preset and the seed are those of `settings`.
    pca: components that every part is reduced to, see `Joint`.
    """
    models: dict[str, Any] = {}

    def extractor(model: str, **options: Any) -> Extractor:
        if model in BASELINES:
            return _baseline(model, **options)
        if model not in models:
            models[model] = load_model(model, device, dtype)
        return as_extractor(models[model], **options)

    first = extractor(name, **settings)
    if techniques:
        if not isinstance(first, Dift):
            raise InputError(f"{name} is no diffusion model; techniques are for those alone.")
        first = Amalgam(first, techniques, amalgamate or "mean")
    if not join and pca is None:
        return first
    parts, weights = [first], [1.0]
    for text in join:
        model, site, size, weight = parse_join(text)
        shared = {key: settings[key] for key in ("preset", "seed") if settings.get(key) is not None}
        parts.append(extractor(model, site=site, size=size, **shared))
        weights.append(weight)
    return Joint(parts, weights, pca)


def parse_join(text: str) -> tuple[str, str | None, str | None, float]:
    """(model, site, size, weight) of "MODEL[@SITE[@SIZE[@WEIGHT]]]"."""
    model, *rest = text.split("@")
    if not model or len(rest) > 3:
        raise InputError(
            f"{text!r} is not understood; write MODEL, MODEL@SITE, MODEL@SITE@SIZE or MODEL@SITE@SIZE@WEIGHT."
        )
    site, size, weight = (*rest, "", "", "")[:3]
    try:
        return model, site or None, size or None, float(weight or 1)
    except ValueError:
        raise InputError(f"The weight {weight!r} of {text!r} is not a number.") from None


def _baseline(name: str, preset: str | None = None, size: Any = None, seed: int = 0, **others: Any) -> Baseline:
    if given := [key for key, value in others.items() if value is not None]:
        raise InputError(f"{name} is a baseline, which has no use for {given[0]}; leave it out.")
    return BASELINES[name](preset=preset, size=size)
