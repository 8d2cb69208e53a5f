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
from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError
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
    """What to read: timestep, site, ensemble size, prompt (or class number), picture size and filter, all decided."""

    t: int
    site: str
    ensemble: int
    size: Size
    prompt: str | int | None = None
    preset: str | None = None
    resample: Resample = "bicubic"


def recipe(
    denoiser: Denoiser,
    preset: str | None = None,
    t: int | None = None,
    site: str | None = None,
    ensemble: int | None = None,
    prompt: str | int | None = None,
    size: Size | None = None,
    resample: Resample | None = None,
) -> Recipe:
    """The denoiser's preset ("semantic" unless said) with whatever is given put in its place.

    Raises InputError for unknown presets and sites, timesteps outside the schedule and empty ensembles.
    """
    presets: Mapping[str, Any] = {**PRESETS.get(denoiser.family, {}), **denoiser.presets}
    name = preset or "semantic"
    if name not in presets:
        raise InputError(
            f"There is no preset {name!r} for {denoiser.name}; choose one of {', '.join(presets or NAMES)}."
        )
    given = {"t": t, "site": site, "ensemble": ensemble, "prompt": prompt, "size": size, "resample": resample}
    settings = {**presets[name], **{k: v for k, v in given.items() if v is not None}}
    for key in ("t", "site", "ensemble", "size"):
        if key not in settings:
            raise InputError(f"The preset {name!r} of {denoiser.name} does not say {key}; complete its denoscope.json.")
    if unknown := sorted(set(settings) - set(given)):
        raise InputError(f"The preset {name!r} of {denoiser.name} has an unknown key {unknown[0]!r}.")
    chosen = Recipe(**settings, preset=name)
    denoiser.schedule.check(chosen.t)
    if not isinstance(chosen.ensemble, int) or chosen.ensemble < 1:
        raise InputError(f"The ensemble needs at least 1 member, not {chosen.ensemble}.")
    return chosen


def resolve_size(size: Size, picture: tuple[int, int], multiple: int = 1, minimum: int = 1) -> tuple[int, int]:
    """(width, height) that a picture of (width, height) is resized to.

    size: (width, height), "WxH", N or "N" (a square, as the published code has it), "shortN" (short side N, long side
        rounded down to a multiple of 32, as the published video code has it), "longN" (long side N, both sides rounded to
        multiples of 8 and at least the model's minimum), or 0 (no resizing).
        `features` also takes several joined by "+": "long48+long96".

    Raises InputError when it cannot be understood, or the model cannot take the result.
    """
    w, h = picture
    text = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        target = int(found[1]), int(found[2])
    elif found := re.fullmatch(r"short(\d+)", text):
        short = int(found[1])
        target = tuple(short if side == min(w, h) else side * short // min(w, h) // 32 * 32 for side in (w, h))
    elif found := re.fullmatch(r"long(\d+)", text):
        if int(found[1]) < minimum:
            raise InputError(f"{text} is too small; this model needs sides of at least {minimum} pixels.")
        scale, step = int(found[1]) / max(w, h), max(8, multiple)
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
    if noise is None:
        key = (seed, picture.digest, chosen.t, chosen.ensemble)
        draws = Noise.draw(shape, *key, posterior=posterior.std is not None)
    else:
        draws = noise if isinstance(noise, Noise) else None
    if draws is not None and draws.diffusion.shape[1:] != shape:
        raise InputError(f"The noise is {list(draws.diffusion.shape[1:])} but the latents are {list(shape)}.")
    if maps := [site.name for site in denoiser.sites(sizes=False) if site.kind == "map" and site.name in sites]:
        raise InputError(f"{maps[0]} is no map of features; choose a block, resnet, attention, query, key or value.")
    condition = denoiser.condition(None if chosen.prompt is None else [chosen.prompt])  # pyright: ignore[reportArgumentType]

    def members(part: slice) -> list[Tensor]:
        if draws is None:
            noisy = posterior.mean
        else:
            x0 = posterior.sample(None if draws.posterior is None else draws.posterior[part])
            noisy = denoiser.schedule.add_noise(x0, draws.diffusion[part].to(x0), chosen.t)
        with torch.no_grad(), Watch(denoiser, sites) as seen:
            denoiser.predict(noisy, chosen.t, condition)
        return [seen[site].float().sum(0) for site in sites]

    sums = _chunked(members, chosen.ensemble, chunk or _members_at_once(denoiser, shape))
    found = {}
    for site, total in zip(sites, sums, strict=True):
        values = total / chosen.ensemble
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
            "noise": "given" if isinstance(noise, Noise) else noise or "drawn",
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            "picture": str(picture.path) if picture.path else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }
        frame = Frame.of(picture.size).resize(width_height).resize((values.shape[2], values.shape[1]))
        found[site] = FeatureMap(values, frame, made, picture)
    return found


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
