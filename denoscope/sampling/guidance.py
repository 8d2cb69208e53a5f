"""Guidance: how conditional and unconditional predictions become one, and at which steps either is computed at all.

The descriptions here are immutable; `begin(n)` gives the state of one run. Compress Guidance (Dinh, Liu and Xu, arXiv
2408.11194) is any of them with a sparse `GuidanceSchedule`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from denoscope.denoisers.classifiers import Classifier
from denoscope.denoisers.protocol import Denoiser
from denoscope.denoisers.schedule import Prediction
from denoscope.errors import InputError
from denoscope.sampling.schedules import GuidanceSchedule, Rule, check_rule, check_schedule

Scale = int | float | Callable[[int], float]  # a number, or one for every step (weight schedules, arXiv 2404.13040)
ScheduleLike = GuidanceSchedule | Callable[[int], GuidanceSchedule] | None
Batch = Float[Tensor, "batch channels *size"]


def resolve(schedule: ScheduleLike, n: int) -> GuidanceSchedule:
    """The schedule for a run of n steps; None guides every step. Raises InputError when it was made for another length."""
    if schedule is None:
        return GuidanceSchedule.all(n)
    check_schedule(schedule)
    made = schedule if isinstance(schedule, GuidanceSchedule) else schedule(n)
    if len(made) != n:
        raise InputError(f"The guidance schedule is for {len(made)} steps, but the run has {n}; make it for {n} steps.")
    return made


def _check_scale(scale: Scale) -> None:
    if not callable(scale) and not math.isfinite(scale):
        raise InputError(f"The guidance scale is {scale}; it must be a finite number.")


def _at(scale: Scale, j: int) -> float:
    return scale(j) if callable(scale) else scale


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[batch] values, shaped to multiply `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416): less of the part of c - u that lies along c.

    eta: share of that part kept. norm: the longest allowed c - u (0: any). momentum: of the running c - u (None: none);
    steps that are skipped do not touch it.
    """

    eta: int | float = 0.0
    norm: int | float = 15.0
    momentum: int | float | None = -0.5


@dataclass(frozen=True)
class CFGZeroStar:
    """CFG-Zero* (Fan et al., arXiv 2503.18886): u is scaled by <c, u> / |u|^2, and the first steps predict nothing at all.

    zero_steps: how many first steps return zero, also when they are skipped (meant for flows, where it leaves x as it is).
    """

    zero_steps: int = 1


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance `u + w (c - u)` (Ho and Salimans, arXiv 2207.12598) on the steps of a schedule.

    scale: w; 1 is unguided (the ADM code's w' is w - 1). A number, or a function of the step.
    schedule: None guides every step; a function makes one for the number of steps.
    rule: how skipped steps are made up for. "mask": not at all. "gap", "multiplicity": w - 1 is multiplied by the
        schedule's weights. "reuse": the last guided - conditional is added again.
    combine: APG or CFGZeroStar instead of the plain formula.
    space: "output" combines what the network predicts; "x0" the clean samples, clipped first if the sampler clips, which
        is the ADM code's formula without its cancellation in float32.
    rescale: share of the result brought back to the standard deviation of c (Lin et al., arXiv 2305.08891, eq. 15).
    channels: guide only the first few latent channels (the DiT release guides 3 of 4).
    network: another denoiser for the second prediction. With `same_condition` it is told the same as the first
        (AutoGuidance, Karras et al., arXiv 2406.02507: a worse version of the model), else nothing.
    """

    scale: Scale = 7.5
    schedule: ScheduleLike = None
    rule: Rule = "mask"
    combine: APG | CFGZeroStar | None = None
    space: Literal["output", "x0"] = "output"
    rescale: int | float = 0.0
    channels: int | None = None
    network: Denoiser | None = None
    same_condition: bool = False

    def __post_init__(self) -> None:
        check_rule(self.rule)
        _check_scale(self.scale)
        if not isinstance(self.combine, APG | CFGZeroStar | None):
            raise InputError(
                f"combine is {self.combine!r}; give APG() or CFGZeroStar(), or None for the plain formula."
            )
        if self.space not in ("output", "x0"):
            raise InputError(f"Space {self.space!r} is unknown; use output or x0.")
        if not 0 <= self.rescale <= 1:
            raise InputError(f"rescale is {self.rescale}; it must be from 0 to 1.")

    def begin(self, n: int) -> "ClassifierFreeRun":
        return ClassifierFreeRun(self, resolve(self.schedule, n))


class ClassifierFreeRun:
    """One run: which steps need a second prediction, and how two become one."""

    def __init__(self, guidance: ClassifierFree, schedule: GuidanceSchedule):
        self.guidance, self.schedule = guidance, schedule
        self.weights = schedule.weights(guidance.rule)
        self.update: Tensor | None = None  # of the last guided step, for "reuse"
        self.average: Tensor | None = None  # of c - u, for APG's momentum

    def wants(self, j: int) -> bool:
        """Whether step j needs the unconditional prediction: not where w is 1."""
        return self.weights[j] > 0 and _at(self.guidance.scale, j) != 1

    def combine(self, j: int, cond: Prediction, uncond: Prediction | None, clip: bool) -> Prediction:
        """The guided prediction of step j; `uncond` is None on skipped steps."""
        guidance = self.guidance
        if isinstance(guidance.combine, CFGZeroStar) and j < guidance.combine.zero_steps:
            return cond.given(torch.zeros_like(cond.value))
        again = self.update if guidance.rule == "reuse" else None
        if uncond is None and again is None:
            return cond
        kind = "sample" if guidance.space == "x0" else cond.kind
        c = cond.to(kind).clamp(-1, 1) if clip and kind == "sample" else cond.to(kind)
        if uncond is None:
            assert again is not None
            return cond.given(c + again, kind)
        u = uncond.to(kind).clamp(-1, 1) if clip and kind == "sample" else uncond.to(kind)
        w = 1 + self.weights[j] * (_at(guidance.scale, j) - 1)
        guided = self._mixed(c, u, w)
        if guidance.channels is not None:
            guided = torch.cat([guided[:, : guidance.channels], c[:, guidance.channels :]], 1)
        if guidance.rescale:
            ratio = c.flatten(1).std(1) / guided.flatten(1).std(1)
            guided = guided * per_sample(1 + guidance.rescale * (ratio - 1), guided)
        self.update = (guided - c).detach()
        return cond.given(guided, kind)

    def _mixed(self, c: Tensor, u: Tensor, w: float) -> Tensor:
        match self.guidance.combine:
            case APG(eta, norm, momentum):
                update = c - u
                if momentum is not None:
                    update = update if self.average is None else update + momentum * self.average
                    self.average = update.detach()
                if norm:
                    length = update.flatten(1).norm(dim=1).clamp_min(1e-12)
                    update = update * per_sample((norm / length).clamp_max(1), update)
                along = c.flatten(1).double()
                along = along / along.norm(dim=1, keepdim=True).clamp_min(1e-12)
                flat = update.flatten(1).double()
                parallel = ((flat * along).sum(1, keepdim=True) * along).view_as(update).to(update.dtype)
                return c + (w - 1) * (update - parallel + eta * parallel)
            case CFGZeroStar():
                flat_c, flat_u = c.flatten(1), u.flatten(1)
                best = (flat_c * flat_u).sum(1) / (flat_u.square().sum(1) + 1e-8)
                u = u * per_sample(best, u)
                return u + w * (c - u)
            case _:
                return u + w * (c - u)


def log_probability(logits: Tensor, labels: Tensor) -> Float[Tensor, " batch"]:
    """log p(y | x)."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by the gradient of log p(y | x) of a classifier (Dhariwal and Nichol, arXiv 2105.05233) on chosen steps.

    scale: s, a number or a function of the step. schedule: as of ClassifierFree. rule: "gap" (the paper's) and
    "multiplicity" multiply the gradient; "reuse" applies the last one again, with the step's own variance; "mask" does nothing.
    at: what the classifier looks at. "noisy": x_t, needs one trained on noise. "x0": the denoised estimate, its gradient
        used as it is. "x0-through": the same, but the gradient is taken through the denoiser (exact, and dear).
    gap_variance: "own" moves by the guided step's variance as the published code does; "sum" by the sum over the gap.
    nonfinite: "raise" or "zero" what is not finite in a gradient.
    score: what is raised, from logits [batch, classes] and labels to [batch]; for CLIP guidance, the similarity itself.

    The gradient is computed in float32, per sample, and never through the denoiser unless asked.
    """

    classifier: Classifier
    scale: Scale = 1.0
    schedule: ScheduleLike = None
    rule: Rule = "gap"
    at: Literal["noisy", "x0", "x0-through"] = "noisy"
    gap_variance: Literal["own", "sum"] = "own"
    nonfinite: Literal["raise", "zero"] = "raise"
    score: Callable[[Tensor, Tensor], Tensor] = log_probability

    def __post_init__(self) -> None:
        check_rule(self.rule)
        _check_scale(self.scale)
        if not isinstance(self.classifier, Classifier):
            raise InputError(
                "classifier must be a Classifier; load a file with load_classifier or wrap a network: Classifier.of."
            )
        if self.at not in ("noisy", "x0", "x0-through"):
            raise InputError(f"at is {self.at!r}; the classifier can look at noisy, x0 or x0-through.")
        if self.gap_variance == "sum" and self.rule != "gap":
            raise InputError("gap_variance='sum' belongs to the rule 'gap'.")

    def begin(self, n: int, gap_ratio: Callable[[int, int], float] | None = None) -> "ClassifierRun":
        """State of a run of n steps. gap_ratio(j, gap): summed variance over own variance, for gap_variance="sum"."""
        return ClassifierRun(self, resolve(self.schedule, n), gap_ratio)


class ClassifierRun:
    """One run: at which steps the classifier is asked, and what it answers."""

    def __init__(
        self, guidance: ClassifierGuidance, schedule: GuidanceSchedule, gap_ratio: Callable[[int, int], float] | None
    ):
        self.guidance, self.schedule = guidance, schedule
        self.weights: list[float] = list(schedule.weights(guidance.rule))
        if guidance.gap_variance == "sum":
            if gap_ratio is None:
                raise InputError("gap_variance='sum' needs the solver 'ddpm' with a fixed variance.")
            self.weights = [gap_ratio(j, int(w)) if w else 0.0 for j, w in enumerate(self.weights)]
        self.stored: Tensor | None = None

    def wants(self, j: int) -> bool:
        """Whether the classifier is asked at step j."""
        return self.weights[j] > 0 and _at(self.guidance.scale, j) != 0

    def through(self, j: int) -> bool:
        """Whether the denoiser's own graph is needed at step j."""
        return self.guidance.at == "x0-through" and self.wants(j)

    def gradient(
        self,
        j: int,
        t: Tensor,
        x: Batch,
        prediction: Prediction,
        labels: Tensor,
        decode: Callable[[Tensor], Tensor],
        clip: bool,
    ) -> Batch | None:
        """s weight_j grad log p(y | x): summed over the batch before autograd, so it is per sample. None where nothing acts.

        x: what the network saw; for "x0-through" the leaf of the denoiser's graph.
        """
        if not self.wants(j):
            return self.stored if self.guidance.rule == "reuse" else None
        guidance = self.guidance
        with torch.enable_grad():
            if guidance.at == "noisy":
                leaf = x.detach().float().requires_grad_()
                logits = guidance.classifier.logits(leaf, t.expand(len(leaf)))
            else:
                x0 = prediction.x0
                leaf = x if guidance.at == "x0-through" else x0.detach().float().requires_grad_()
                seen = x0 if guidance.at == "x0-through" else leaf
                pixels = decode(seen.clamp(-1, 1) if clip else seen)
                logits = guidance.classifier.logits(pixels.clamp(-1, 1), torch.zeros_like(t).expand(len(leaf)))
            gradient = torch.autograd.grad(guidance.score(logits, labels).sum(), leaf)[0].float()
        if not gradient.isfinite().all():
            if guidance.nonfinite == "raise":
                raise InputError(
                    f"The classifier's gradient is not finite at step {j}; lower its scale, or zero such values "
                    "(nonfinite='zero' in Python)."
                )
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        self.stored = gradient * (_at(guidance.scale, j) * self.weights[j])
        return self.stored


def describe(guidance: Any) -> dict[str, Any]:
    """The settings of a guidance as plain values, for records."""
    if guidance is None:
        return {}

    def plain(value: Any) -> Any:
        if isinstance(value, GuidanceSchedule):
            return {"name": value.name, "positions": list(value.positions), "steps": len(value)}
        if hasattr(value, "name"):
            return value.name
        if isinstance(value, APG | CFGZeroStar):
            return {"kind": type(value).__name__, **vars(value)}
        if isinstance(value, str | int | float | bool | None):
            return value
        return getattr(value, "__name__", str(value))

    return {"kind": type(guidance).__name__, **{key: plain(value) for key, value in vars(guidance).items()}}
