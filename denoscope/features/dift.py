"""DIFT: dense features from one noising step and one partial forward pass of a diffusion model.

Tang, Jia, Wang, Phoo and Hariharan, "Emergent Correspondence from Image Diffusion", NeurIPS 2023 (arXiv 2306.03881), section 4:
add the noise of timestep t to the picture, run the network, read one decoder activation, average over draws of the noise.

Where this differs from the published code, the result does not: the picture is encoded once for the whole ensemble (the
published code encodes every copy), and the network stops inside the forward pass as soon as the site has been seen.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from denoscope.denoisers.noise import Noise
from denoscope.denoisers.protocol import Condition, Denoiser
from denoscope.errors import InputError
from denoscope.features import ditf
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import concatenate
from denoscope.features.presets import NAMES, PRESETS
from denoscope.images import Frame, Picture
from denoscope.images.picture import MAX_PIXELS, Resample
from denoscope.sites import Watch

Size = int | str | tuple[int, int]
_CELLS_AT_ONCE = 4 * 96 * 96  # latent cells per forward pass on the CPU: four members of a 768 px picture


@dataclass(frozen=True)
class Recipe:
    """What to read: timestep, site, ensemble size, prompt (or class number), picture size and filter, all decided.

    noise: "drawn", or "none" for clean latents. adaln, massive: see `features`.
    """

    t: int
    site: str
    ensemble: int
    size: Size
    prompt: str | int | None = None
    preset: str | None = None
    resample: Resample = "bicubic"
    noise: str = "drawn"
    adaln: bool = False
    massive: str = "keep"


def recipe(
    denoiser: Denoiser,
    preset: str | None = None,
    t: int | None = None,
    site: str | None = None,
    ensemble: int | None = None,
    prompt: str | int | None = None,
    size: Size | None = None,
    resample: Resample | None = None,
    noise: str | None = None,
    adaln: bool | None = None,
    massive: str | None = None,
) -> Recipe:
    """The denoiser's preset ("semantic" unless said) with whatever is given put in its place.

    Clean latents (`noise="none"`) are all alike, so their ensemble is 1 unless said. Without a word about `adaln` and
    `massive`, outputs of transformer blocks are modulated and lose their massive channels, and other sites are left alone.

    Raises InputError for unknown presets and sites, timesteps outside the schedule, empty ensembles, and a treatment of
    transformer blocks where there is none.
    """
    presets: Mapping[str, Any] = {**PRESETS.get(denoiser.family, {}), **denoiser.presets}
    name = preset or "semantic"
    if name not in presets:
        raise InputError(
            f"There is no preset {name!r} for {denoiser.name}; choose one of {', '.join(presets or NAMES)}."
        )
    given = {"t": t, "site": site, "ensemble": ensemble, "prompt": prompt, "size": size, "resample": resample}
    given |= {"noise": noise, "adaln": adaln, "massive": massive}
    own = presets[name] if noise != "none" else {**presets[name], "ensemble": 1}
    settings = {**own, **{k: v for k, v in given.items() if v is not None}}
    settings.pop("propagation", None)  # what tracking does with the features, see `propagation_settings`
    for key in ("t", "site", "ensemble", "size"):
        if key not in settings:
            raise InputError(f"The preset {name!r} of {denoiser.name} does not say {key}; complete its denoscope.json.")
    if unknown := sorted(set(settings) - set(given)):
        raise InputError(f"The preset {name!r} of {denoiser.name} has an unknown key {unknown[0]!r}.")
    block = ditf.applies(denoiser, settings["site"])
    if not block and (adaln or massive not in (None, "keep")):
        raise InputError(
            f"adaln and massive are for outputs of transformer blocks (block.N of DiT, PixArt, SD3, Flux), not for "
            f"{settings['site']} of {denoiser.name}."
        )
    settings |= {} if block else {"adaln": False, "massive": "keep"}
    chosen = Recipe(**{"adaln": block, "massive": "zero" if block else "keep", **settings}, preset=name)
    if chosen.noise not in ("drawn", "none"):
        raise InputError(f'noise is "drawn" or "none", not {chosen.noise!r}.')
    denoiser.schedule.check(chosen.t)
    if not isinstance(chosen.ensemble, int) or chosen.ensemble < 1:
        raise InputError(f"The ensemble needs at least 1 member, not {chosen.ensemble}.")
    return chosen


def resolve_size(size: Size, picture: tuple[int, int], multiple: int = 1, minimum: int = 1) -> tuple[int, int]:
    """(width, height) that a picture of (width, height) is resized to.

    size: (width, height), "WxH", N or "N" (a square, as the published code has it), "shortN" (short side N, long side
        rounded down to a multiple of 32, as the published video code has it), "longN" (long side N, both sides rounded to
        multiples of 8 and at least the model's minimum), or 0 (no resizing). Where `multiple` asks for others than 32 and 8
        (14, the patch of DINOv2), it takes their place.
        `features` also takes several joined by "+": "long48+long96".

    Raises InputError when it cannot be understood, or the model cannot take the result.
    """
    w, h = picture
    text = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        target = int(found[1]), int(found[2])
    elif found := re.fullmatch(r"short(\d+)", text):
        short, step = int(found[1]), multiple if 32 % multiple else 32
        target = tuple(short if side == min(w, h) else side * short // min(w, h) // step * step for side in (w, h))
    elif found := re.fullmatch(r"long(\d+)", text):
        if int(found[1]) < minimum:
            raise InputError(f"{text} is too small; this model needs sides of at least {minimum} pixels.")
        scale, step = int(found[1]) / max(w, h), -(-8 // multiple) * multiple
        target = tuple(max(minimum, step, round(side * scale / step) * step) for side in (w, h))
    elif text.isdecimal():
        target = (int(text), int(text)) if int(text) else (w, h)
    else:
        raise InputError(
            f"Size {text!r} is not understood; write 768, 768x512, short480, long512, 0 or several joined by +."
        )
    if min(target) < minimum:
        raise InputError(f"{target[0]}x{target[1]} pixels is too small; this model needs sides of at least {minimum}.")
    if target[0] * target[1] > MAX_PIXELS:
        raise InputError(
            f"{target[0]}x{target[1]} is more than {MAX_PIXELS // 1_000_000} megapixels; use a smaller size."
        )
    if any(side % multiple for side in target):
        nearest = "x".join(str(max(1, int(side / multiple + 0.5)) * multiple) for side in target)
        raise InputError(f"This model needs sides that are multiples of {multiple}; use size {nearest}.")
    return target[0], target[1]


def feature_maps(
    denoiser: Denoiser,
    picture: Picture,
    chosen: Recipe,
    sites: Sequence[str],
    noise: Noise | Literal["none"] | None = None,
    seed: int = 0,
    chunk: int | None = None,
) -> dict[str, FeatureMap]:
    """Features of one picture at several sites from the same forward passes; see `features` for the arguments."""
    if isinstance(chosen.size, str) and "+" in chosen.size:
        parts = [
            feature_maps(denoiser, picture, replace(chosen, size=size), sites, noise, seed, chunk)
            for size in chosen.size.split("+")
        ]
        return {site: concatenate([part[site] for part in parts]) for site in sites}
    width_height = resolve_size(chosen.size, picture.size, denoiser.multiple, denoiser.minimum)
    posterior = denoiser.posterior(picture.resized(width_height, chosen.resample)[None])
    shape = tuple(posterior.mean.shape[1:])
    clean = noise == "none" or (noise is None and chosen.noise == "none")
    if isinstance(noise, Noise) or clean:
        draws = noise if isinstance(noise, Noise) else None
    else:
        key = (seed, picture.digest, chosen.t, chosen.ensemble)
        draws = Noise.draw(shape, *key, posterior=posterior.std is not None)
    if draws is not None and draws.shape != shape:
        raise InputError(f"The noise is {list(draws.shape)} but the latents are {list(shape)}.")
    if maps := [site.name for site in denoiser.sites(sizes=False) if site.kind == "map" and site.name in sites]:
        raise InputError(f"{maps[0]} is no map of features; choose a block, resnet, attention, query, key or value.")
    condition = denoiser.condition(None if chosen.prompt is None else [chosen.prompt])  # pyright: ignore[reportArgumentType]

    def members(part: slice) -> list[Tensor]:
        if draws is None:
            noisy = posterior.mean
        else:
            noisy = posterior.sample(None if draws.posterior is None else draws.posterior[part])
            if draws.diffusion is not None:
                noisy = denoiser.schedule.add_noise(noisy, draws.diffusion[part].to(noisy), chosen.t)
        with torch.no_grad(), Watch(denoiser, sites) as seen:
            denoiser.predict(noisy, chosen.t, condition)
        return [seen[site].float().sum(0) for site in sites]

    sums = _chunked(members, chosen.ensemble, chunk or _members_at_once(denoiser, shape))
    found = {}
    for site, total in zip(sites, sums, strict=True):
        values, treatment = _treated(denoiser, chosen, site, total / chosen.ensemble, condition, shape)
        if values.device.type != "meta" and not values.isfinite().all():
            raise InputError(f"The features are not finite in {denoiser.dtype}; load the model in bfloat16 or float32.")
        made = {
            "model": denoiser.name,
            "preset": chosen.preset,
            "t": chosen.t,
            "site": site,
            "ensemble": chosen.ensemble,
            "prompt": chosen.prompt,
            "size": list(width_height),
            "resample": chosen.resample,
            "seed": None if isinstance(noise, Noise) else seed,
            "noise": "given" if isinstance(noise, Noise) else "none" if clean else "drawn",
            **treatment,
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            "picture": str(picture.path) if picture.path else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }
        frame = Frame.of(picture.size).resize(width_height).resize((values.shape[2], values.shape[1]))
        found[site] = FeatureMap(values, frame, made, picture)
    return found


def _treated(
    denoiser: Denoiser, chosen: Recipe, site: str, values: Tensor, condition: Condition, shape: tuple[int, ...]
) -> tuple[Tensor, dict[str, Any]]:
    """The DiTF treatment that a recipe asks for, and what it was."""
    if not ditf.applies(denoiser, site) or not (chosen.adaln or chosen.massive != "keep"):
        return values, {"adaln": False, "massive": "keep"}
    channels = ditf.channels_to_zero(denoiser, chosen.massive, site, chosen.t, values.shape[0])
    shift, scale = ditf.modulation(denoiser, site, chosen.t, condition, shape[1:]) if chosen.adaln else (None, None)
    made = {"adaln": chosen.adaln, "massive": chosen.massive, "massive_channels": list(channels)}
    return ditf.treated(values, channels, shift, scale), made


def _members_at_once(denoiser: Denoiser, shape: tuple[int, ...]) -> int:
    return 1 << 30 if denoiser.device.type == "cuda" else max(1, _CELLS_AT_ONCE // (shape[-1] * shape[-2]))


def _chunked(members: Callable[[slice], list[Tensor]], count: int, chunk: int) -> list[Tensor]:
    """Sums of `members(slice)` over `count` members; a GPU that runs out of memory gets half as many at once."""
    totals: list[Tensor] = []
    start = 0
    while start < count:
        stop = min(count, start + chunk)
        try:
            part = members(slice(start, stop))
        except torch.OutOfMemoryError:
            if stop - start == 1:
                raise
            chunk = (stop - start) // 2
            torch.cuda.empty_cache()
            continue
        totals = [total + new for total, new in zip(totals, part, strict=True)] if totals else part
        start = stop
    return totals
