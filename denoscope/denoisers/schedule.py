"""`NoiseSchedule`: what "timestep t" means for a model, and the conversions between what networks predict.

One form for all: `x_t = a_t x_0 + s_t eps`, with `a_t = sqrt(alphabar_t)`, `s_t = sqrt(1 - alphabar_t)` for the
variance-preserving process of DDPM (Ho et al., arXiv 2006.11239) and `a_t = 1 - s_t` for rectified flow. Kept in float64 and
rounded once, where they meet a tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from denoscope.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
Timestep = int | Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network said about `x = a x_0 + s eps`, in the terms it was said in; other terms on request.

    kind: "epsilon" (eps), "v_prediction" (`a eps - s x_0`), "sample" (x_0) or "flow" (`eps - x_0`). a, s: signal and noise
    level of x, with `a^2 + s^2 = 1` (or `a + s = 1` for flow). Nothing is divided by a level unless the terms differ by it.
    """

    value: Float[Tensor, "batch channels *size"]
    kind: str
    x: Float[Tensor, "batch channels *size"]
    a: Any
    s: Any

    @property
    def x0(self) -> Tensor:
        """The clean sample."""
        match self.kind:
            case "epsilon":
                return (self.x - self.s * self.value) / self.a
            case "v_prediction":
                return self.a * self.x - self.s * self.value
            case "sample":
                return self.value
            case _:
                return self.x - self.s * self.value

    @property
    def eps(self) -> Tensor:
        """The noise."""
        match self.kind:
            case "epsilon":
                return self.value
            case "v_prediction":
                return self.s * self.x + self.a * self.value
            case "sample":
                return (self.x - self.a * self.value) / self.s
            case _:
                return self.x + self.a * self.value  # eps = x + (1 - s) (eps - x_0)

    def to(self, kind: str) -> Tensor:
        """The same in other terms."""
        if kind == self.kind:
            return self.value
        match kind:
            case "epsilon":
                return self.eps
            case "v_prediction":
                return self.a * self.eps - self.s * self.x0
            case "sample":
                return self.x0
            case _:
                return self.eps - self.x0

    def moved(self, gradient: Tensor) -> "Prediction":
        """Guided by the score (Dhariwal and Nichol, eq. 14): eps moved by `-s gradient`, and so x_0 by `s^2 / a gradient`."""
        factor = {"epsilon": -self.s, "sample": self.s**2 / self.a}.get(self.kind, -self.s / self.a)
        return self.given(self.value + factor * gradient)

    def given(self, value: Tensor, kind: str | None = None) -> "Prediction":
        """Another prediction at the same place."""
        return replace(self, value=value, kind=kind or self.kind)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """signal `a_t` and noise `s_t` for every training timestep, and what the network predicts there.

    prediction: the kind of `Prediction` that the network makes. config: the scheduler configuration it was read from.
    """

    signal: Float[Tensor, " steps"]
    noise: Float[Tensor, " steps"]
    prediction: str = "epsilon"
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(f"Unknown prediction type {self.prediction!r}; known are {', '.join(PREDICTIONS)}.")

    def __len__(self) -> int:
        return self.signal.shape[0]

    @property
    def alphas_cumprod(self) -> Float[Tensor, " steps"]:
        """alphabar_t."""
        return self.signal**2

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any, prediction: str = "epsilon") -> "NoiseSchedule":
        alphabar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        return cls(alphabar.sqrt(), (1 - alphabar).sqrt(), prediction)

    @classmethod
    def from_betas(cls, betas: Any, prediction: str = "epsilon") -> "NoiseSchedule":
        return cls.from_alphas_cumprod(torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0), prediction)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """From the `scheduler_config.json` of any diffusers scheduler (the training process, not the sampler's steps)."""
        steps = config.get("num_train_timesteps", 1000)
        if "FlowMatch" in config.get("_class_name", ""):
            shift = config.get("shift", 1.0) if not config.get("use_dynamic_shifting") else 1.0
            s = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            s = shift * s / (1 + (shift - 1) * s)
            return cls(1 - s, s, "flow", dict(config))
        low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        name = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], dtype=np.float64)
        elif name == "linear":
            betas = np.linspace(low, high, steps)
        elif name == "scaled_linear":
            betas = np.linspace(low**0.5, high**0.5, steps) ** 2
        elif name == "squaredcos_cap_v2":  # Nichol and Dhariwal, arXiv 2102.09672, eq. 17
            u = np.arange(steps + 1) / steps
            alphabar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alphabar[1:] / alphabar[:-1], 0.999)
        elif name == "sigmoid":
            betas = (high - low) / (1 + np.exp(-np.linspace(-6, 6, steps))) + low
        else:
            raise InputError(f"Unknown beta schedule {name!r} in the scheduler configuration.")
        schedule = replace(cls.from_betas(betas, config.get("prediction_type", "epsilon")), config=dict(config))
        if config.get("rescale_betas_zero_snr"):  # Lin et al., arXiv 2305.08891, algorithm 1
            a = schedule.signal
            a = (a - a[-1]) * a[0] / (a[0] - a[-1])
            schedule = replace(schedule, signal=a, noise=(1 - a**2).sqrt())
        return schedule

    def check(self, t: int) -> int:
        """t, or InputError when it is no training timestep."""
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < len(self):
            raise InputError(f"Timestep {t} is not in [0, {len(self)}); choose a whole number in that range.")
        return t

    def at(self, t: Timestep, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t), shaped to multiply `like`, in its dtype (at least float32) and on its device."""
        index = torch.as_tensor(t, device="cpu")
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1, *[1] * (like.ndim - 1)) if index.ndim else ()
        a, s = (table[index].reshape(shape).to(like.device, dtype) for table in (self.signal, self.noise))
        return a, s

    def add_noise(self, x0: Tensor, eps: Tensor, t: Timestep) -> Tensor:
        """`x_t = a_t x_0 + s_t eps`."""
        a, s = self.at(t, x0)
        return a * x0 + s * eps

    def timestep(self, t: Timestep) -> Tensor:
        """What the network is told for training timestep t: t itself, or the noise level on its scale for a flow."""
        index = torch.as_tensor(t, device="cpu")
        return self.noise[index] * len(self) if self.prediction == "flow" else index

    def _prediction(self, value: Tensor, kind: str, x_t: Tensor, t: Timestep) -> Prediction:
        return Prediction(value, kind, x_t, *self.at(t, x_t))

    def eps(self, output: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """The noise in `x_t` according to the network's output, whatever the network predicts."""
        return self._prediction(output, self.prediction, x_t, t).eps

    def x0(self, eps: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """The clean sample implied by a noise: `(x_t - s_t eps) / a_t`."""
        return self._prediction(eps, "epsilon", x_t, t).x0

    def output(self, eps: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """What the network would have to output for `eps`; the inverse of `eps(output)`."""
        return self._prediction(eps, "epsilon", x_t, t).to(self.prediction)
