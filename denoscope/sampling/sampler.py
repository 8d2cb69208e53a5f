"""The sampling loop: one generator of `Step`s over any Denoiser and any solver. Everything that samples consumes it.

for step in trajectory(denoiser, ["a cat"], steps=50, guidance=ClassifierFree(7.5, partial(GuidanceSchedule.power, rate=5))):
    step.x0  # the denoised estimate; breaking off here costs nothing more
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from denoscope.denoisers.protocol import Condition, ControlInput, Denoiser, Timed
from denoscope.denoisers.schedule import Prediction
from denoscope.errors import InputError
from denoscope.images import Picture, read
from denoscope.sampling.guidance import ClassifierFree, ClassifierGuidance
from denoscope.sampling.solvers import DiffusersSolver, Respaced, drawn, make_solver
from denoscope.sites import Watch

Prompts = Sequence[str] | Sequence[int] | None
Batch = Float[Tensor, "batch channels *size"]


@dataclass(frozen=True, eq=False)
class Step:
    """What one sampling step saw. Where a solver evaluates the network twice, the predictions are those of the first time.

    index: position in execution order. timestep: as the network was told. latents: x before the step and `after` it, in the
    solver's scale. conditional, unconditional, prediction: what the network said, and what was made of it (`.eps`, `.x0`);
    unconditional is None on skipped steps. gradient: of the classifier, scaled. watched: activations for the condition, and
    `watched_unconditional`. denoiser_calls, classifier_calls: network evaluations a sample in this step.
    """

    index: int
    steps: int
    timestep: float
    latents: Batch
    after: Batch
    conditional: Prediction
    unconditional: Prediction | None
    prediction: Prediction
    gradient: Tensor | None = None
    watched: Mapping[str, Tensor] = field(default_factory=dict)
    watched_unconditional: Mapping[str, Tensor] = field(default_factory=dict)
    denoiser_calls: int = 1
    classifier_calls: int = 0

    @property
    def guided(self) -> bool:
        """Whether guidance was computed here."""
        return self.unconditional is not None or self.classifier_calls > 0

    @property
    def x0(self) -> Batch:
        """The denoised estimate after guidance by the condition, in latent scale."""
        return self.prediction.x0


def trajectory(
    denoiser: Denoiser,
    prompts: Prompts = None,
    *,
    steps: int = 50,
    guidance: ClassifierFree | None = None,
    classifier: ClassifierGuidance | None = None,
    labels: Sequence[int] | Tensor | None = None,
    negative: Prompts = None,
    solver: Any = "auto",
    seed: int | Sequence[int] = 0,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    start: Picture | Tensor | str | Path | None = None,
    strength: int | float = 0.8,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    watch: Sequence[str] = (),
    together: bool = True,
    clip: bool | None = None,
    control: Sequence[ControlInput] = (),
) -> Iterator[Step]:
    """Sample step by step. Nothing runs before the first `next`, and nothing after the consumer stops.

    prompts: prompts or class numbers, one a sample; None is unconditional, `batch` samples.
    guidance: by a second prediction. classifier: by a classifier, towards `labels`. Both may act.
    negative: prompts of the unconditional prediction ("" by default), one for all or one a sample.
    solver: a name (solvers.NAMES), a diffusers scheduler, or a Respaced. "auto" is DDIM, or Euler for flows.
    seed: sample i has seed + i, or its own from a list. A sample depends on its seed alone, whatever it is batched with, and is
        the one that a diffusers pipeline makes with `generator=torch.Generator().manual_seed(seed)`.
    size: (width, height) in pixels, or one number for both.
    start: picture (or its file) or latents to start from with noise of `strength` (img2img). mask: [height, width] or
        [batch, 1, height, width], 1 where `start` is to be repainted; elsewhere it stays (inpainting; strength 1 is usual).
    noise: explicit draws instead of the seeds', [1 + steps, batch, channels, *size]: the initial one, then one for each
        step (solver "ddpm"); or only the first.
    watch: sites to record at every step. together: both predictions in one forward pass; False halves the peak memory.
    clip: x0 into [-1, 1] where the method does that; by default as the model's scheduler says, else for pixel-space models.
    control: ControlNets and what they are shown (`control_input`), one row or one a sample; they act on both predictions.

    Raises InputError for settings that do not fit the model or one another.
    """
    for what, given, kind in (("guidance", guidance, ClassifierFree), ("classifier", classifier, ClassifierGuidance)):
        if not isinstance(given, kind | None):
            raise InputError(f"{what} must be a {kind.__name__}, not {given!r}.")
    size = (size, size) if isinstance(size, int) else size
    start = read(start) if isinstance(start, str | Path) else start
    if isinstance(watch, str):
        raise InputError(f"watch is a list of sites; write [{watch!r}].")
    n = _samples(prompts, labels, seed, batch, start)
    seeds = [seed + i for i in range(n)] if isinstance(seed, int) else [int(one) for one in seed]
    for what, given in (("prompts", prompts), ("labels", labels), ("seeds", seeds)):
        if given is not None and len(given) != n:
            raise InputError(f"There are {len(given)} {what} for {n} samples; give one for each.")
    if type(steps) is not int or not 1 <= steps <= len(denoiser.schedule):
        raise InputError(
            f"The number of steps is {steps!r}; it must be a whole number from 1 to {len(denoiser.schedule)}."
        )
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    device = denoiser.device
    shape = denoiser.latent_shape(*(size[::-1] if size else (None, None)))
    clip = bool(denoiser.schedule.config.get("clip_sample", shape[0] <= 3)) if clip is None else clip
    taken = make_solver(solver, denoiser.schedule, clip)
    if guidance is not None and prompts is None and guidance.network is None:
        raise InputError("Classifier-free guidance needs something to guide towards; give prompts or labels.")
    if classifier is not None and labels is None:
        raise InputError("Classifier guidance needs labels, the class of every sample.")
    if control and guidance is not None and guidance.network is not None:
        raise InputError("A ControlNet does not act on a second network; leave out control, or the guiding network.")
    condition = _controlled(denoiser.condition(prompts, n), control, n)
    known = None if start is None else _known(denoiser, start, generators, n)
    if known is not None:
        shape = tuple(known.shape[1:])
    if mask is not None and known is None:
        raise InputError("A mask needs a picture to start from.")
    kept = None if mask is None else 1 - _at_latents(mask, shape).to(device)
    first = drawn(torch.empty(n, *shape, device=device), generators, None if noise is None else noise[0])
    if noise is not None and tuple(noise.shape[1:]) != (n, *shape):
        raise InputError(f"The explicit noise is {list(noise.shape[1:])}; this run needs {[n, *shape]}.")
    if isinstance(solver, str) and isinstance(taken, DiffusersSolver) and isinstance(denoiser, Timed):
        taken.options = denoiser.timing(steps, shape)
    evaluations = taken.begin(steps, device, strength if known is not None else 1.0)
    total = evaluations[-1].position + 1
    guide = None if guidance is None else guidance.begin(total)
    ratio = taken.gap_ratio if isinstance(taken, Respaced) and taken.variance != "learned" else None
    judge = None if classifier is None else classifier.begin(total, ratio)
    _warn(guidance, classifier, taken.multistep)
    targets = None if classifier is None or labels is None else classifier.classifier.check_labels(labels, n).to(device)
    away: Condition | None = None
    if guide is not None and any(guide.wants(j) for j in range(total)):
        assert guidance is not None
        second = guidance.network or denoiser
        # networks that pool what they are shown act on the conditional prediction alone, as in the pipelines
        both = [shown for shown in control if not pools(shown)]
        away = condition if guidance.same_condition else _controlled(_unconditional(second, negative, n), both, n)
    from_noise = known is None or (mask is not None and strength == 1)
    x = taken.start(first) if from_noise else taken.start(first, known)
    other = Network(guidance.network if guidance and guidance.network else denoiser)
    network = Network(denoiser)
    with Watch(denoiser, watch, stop=False) if watch else nullcontext() as seen:
        held: dict[str, Any] = {}
        for e, (j, t, a, s) in enumerate(evaluations):
            if not held or held["index"] != j:
                held = {"index": j, "latents": x, "denoiser_calls": 0, "classifier_calls": 0}
            wanted = guide is not None and guide.wants(j) and away is not None
            through = judge is not None and judge.through(j)
            with torch.set_grad_enabled(through):
                noisy = taken.noisy(x, e).detach().requires_grad_(through)
                pair = network.pair(noisy, t, condition, away if wanted else None, other, together, seen)
                (output, unconditional), recorded = pair
                channels = noisy.shape[1]
                c = Prediction(output[:, :channels], denoiser.schedule.prediction, noisy, a, s)
                u = None
                if unconditional is not None:
                    u = Prediction(unconditional[:, :channels], other.denoiser.schedule.prediction, noisy, a, s)
                prediction = c if guide is None else guide.combine(j, c, u, clip)
                gradient = None
                if judge is not None and targets is not None:
                    told = torch.as_tensor(t, device=device).round().long()
                    gradient = judge.gradient(j, told, noisy, prediction, targets, denoiser.decode, clip)
            with torch.no_grad():
                prediction, c, u = _detached(prediction), _detached(c), None if u is None else _detached(u)
                variance = output[:, channels:].detach() if output.shape[1] > channels else None
                draw = noise[1 + j] if noise is not None and len(noise) > 1 else None
                x = taken.step(prediction, x, e, generators, variance=variance, gradient=gradient, draw=draw)
                if kept is not None and known is not None:
                    x = kept * taken.renoised(known, first, e) + (1 - kept) * x
            held["denoiser_calls"] += 1 + (u is not None)
            held["classifier_calls"] += judge is not None and judge.wants(j)
            if "timestep" not in held:
                held |= {"timestep": float(t), "conditional": c, "unconditional": u, "prediction": prediction}
                held |= {"gradient": gradient, "watched": recorded[0], "watched_unconditional": recorded[1]}
            if e + 1 == len(evaluations) or evaluations[e + 1].position != j:
                yield Step(after=x, steps=total, **held)


class Network:
    """A denoiser's forward passes, conditional and not, in one batch or one after the other."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser

    def pair(
        self,
        noisy: Tensor,
        t: Tensor,
        condition: Condition,
        away: Condition | None,
        other: "Network",
        together: bool,
        seen: Watch | None,
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """(conditional, unconditional or None), and what was watched in either."""
        t, n = t.to(noisy.device), noisy.shape[0]
        if away is not None and together and other.denoiser is self.denoiser:
            both = self.denoiser.output(torch.cat([noisy, noisy]), t, condition.expand(n).beside(away.expand(n)))
            taken = seen.take() if seen else {}
            return (both[:n], both[n:]), ({k: v[:n] for k, v in taken.items()}, {k: v[n:] for k, v in taken.items()})
        one = self.denoiser.output(noisy, t, condition)
        recorded = seen.take() if seen else {}
        two = None if away is None else other.denoiser.output(noisy, t, away)
        return (one, two), (recorded, seen.take() if seen and two is not None else {})


def _detached(prediction: Prediction) -> Prediction:
    return Prediction(prediction.value.detach(), prediction.kind, prediction.x.detach(), prediction.a, prediction.s)


def _samples(prompts: Prompts, labels: Any, seed: Any, batch: int | None, start: Any) -> int:
    for given in (prompts, labels, None if isinstance(seed, int) else seed):
        if given is not None:
            if isinstance(given, str) or not len(given):
                raise InputError(
                    "prompts, labels and seeds are lists, one entry a sample; this one is empty or a string."
                )
            return len(given)
    n = batch if batch is not None else start.shape[0] if isinstance(start, Tensor) else 1
    if n < 1:
        raise InputError(f"The batch is {n}; it must be at least 1.")
    return n


def _unconditional(denoiser: Denoiser, negative: Prompts, n: int) -> Condition:
    if negative is None:
        return denoiser.condition(None, n)
    if len(negative) not in (1, n):
        raise InputError(f"There are {len(negative)} negative prompts for {n} samples; give one, or one for each.")
    rows: Any = list(negative) * (n if len(negative) == 1 else 1)
    return denoiser.condition(rows)


def _controlled(condition: Condition, control: Sequence[ControlInput], n: int) -> Condition:
    for shown in control:
        if shown.image.shape[0] not in (1, n):
            raise InputError(
                f"A ControlNet is shown {shown.image.shape[0]} pictures for {n} samples; give one, or one for each."
            )
    return replace(condition, controls=tuple(shown.expand(n) for shown in control))


def pools(shown: ControlInput) -> bool:
    """Whether a ControlNet pools what it is shown; such ones act on the conditional prediction alone."""
    config: Any = shown.network.config
    return bool(config.get("global_pool_conditions"))


def _known(denoiser: Denoiser, start: Picture | Tensor, generators: list[torch.Generator], n: int) -> Tensor:
    """Latents to start from, a row for every sample; the autoencoder's posterior is sampled, as the pipelines do."""
    if isinstance(start, Tensor):
        if start.device.type != "meta" and not start.isfinite().all():
            raise InputError("The latents to start from are not all finite.")
        if len(start) not in (1, n):
            raise InputError(
                f"There are {len(start)} latents to start from and {n} samples; give one, or one for each."
            )
        return start.to(denoiser.device).float().expand(n, *start.shape[1:])
    posterior = denoiser.posterior(start.pixels[None] * 2 - 1)
    mean = posterior.mean.expand(n, *posterior.mean.shape[1:])
    return mean if posterior.std is None else mean + posterior.std * drawn(mean, generators)


def _at_latents(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    grid = mask.float() if mask.ndim == 4 else mask.float()[None, None]
    return torch.nn.functional.interpolate(grid, size=shape[1:])


def _warn(guidance: ClassifierFree | None, classifier: ClassifierGuidance | None, multistep: bool) -> None:
    if guidance is not None and guidance.scale == 1:
        warnings.warn("The guidance scale is 1, so there is nothing to guide and nothing to skip.", stacklevel=3)
    rules = {g.rule for g in (guidance, classifier) if g is not None and g.schedule is not None}
    if multistep and rules & {"gap", "multiplicity"}:
        warnings.warn(
            "A multistep solver mixes guided and unguided steps, which smears the weights of this rule; prefer mask or reuse.",
            stacklevel=3,
        )
    if classifier is not None and classifier.at == "noisy" and not classifier.classifier.noise_aware:
        warnings.warn(
            f"{classifier.classifier.name} was not trained on noise; let it look at the denoised estimate (x0).",
            stacklevel=3,
        )
