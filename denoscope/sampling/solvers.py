"""Solvers: how one sampling step is taken, given what the network predicts. Any diffusers scheduler, or `Respaced`.

A solver owns the scale of `x`; the network and everybody else see `noisy = a x_0 + s eps`.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import diffusers
import numpy as np
import torch
from torch import Tensor

from denoscope.denoisers.schedule import NoiseSchedule, Prediction
from denoscope.errors import InputError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
NAMES = ("auto", "ddpm", *SCHEDULERS)
KINDS = {"flow_prediction": "flow"}  # diffusers' name: ours
MULTISTEP = re.compile("Multistep|Singlestep|PNDM|LMS|SASolver|CogVideoXDPM")  # class names


class Evaluation(NamedTuple):
    """One network evaluation: the outer step it belongs to, the timestep the network is told, signal and noise level."""

    position: int
    timestep: Tensor
    a: float
    s: float


@runtime_checkable
class Solver(Protocol):
    """multistep: whether a step uses predictions of earlier steps (they smear guidance weights)."""

    multistep: bool

    def begin(self, steps: int, device: torch.device, strength: float = 1.0) -> list[Evaluation]:
        """The evaluations of a run of `steps` steps; of the last `strength` of them when starting from a picture."""
        ...

    def start(self, noise: Tensor, x0: Tensor | None = None) -> Tensor:
        """x of the first evaluation: noise alone, or `x0` with noise."""
        ...

    def renoised(self, x0: Tensor, noise: Tensor, after: int) -> Tensor:
        """Known content at the noise level reached after evaluation `after` (for inpainting)."""
        ...

    def noisy(self, x: Tensor, evaluation: int) -> Tensor:
        """What the network sees of x."""
        ...

    def step(
        self,
        prediction: Prediction,
        x: Tensor,
        evaluation: int,
        generators: list[torch.Generator],
        *,
        variance: Tensor | None = None,
        gradient: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> Tensor:
        """x after this evaluation.

        variance: what the network says of variances, in [-1, 1]. gradient: of log p(y | x_t), scaled, to move along.
        draw: the noise to use instead of the generators' (Respaced only).
        """
        ...


def outer_step(scheduler: Any, evaluation: int) -> int:
    """The sampling step that a network evaluation of a diffusers scheduler belongs to, both counted from where a run begins.

    Second-order solvers (Heun, KDPM2) evaluate twice in all but the last step; PNDM evaluates the first step twice, or the
    first three four times with Runge-Kutta.
    """
    if not isinstance(scheduler, diffusers.PNDMScheduler):
        return evaluation // getattr(scheduler, "order", 1)
    if scheduler.config["skip_prk_steps"]:
        return max(evaluation - 1, 0)
    return evaluation // 4 if evaluation < 12 else evaluation - 9


class DiffusersSolver:
    """A diffusers scheduler. `options` go to its `set_timesteps` (`mu` of dynamic shifting, `timesteps`, `sigmas`)."""

    def __init__(self, scheduler: Any, **options: Any):
        self.scheduler, self.options = scheduler, options
        name = type(scheduler).__name__
        if not callable(getattr(scheduler, "step", None)) or "EDM" in name or not hasattr(scheduler, "config"):
            raise InputError(
                f"{name} cannot be used as a solver; give a diffusers scheduler for noise, v or flow prediction."
            )
        self.multistep = bool(MULTISTEP.search(name))
        kind = str(scheduler.config.get("prediction_type", "flow" if "FlowMatch" in name else "epsilon"))
        self.kind: str = KINDS.get(kind, kind)

    def begin(self, steps: int, device: torch.device, strength: float = 1.0) -> list[Evaluation]:
        scheduler: Any = self.scheduler
        # timesteps can stay on the CPU; the schedulers move what they need
        scheduler.set_timesteps(
            **({} if {"timesteps", "sigmas"} & set(self.options) else {"num_inference_steps": steps}), **self.options
        )
        skipped = max(steps - int(steps * strength), 0) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        self.timesteps = scheduler.timesteps[skipped:]
        if not len(self.timesteps):
            raise InputError(f"Strength {strength:g} leaves none of {steps} steps; raise it or take more steps.")
        positions = [outer_step(scheduler, e) for e in range(len(self.timesteps))]
        levels = [self._levels(skipped + e, t) for e, t in enumerate(self.timesteps)]
        return [Evaluation(j, t, *level) for j, t, level in zip(positions, self.timesteps, levels, strict=True)]

    def _levels(self, e: int, t: Tensor) -> tuple[float, float]:
        scheduler = self.scheduler
        sigmas = getattr(scheduler, "sigmas", None)
        if self.kind == "flow":
            sigma = float(scheduler.sigmas[e])
            return 1 - sigma, sigma
        if hasattr(scheduler, "sigmas_interpol") and e % 2:  # KDPM2 evaluates between two levels
            sigmas = scheduler.sigmas_interpol
        if sigmas is not None:
            sigma = float(sigmas[e])
            return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        alphabar = float(scheduler.alphas_cumprod[int(t)])
        return alphabar**0.5, (1 - alphabar) ** 0.5

    def start(self, noise: Tensor, x0: Tensor | None = None) -> Tensor:
        if x0 is None:
            return noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return self._with_noise(x0, noise, 0)

    def _with_noise(self, x0: Tensor, noise: Tensor, e: int) -> Tensor:
        add = getattr(self.scheduler, "add_noise", None) or self.scheduler.scale_noise
        t = self.timesteps[e : e + 1]
        return add(x0, noise, t) if add.__name__ == "add_noise" else add(x0, t, noise)

    def renoised(self, x0: Tensor, noise: Tensor, after: int) -> Tensor:
        return x0 if after + 1 == len(self.timesteps) else self._with_noise(x0, noise, after + 1)

    def noisy(self, x: Tensor, evaluation: int) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, self.timesteps[evaluation])

    def step(
        self,
        prediction: Prediction,
        x: Tensor,
        evaluation: int,
        generators: list[torch.Generator],
        *,
        variance: Tensor | None = None,
        gradient: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> Tensor:
        if draw is not None:
            raise InputError(
                "Only the solver 'ddpm' (Respaced) takes explicit noise; diffusers schedulers draw their own."
            )
        output = (prediction if gradient is None else prediction.moved(gradient)).to(self.kind)
        if variance is not None and "learned" in str(self.scheduler.config.get("variance_type")):
            output = torch.cat([output, variance], 1)
        draws = {"generator": generators} if "generator" in self.scheduler.step.__code__.co_varnames else {}
        return self.scheduler.step(output, self.timesteps[evaluation], x, return_dict=False, **draws)[0]


Spacing = Literal["linspace", "leading", "trailing"]


class Respaced:
    """DDPM and DDIM on a respaced process, as in guided-diffusion (Dhariwal and Nichol, arXiv 2105.05233), in float64.

    With respaced abar_i: beta_i = 1 - abar_i / abar_{i-1}, posterior variance bt_i = beta_i (1 - abar_{i-1}) / (1 - abar_i).

    method: "ddpm" draws from N(mu(x0, x) + S g, S); "ddim" moves eps by -sqrt(1 - abar) g and steps with `eta`. S is the
    variance: "small" (bt), "large" (beta), "learned" (between them, in log space, Nichol and Dhariwal, arXiv 2102.09672),
    or None: learned where the network has an opinion, else small. clip: x0 into [-1, 1] before anything else.
    timesteps: explicit ones, descending, instead of `spacing`.
    """

    multistep = False

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        method: Literal["ddpm", "ddim"] = "ddpm",
        variance: Literal["small", "large", "learned"] | None = None,
        eta: float = 0.0,
        spacing: Spacing = "linspace",
        timesteps: Sequence[int] | None = None,
        clip: bool = True,
    ):
        if schedule.prediction == "flow":
            raise InputError("A rectified flow has no DDPM steps; use the solver flow-euler.")
        if method not in ("ddpm", "ddim") or variance not in ("small", "large", "learned", None):
            raise InputError("method is 'ddpm' or 'ddim', variance 'small', 'large', 'learned' or None.")
        self.schedule, self.method, self.variance, self.eta = schedule, method, variance, eta
        self.spacing, self.explicit, self.clip = spacing, timesteps, clip

    def begin(self, steps: int, device: torch.device, strength: float = 1.0) -> list[Evaluation]:
        total = len(self.schedule)
        if self.explicit is not None:
            t = np.asarray(self.explicit)[::-1]
            if len(t) != steps or (np.diff(t) <= 0).any() or t[0] < 0 or t[-1] >= total:
                raise InputError(f"Explicit timesteps must be {steps} falling whole numbers from {total - 1} to 0.")
        elif not 2 <= steps <= total:
            raise InputError(f"The number of steps is {steps}; it must be from 2 to {total}.")
        elif self.spacing == "linspace":
            t = np.array([round(i * (total - 1) / (steps - 1)) for i in range(steps)])
        elif self.spacing == "leading":
            t = np.arange(steps) * (total // steps)
        else:
            t = np.round(np.arange(total, 0, -total / steps)).astype(int)[::-1][-steps:] - 1
        self.t = t
        abar = self.schedule.alphas_cumprod.double().numpy()[t]
        before = np.append(1.0, abar[:-1])
        self.abar, self.before, self.beta = abar, before, 1 - abar / before
        self.small = self.beta * (1 - before) / (1 - abar)
        self.large = np.append(self.small[1], self.beta[1:])
        first = max(steps - int(steps * strength), 0)
        self.indices = list(range(steps - 1, -1, -1))[first:]
        if not self.indices:
            raise InputError(f"Strength {strength:g} leaves none of {steps} steps; raise it or take more steps.")
        return [
            Evaluation(j, torch.tensor(int(t[i])), float(abar[i] ** 0.5), float((1 - abar[i]) ** 0.5))
            for j, i in enumerate(self.indices)
        ]

    def start(self, noise: Tensor, x0: Tensor | None = None) -> Tensor:
        return noise if x0 is None else self._with_noise(x0, noise, self.abar[self.indices[0]])

    def _with_noise(self, x0: Tensor, noise: Tensor, abar: float) -> Tensor:
        return float(abar**0.5) * x0 + float((1 - abar) ** 0.5) * noise

    def renoised(self, x0: Tensor, noise: Tensor, after: int) -> Tensor:
        return self._with_noise(x0, noise, self.before[self.indices[after]])

    def noisy(self, x: Tensor, evaluation: int) -> Tensor:
        return x

    def gap_ratio(self, position: int, gap: int) -> float:
        """Sum of S over `gap` steps from this one, in units of this one's S (known beforehand unless learned)."""
        own = [float((self.large if self.variance == "large" else self.small)[i]) for i in self.indices]
        return sum(own[position : position + gap]) / own[position] if own[position] else float(gap)

    def _variance(self, i: int, variance: Tensor | None) -> tuple[Any, Any]:
        """(S, log of the variance that noise is drawn with), numbers or tensors."""
        kind = self.variance or ("small" if variance is None else "learned")
        log_small = float(np.log(self.small[max(i, 1)]))  # bt_0 is 0
        if kind == "small":
            return float(self.small[i]), log_small
        if kind == "large":
            return float(self.large[i]), float(np.log(self.large[i]))
        if variance is None:
            raise InputError("This network does not predict variances; use variance 'small' or 'large'.")
        share = (variance + 1) / 2
        log = share * float(np.log(self.beta[i])) + (1 - share) * log_small
        return log.exp(), log

    def step(
        self,
        prediction: Prediction,
        x: Tensor,
        evaluation: int,
        generators: list[torch.Generator],
        *,
        variance: Tensor | None = None,
        gradient: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> Tensor:
        i = self.indices[evaluation]
        abar, before, beta = float(self.abar[i]), float(self.before[i]), float(self.beta[i])
        x0 = prediction.x0.clamp(-1, 1) if self.clip else prediction.x0
        if self.method == "ddim":
            eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
            if gradient is not None:
                eps = eps - (1 - abar) ** 0.5 * gradient
                x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5  # not clipped again
            sigma = self.eta * ((1 - before) / (1 - abar) * beta) ** 0.5
            mean = before**0.5 * x0 + max(1 - before - sigma**2, 0.0) ** 0.5 * eps
            return mean if i == 0 or sigma == 0 else mean + sigma * drawn(x, generators, draw)
        s, log = self._variance(i, variance)
        mean = beta * before**0.5 / (1 - abar) * x0 + (1 - before) * (1 - beta) ** 0.5 / (1 - abar) * x
        if gradient is not None:
            mean = mean + s * gradient
        if i == 0:
            return mean
        deviation = (0.5 * log).exp() if isinstance(log, Tensor) else float(np.exp(0.5 * log))
        return mean + deviation * drawn(x, generators, draw)


def drawn(x: Tensor, generators: list[torch.Generator], draw: Tensor | None = None) -> Tensor:
    """Standard normal values in the shape of x, each row from its own generator, so that batches do not matter."""
    if draw is not None:
        return draw.to(x)
    shape = x.shape[1:]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(x)


def make_solver(solver: Any, schedule: NoiseSchedule, clip: bool) -> Solver:
    """A solver by name (see NAMES), around a diffusers scheduler, or as it is.

    clip: whether "ddpm" clips x0 to [-1, 1] (pixel-space models). Raises InputError for unknown names and for a
    solver that does not fit the model's process.
    """
    if not isinstance(solver, str):
        ready = isinstance(solver, Respaced | DiffusersSolver)
        return solver if ready else DiffusersSolver(solver)
    flow = schedule.prediction == "flow"
    fitting = "flow-euler" if flow else "ddim"
    solver = fitting if solver == "auto" else solver
    if solver not in NAMES:
        raise InputError(f"Solver {solver!r} is unknown; use {', '.join(NAMES)}.")
    if flow != (solver == "flow-euler"):
        process = "rectified flow" if flow else "diffusion model"
        raise InputError(f"The solver {solver} does not fit a {process}; use {fitting}.")
    if solver == "ddpm":
        return Respaced(schedule, clip=clip)
    config = dict(schedule.config)
    if not config:
        abar = schedule.alphas_cumprod
        betas = 1 - abar / torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        config = {"trained_betas": betas.tolist(), "num_train_timesteps": len(schedule), "clip_sample": clip}
        config["prediction_type"] = schedule.prediction
    return DiffusersSolver(getattr(diffusers, SCHEDULERS[solver]).from_config(config))
