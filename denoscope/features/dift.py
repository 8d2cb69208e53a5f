"""DIFT: dense features from one noising step and one partial forward pass of a diffusion model, and techniques around it.

Tang, Jia, Wang, Phoo and Hariharan, "Emergent Correspondence from Image Diffusion", NeurIPS 2023 (arXiv 2306.03881), section 4:
add the noise of timestep t to the picture, run the network, read one decoder activation, average over draws of the noise.
Meng et al., "Suppress Content Shift", NeurIPS 2024 (arXiv 2410.06719), section 4: tell the model more about the picture
(prompt, ControlNet, LoRA) or denoise a little before reading, so that it re-imagines the picture closer to what it is.

Where this differs from the published code, the result does not: the picture is encoded once for the whole ensemble and all
techniques (the published code encodes every copy), prompts, timesteps, draws and ControlNets of one picture share a batch, and
the network stops inside the forward pass as soon as the last site has been seen.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from denoscope.denoisers import winograd
from denoscope.denoisers.lora import adapters
from denoscope.denoisers.noise import Noise
from denoscope.denoisers.protocol import Condition, Denoiser, Posterior
from denoscope.denoisers.text import long_prompts
from denoscope.errors import InputError
from denoscope.features import ditf
from denoscope.features.denoising import denoised, effective, repainted
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import concatenate
from denoscope.features.prompts import resolve
from denoscope.features.recipe import Recipe, Size, recipe, resolve_size, varied
from denoscope.features.sets import Reading, expand, readings
from denoscope.features.technique import control_inputs
from denoscope.features.weights import versions, weights_digest
from denoscope.images import Frame, Picture
from denoscope.sampling.sampler import pools
from denoscope.sites import Watch

__all__ = [
    "Recipe", "Size", "ensemble_maps", "feature_maps", "feature_sets", "member_maps", "recipe", "resolve_size", "varied",
]  # fmt: skip

_CELLS_AT_ONCE = 4 * 96 * 96  # latent cells per forward pass on the CPU: four members of a 768 px picture
Draws = Noise | Literal["none", "shared"] | None
Values = dict[str, Tensor]  # by site, [channels, height, width]


def feature_maps(
    denoiser: Denoiser,
    picture: Picture,
    chosen: Recipe,
    sites: Sequence[str],
    noise: Draws = None,
    seed: int = 0,
    chunk: int | None = None,
) -> dict[str, FeatureMap]:
    """Features of one picture at several sites from the same forward passes; see `features` for the arguments."""
    return feature_sets(denoiser, picture, {"": chosen}, sites=sites, noise=noise, seed=seed, chunk=chunk)[""]


def feature_sets(
    denoiser: Denoiser,
    picture: Picture,
    recipes: Mapping[str, Recipe],
    *,
    sites: Sequence[str] | None = None,
    noise: Draws = None,
    seed: int = 0,
    chunk: int | None = None,
) -> dict[str, dict[str, FeatureMap]]:
    """Features of one picture under several recipes, in as few forward passes as they need together.

    sites: read at these for every recipe; by default each at its own. noise: explicit draws, the same for all recipes; "shared"
    for draws that depend on picture and seed but not on the timestep; "none" for clean latents; by default drawn for each.
    chunk: rows per forward pass; by default as many as fit.

    Returns maps by recipe name and site. Raises InputError for features that are not finite and as `recipe` does.
    """
    parts = {
        (name, k): replace(one, size=size)
        for name, one in recipes.items()
        for k, size in enumerate(one.size.split("+") if isinstance(one.size, str) else [one.size])
    }
    work = _Work(denoiser, picture, parts, sites, noise, seed)
    sums: dict[Any, dict[int, Values]] = defaultdict(dict)
    for key, t, _, values in work.run(chunk):
        total = sums[key].setdefault(t, {site: torch.zeros_like(value) for site, value in values.items()})
        for site, value in values.items():
            total[site] += value
    found: dict[Any, dict[str, FeatureMap]] = {}
    for key, plan in work.plans.items():
        means = {t: {s: v / plan.recipe.ensemble for s, v in total.items()} for t, total in sums.pop(key).items()}
        found[key] = {site: plan.feature_map(work, site, *plan.finish(work, site, means)) for site in plan.sites}
    sizes = {name: [found[key] for key in parts if key[0] == name] for name in recipes}
    return {
        name: {s: concatenate([part[s] for part in maps]) if len(maps) > 1 else maps[0][s] for s in maps[0]}
        for name, maps in sizes.items()
    }


def member_maps(
    denoiser: Denoiser,
    picture: Picture,
    recipes: Mapping[str, Recipe],
    *,
    sites: Sequence[str] | None = None,
    noise: Draws = None,
    seed: int = 0,
    chunk: int | None = None,
) -> Iterator[tuple[str, int, Values]]:
    """As `feature_sets`, but every member of the ensembles by itself, as it comes: (recipe name, member, values by site)."""
    for key, member, own, _ in ensemble_maps(
        denoiser, picture, recipes, sites=sites, noise=noise, seed=seed, chunk=chunk
    ):
        yield key, member, own


def ensemble_maps(
    denoiser: Denoiser,
    picture: Picture,
    recipes: Mapping[str, Recipe],
    *,
    sites: Sequence[str] | None = None,
    noise: Draws = None,
    seed: int = 0,
    chunk: int | None = None,
) -> Iterator[tuple[str, int, Values, Values]]:
    """As `member_maps`, and with every member the features of the ensemble of those so far (which for treated transformer
    blocks are not the mean of the members' features): (recipe name, member, its values by site, those of the ensemble)."""
    if several := [one.size for one in recipes.values() if isinstance(one.size, str) and "+" in one.size]:
        raise InputError(f"Members of ensembles are read at one size, not at {several[0]}.")
    work = _Work(denoiser, picture, recipes, sites, noise, seed)
    waiting: dict[Any, dict[int, Values]] = defaultdict(dict)
    sums: dict[Any, dict[int, Values]] = {}
    for key, t, member, values in work.run(chunk):
        plan, held = work.plans[key], waiting[key, member]
        held[t] = values
        if len(held) == len(plan.times):
            del waiting[key, member]
            before = sums.get(key)  # members come in their order
            total = {t: {s: v + before[t][s] if before else v for s, v in one.items()} for t, one in held.items()}
            sums[key] = total
            mean = {t: {s: v / (member + 1) for s, v in one.items()} for t, one in total.items()}
            own, whole = ({s: plan.finish(work, s, one)[0] for s in plan.sites} for one in (held, mean))
            yield key, member, own, whole


def _encoded(denoiser: Denoiser, picture: Picture, size: tuple[int, int], resample: Any) -> Posterior:
    return denoiser.posterior(picture.resized(size, resample)[None])


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of a batch. The activations of a member are the sum of its rows', each times its weight."""

    key: Any
    t: int
    member: int
    weight: float
    noisy: Tensor
    condition: Condition


@dataclass(eq=False)
class _Start:
    """Latents of a recipe's members, and the noise for them at a timestep."""

    key: Any
    t: int
    x: Tensor
    eps: Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """A recipe, worked out for one picture. times: that are read, as the network is told them."""

    recipe: Recipe
    sites: list[str]
    readings: list[Reading]
    size: tuple[int, int]
    posterior: Posterior
    prompt: str | int | None
    condition: Condition
    unconditional: Condition | None  # None where there is no guidance, or nothing to guide towards
    times: tuple[int, ...]
    draws: dict[int, Noise | None]
    treatments: dict[tuple[str, int], "_Treatment"]
    seed: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.posterior.mean.shape[1:])

    @property
    def guidance(self) -> int | float | None:
        return None if self.unconditional is None else self.recipe.guidance

    @property
    def clean(self) -> bool:
        return all(noise is None for noise in self.draws.values())

    def rows(self, key: Any, noisy: Mapping[int, Tensor]) -> Iterator[_Row]:
        """noisy: what the network is fed at every timestep, a row for each member."""
        s = self.guidance
        for t in self.times:
            for member in range(self.recipe.ensemble):
                one = noisy[t][member : member + 1]
                if s != 0:
                    yield _Row(key, t, member, 1.0 if s is None else float(s), one, self.condition)
                if s is not None and s != 1:
                    assert self.unconditional is not None
                    yield _Row(key, t, member, 1 - float(s), one, self.unconditional)

    def start(self, t: int) -> tuple[Tensor, Tensor | None]:
        """Clean latents, a row for each member, and the noise to be added to them at t."""
        n, noise = self.recipe.ensemble, self.draws[t]
        posterior, eps = (
            (None, None) if noise is None else (noise.posterior, noise.diffusion)
        )  # explicit ones may have more
        x = self.posterior.sample(None if posterior is None else posterior[:n]).expand(n, *self.shape)
        return x, None if eps is None else eps[:n].to(x)

    def finish(self, work: "_Work", site: str, values: Mapping[int, Values]) -> tuple[Tensor, dict[str, Any]]:
        """The features of a site from its activations at every timestep, and what was done to them."""
        own = [self.treatments.get((site, t)) for t in self.times]
        treated = [
            one if how is None else ditf.treated(one, *how)
            for one, how in zip((values[t][site] for t in self.times), own, strict=True)
        ]
        mean = torch.stack(treated).mean(0) if len(treated) > 1 else treated[0]
        if self.recipe.pool > 1:
            h, w = (max(1, side // self.recipe.pool) for side in mean.shape[1:])
            mean = F.adaptive_avg_pool2d(mean, (h, w))
        if mean.device.type != "meta" and not mean.isfinite().all():
            raise InputError(
                f"The features are not finite in {work.denoiser.dtype}; load the model in bfloat16 or float32."
            )
        if own[0] is None:
            return mean, {"adaln": False, "massive": "keep"}
        chosen = self.recipe
        return mean, {"adaln": chosen.adaln, "massive": chosen.massive, "massive_channels": list(own[0][0])}

    def feature_map(self, work: "_Work", site: str, values: Tensor, treatment: dict[str, Any]) -> FeatureMap:
        chosen = self.recipe
        made = {
            "model": work.denoiser.name,
            "preset": chosen.preset,
            "t": self.times[0],
            **({"asked_t": chosen.t} if self.times[0] != chosen.t else {}),
            "site": site,
            "ensemble": chosen.ensemble,
            "prompt": self.prompt,
            "size": list(self.size),
            "resample": chosen.resample,
            "seed": self.seed,
            "noise": "given" if isinstance(work.noise, Noise) else "none" if self.clean else "drawn",
            **treatment,
            **{name: value for name, value in chosen.described().items() if name in _EXTRA},
            "dtype": str(work.denoiser.dtype).removeprefix("torch."),
            **winograd.described(work.denoiser.device, work.denoiser.dtype),
            "picture": str(work.picture.path) if work.picture.path else None,
            "versions": dict(versions()),
        }
        frame = Frame.of(work.picture.size).resize(self.size).resize((values.shape[2], values.shape[1]))
        return FeatureMap(values, frame, made, work.picture)


_EXTRA = (
    "control", "lora", "denoise_from", "denoise_start", "img2img", "second_t", "guidance", "timestep_mode", "pool",
    "long_prompts",
)  # fmt: skip


class _Work:
    """All that is to be read of one picture."""

    def __init__(
        self,
        denoiser: Denoiser,
        picture: Picture,
        recipes: Mapping[Any, Recipe],
        sites: Sequence[str] | None,
        noise: Draws,
        seed: int,
    ):
        self.denoiser, self.picture, self.recipes = denoiser, picture, recipes
        self.sites, self.noise, self.seed = sites, noise, seed
        self.plans: dict[Any, _Plan] = {}
        self._posteriors: dict[Any, Posterior] = {}

    def run(self, chunk: int | None) -> Iterator[tuple[Any, int, int, Values]]:
        """(key, timestep, member, activations by site), as they come."""
        groups: dict[Any, list[Any]] = defaultdict(list)
        for key, one in self.recipes.items():
            groups[one.lora, one.long_prompts].append(key)
        for (loras, long), keys in groups.items():
            with ExitStack() as stack:
                if loras:
                    stack.enter_context(adapters(self.denoiser, [(lora.path, lora.scale) for lora in loras]))
                if long == "chunks":
                    stack.enter_context(long_prompts(self.denoiser))
                batches: dict[Any, list[_Row]] = defaultdict(list)
                for key in keys:
                    self.plans[key] = self._plan(self.recipes[key])
                noisy = self._noised(keys, chunk)
                for key in keys:
                    plan = self.plans[key]
                    alike = (plan.shape, tuple(plan.sites), _length(plan.condition))
                    batches[alike] += plan.rows(key, noisy[key])
                for (shape, *_), rows in batches.items():
                    yield from self._read(rows, chunk or _rows_at_once(self.denoiser, shape))

    def _noised(self, keys: Sequence[Any], chunk: int | None) -> dict[Any, dict[int, Tensor]]:
        """What the network is fed for every recipe at every timestep, a row for each member."""
        starts = [_Start(key, t, *self.plans[key].start(t)) for key in keys for t in self.plans[key].times]
        self._sample(repainted, "img2img", starts, chunk)
        self._sample(denoised, "denoise_from", starts, chunk)
        found: dict[Any, dict[int, Tensor]] = defaultdict(dict)
        for one in starts:
            noisy = one.x
            if one.eps is not None and self.plans[one.key].recipe.denoise_from is None:
                noisy = self.denoiser.schedule.add_noise(one.x, one.eps, one.t)
            found[one.key][one.t] = noisy
        return found

    def _sample(
        self, sampling: Callable[..., Tensor], setting: str, starts: Sequence["_Start"], chunk: int | None
    ) -> None:
        """Sample from the starts whose recipes have a setting; those that differ in nothing but what the network is told
        share their passes."""
        groups: dict[Any, list[_Start]] = defaultdict(list)
        for one in starts:
            plan, chosen = self.plans[one.key], self.plans[one.key].recipe
            if getattr(chosen, setting) is not None and one.eps is not None:
                alike = (chosen.t, chosen.img2img, chosen.denoise_start, plan.guidance, chosen.timestep_mode)
                groups[alike, plan.shape, _length(plan.condition), plan.prompt is None].append(one)
        for group in groups.values():
            plans = [self.plans[one.key] for one in group]
            counts = [len(one.x) for one in group]
            told = Condition.stack([plan.condition.expand(n) for plan, n in zip(plans, counts, strict=True)])
            prompts = [plan.prompt for plan, n in zip(plans, counts, strict=True) for _ in range(n)]
            seeds = [member for n in counts for member in range(n)]  # of schedulers that draw noise themselves
            x, eps = torch.cat([one.x for one in group]), torch.cat([one.eps for one in group if one.eps is not None])
            limit, made = chunk or _rows_at_once(self.denoiser, plans[0].shape), []
            chosen = replace(plans[0].recipe, guidance=plans[0].guidance)
            for k in range(0, len(x), limit):
                rows = slice(k, k + limit)
                controls = [control.rows(rows) for control in told.controls]
                made.append(sampling(self.denoiser, x[rows], eps[rows], chosen, prompts[rows], controls, seeds[rows]))
            for one, latents in zip(group, torch.cat(made).split(counts), strict=True):
                one.x = latents

    def _plan(self, chosen: Recipe) -> _Plan:
        denoiser, picture = self.denoiser, self.picture
        size = resolve_size(chosen.size, picture.size, denoiser.multiple, denoiser.minimum)
        if (size, chosen.resample) not in self._posteriors:
            self._posteriors[size, chosen.resample] = _encoded(denoiser, picture, size, chosen.resample)
        posterior = self._posteriors[size, chosen.resample]
        shape = tuple(posterior.mean.shape[1:])
        sites = list(dict.fromkeys(self.sites if self.sites is not None else expand(denoiser, chosen.site)))
        if maps := [site.name for site in denoiser.sites(sizes=False) if site.kind == "map" and site.name in sites]:
            raise InputError(
                f"{maps[0]} is no map of features; choose a block, resnet, attention, query, key, value or attention.up_cross."
            )
        prompt = resolve(chosen.prompt, picture)
        condition = denoiser.condition(None if prompt is None else [prompt])  # pyright: ignore[reportArgumentType]
        unconditional = None if chosen.guidance is None else denoiser.condition(None)
        if unconditional is not None and _length(unconditional) != _length(condition):  # as long as a prompt in pieces
            unconditional = denoiser.condition(["", str(prompt)]).rows(slice(1))
        if given := control_inputs(denoiser, chosen.control, picture, size, chosen.resample):
            condition = replace(condition, controls=given)
            away = tuple(one for one in given if not pools(one))  # as in sampling
            unconditional = unconditional and replace(unconditional, controls=away)
        if unconditional is not None and same(condition, unconditional):
            unconditional = None
            if chosen.guidance != 1:
                warn_idle()
        times = tuple(
            dict.fromkeys(effective(denoiser, chosen, t) for t in (chosen.t, chosen.second_t) if t is not None)
        )
        seed = chosen.seed if chosen.seed is not None else self.seed
        draws: dict[int, Noise | None] = {}
        for t in times:
            if isinstance(self.noise, Noise):
                draws[t] = self.noise
            elif self.noise == "none" or chosen.noise == "none":
                draws[t] = None
            else:
                named = -1 if self.noise == "shared" else t
                key = (seed, picture.digest, named, chosen.ensemble)
                draws[t] = Noise.draw(shape, *key, posterior=posterior.std is not None)
        for noise in draws.values():
            if noise is not None and noise.shape != shape:
                raise InputError(f"The noise is {list(noise.shape)} but the latents are {list(shape)}.")
            if noise is not None and noise.members < chosen.ensemble:
                raise InputError(f"The noise has {noise.members} members but the ensemble {chosen.ensemble}.")
        recorded = None if isinstance(self.noise, Noise) else seed
        return _Plan(
            chosen,
            sites,
            readings(denoiser, sites),
            size,
            posterior,
            prompt,
            condition,
            unconditional,
            times,
            draws,
            _treatments(denoiser, chosen, sites, times, condition, shape[1:]),
            recorded,
        )

    def _read(self, rows: Sequence[_Row], chunk: int) -> Iterator[tuple[Any, int, int, Values]]:
        plan = self.plans[rows[0].key]
        names = list(dict.fromkeys(name for reading in plan.readings for name in reading.watch))
        latent = plan.shape[-2], plan.shape[-1]

        def run(part: Sequence[_Row]) -> list[Values]:
            times = [row.t for row in part]
            same = all(row.condition is part[0].condition for row in part)
            condition = part[0].condition if same else Condition.stack([row.condition for row in part])
            with torch.no_grad(), Watch(self.denoiser, names) as seen:
                t = times[0] if len(set(times)) == 1 else torch.tensor(times)
                self.denoiser.predict(torch.cat([row.noisy for row in part]), t, condition)
            found = {reading.name: reading.values(seen.seen, latent).float() for reading in plan.readings}
            return [
                {site: values[i] * row.weight if row.weight != 1 else values[i] for site, values in found.items()}
                for i, row in enumerate(part)
            ]

        expected = defaultdict(int)
        for row in rows:
            expected[row.key, row.t, row.member] += 1
        sums: dict[Any, Values] = {}
        for row, values in _chunked(run, rows, chunk):
            which = row.key, row.t, row.member
            sums[which] = {s: sums[which][s] + v for s, v in values.items()} if which in sums else values
            expected[which] -= 1
            if not expected[which]:
                yield *which, sums.pop(which)


def same(one: Condition, two: Condition) -> bool:
    """Whether two conditions of one model tell the network the same, with the same ControlNets."""
    told = [{"": x.tokens, **x.extra} if x.tokens is not None else dict(x.extra) for x in (one, two)]
    if told[0].keys() != told[1].keys() or [c.network for c in one.controls] != [c.network for c in two.controls]:
        return False
    pairs = [(told[0][name], told[1][name]) for name in told[0]]
    return all(a.device.type != "meta" and a.shape == b.shape and a.equal(b) for a, b in pairs)


def warn_idle() -> None:
    warnings.warn(
        "Guidance has no effect without something to guide towards; give a prompt (or class number), or leave it out.",
        stacklevel=3,
    )


def _length(condition: Condition) -> int | None:
    """Of the prompt, in tokens."""
    return None if condition.tokens is None else condition.tokens.shape[1]


_Treatment = tuple[tuple[int, ...], Tensor | None, Tensor | None]  # channels to zero, shift, scale


def _treatments(
    denoiser: Denoiser, chosen: Recipe, sites: Sequence[str], times: Sequence[int], condition: Condition, size: Any
) -> dict[tuple[str, int], _Treatment]:
    """The DiTF treatment that a recipe asks for, by site and timestep, of the network as it is now (with its LoRAs)."""
    streams = (
        [site for site in sites if ditf.applies(denoiser, site)] if chosen.adaln or chosen.massive != "keep" else []
    )
    widths = {site.name: site.channels for site in denoiser.sites()} if streams else {}
    weights = weights_digest(denoiser) if streams else ""
    found: dict[tuple[str, int], _Treatment] = {}
    for site, t in product(streams, times):
        channels = ditf.channels_to_zero(denoiser, chosen.massive, site, t, widths[site], weights)
        shift, scale = ditf.modulation(denoiser, site, t, condition, size) if chosen.adaln else (None, None)
        found[site, t] = channels, shift, scale
    return found


def _rows_at_once(denoiser: Denoiser, shape: tuple[int, ...]) -> int:
    return 1 << 30 if denoiser.device.type == "cuda" else max(1, _CELLS_AT_ONCE // (shape[-1] * shape[-2]))


def _chunked(
    run: Callable[[Sequence[_Row]], list[Values]], rows: Sequence[_Row], chunk: int
) -> Iterator[tuple[_Row, Values]]:
    """Each row with its values, `chunk` rows a pass; a GPU that runs out of memory gets half as many at once."""
    start = 0
    while start < len(rows):
        part = rows[start : start + chunk]
        try:
            values = run(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            chunk = len(part) // 2
            torch.cuda.empty_cache()
            continue
        yield from zip(part, values, strict=True)
        start += len(part)
