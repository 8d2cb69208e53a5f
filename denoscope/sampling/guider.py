"""`CompressGuidance`: a guider for diffusers' modular pipelines that computes the unconditional prediction on few steps.

Compress Guidance (Dinh, Liu and Xu, arXiv 2408.11194). A modular pipeline's denoise loop asks its guider how many predictions
a step needs and combines them. Here a skipped step needs one instead of two; the formula of guided steps is that of a stock
guider, which is kept inside and told the scale of each step (a skipped step has the scale of no guidance).
"""

import inspect
import logging
import math
import warnings
from typing import Any, Literal

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from denoscope.errors import InputError
from denoscope.sampling.schedules import GuidanceSchedule, Rule, check_rule

Base = Literal["cfg", "apg", "cfg-zero*"]
BASES = {
    "cfg": ClassifierFreeGuidance,
    "apg": AdaptiveProjectedGuidance,
    "cfg-zero*": ClassifierFreeZeroStarGuidance,
}
LONGEST = 10_000  # steps: settings that no run up to this length could use are refused at once


class CompressGuidance(BaseGuidance):
    """Guidance on chosen steps only: n + |G| network calls instead of 2n.

    guidance_scale: w. 1 means no guidance (0 with `use_original_formulation`, which counts from the conditional prediction).
    rate, k, always_last: the schedule, `GuidanceSchedule.power` of each run's number of steps.
    positions: the guided steps instead, in execution order (0 the noisiest); repeats count for the rule "multiplicity".
    steps: the only number of steps allowed; a run of another length raises InputError at its first step. None: any.
    rule: what makes up for the skipped steps. "mask": nothing (raise guidance_scale yourself). "gap" and "multiplicity": the
        guided step's scale becomes 1 + weight (w - 1), the weight being the schedule's. "reuse": the last guided step's
        update, guided minus conditional prediction, is added on skipped steps (it is kept: one tensor of latent size).
    base: the formula: plain classifier-free guidance, APG (Sadat et al., arXiv 2410.02416; its momentum only sees guided
        steps) or CFG-Zero* (Fan et al., arXiv 2503.18886; steps that it sets to zero are zero whether chosen or not, cost
        one network call and leave nothing to reuse). base_options: further arguments of diffusers' guider of that name.
    order: network calls a step: 2 for Heun, KDPM2 and their kin, so that both calls of a step are treated alike; but 1 where
        a pipeline is given timesteps, sigmas or denoising_end, for then diffusers itself counts calls as steps. 1 for PNDM
        too, whose one call more than steps is treated as the last step.

    All arguments are plain numbers, strings and lists: `save_pretrained`, `from_pretrained`, `from_config` and
    `new(guidance_scale=…)` work as for every guider. Wan 2.2 has two guiders, each seeing part of the steps: give it two
    instances. Models with more than two predictions (LTX-2) need their own guider. Raises InputError for bad settings.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012  (diffusers asks for a list)

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        rate: float = 5,
        k: float | None = None,
        always_last: int = 2,
        positions: list[int] | None = None,
        steps: int | None = None,
        rule: Rule = "mask",
        base: Base = "cfg",
        base_options: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        order: int = 1,
        enabled: bool = True,
    ):
        super().__init__(enabled=enabled)
        check_rule(rule)
        if not math.isfinite(guidance_scale):
            raise InputError(f"guidance_scale is {guidance_scale}; it must be a finite number.")
        if order < 1:
            raise InputError(f"order is {order}; it must be at least 1 (the scheduler's network calls a step).")
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self._base = _stock_guider(base, base_options or {})
        # Helios' loop looks for this attribute, and sets it to 0 in its later stages.
        self.zero_init_steps: int = getattr(self._base, "zero_init_steps", 0)
        self._choosing = False  # between set_state and the step's first network call
        self.guided = False  # whether the step in hand computes the unconditional prediction
        self._update: Tensor | None = None  # rule "reuse": guided minus conditional prediction of the last guided step
        self.schedule(LONGEST if steps is None else steps)  # bad settings fail here rather than in the loop

    @classmethod
    def from_schedule(cls, schedule: GuidanceSchedule, **options: Any) -> "CompressGuidance":
        """The guider of one schedule, for runs of just its length. `options`: the constructor's other arguments."""
        positions = [j for j, count in enumerate(schedule.counts) for _ in range(count)]
        return cls(positions=positions, steps=len(schedule), **options)

    def schedule(self, n: int) -> GuidanceSchedule:
        """The schedule of a run of n steps."""
        settings = self.config
        if settings["steps"] not in (None, n):
            raise InputError(
                f"This guider's schedule is for {settings['steps']} steps and the run has {n}; make both the same."
            )
        if settings["positions"] is not None:
            return GuidanceSchedule.explicit(n, settings["positions"])
        return GuidanceSchedule.power(n, settings["rate"], settings["k"], settings["always_last"])

    @property
    def num_conditions(self) -> int:
        """Predictions needed: of the step in hand (2 or 1) until its first network call, else the most that any step needs.

        Pipelines ask before the loop, to know whether the negative prompt must be encoded. A step that fails does so in its
        network call, so the answer has gone back to the maximum by then, and the next run encodes what it needs.
        """
        return 1 + (self.guided if self._choosing else self._active)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin network call `step` (from 0) of a run of `num_inference_steps`; the loop calls this."""
        n, order, rule = num_inference_steps, self.config["order"], self.config["rule"]
        if self._step is None or step <= self._step or n != self._num_inference_steps:  # a new run
            self._weights, self._update = self.schedule(n).weights(rule), None
            if self._enabled and math.isclose(self.guidance_scale, self._unguided_scale):
                warnings.warn("The guidance scale asks for no guidance, so there is nothing to skip.", stacklevel=2)
        if step > n * order:  # at n * order: PNDM
            raise InputError(
                f"The scheduler makes more network calls than the {n} steps times order {order}; "
                "give CompressGuidance the scheduler's order (2 for Heun)."
            )
        super().set_state(step, n, timestep)
        position = min(step // order, n - 1)
        weight = self._weights[position]
        self.guided = self._active and weight > 0 and position >= self.zero_init_steps
        self._choosing = True

        base, extra = self._base, self.guidance_scale - self._unguided_scale
        base.guidance_scale = self.guidance_scale + (weight - 1) * extra if self.guided else self._unguided_scale
        base.guidance_rescale = self.guidance_rescale if self.guided else 0.0  # nothing to mend on a skipped step
        base.use_original_formulation = self.use_original_formulation
        if isinstance(base, ClassifierFreeZeroStarGuidance):
            base.zero_init_steps = self.zero_init_steps
        base.enable() if self._enabled else base.disable()
        base.set_state(position, n, timestep)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One batch for each prediction that the step needs, of {name: tensor or (conditional, unconditional)}."""
        return self._base.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same from a block state; `input_fields` holds attribute names instead of tensors."""
        return self._base.prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: Any) -> None:
        """Called before each network call of a step."""
        self._choosing = False
        super().prepare_models(denoiser)

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """Combine the batches' predictions (their `noise_pred`)."""
        return self._finish(self._base(data))

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Combine predictions of equal shape; `pred_uncond` is needed on guided steps only."""
        return self._finish(self._base.forward(pred_cond, pred_uncond))

    def get_state(self) -> dict[str, Any]:
        """What `repr` shows: diffusers' entries, whether this step is guided and the run's guided steps."""
        n = self._num_inference_steps
        return super().get_state() | {"guided": self.guided, "positions": n and self.schedule(n).positions}

    @property
    def _unguided_scale(self) -> float:
        return 0.0 if self.use_original_formulation else 1.0

    @property
    def _active(self) -> bool:
        """Whether any step is guided. Only an empty list of positions makes a schedule without guided steps."""
        neutral = math.isclose(self.guidance_scale, self._unguided_scale)
        return self._enabled and not neutral and self.config["positions"] != []

    def _finish(self, output: Any) -> GuiderOutput:
        if self._step is None:
            raise InputError("The guider knows no step; call set_state(step, num_inference_steps, timestep) before it.")
        self._choosing = False
        if self.config["rule"] != "reuse" or not self._active:
            return output
        if self.guided:
            self._update = output.pred - output.pred_cond
        elif self._update is not None:
            output.pred = output.pred_cond + self._update
        return output


def _stock_guider(
    base: str, options: dict[str, Any]
) -> ClassifierFreeGuidance | AdaptiveProjectedGuidance | ClassifierFreeZeroStarGuidance:
    if base not in BASES:
        raise InputError(f"Base {base!r} is unknown; use {', '.join(BASES)}.")
    ours = {"guidance_scale", "guidance_rescale", "use_original_formulation", "start", "stop", "enabled"}
    known = inspect.signature(BASES[base]).parameters.keys() - ours
    if unknown := options.keys() - known:
        allowed = ", ".join(sorted(known)) or "none"
        raise InputError(f"Option {min(unknown)} is not one of base {base!r}; base_options may hold: {allowed}.")
    log = logging.getLogger(BaseGuidance.__module__)
    level = log.level
    log.setLevel(logging.ERROR)  # diffusers calls every guider experimental; once, for ours, is enough
    try:
        return BASES[base](**options)
    finally:
        log.setLevel(level)
