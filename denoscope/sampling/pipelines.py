"""`compress_guidance`: a classic diffusers pipeline computes classifier-free guidance on chosen steps only.

Inside the context the pipeline's networks, ControlNet and scheduler pass for instances of throw-away subclasses, whose
`__call__`, `step` and `set_timesteps` ask one gate. Nothing else is touched, so offloading hooks (which exchange `forward`
and are renewed after every run), compiled modules and isinstance checks work as before.

c and u are the network's outputs with and without the prompt. Where guidance is to be skipped u is not computed and the
pipeline is given u = c, from which any formula u + w (c - u) makes c itself. Pipelines get c and u in one of two ways:

    one call with a doubled batch, [u, c] nearly everywhere: a skipped step runs only the half that belongs to c
    two calls in a step, c first: a skipped step answers the second from the first
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from denoscope.errors import InputError
from denoscope.sampling.schedules import GuidanceSchedule, Rule, check_rule, check_schedule
from denoscope.sampling.solvers import MULTISTEP, outer_step

_NETWORKS = ("unet", "transformer", "transformer_2", "unconditional_transformer")
_CONDITIONAL_FIRST = {"DiTPipeline", "LuminaPipeline", "OmniGenPipeline", "AceStepPipeline"}  # doubled batch [c, u]
_OTHER_HALVES = re.compile("PAG|LEdits|HiDream")  # halves that are not u and c, or not along the first axis
_SHARED = re.compile("rotary|(^|_)rope(_|$)|^img_ids$|^txt_ids$|^ip_adapter_masks$")  # without a row for every sample
_DIT_NULL = 1000  # label of "no class" in DiTPipeline


@dataclass
class Run:
    """One denoising loop. `guided`: steps where u was computed. `samples`: rows of the batches put through the network.

    `full_samples`: rows that guidance on every step would have put through it.
    """

    schedule: GuidanceSchedule
    samples: int = 0
    full_samples: int = 0
    guided: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.samples / self.full_samples if self.full_samples else 1.0


@dataclass(repr=False)
class Savings:
    """What the runs inside one context cost, in their order, and the sums."""

    runs: list[Run] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(run.samples for run in self.runs)

    @property
    def full_samples(self) -> int:
        return sum(run.full_samples for run in self.runs)

    @property
    def ratio(self) -> float:
        return self.samples / self.full_samples if self.full_samples else 1.0

    @property
    def schedule(self) -> GuidanceSchedule | None:
        """The schedule of the latest run."""
        return self.runs[-1].schedule if self.runs else None

    def __str__(self) -> str:
        guided, steps = sum(len(run.guided) for run in self.runs), sum(len(run.schedule) for run in self.runs)
        runs = f"{len(self.runs)} runs, " if len(self.runs) != 1 else ""
        cost = f"{self.samples} network samples instead of {self.full_samples} ({100 * self.ratio:.0f} %)"
        return f"{runs}guided {guided} of {steps} steps: {cost}"

    def __repr__(self) -> str:
        return f"Savings({self})"


@contextmanager
def compress_guidance(
    pipe: Any,
    schedule: GuidanceSchedule | Callable[[int], GuidanceSchedule] | None = None,
    *,
    rate: float = 5,
    k: float | None = None,
    rule: Rule = "mask",
) -> Iterator[Savings]:
    """Compute guidance only on the steps of a schedule while `pipe` runs inside the context.

    with compress_guidance(pipe, rate=5) as saved:
        image = pipe("a cat", num_inference_steps=50).images[0]
    print(saved)  # guided 12 of 50 steps: 62 network samples instead of 100 (62 %)

    schedule: over the steps that are really run (image-to-image pipelines run a part of `num_inference_steps`; the two
    evaluations of a Heun step are one), or a function from their number to a schedule; without one, the power law of
    `rate` and `k`. rule: "mask" guides the chosen steps as always; "gap" and "multiplicity" multiply w - 1 there by the
    schedule's weights; "reuse" repeats the last c - u on skipped steps.

    On leaving, also after an exception, the pipeline is exactly as it was found. Where guidance is off (guidance_scale 1,
    distilled models without negative prompt) the run is unchanged and a UserWarning says so; another one advises against
    weights with multistep solvers.

    Raises InputError for pipelines without scheduler or denoising network, with other guidance than c and u (perturbed
    attention, InstructPix2Pix, skip-layer guidance, …) or with a diffusers cache switched on, and in the first step when
    the length of `schedule` is not the number of steps.
    """
    check_rule(rule)
    if schedule is not None:
        check_schedule(schedule)
    name = type(pipe).__name__
    networks = {id(m): m for part in _NETWORKS if isinstance(m := getattr(pipe, part, None), nn.Module)}.values()
    scheduler, controlnet = getattr(pipe, "scheduler", None), getattr(pipe, "controlnet", None)
    if not isinstance(pipe, diffusers.DiffusionPipeline) or not networks or not hasattr(scheduler, "set_timesteps"):
        raise InputError(
            f"{name} is no classic diffusers pipeline with a scheduler and a unet or transformer; give one."
        )
    if any(hasattr(part, "_compressed") for part in (scheduler, *networks)):
        raise InputError("A part of the pipeline is inside compress_guidance already; leave that context first.")
    if _OTHER_HALVES.search(name):
        raise _refusal(pipe, "does not keep what it computes with and without the prompt as two halves of its batch")
    if any(getattr(network, "is_cache_enabled", False) for network in networks):
        raise InputError(
            "The network's diffusers cache would mix guided and skipped steps; call disable_cache() first."
        )
    if rule in ("gap", "multiplicity") and MULTISTEP.search(type(scheduler).__name__):
        warnings.warn(
            f"{type(scheduler).__name__} mixes neighbouring steps, which smears the weights of rule {rule}; prefer rule "
            "mask or reuse.",
            stacklevel=3,
        )
    gate = _Gate(pipe, partial(GuidanceSchedule.power, rate=rate, k=k) if schedule is None else schedule, rule)
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(_as(network, _asking(type(network), gate.denoise)))
        if isinstance(controlnet, nn.Module):
            stack.enter_context(_as(controlnet, _asking(type(controlnet), gate.control)))
        stack.enter_context(_as(scheduler, _reporting(scheduler, gate)))
        yield gate.savings


@dataclass
class _Loop:
    """State of the running denoising loop. An evaluation is what happens between two calls of `scheduler.step`."""

    run: Run
    weights: tuple[int, ...]
    evaluations: int
    problem: InputError | None  # of the schedule; matters only if there is guidance
    evaluation: int = 0
    batch: int | None = None  # rows without doubling; known from the first `scheduler.step` on
    assumed: bool | None = None  # before that: whether the batch was taken for doubled, if it mattered
    doubled: bool = False
    passes: list[tuple[Tensor, Any]] = field(default_factory=list)  # input and output of this evaluation's calls
    delta: Any = None  # the last c - u, for rule "reuse"


class _Gate:
    """Decides call by call what the networks compute.

    Outputs are tensors in any nesting of tuples, lists and records. `call` runs the network, on everything it was called
    with or on what a function makes of each tensor.
    """

    def __init__(self, pipe: Any, schedule: GuidanceSchedule | Callable[[int], GuidanceSchedule], rule: Rule):
        self.pipe, self.scheduler, self.schedule = pipe, pipe.scheduler, schedule
        self.rule: Rule = rule
        self.conditional = 0 if any(kind.__name__ in _CONDITIONAL_FIRST for kind in type(pipe).__mro__) else 1
        self.dit = isinstance(pipe, diffusers.DiTPipeline)  # alone steps the doubled batch
        self.savings, self.warned = Savings(), False
        self.loop: _Loop | None = None
        self.fresh = False  # timesteps were set and no network has been called since

    def denoise(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the denoising network."""
        if (loop := self._current(args, kwargs)) is None:
            return call()
        sample, (guided, weight) = self._sample(args, kwargs), self._now(loop)
        loop.run.full_samples += len(sample)
        if loop.passes:
            first, c = loop.passes[0]
            if len(loop.passes) > 1 or not (sample is first or torch.equal(sample, first)):
                raise _refusal(self.pipe)
            loop.passes.append((sample, None))
            loop.run.samples += len(sample) if guided else 0
            return self._unconditional(loop, c, call() if guided else None)
        loop.doubled = self._is_doubled(loop, sample, kwargs)
        matters = not guided or weight != 1 or self.rule == "reuse"
        loop.assumed = loop.doubled if matters and loop.batch is None else None
        if not (loop.doubled and matters):
            output = call()
        else:
            c, u = self._halves(call()) if guided else (call(self._half_of(sample)), None)
            output = _mapped(self._joined, c, self._unconditional(loop, c, u))
        loop.run.samples += len(sample) // (1 if guided or not loop.doubled else 2)
        loop.passes.append((sample, output))
        return output

    def control(self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the ControlNet; in guess mode it is given c's half anyway. Its rows may be the frames of a sample."""
        loop = self._current(args, kwargs)
        if loop is None or self._now(loop)[0] or kwargs.get("guess_mode"):
            return call()
        sample = self._sample(args, kwargs)
        if not self._halves_equal(sample) or (loop.batch is not None and len(sample) % (2 * loop.batch)):
            return call()
        output = call(self._half_of(sample))
        return _mapped(self._joined, output, output)

    def stepping(self, sample: Tensor) -> None:
        """The scheduler is about to step `sample`, which tells for certain how this evaluation was guided."""
        loop, name = self.loop, type(self.pipe).__name__
        if loop is None and not self.fresh:
            return
        if loop is None or self.fresh or not loop.passes or loop.evaluation >= loop.evaluations:
            raise _refusal(self.pipe, "does not run its network before every step of its scheduler")
        first, passes = loop.passes[0][0], len(loop.passes)
        loop.batch = len(sample)
        if first.ndim == 5 and sample.ndim == 4:  # text-to-video: the scheduler is given the frames as rows
            loop.batch //= first.shape[2]
        doubled = loop.doubled if self.dit else len(first) == 2 * loop.batch
        guidance = doubled or passes == 2
        if len(first) not in (loop.batch, 2 * loop.batch) or (doubled and passes > 1):
            raise _refusal(self.pipe)
        if loop.assumed not in (None, doubled):
            raise InputError(
                f"How {name} batches guidance shows only after its first step; guide step 0 and use rule mask, or give every "
                "sample its own noise."
            )
        if guidance and loop.problem is not None:
            raise loop.problem
        if not guidance and loop.evaluation == 0 and not self.warned:
            self.warned = True
            warnings.warn(
                f"{name} computes no guidance here (its scale is 1 or less, or the model is distilled and got no negative "
                "prompt), so there is nothing to skip and it runs unchanged.",
                stacklevel=4,
            )
        step = outer_step(self.scheduler, loop.evaluation)
        if guidance and loop.run.schedule.mask[step] and step not in loop.run.guided:
            loop.run.guided.append(step)
        loop.evaluation += 1
        loop.passes.clear()

    def _current(self, args: tuple, kwargs: dict[str, Any]) -> _Loop | None:
        """The running loop, begun by the first call after timesteps were set; None outside loops."""
        if self.pipe.scheduler is not self.scheduler:
            raise InputError("The scheduler was exchanged inside compress_guidance; exchange it before.")
        if self.fresh:
            self.loop, self.fresh = self._begin(kwargs.get("timestep", args[1] if len(args) > 1 else None)), False
            self.savings.runs.append(self.loop.run)
        return None if self.loop is None or self.loop.evaluation >= self.loop.evaluations else self.loop

    def _begin(self, timestep: Any) -> _Loop:
        """Count the steps of this run and make its schedule. timestep: what the network is given first."""
        timesteps = torch.as_tensor(self.scheduler.timesteps)
        begin = getattr(self.scheduler, "begin_index", None)  # image-to-image pipelines start in the middle
        if begin is None and timestep is not None:
            found = timesteps == torch.as_tensor(timestep, device=timesteps.device).flatten()[0]
            begin = int(found.int().argmax())  # 0 if it is not found, as where the network counts otherwise
        evaluations = getattr(self.pipe, "_num_timesteps", None)  # also knows of runs that end early
        if not isinstance(evaluations, int) or not 0 < evaluations <= len(timesteps):
            evaluations = len(timesteps) - (begin or 0)
        n, problem = outer_step(self.scheduler, evaluations - 1) + 1, None
        try:
            schedule = self.schedule if isinstance(self.schedule, GuidanceSchedule) else self.schedule(n)
            if len(schedule) != n:
                raise InputError(
                    f"The schedule has {len(schedule)} steps but this run has {n}; give one of {n} steps, or a function from "
                    "the number of steps to a schedule."
                )
        except InputError as error:
            schedule, problem = GuidanceSchedule((1,) * n, "full"), error
        return _Loop(Run(schedule), schedule.weights(self.rule), evaluations, problem)

    def _now(self, loop: _Loop) -> tuple[bool, int]:
        """Whether the present step is guided, and its weight."""
        step = outer_step(self.scheduler, loop.evaluation)
        return loop.run.schedule.mask[step], loop.weights[step]

    def _sample(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The noisy samples given to a network, [rows, …]."""
        names = ("hidden_states", "sample", "latents", "x")
        sample = args[0] if args else next((kwargs[name] for name in names if name in kwargs), None)
        if not isinstance(sample, Tensor):
            raise _refusal(self.pipe, "gives its network no tensor of samples")
        return sample

    def _is_doubled(self, loop: _Loop, sample: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the batch holds every sample for u and for c: certain after the first step, before it by equal halves."""
        if self.dit:
            return len(sample) > 1 and bool((kwargs["class_labels"][len(sample) // 2 :] == _DIT_NULL).all())
        return self._halves_equal(sample) if loop.batch is None else len(sample) == 2 * loop.batch

    def _halves_equal(self, sample: Tensor) -> bool:
        scale = getattr(self.pipe, "guidance_scale", None)
        off = (isinstance(scale, int | float) and scale <= 1) or not getattr(
            self.pipe, "do_classifier_free_guidance", 1
        )
        return not off and len(sample) % 2 == 0 and torch.equal(*sample.chunk(2))

    def _half_of(self, sample: Tensor) -> Callable[[Tensor], Tensor]:
        """From everything a network is called with on a doubled batch to what belongs to c."""
        rows = {len(sample), len(sample) * (sample.shape[2] if sample.ndim == 5 else 1)}  # or one row for every frame
        return lambda value: value.chunk(2)[self.conditional] if value.ndim and len(value) in rows else value

    def _halves(self, output: Any) -> tuple[Any, Any]:
        """c and u of a doubled batch."""
        c, u = (_mapped(lambda both, i=i: both.chunk(2)[i], output) for i in (self.conditional, 1 - self.conditional))
        return c, u

    def _joined(self, c: Tensor, u: Tensor) -> Tensor:
        return torch.cat([u, c] if self.conditional else [c, u])

    def _unconditional(self, loop: _Loop, c: Any, u: Any) -> Any:
        """What the pipeline is given for u (None where it was skipped)."""
        weight = self._now(loop)[1]
        if u is None:
            return c if loop.delta is None else _mapped(torch.sub, c, loop.delta)
        if self.rule == "reuse":
            loop.delta = _mapped(torch.sub, c, u)
        return u if weight == 1 else _mapped(lambda c, u: c - weight * (c - u), c, u)


def _mapped(change: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """`value` with every tensor changed (given those of `others` too), save those that all samples share."""
    if isinstance(value, Tensor):
        return change(value, *others)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if _SHARED.search(str(key))}
        made = {key: _mapped(change, *(each[key] for each in (value, *others))) for key in value if key not in kept}
        return kept | made if type(value) is dict else type(value)(**kept, **made)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, *items) for items in zip(value, *others, strict=True))
    return value


def _refusal(pipe: Any, why: str = "combines other passes than one with and one without the prompt") -> InputError:
    return InputError(
        f"{type(pipe).__name__} {why}, so that guidance cannot be skipped; run it without compress_guidance."
    )


@contextmanager
def _as(target: Any, kind: type) -> Iterator[None]:
    """`target` is an instance of `kind` inside the context."""
    before = type(target)
    object.__setattr__(target, "__class__", kind)  # compiled modules forward plain assignment to what they wrap
    try:
        yield
    finally:
        object.__setattr__(target, "__class__", before)


def _subclass(kind: type, **methods: Any) -> type:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_compressed": True}
    return type(kind)(kind.__name__, (kind,), names | methods)


def _asking(kind: type, ask: Callable[..., Any]) -> type:
    """A subclass of a module's class whose calls are put to `ask`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        def call(change: Callable[[Tensor], Tensor] | None = None) -> Any:
            with _as(self, kind):  # code that was compiled for the original class stays valid
                return (
                    self(*args, **kwargs) if change is None else self(*_mapped(change, args), **_mapped(change, kwargs))
                )

        return ask(call, args, kwargs)

    return _subclass(kind, __call__=__call__)


def _reporting(scheduler: Any, gate: _Gate) -> type:
    """A subclass of the scheduler's class that reports to the gate; copies which pipelines make of a scheduler do not."""
    kind, signature = type(scheduler), inspect.signature(type(scheduler).step)

    @wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate.fresh = gate.fresh or self is scheduler
        return kind.set_timesteps(self, *args, **kwargs)

    @wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            gate.stepping(signature.bind(self, *args, **kwargs).arguments["sample"])
        return kind.step(self, *args, **kwargs)

    return _subclass(kind, set_timesteps=set_timesteps, step=step)
