"""GATE's check: does a technique bring image-to-image results closer to the picture? Then it should suppress content shift.

Meng et al., "Suppress Content Shift", NeurIPS 2024 (arXiv 2410.06719), section 3.3 ("GenerAtion Techniques Enhanced"): repaint
the picture with high strength, with a plain prompt and with the technique, from the same noise. The paper looks at the results;
here PSNR, SSIM and the F1 of edges are computed, and a verdict from their intervals. The paper gives neither strength nor
seeds. The verdict predicts the direction of the change in features, not its size, and it is a proxy: it can be wrong.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from denoscope.denoisers.lora import adapters
from denoscope.denoisers.noise import Noise
from denoscope.denoisers.protocol import ControlInput, Denoiser
from denoscope.denoisers.text import long_prompts
from denoscope.errors import InputError
from denoscope.features.bootstrap import LEVEL, RESAMPLES, interval
from denoscope.features.compared import (
    PLAIN,
    WRONG,
    Record,
    Techniques,
    base_recipe,
    choices_of,
    common_settings,
    completed,
    files_of,
    next_ones,
    of_another,
    wrongly,
)
from denoscope.features.dift import _rows_at_once, same, warn_idle
from denoscope.features.likeness import FEWEST, MARGINS, MEASURES, verdict
from denoscope.features.prompts import resolve
from denoscope.features.recipe import Recipe, resolve_size, varied
from denoscope.features.technique import control_inputs
from denoscope.images import Picture, read, save_result
from denoscope.images.draw_shift import bars
from denoscope.sampling.guidance import ClassifierFree
from denoscope.sampling.sampler import trajectory

SAMPLED = ("prompt", "control", "lora", "guidance", "long_prompts")  # settings that image-to-image knows


@dataclass(frozen=True)
class GateChoices:
    """strength: of the noise, 1 leaves nothing of the picture. seeds: how many draws. steps: of the whole schedule, of which
    `strength` are taken. guidance: classifier-free, for techniques that set none (None: none, as when features are read).
    margins: changes that count as none, see `MARGINS`.
    """

    strength: int | float = 0.7
    seeds: int = 4
    steps: int = 20
    guidance: int | float | None = None
    seed: int = 0
    margins: Mapping[str, int | float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise InputError(f"The strength of image-to-image lies between 0 and 1, not at {self.strength}.")
        if self.seeds < 1 or self.steps < 1:
            raise InputError(f"Image-to-image needs at least 1 seed and 1 step, not {self.seeds} and {self.steps}.")
        if unknown := sorted(set(self.margins or {}) - set(MARGINS)):
            raise InputError(f"There is no margin {unknown[0]!r}; they are {', '.join(MARGINS)}.")


class Gatekeeper:
    """Checks pictures one by one: `record` of each, then `Gate.of` all records.

    settings: of `features`, common to all techniques (preset, size, resample). Pictures are repainted at the size that features
    are read at, its sides rounded to multiples of 8 (and of what the model needs).

    skipped: techniques that differ from "plain" only in how features are read, of which image-to-image cannot tell.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        techniques: Techniques,
        choices: GateChoices | None = None,
        wrong_control: bool = False,
        **settings: Any,
    ) -> None:
        self.denoiser, self.choices = denoiser, choices or GateChoices()
        self.base = base_recipe(denoiser, **{**settings, "t": 0})  # nothing is read: denoise_from may start anywhere
        self.recipes = {name: varied(denoiser, self.base, own) for name, own in completed(techniques).items()}
        if wrong_control:
            self.recipes |= wrongly(self.recipes)
        plain = self._told(self.recipes[PLAIN])
        written = {name: one for name, one in self.recipes.items() if name == PLAIN or not name.startswith(WRONG)}
        self.skipped = [
            name for name, one in written.items()
            if name != PLAIN and self._told(one) == plain and one.settings() != self.recipes[PLAIN].settings()
        ]  # fmt: skip

    @staticmethod
    def _told(one: Recipe) -> dict[str, Any]:
        return {name: getattr(one, name) for name in SAMPLED}

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON values."""
        told = {name: {k: v for k, v in one.described().items() if k in SAMPLED} for name, one in self.recipes.items()}
        chosen = asdict(self.choices)
        return {
            **common_settings(self.denoiser, self.base),
            "techniques": told,
            "files": files_of(self.recipes),
            "skipped": self.skipped,
            **chosen,
            "margins": {**MARGINS, **(self.choices.margins or {})},
            "solver": "auto (DDIM, or Euler for flows)",
            "edges": "Canny 100/200, 1 px tolerance",
            "noise": "the same draws for all techniques",
        }

    def repaint(self, source: Any, other: Any = None) -> dict[str, Float[Tensor, "seeds 3 height width"]]:
        """Image-to-image of a picture with every technique, pixels in [0, 1]; "input" is the picture, once.

        other: the picture whose controls are shown in the wrong place.
        """
        picture, chosen, denoiser = read(source), self.choices, self.denoiser
        size = self.size(picture)
        pixels = picture.resized(size, self.base.resample)
        posterior = denoiser.posterior(pixels[None])
        shape, n = tuple(posterior.mean.shape[1:]), chosen.seeds
        draws = Noise.draw(shape, chosen.seed, picture.digest, -1, n, posterior=posterior.std is not None)
        assert draws.diffusion is not None
        start, eps = posterior.sample(draws.posterior).expand(n, *shape), draws.diffusion.to(posterior.mean)
        found: dict[str, Tensor] = {}
        with TemporaryDirectory() as folder:
            recipes = of_another(self.recipes, picture, None if other is None else read(other), denoiser, Path(folder))
            groups: dict[Any, dict[Any, list[str]]] = {}
            for name, one in recipes.items():
                if name in self.skipped:
                    continue
                prompt = resolve(one.prompt, picture)
                guidance = chosen.guidance if one.guidance is None else one.guidance
                if guidance not in (None, 1) and self._idle(prompt, one):
                    warn_idle()
                    guidance = None
                apart = prompt if one.long_prompts == "chunks" else None  # pieces are padded to the longest of a batch
                alike = (one.control, one.lora, guidance, one.long_prompts, prompt is None, apart)
                groups.setdefault(alike, {}).setdefault(prompt, []).append(name)
            for (controls, loras, guidance, long, *_), names in groups.items():
                with ExitStack() as stack:
                    if loras:
                        stack.enter_context(adapters(denoiser, [(lora.path, lora.scale) for lora in loras]))
                    if long == "chunks":
                        stack.enter_context(long_prompts(denoiser))
                    given = control_inputs(denoiser, controls, picture, size, self.base.resample)
                    rows = [(prompt, k) for prompt in names for k in range(n)]
                    done = self._sampled(rows, start, eps, given, guidance, together=long == "cut")
                for i, same in enumerate(names.values()):
                    found |= dict.fromkeys(same, done[i * n : (i + 1) * n])
        ordered = {name: found[name] for name in self.recipes if name in found}
        return {"input": pixels[None] / 2 + 0.5, **ordered}

    def _idle(self, prompt: Any, one: Recipe) -> bool:
        """Whether guidance has nothing to guide towards."""
        if prompt != "" or one.control:  # ControlNets that pool act on the conditional prediction alone
            return prompt is None
        return same(self.denoiser.condition([prompt]), self.denoiser.condition(None))  # not so for SDXL

    def _sampled(
        self,
        rows: Sequence[tuple[Any, int]],
        start: Tensor,
        eps: Tensor,
        controls: Sequence[ControlInput],
        guidance: Any,
        together: bool,
    ) -> Tensor:
        """Pixels in [0, 1] of rows (prompt, seed), as many at once as fit."""
        chosen, denoiser, done = self.choices, self.denoiser, []
        at_once = _rows_at_once(denoiser, tuple(start.shape[1:]))
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            which = torch.tensor([k for _, k in part], device=start.device)
            prompts = None if part[0][0] is None else [prompt for prompt, _ in part]
            guided = ClassifierFree(guidance) if prompts is not None and guidance not in (None, 1) else None
            run = trajectory(
                denoiser, prompts, batch=len(part), start=start[which], noise=eps[which][None], steps=chosen.steps,
                strength=chosen.strength, guidance=guided, control=controls, together=together,
            )  # fmt: skip
            latents = start
            with torch.no_grad():
                for step in run:
                    latents = step.after
                done += [denoiser.decode(latents[i : i + 1]).float().cpu() for i in range(len(part))]
        pixels = torch.cat(done)
        if not pixels.isfinite().all():
            raise InputError(
                f"Image-to-image is not finite in {denoiser.dtype}; load the model in bfloat16 or float32."
            )
        return (pixels / 2 + 0.5).clamp(0, 1)

    def size(self, picture: Picture) -> tuple[int, int]:
        """(width, height) that a picture is repainted at."""
        width, height = resolve_size(self.base.size, picture.size, self.denoiser.multiple, self.denoiser.minimum)
        unit = math.lcm(8, self.denoiser.multiple)
        least = -(-max(self.denoiser.minimum, 16) // unit) * unit
        w, h = (max(least, round(side / unit) * unit) for side in (width, height))
        return w, h

    def record(self, source: Any, other: Any = None, keep: dict[str, Tensor] | None = None) -> Record:
        """Likeness of every repainted picture to the input, for each seed; as JSON values. keep: filled by `repaint`."""
        picture = read(source)
        images = self.repaint(picture, other)
        if keep is not None:
            keep.update(images)
        target = images.pop("input")[0]
        rows = {
            name: {measure: [of(target, one) for one in seeds] for measure, of in MEASURES.items()}
            for name, seeds in images.items()
        }
        return {"picture": str(picture.path or picture.name), "size": list(picture.size), "rows": rows}


@dataclass(frozen=True)
class GateRow:
    """One technique over all pictures and seeds: mean of each measure, its change against "plain", and that one's interval.

    closer: share of pictures that are more like the input than plain, by each measure. verdict: see `verdict`; "" for plain.
    """

    technique: str
    verdict: str
    means: Mapping[str, float]
    changes: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float] | None]
    closer: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Gate:
    """rows: plain first. records: see `Gatekeeper.record`, a picture each. settings: everything that was chosen."""

    rows: tuple[GateRow, ...]
    records: tuple[Record, ...]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, records: Sequence[Record], settings: Mapping[str, Any], seed: int = 0) -> "Gate":
        """Means, intervals and verdicts over the pictures of `records`; seed: of the resampling."""
        if not records:
            raise InputError("There are no pictures to check; give at least one.")
        names = list(records[0]["rows"])
        if any(list(one["rows"]) != names for one in records):
            raise InputError("These records are of different techniques; check the pictures again.")
        margins, rows = settings.get("margins") or MARGINS, []
        for name in names:
            values = {m: np.array([one["rows"][name][m] for one in records]) for m in MEASURES}
            change = {m: found - np.array([one["rows"][PLAIN][m] for one in records]) for m, found in values.items()}
            spans = {m: interval(found, seed=seed) for m, found in change.items()}
            rows.append(
                GateRow(
                    name,
                    "" if name == PLAIN else verdict(spans, margins, len(records)),
                    {m: float(found.mean()) for m, found in values.items()},
                    {m: float(found.mean()) for m, found in change.items()},
                    spans,
                    {m: float((found.mean(1) > 0).mean()) for m, found in change.items()},
                )
            )
        told = {**settings, "interval": {"kind": "bootstrap over pictures and their seeds, percentiles", "level": LEVEL,
                                         "resamples": RESAMPLES, "seed": seed},
                "fewest_pictures": FEWEST}  # fmt: skip
        return cls(tuple(rows), tuple(records), told)

    def draw(self) -> Image.Image:
        """Changes of the three measures against plain, with intervals; the grey band counts as no change."""
        margins = self.settings.get("margins") or MARGINS
        titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "edge_f1": "edge F1"}
        panels = {
            titles[m]: [(f"{row.technique}: {row.verdict}", row.changes[m], row.intervals[m])
                        for row in self.rows if row.technique != PLAIN]
            for m in MEASURES
        }  # fmt: skip
        if not next(iter(panels.values())):
            raise InputError("There is no technique beside plain, so there is no change to draw.")
        return bars(panels, "change of {panel}", {titles[m]: margin for m, margin in margins.items()})

    def lines(self) -> list[dict[str, Any]]:
        """Flat rows for tables."""
        found = []
        for row in self.rows:
            line: dict[str, Any] = {"technique": row.technique, "verdict": row.verdict}
            for m in MEASURES:
                low, high = row.intervals[m] or (None, None)
                line |= {m: row.means[m], f"{m}_change": row.changes[m], f"{m}_low": low, f"{m}_high": high}
                line[f"{m}_closer"] = row.closer[m]
            found.append({**line, "pictures": len(self.records)})
        return found

    def save(self, path: str | Path) -> Path:
        """.json (everything), .csv (a line for each technique), .npz (every seed) or a picture."""

        def arrays() -> dict[str, Any]:
            found = {
                m: [[one["rows"][row.technique][m] for row in self.rows] for one in self.records] for m in MEASURES
            }
            return {**found, "technique": [row.technique for row in self.rows],
                    "picture": [one["picture"] for one in self.records]}  # fmt: skip

        return save_result(
            path,
            "Results of the check",
            lambda: {"settings": dict(self.settings), "rows": self.lines(), "pictures": list(self.records)},
            arrays,
            self.draw,
            lambda: (list(self.lines()[0]), self.lines()),
        )


def gate(
    denoiser: Denoiser,
    images: Iterable[Any],
    techniques: Techniques,
    *,
    settings: Mapping[str, Any] | None = None,
    wrong_control: bool = False,
    **choices: Any,
) -> Gate:
    """Whether techniques should suppress content shift, by GATE's image-to-image check; with a verdict for each.

    images: pictures or anything that `denoscope.read` takes. techniques: settings of `features` by name; "plain" is always
        among them, and what it sets holds for the others too.
    settings: of `features`, for all (preset, size, resample). choices: see `GateChoices` (strength, seeds, steps, guidance,
        seed, margins).
    wrong_control: also show every ControlNet what belongs to the next picture, as "wrong:NAME".
    """
    keeper = Gatekeeper(denoiser, techniques, choices_of(GateChoices, choices), wrong_control, **(settings or {}))
    pictures = [read(source) for source in images]
    others = next_ones(pictures, wrong_control)
    return Gate.of([keeper.record(*pair) for pair in zip(pictures, others, strict=True)], keeper.settings())
