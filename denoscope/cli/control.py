"""What `--control` and `--control-image` ask for."""

from typing import Any

from denoscope.errors import InputError


def controlled(
    given: dict[str, Any], denoiser: Any, control: list[str] | None, images: list[str] | None
) -> dict[str, Any]:
    """Put the ControlNets and what they are shown into `given`; returns what names them in the record."""
    import denoscope as ds
    from denoscope.denoisers.control import control_input, load_control
    from denoscope.features.technique import controls, shown

    if not control:
        if images:
            raise InputError("--control-image is shown to a ControlNet; give --control.")
        return {}
    if not images or len(images) not in (1, len(control)):
        raise InputError(
            f"There are {len(control)} --control and {len(images or [])} --control-image; give one for each."
        )
    networks = [load_control(one.model, denoiser) for one in controls(control)]
    size: Any = given["size"] or tuple(side * denoiser.stride for side in denoiser.latent_shape()[:0:-1])
    seen = [ds.read(image.removeprefix("canny:")) for image in images]
    rows = []
    for k, (one, network) in enumerate(zip(controls(control), networks, strict=True)):
        image, picture = images[k % len(images)], seen[k % len(images)]
        view = shown(one, picture, size, "bicubic") if image.startswith("canny:") else picture
        rows.append(control_input(denoiser, network, view, size, one.scale))
    given["control"] = tuple(rows)
    named = [[image.startswith("canny:"), picture.digest] for image, picture in zip(images, seen, strict=True)]
    return {"control": control, "control_image": named}
