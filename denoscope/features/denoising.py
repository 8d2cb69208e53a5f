"""Sampling before reading: which timesteps are reached, short denoising, and repainting (Meng et al., arXiv 2410.06719)."""

import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from denoscope.denoisers.protocol import ControlInput, Denoiser
from denoscope.errors import InputError
from denoscope.features.recipe import Recipe, start_of
from denoscope.sampling.guidance import ClassifierFree
from denoscope.sampling.sampler import trajectory
from denoscope.sampling.solvers import DiffusersSolver, Evaluation, make_solver

Latents = Float[Tensor, "members channels *size"]


def effective(denoiser: Denoiser, chosen: Recipe, t: int) -> int:
    """The training timestep that is read at when a recipe asks for t.

    "exact": t itself. "gdf": that of the published extractor (generic-diffusion-feature), which takes 1000 steps of the model's
    own scheduler and cuts them by strength t / 1000: 50 becomes 51 with PNDM (steps_offset 1), 49 with Euler. Where it denoises
    first, the last of these timesteps that is not below t. Strength 0 leaves none of them: t = 0 is 0, as in "exact".

    Raises InputError for a model without a scheduler of its own: no published code cuts its steps by strength.
    """
    if chosen.timestep_mode == "exact":
        return t
    start = start_of(chosen.denoise_from, t)
    solver = _own(denoiser)
    if t == 0 and not start:
        return 0
    evaluations = _cut(denoiser, solver, t if start is None else start)
    told = [_index(denoiser, one) for one in evaluations]
    if start is None:
        return told[0]
    if told[0] < t:
        raise InputError(
            f"denoise_from={chosen.denoise_from} begins at {told[0]} with this scheduler, below t = {t}; start higher."
        )
    return min(one for one in told if one >= t)


def denoised(
    denoiser: Denoiser,
    x0: Latents,
    eps: Latents,
    chosen: Recipe,
    prompts: Sequence[str | int | None],
    controls: Sequence[ControlInput],
    seeds: Sequence[int],
) -> Latents:
    """Latents with the noise of `denoise_from`, denoised step by step down to t: what the network is fed there.

    "exact": every training timestep from denoise_from to t, by DDIM (flows: Euler). "gdf": as the published code, with the
    model's own scheduler. The paper: with more than about ten steps the shift comes back even under a ControlNet.

    x0, eps, prompts (all None or none), controls, seeds (of the noise that some schedulers draw): a row for each member.

    Raises InputError when the start is too near for the published scheduler (PNDM takes its first step twice).
    """
    start = chosen.denoise_start
    assert start is not None
    if start == 0:
        return denoiser.schedule.add_noise(x0, eps, 0)
    if not controls and start > chosen.t:
        warnings.warn("Denoising without a ControlNet brings the content shift back; add control=.", stacklevel=2)
    steps = len(denoiser.schedule)
    if chosen.timestep_mode == "gdf":
        solver = _own(denoiser)
        evaluations, strength = _cut(denoiser, solver, start), start / steps
    else:
        solver, strength = _every_timestep(denoiser), (start + 0.5) / steps
        strength += 1 / steps  # timestep 0 is a step too
        evaluations = solver.begin(steps, torch.device("cpu"), strength)
    target = effective(denoiser, chosen, chosen.t)
    last = max(e for e, one in enumerate(evaluations) if _index(denoiser, one) >= target)
    place = evaluations[last].position
    if last == 0:
        return denoiser.schedule.add_noise(x0, eps, target)
    if evaluations[last - 1].position == place:
        raise InputError(
            f"denoise_from={chosen.denoise_from} is too near to t = {chosen.t} for this scheduler, which takes its first step "
            "twice; start higher."
        )
    run = _sampled(denoiser, x0, eps, chosen, prompts, controls, seeds, steps=steps, strength=strength, solver=solver)
    step = next(step for step in run if step.index == place - 1)
    return solver.noisy(step.after, last)


def repainted(
    denoiser: Denoiser,
    x0: Latents,
    eps: Latents,
    chosen: Recipe,
    prompts: Sequence[str | int | None],
    controls: Sequence[ControlInput],
    seeds: Sequence[int],
    steps: int = 50,
) -> Latents:
    """Image-to-image: noise of the recipe's strength is added and all of it sampled away again. Arguments as of `denoised`."""
    assert chosen.img2img is not None
    steps = max(steps, int(2 / chosen.img2img))  # at least two steps are left
    latents = x0
    run = _sampled(denoiser, x0, eps, chosen, prompts, controls, seeds, steps=steps, strength=float(chosen.img2img))
    for step in run:
        latents = step.after
    return latents


def _sampled(
    denoiser: Denoiser,
    x0: Tensor,
    eps: Tensor,
    chosen: Recipe,
    prompts: Any,
    controls: Sequence[ControlInput],
    seeds: Sequence[int],
    **settings: Any,
) -> Any:
    told = prompts[0] is not None
    guided = None if chosen.guidance is None or not told else ClassifierFree(float(chosen.guidance))
    return trajectory(
        denoiser,
        prompts if told else None,
        start=x0,
        noise=eps[None],
        control=controls,
        guidance=guided,
        seed=seeds,
        batch=len(x0),
        together=chosen.long_prompts == "cut",  # a prompt in pieces is longer than the empty one
        **settings,
    )


def _own(denoiser: Denoiser) -> DiffusersSolver:
    """The model's own scheduler."""
    config = dict(denoiser.schedule.config)
    name = config.get("_class_name")
    if name is None:
        raise InputError(
            f"{denoiser.name} comes without a scheduler of its own, which says at what timesteps the published code reads; use "
            'timestep_mode="exact", as published code reads such models.'
        )
    return DiffusersSolver(getattr(diffusers, name).from_config(config))


def _cut(denoiser: Denoiser, solver: DiffusersSolver, t: int) -> list[Evaluation]:
    """The scheduler's steps cut by strength t / 1000, as image-to-image pipelines do."""
    steps = len(denoiser.schedule)
    return solver.begin(steps, torch.device("cpu"), t / steps)


def _every_timestep(denoiser: Denoiser) -> DiffusersSolver:
    """DDIM (flows: Euler) over every training timestep."""
    solver = make_solver("auto", denoiser.schedule, clip=False)
    assert isinstance(solver, DiffusersSolver)
    scheduler: Any = solver.scheduler
    spacing = {"timestep_spacing": "leading", "steps_offset": 0, "use_dynamic_shifting": False, "shift_terminal": None}
    config = {**scheduler.config, **{name: value for name, value in spacing.items() if name in scheduler.config}}
    return DiffusersSolver(type(scheduler).from_config(config))


def _index(denoiser: Denoiser, evaluation: Evaluation) -> int:
    """The training timestep nearest to an evaluation."""
    if denoiser.schedule.prediction != "flow":
        return int(evaluation.timestep)
    return int((denoiser.schedule.noise - evaluation.s).abs().argmin())
