"""What `--control` and `--control-image` ask for."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from denoscope.errors import InputError


def controlled(
    given: dict[str, Any], denoiser: Any, control: Any, images: list[str] | None, own: bool = False, start: Any = None
) -> dict[str, Any]:
    """Put the ControlNets and what they are shown into `given`; returns what names them in the record.

    own: whether `control` also says what they are shown, as settings of features do; of `start`, where it has a picture's own.
    """
    import denoscope as ds
    from denoscope.denoisers.control import control_input, load_control
    from denoscope.features.technique import controls, shown

    if not control:
        if images:
            raise InputError("--control-image is shown to a ControlNet; give --control.")
        return {}
    if own and not images:
        return _own(given, denoiser, control, start)
    asked = controls(control)
    if not images or len(images) not in (1, len(asked)):
        raise InputError(
            f"There are {len(asked)} --control and {len(images or [])} --control-image; give one for each."
        )
    networks = [load_control(one.model, denoiser) for one in asked]
    size = _size(given, denoiser)
    seen = [ds.read(image.removeprefix("canny:")) for image in images]
    rows = []
    for k, (one, network) in enumerate(zip(asked, networks, strict=True)):
        image, picture = images[k % len(images)], seen[k % len(images)]
        edges = image.startswith("canny:")
        view = shown(replace(one, image="canny"), picture, size, "bicubic") if edges else picture
        rows.append(control_input(denoiser, network, view, size, one.scale))
    given["control"] = tuple(rows)
    named = [[image.startswith("canny:"), picture.digest] for image, picture in zip(images, seen, strict=True)]
    return {"control": [one.described() for one in asked] if own else control, "control_image": named}


def _own(given: dict[str, Any], denoiser: Any, control: Any, picture: Any) -> dict[str, Any]:
    """ControlNets that are shown what they say themselves; without a picture, those whose image is a file."""
    import denoscope as ds
    from denoscope.features.technique import contents, control_inputs, controls

    kept, rows, size = [], [], _size(given, denoiser)
    for one in controls(control):
        if picture is None and (one.image == "canny" or Path(one.image).expanduser().is_dir()):
            warnings.warn(
                f"The ControlNet {one.model} is shown something of each picture that is read, and here there is none; it is "
                "left out.",
                stacklevel=2,
            )
        else:
            made = control_inputs(denoiser, [one], picture or ds.read(one.image), size, "bicubic")
            kept += [one] * len(made)  # a picture without edges has nothing to show
            rows += made
    if not kept:
        return {}
    given["control"] = tuple(rows)
    return {"control": [one.described() for one in kept], "control_image": contents(None, kept, ())}


def _size(given: dict[str, Any], denoiser: Any) -> Any:
    """(width, height) of the pictures that are made."""
    return given["size"] or tuple(side * denoiser.stride for side in denoiser.latent_shape()[:0:-1])
