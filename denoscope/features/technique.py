"""What a model is told beside the prompt, as plain values: `Control` and `Lora`, written in settings as text, tables or lists.

Meng et al., "Suppress Content Shift: Better Diffusion Features via Off-the-Shelf Generation Techniques", NeurIPS 2024
(arXiv 2410.06719), section 4. A technique is a mapping of settings of `features`; techniques compose by merging the mappings.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from denoscope.denoisers.control import canny, control_input, load_control
from denoscope.denoisers.protocol import ControlInput, Denoiser
from denoscope.errors import InputError, MissingError
from denoscope.features.weights import path_digest, weights_digest
from denoscope.images import Picture, read
from denoscope.images.picture import IMAGE_SUFFIXES, Resample

_KINDS: dict[tuple[type, ...], tuple[str, tuple[str, ...]]] = {
    (str, nn.Module): ("a folder, hub id or network", ("model",)),
    (str,): ("text", ("path", "image")),
    (int, float): ("a number", ("scale", "low", "high")),
}


def check_kinds(
    settings: Mapping[str, Any], kinds: Mapping[tuple[type, ...], tuple[str, Sequence[str]]], where: str = ""
) -> None:
    """InputError for a setting of a wrong type, as files and people write them. kinds: types to their name, and settings."""
    for types, (kind, names) in kinds.items():
        for name in names:
            value = settings.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
                raise InputError(f"{where}{name} is {kind}, not {value!r}.")


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it is shown.

    model: folder, hub id, or a loaded ControlNet. image: "canny" (edges of the picture itself, between the thresholds low and
    high of 0..255), a picture file for all pictures, or a folder with a picture of the same stem for each. scale: what its
    residuals are multiplied by.
    """

    model: str | nn.Module
    image: str = "canny"
    scale: int | float = 1.0
    low: int | float = 100
    high: int | float = 200

    def __post_init__(self) -> None:
        if self.scale < 0 or not self.scale < float("inf"):
            raise InputError(f"The scale of a ControlNet is a number from 0, not {self.scale}.")

    def described(self) -> dict[str, Any]:
        """As JSON values; a loaded network goes by its class."""
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        return {"model": name, "image": self.image, "scale": self.scale, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Lora:
    """Low-rank weights in a file (diffusers, peft or kohya layout), and what they are multiplied by."""

    path: str
    scale: int | float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.scale) < float("inf"):
            raise InputError(f"The scale of a LoRA is a finite number, not {self.scale}.")

    def described(self) -> dict[str, Any]:
        return {"path": self.path, "scale": self.scale}


def controls(given: Any) -> tuple[Control, ...]:
    """The ControlNets that a setting names: "MODEL", "MODEL@SCALE", a table, a ControlNet, a `Control`, or a list of these."""
    return tuple(_one(entry, Control, "model") for entry in _listed(given))


def loras(given: Any) -> tuple[Lora, ...]:
    """The LoRAs that a setting names: "FILE", "FILE@SCALE", a table, a `Lora`, or a list of these."""
    return tuple(_one(entry, Lora, "path") for entry in _listed(given))


def _listed(given: Any) -> Sequence[Any]:
    return () if given is None else given if isinstance(given, list | tuple) else (given,)


def _one(given: Any, kind: type, main: str) -> Any:
    if isinstance(given, kind):
        return given
    if isinstance(given, str | Path):
        text = str(given)
        name, at, scale = text.rpartition("@")
        if not at or Path(text).exists():  # an @ inside a name
            return kind(text)
        try:
            number = float(scale)
        except ValueError:
            raise InputError(f"The scale {scale!r} of {text!r} is not a number.") from None
        return kind(name, scale=number)
    if isinstance(given, Mapping) and main in given:
        known = [field.name for field in fields(kind)]
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"A table for {kind.__name__} has {', '.join(known)}, not {unknown[0]!r}.")
        check_kinds(given, _KINDS, f"{kind.__name__}: ")
        return kind(**given)
    if kind is Control and isinstance(given, nn.Module):
        return Control(given)
    raise InputError(f"{given!r} is not understood; write '{main.upper()}@SCALE' or a table with {main!r}.")


def shown(control: Control, picture: Picture, size: tuple[int, int], resample: Resample) -> Picture:
    """What a ControlNet is shown beside a picture that is read at (width, height): edges at that size, or a picture of a file.

    Raises MissingError when a folder holds no picture of the same stem, InputError when the picture has no name to look for.
    """
    if control.image == "canny":
        pixels = ((picture.resized(size, resample) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        return read(canny(pixels, control.low, control.high))
    path = Path(control.image).expanduser()
    if not path.is_dir():
        return read(path)
    if picture.path is None:
        raise InputError(f"A picture without a file has no counterpart in {path}; name a file, or 'canny'.")
    files = [
        one for one in sorted(path.glob(f"{glob.escape(picture.path.stem)}.*")) if one.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise MissingError(f"{path} holds no picture named {picture.path.stem}; every picture needs one to be shown.")
    return read(files[0])


def without_edges(control: Control, seen: Picture) -> bool:
    """Whether a ControlNet is to be shown a picture's own edges and there are none; then it is left out."""
    return control.image == "canny" and not seen.pixels.any()


def control_inputs(
    denoiser: Denoiser, controls: Sequence[Control], picture: Picture, size: tuple[int, int], resample: Resample
) -> tuple[ControlInput, ...]:
    """ControlNets with what they are `shown` beside a picture that is read at (width, height).

    Those that would be shown edges of a picture without any are left out (`canny` warns of it): on an empty map they would
    still act, though nothing is said to them.
    """
    found = []
    for control in controls:
        network, seen = load_control(control.model, denoiser), shown(control, picture, size, resample)
        if not without_edges(control, seen):
            found.append(control_input(denoiser, network, seen, size, control.scale))
    return tuple(found)


def contents(prompt: Any, controls: Sequence[Control], loras: Sequence[Lora]) -> dict[str, str]:
    """What settings name by a path and that may change behind it: path to a digest of the file, or of a folder's files.

    Models of the hub are not looked at.
    """
    paths = [m[1]] if isinstance(prompt, str) and (m := re.fullmatch(r"(?:@|caption:)(.+)", prompt)) else []
    paths += [control.image for control in controls if control.image != "canny"] + [lora.path for lora in loras]
    paths += [control.model for control in controls if isinstance(control.model, str)]
    places = {path: Path(path).expanduser() for path in paths}
    found = {path: path_digest(place) for path, place in places.items() if place.exists()}
    networks = [control.model for control in controls if isinstance(control.model, nn.Module)]
    return found | {f"{type(one).__name__} {k}": weights_digest(one) for k, one in enumerate(networks)}
