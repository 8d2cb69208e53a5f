"""`GuidanceSchedule`: at which sampling steps guidance is computed, and how strongly it acts there.

Compress Guidance (Dinh, Liu and Xu, arXiv 2408.11194) guides |G| of n steps, chosen by a power law, and puts the weight of the
skipped steps on the guided ones. Positions j = 0 … n-1 are in execution order, 0 the noisiest; the published code counts the
other way, i = n-1-j ("respaced index").
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from denoscope.errors import InputError
from denoscope.images.chart import LINES, chart

Rule = Literal["mask", "gap", "multiplicity", "reuse"]
Kind = Literal["cfg", "classifier"]
RULES: tuple[str, ...] = get_args(Rule)


def check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, GuidanceSchedule) and not callable(schedule):
        raise InputError(f"{schedule!r} is no schedule; give a GuidanceSchedule, or a function from steps to one.")


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise InputError(f"Rule {rule!r} is unknown; use {', '.join(RULES)}.")


@dataclass(frozen=True)
class GuidanceSchedule:
    """counts[j]: how often step j was chosen (0: skipped; more than 1 where the power law chose one step several times)."""

    counts: tuple[int, ...]
    name: str = "explicit"

    def __post_init__(self) -> None:
        if any(type(count) is not int or count < 0 for count in self.counts):
            raise InputError("A guidance schedule holds one whole number, 0 or more, for every step.")

    @classmethod
    def power(cls, n: int, rate: float = 5, k: float | None = None, always_last: int = 2) -> "GuidanceSchedule":
        """The paper's power law: m = int(n / rate) steps at int(n (a / m)^k), a = 0 … m-1, and the last `always_last` ones.

        k = 1 is uniform, k > 1 guides mostly early (at high noise), k < 1 mostly late. By default 1, and from 100 steps on 2 as
        published. As in the published code the last `always_last` steps count once, however often they were chosen.
        """
        n, m = _steps(n), _many(n, rate)
        k = (1.0 if n < 100 else 2.0) if k is None else k
        if not 0 < k <= 100:
            raise InputError(
                f"k is {k}; it must be larger than 0 (1 spreads guidance evenly, 2 puts it early), at most 100."
            )
        if type(always_last) is not int or not 0 <= always_last <= n:
            raise InputError(f"always_last is {always_last}; it must be a whole number from 0 to {n}.")
        counts, c = [0] * n, n / m**k
        for a in range(m):
            counts[int(c * a**k)] += 1
        counts[n - always_last :] = [1] * always_last
        return cls(tuple(counts), f"power r{rate:g} k{k:g}")

    @classmethod
    def uniform(cls, n: int, rate: int = 5) -> "GuidanceSchedule":
        """Every rate-th step, counted from the end, and the two last ones (the rule of the published uniform scripts)."""
        n, _ = _steps(n), _many(n, rate)
        if rate != int(rate):
            raise InputError(f"rate is {rate}; the uniform rule needs a whole number.")
        return cls(tuple(int((n - j) % rate == 0 or j >= n - 2) for j in range(n)), f"uniform r{rate:g}")

    @classmethod
    def early_stop(cls, n: int, fraction: float = 0.2) -> "GuidanceSchedule":
        """The paper's straw baseline ES: only while i + 1 >= (1 - fraction) n (51 of 250 steps at 0.2)."""
        n, fraction = _steps(n), _fraction("fraction", fraction)
        return cls(tuple(int(n - j >= round((1 - fraction) * n, 9)) for j in range(n)), f"early stop {fraction:g}")

    @classmethod
    def first(cls, n: int, fraction: float) -> "GuidanceSchedule":
        """The first `fraction` of the steps, rounded (Step AG, arXiv 2506.08351)."""
        n, fraction = _steps(n), _fraction("fraction", fraction)
        return cls(tuple(int(j < round(fraction * n)) for j in range(n)), f"first {fraction:g}")

    @classmethod
    def interval(
        cls,
        n: int,
        start: float,
        stop: float,
        unit: Literal["fraction", "index", "sigma"] = "fraction",
        sigmas: Sequence[float] | None = None,
    ) -> "GuidanceSchedule":
        """Guidance in a limited interval (Kynkäänniemi et al., arXiv 2404.07724).

        unit "fraction": int(start n) <= j < int(stop n). "index": start <= j < stop. "sigma": start < sigma_j <= stop, with
        the noise-to-signal ratio of every step in `sigmas`.
        """
        n = _steps(n)
        if not start <= stop:
            raise InputError(
                f"The interval {start:g} to {stop:g} is empty; start must be a number not larger than stop."
            )
        match unit:
            case "fraction":
                first, last = int(_fraction("start", start) * n), int(_fraction("stop", stop) * n)
                chosen = [first <= j < last for j in range(n)]
            case "index":
                chosen = [start <= j < stop for j in range(n)]
            case "sigma":
                if sigmas is None or len(sigmas) != n:
                    raise InputError(f"An interval of sigma needs sigmas, the noise level of each of the {n} steps.")
                chosen = [start < sigma <= stop for sigma in sigmas]
            case _:
                raise InputError(f"Unit {unit!r} is unknown; use fraction, index or sigma.")
        return cls(tuple(map(int, chosen)), f"interval {start:g}-{stop:g}")

    @classmethod
    def random(cls, n: int, count: int, seed: int = 0) -> "GuidanceSchedule":
        """`count` steps chosen at random: the control that structured placements must beat."""
        n = _steps(n)
        if type(count) is not int or not 0 <= count <= n:
            raise InputError(f"count is {count}; it must be a whole number from 0 to {n}.")
        return cls._of(n, random.Random(seed).sample(range(n), count), f"random {count}")

    @classmethod
    def explicit(cls, n: int, positions: Iterable[int]) -> "GuidanceSchedule":
        """The steps named, in execution order; one named several times counts so often."""
        return cls._of(_steps(n), list(positions), "explicit")

    @classmethod
    def all(cls, n: int) -> "GuidanceSchedule":
        return cls((1,) * _steps(n), "full")

    @classmethod
    def none(cls, n: int) -> "GuidanceSchedule":
        return cls((0,) * _steps(n), "none")

    @classmethod
    def _of(cls, n: int, positions: list[int], name: str) -> "GuidanceSchedule":
        counts = [0] * n
        for j in positions:
            if isinstance(j, bool) or not isinstance(j, int) or not 0 <= j < n:
                raise InputError(f"Position {j} is no step; name whole numbers from 0 to {n - 1}.")
            counts[j] += 1
        return cls(tuple(counts), name)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def mask(self) -> tuple[bool, ...]:
        """Whether guidance is computed, for every step in execution order."""
        return tuple(count > 0 for count in self.counts)

    @property
    def positions(self) -> tuple[int, ...]:
        """The guided steps in execution order."""
        return tuple(j for j, count in enumerate(self.counts) if count)

    def weights(self, rule: Rule) -> tuple[int, ...]:
        """The factor on the guidance scale at every step.

        "mask" and "reuse": 1 where guided ("reuse" repeats the last guidance elsewhere). "gap": steps until the next guided
        one, so that the weights of a schedule guided at step 0 sum to n. "multiplicity": how often the step was chosen.
        """
        check_rule(rule)
        if rule == "multiplicity":
            return self.counts
        weights, n = [0] * len(self), len(self)
        for j, following in zip(self.positions, [*self.positions[1:], n], strict=False):
            weights[j] = following - j if rule == "gap" else 1
        return tuple(weights)

    def nfe(self, kind: Kind = "cfg") -> int:
        """Network evaluations a sample: n + |G|, the second ones being the unconditional denoiser's or the classifier's."""
        if kind not in get_args(Kind):
            raise InputError(f"Kind {kind!r} is unknown; use cfg or classifier.")
        return len(self) + len(self.positions)

    def relative_cost(self, kind: Kind = "cfg", classifier_cost: float = 1.0) -> float:
        """Cost over that of guiding every step. `classifier_cost`: classifier forward + backward over one denoiser pass."""
        n, guided = len(self), self.nfe(kind) - len(self)
        second = 1.0 if kind == "cfg" else classifier_cost
        return (n + guided * second) / (n + n * second)

    def official_lookup(
        self, timesteps: Sequence[int], code: Literal["dit", "glide", "classifier"] = "dit"
    ) -> "GuidanceSchedule":
        """The schedule that the published code really followed, for parity only; it is wrong.

        timesteps: original timestep of every step in execution order (as of 1000). "dit" and "glide" look a step up in slot
        int((t + 1) / int(1000 / n)) - 1, which is off by one for most steps and wraps at the last; "glide" moreover guides
        only steps chosen exactly once. "classifier" looks up int(t / int(1000 / n)), wrong where n does not divide 1000.
        """
        n = len(self)
        if len(timesteps) != n:
            raise InputError(f"{len(timesteps)} timesteps were given for a schedule of {n} steps.")
        width = int(1000 / n)
        slots = [int(t / width) if code == "classifier" else int((t + 1) / width) - 1 for t in timesteps]
        counts = [self.counts[n - 1 - slot % n] for slot in slots]
        if code == "glide":
            counts = [int(count == 1) for count in counts]
        return GuidanceSchedule(tuple(counts), f"{self.name}, as {code} code")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: positions and weights in execution order, network calls and relative cost."""
        return {
            "name": self.name,
            "steps": len(self),
            "positions": list(self.positions),
            "counts": list(self.counts),
            "weights": {rule: list(self.weights(rule)) for rule in get_args(Rule)},
            "network_calls": {"cfg": self.nfe("cfg"), "classifier": self.nfe("classifier"), "full": 2 * len(self)},
            "relative_cost": self.relative_cost(),
        }

    def plot(self, rule: Rule = "gap", timesteps: Sequence[float] | None = None) -> Image.Image:
        """A stem plot of the weights over steps (or timesteps), as a PIL image."""
        x = list(range(len(self))) if timesteps is None else list(timesteps)
        guided, weights = [x[j] for j in self.positions], [self.weights(rule)[j] for j in self.positions]
        with chart(7, 2.4) as drawn:
            axes = drawn.axes
            axes.vlines(guided, 0, weights, color=LINES[0], lw=2)
            axes.plot(guided, weights, "o", ms=4)
            axes.set(ylabel="weight", xlabel="step" if timesteps is None else "timestep", ylim=(0, None))
            axes.set_xlim(x[0] - 1, x[-1] + 1) if x[-1] > x[0] else axes.set_xlim(x[0] + 1, x[-1] - 1)
            axes.set_title(f"{self.name}: {len(self.positions)} of {len(self)} steps guided, rule {rule}")
            return drawn.image()


def _steps(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InputError(f"The number of steps is {n}; it must be a whole number of at least 2.")
    return n


def _many(n: int, rate: float) -> int:
    if not 1 <= rate <= n:
        raise InputError(f"rate is {rate:g}; it must be from 1 (every step) to {n} (the number of steps).")
    return int(n / rate)


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value:g}; as a fraction of the run it must be from 0 to 1.")
    return value
