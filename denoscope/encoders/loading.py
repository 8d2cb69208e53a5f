"""`load_encoder(name)`: from a transformers folder or hub id to an Encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from denoscope.denoisers.loading import HUB_ID, _json, _quietly, resolve_device, resolve_dtype
from denoscope.encoders.vision import LAYOUTS, ClipTower, VisionEncoder
from denoscope.errors import InputError, MissingError

KNOWN = "DINO (vit), DINOv2 (with registers or without), DINOv3 (vit, convnext), CLIP and SAM"


def is_encoder(name: str | Path) -> bool:
    """Whether a local folder or hub id holds a network of transformers, not a diffusion model.

    Raises MissingError when the hub cannot be asked.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or path.suffix in {".safetensors", ".pt", ".pth"}):
        return False
    if not path.is_dir() and not HUB_ID.fullmatch(str(name)):
        return False
    source = str(path) if path.is_dir() else str(name)
    if _json(source, "model_index.json") is not None:
        return False
    return "model_type" in (_json(source, "config.json") or {})


def load_encoder(
    name: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype | None = None
) -> VisionEncoder:
    """Load the vision tower of a DINO, DINOv2, DINOv3, CLIP or SAM model.

    name: a folder in transformers layout (config.json, weights in safetensors, preprocessor_config.json), or a hub id such as
        "facebook/dinov2-base".

    Raises MissingError when there is no such model, InputError when it is of a kind that cannot be read.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or not HUB_ID.fullmatch(str(name))):
        raise MissingError(f"There is no encoder {str(name)!r}; give a transformers folder or a hub id.")
    source = str(path) if path.is_dir() else str(name)
    config = _json(source, "config.json")
    if config is None or "model_type" not in config:
        hint = (
            "is a diffusion model; load it with denoscope.load" if config or _json(source, "model_index.json") else ""
        )
        raise (InputError if hint else MissingError)(
            f"{name} {hint or 'has no config.json; it is not a transformers folder'}."
        )
    model_type = config["model_type"]
    if model_type not in LAYOUTS:
        raise InputError(f"{name} is a {model_type!r} model; the encoders that can be read are {KNOWN}.")
    network, build = _network(source, str(name), config, kind)
    mean, std = _normalisation(source)
    network.to(place).requires_grad_(False).eval()
    return VisionEncoder(network, LAYOUTS[model_type], build, str(name), mean, std)


def _network(
    source: str, name: str, config: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """The network, and what makes it again without weights."""
    t: Any = transformers

    def whole(kind: Any, part: Callable[[Any], nn.Module] = lambda model: model, **options: Any) -> Any:
        quiet = {
            "dtype": dtype,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }  # both are looked at below
        loaded, info = _quietly(name, lambda: kind.from_pretrained(source, **quiet, **options))
        missing = [key for key in info["missing_keys"] if not key.endswith("mask_token")]
        if missing:
            raise InputError(
                f"The weights of {name} are incomplete ({sorted(missing)[0]} is missing); fetch them again."
            )
        if info.get("mismatched_keys"):
            raise InputError(f"The weights of {name} do not fit its config.json; fetch both again.")
        settings, given = loaded.config, {key: value for key, value in options.items() if key != "config"}
        return part(loaded), lambda: part(kind(settings, **given))

    match config["model_type"]:
        case "vit":
            return whole(t.ViTModel, add_pooling_layer=False)
        case "clip" | "clip_vision_model":
            plain = config["model_type"] == "clip_vision_model" and not any(
                "Projection" in one for one in config.get("architectures") or []
            )
            if plain:
                return whole(t.CLIPVisionModel, lambda model: ClipTower(model, None))
            options = {}
            if config["model_type"] == "clip":  # the width of the projection is said for both towers together
                both = _quietly(name, lambda: t.CLIPConfig.from_pretrained(source))
                both.vision_config.projection_dim = both.projection_dim
                options["config"] = both.vision_config
            part = lambda model: ClipTower(model.vision_model, model.visual_projection)  # noqa: E731
            return whole(t.CLIPVisionModelWithProjection, part, **options)
        case "sam" | "sam_vision_model":
            return whole(t.SamVisionModel, lambda model: model.vision_encoder)
        case _:
            return whole(getattr(t, _CLASSES[config["model_type"]]))


_CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "dinov3_convnext": "DINOv3ConvNextModel",
}


def _normalisation(source: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation in preprocessor_config.json; None where it does not say (the family's own then hold)."""
    given = _json(source, "preprocessor_config.json") or {}
    if given.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found = []
    for key in ("image_mean", "image_std"):
        values = given.get(key)
        if values is not None and not (
            isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) for v in values)
        ):
            raise InputError(f"preprocessor_config.json of {source}: {key} must be three numbers, not {values}.")
        found.append(None if values is None else tuple(float(v) for v in values))
    if found[1] is not None and min(found[1]) <= 0:
        raise InputError(f"preprocessor_config.json of {source}: image_std must be positive, not {list(found[1])}.")
    return found[0], found[1]
