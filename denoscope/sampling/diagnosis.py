"""Model-fitting: do guided samples please everybody, or only the classifier that guided them?

A classifier that guides sees to it that it is right about the samples. Others, which did not guide, tell how much of that is
real: how much more often the guide is right is model-fitting (Dinh, Liu and Xu, arXiv 2408.11194).

diagnose(denoiser, {"full": ClassifierGuidance(on, 2.0)}, labels=labels, on=on, off={"other": off}).recommendation
"""

import csv
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from denoscope.denoisers.classifiers import Classifier
from denoscope.denoisers.protocol import ControlInput, Denoiser
from denoscope.errors import InputError
from denoscope.images import atomically, write
from denoscope.images.chart import LINES, chart
from denoscope.sampling.guidance import ClassifierFree, ClassifierGuidance, describe
from denoscope.sampling.sampler import Prompts, Step, trajectory

Pair = tuple[ClassifierFree | None, ClassifierGuidance | None]
Guide = ClassifierFree | ClassifierGuidance | Pair | None

FEW = 20  # fewer samples carry no verdict


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of d = one - other over samples, and its standard error if there were no difference, `sqrt(sum d^2) / n`.

    For right and wrong answers, mean / error is the z of McNemar's test.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n = len(differences)
    return sum(differences) / n, sum(d * d for d in differences) ** 0.5 / n


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) ** 0.5 / len(values)


@dataclass(frozen=True)
class Outcome:
    """One run. Calls are network evaluations a sample; seconds are of sampling alone, for all samples.

    guided: positions of guided steps. timesteps: of every step. curves: for every judge, mean -log p(y | .) at every step.
    losses, correct: for every judge, -log p(y | sample) of every finished sample, and whether y was its first choice.
    """

    by_classifier: bool
    guided: list[int]
    timesteps: list[float]
    denoiser_calls: int
    classifier_calls: int
    seconds: float
    curves: Mapping[str, list[float]]
    losses: Mapping[str, list[float]]
    correct: Mapping[str, list[bool]]

    @property
    def calls(self) -> int:
        """Network evaluations a sample."""
        return self.denoiser_calls + self.classifier_calls

    def accuracy(self, judge: str) -> float:
        return sum(self.correct[judge]) / len(self.correct[judge])

    def cross_entropy(self, judge: str) -> float:
        return sum(self.losses[judge]) / len(self.losses[judge])


@dataclass(frozen=True, eq=False)
class ModelFitting:
    """What every judge says of every run. The judge "on" guides; the others do not."""

    outcomes: Mapping[str, Outcome]
    record: dict[str, Any]

    @property
    def samples(self) -> int:
        return len(self.record["labels"])

    @property
    def judges(self) -> list[str]:
        return list(self.record["judges"])

    @property
    def off(self) -> list[str]:
        """The judges that do not guide."""
        return [judge for judge in self.judges if judge != "on"]

    def off_scores(self, run: str) -> list[float]:
        """For every sample, the share of the off-sampling judges that are right about it."""
        correct = self.outcomes[run].correct
        return [sum(votes) / len(votes) for votes in zip(*(correct[judge] for judge in self.off), strict=True)]

    def gap(self, run: str) -> tuple[float, float]:
        """accuracy_on - accuracy_off (mean over the off-sampling judges) and its standard error."""
        return paired([float(right) for right in self.outcomes[run].correct["on"]], self.off_scores(run))

    def table(self) -> list[dict[str, Any]]:
        """One row a run: costs, accuracy and cross-entropy of every judge, gap and ratio of every off-sampling one."""
        rows = []
        for name, run in self.outcomes.items():
            row: dict[str, Any] = {"run": name, "guided_steps": len(run.guided), "network_calls": run.calls}
            row |= {"denoiser_calls": run.denoiser_calls, "classifier_calls": run.classifier_calls}
            row["seconds"] = round(run.seconds, 3)
            for judge in self.judges:
                row[f"accuracy {judge}"] = run.accuracy(judge)
                row[f"cross-entropy {judge}"] = run.cross_entropy(judge)
            for judge in self.off if "on" in self.judges else ():
                right = [[float(one) for one in run.correct[which]] for which in ("on", judge)]
                row[f"gap {judge}"], row[f"gap error {judge}"] = paired(*right)
                row[f"ratio {judge}"] = run.cross_entropy(judge) / max(run.cross_entropy("on"), 1e-12)
            rows.append(row)
        return rows

    @property
    def recommendation(self) -> str:
        """Whether model-fitting shows, which run to take, and how far the number of samples carries; no verdict on a few."""
        if self.samples < FEW:
            return f"This rests on {self.samples} samples: so few carry no verdict; take {FEW} or more."
        return " ".join(filter(None, (self._fitting(), self._choice(), self._caution())))

    def _fitting(self) -> str:
        fitted = [name for name, run in self.outcomes.items() if run.by_classifier]
        if "on" not in self.judges or not fitted:
            return ""
        gaps = {name: self.gap(name) for name in fitted}
        shown = [
            f"{name} {100 * gap:.1f} ± {100 * error:.1f}" for name, (gap, error) in gaps.items() if gap > 2 * error
        ]
        if not shown:
            return "Model-fitting does not show: no gap between on and off accuracy exceeds two standard errors."
        return (
            f"The guiding classifier is right more often than the others (points: {', '.join(shown)}): model-fitting, unless "
            "the others are worse on real pictures too."
        )

    def _choice(self) -> str:
        if len(self.outcomes) < 2:
            return ""
        scores = {name: self.off_scores(name) for name in self.outcomes}
        best = max(scores, key=lambda name: sum(scores[name]))
        near = [name for name in scores if (lost := paired(scores[best], scores[name]))[0] <= lost[1]]
        cheapest = min(near, key=lambda name: (self.outcomes[name].calls, -sum(scores[name])))
        percent = {name: f"{100 * sum(score) / len(score):.1f} %" for name, score in scores.items()}
        top, taken = self.outcomes[best], self.outcomes[cheapest]
        if cheapest == best:
            others = [name for name in near if name != best]
            equal = f" ({', '.join(others)} within one standard error)" if others else ""
            cheaper = any(run.calls < top.calls for run in self.outcomes.values())
            rest = "; nothing cheaper comes so close" if cheaper else ""
            return (
                f"{best} has the best off accuracy, {percent[best]} at {top.calls} network calls a sample{equal}{rest}."
            )
        return (
            f"{cheapest} is the cheapest within one standard error of the best off accuracy: {percent[cheapest]} at "
            f"{taken.calls} network calls a sample, against {percent[best]} at {top.calls} for {best}."
        )

    def _caution(self) -> str:
        error = max(standard_error(self.off_scores(name)) for name in self.outcomes)
        told = f"; an off accuracy has a standard error of up to {100 * error:.1f} points" if error else ""
        return f"This rests on {self.samples} samples{told}."

    def draw(self) -> Image.Image:
        """The judges' losses along every run, with ticks at its guided steps, and off accuracy against network calls."""
        count = len(self.outcomes)
        columns = min(count + 1, 3)
        rows = -(-(count + 1) // columns)
        colours = dict(zip(self.judges, LINES, strict=False))
        top = max(max(curve) for run in self.outcomes.values() for curve in run.curves.values())
        with chart(4 * columns, 2.9 * rows, columns, rows) as drawn:
            for axes, (name, run) in zip(drawn.panels, self.outcomes.items(), strict=False):
                for judge, colour in colours.items():
                    style = "-" if judge == "on" else "--"
                    axes.plot(run.timesteps, run.curves[judge], style, color=colour, label=judge, lw=1.6)
                guided = [run.timesteps[j] for j in run.guided]
                axes.vlines(guided, 0, 0.035, color="#444444", lw=0.8, transform=axes.get_xaxis_transform())
                axes.set(xlabel="timestep", ylabel="mean −log p(y | ·)", ylim=(0, 1.05 * top), title=name)
                axes.invert_xaxis()
            drawn.axes.legend()
            axes = drawn.panels[count]
            marks = zip(LINES * count, "osD^vPX" * count, strict=False)
            for (name, run), (colour, mark) in zip(self.outcomes.items(), marks, strict=False):
                score = self.off_scores(name)
                mean = sum(score) / len(score)
                error = 100 * standard_error(score)
                axes.errorbar(run.calls, 100 * mean, error, fmt=mark, ms=5, capsize=3, color=colour, label=name)
            axes.set(xlabel="network calls a sample", ylabel="off accuracy, % (± 1 s.e.)", title="Cost and accuracy")
            axes.margins(0.15)
            axes.legend()
            for axes in drawn.panels[count + 1 :]:
                axes.set_axis_off()
            return drawn.image()

    def to_dict(self) -> dict[str, Any]:
        outcomes = {name: asdict(run) for name, run in self.outcomes.items()}
        told = {"recommendation": self.recommendation, "table": self.table()}
        return {**self.record, **told, "outcomes": outcomes}

    def save(self, path: str | Path) -> None:
        """By suffix: .json (everything), .csv (the table), .png (the drawing)."""
        path = Path(path)
        match path.suffix.lower():
            case ".png":
                write(self.draw(), path)
            case ".json":
                atomically(path, lambda part: part.write_text(json.dumps(self.to_dict(), indent=1) + "\n"))
            case ".csv":
                atomically(path, self._write_csv)
            case other:
                raise InputError(f"A diagnosis is saved as .json, .csv or .png, not {other or 'without a suffix'}.")

    def _write_csv(self, path: Path) -> None:
        rows = self.table()
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def diagnose(
    denoiser: Denoiser,
    runs: Mapping[str, Guide],
    *,
    labels: Sequence[int],
    off: Mapping[str, Classifier],
    on: Classifier | None = None,
    prompts: Prompts = None,
    steps: int = 50,
    seed: int = 0,
    at_once: int = 16,
    solver: Any = "auto",
    size: tuple[int, int] | None = None,
    control: Sequence[ControlInput] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ModelFitting:
    """Sample every run from the same seeds and let classifiers judge it, along the way and at the end.

    runs: name: the guidance, by classifier, classifier-free, both as a pair, or None. labels: the class of every sample, by
    number. on: the classifier that guides; None when none does. off: classifiers that did not guide; to tell anything they
    must be about as good as `on` on real pictures, and trained on other ones. Where both have names of classes, their classes
    are matched by name. prompts, control: what the model is told and shown, as of `sample`;
    a row of control for all.

    Along the way, noise-aware judges look at what the network saw and others at the decoded x0 estimate; at the end all look
    at the sample, at timestep 0. report(done, total): called after every step, in sample steps.

    Raises InputError for settings that do not fit, judges of other classes, and runs guided by another classifier than `on`.
    """
    pairs = {name: _pair(guide) for name, guide in runs.items()}
    n, labels = len(labels), list(labels)
    if not pairs or not n or not off or at_once < 1:
        raise InputError("A diagnosis needs at least one run, one label and one off-sampling classifier.")
    if "on" in off:
        raise InputError("An off-sampling classifier cannot be called 'on'; give it another name.")
    judges = {**({} if on is None else {"on": on}), **off}
    guides = [on, *(guidance.classifier for _, guidance in pairs.values() if guidance is not None)]
    counts = next((guide for guide in guides if guide is not None), next(iter(judges.values())))
    counts.check_labels(labels, n)
    numbers = {name: _numbers(labels, counts, name, judge) for name, judge in judges.items()}
    for name, (_, guidance) in pairs.items():
        if on is not None and guidance is not None and guidance.classifier.module is not on.module:
            raise InputError(f"The run {name!r} is guided by another classifier than `on`; diagnose it by itself.")
    outcomes: dict[str, Outcome] = {}
    shared = {"steps": steps, "solver": solver, "size": size, "control": control}
    for name, pair in pairs.items():
        base = len(outcomes)
        outcomes[name] = _followed(
            denoiser, pair, judges, labels, numbers, prompts, seed, at_once, shared,
            lambda done, total, base=base: report(base * total + done, len(pairs) * total),
        )  # fmt: skip
    record = {
        "model": denoiser.name,
        "judges": {k: {"name": v.name, "noise_aware": v.noise_aware, "classes": v.classes} for k, v in judges.items()},
        "runs": {name: [describe(guidance) for guidance in pair] for name, pair in pairs.items()},
        "solver": solver if isinstance(solver, str) else type(solver).__name__,
        "steps": len(next(iter(outcomes.values())).timesteps),
        "size": size,
        "seed": seed,
        "labels": labels,
        "prompts": None if prompts is None else list(prompts),
        "device": str(denoiser.device),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    return ModelFitting(outcomes, record)


def _names(classifier: Classifier) -> tuple[str, ...]:
    """Of its classes; LABEL_0 … of transformers are none."""
    placeholders = all(name == f"LABEL_{i}" for i, name in enumerate(classifier.names))
    return () if placeholders else classifier.names


def _numbers(labels: list[int], counts: Classifier, name: str, judge: Classifier) -> list[int]:
    """Labels, given as `counts` numbers its classes, as `judge` does: by name where both have names."""
    if judge.classes != counts.classes:
        raise InputError(
            f"The classifier {name!r} tells {judge.classes} classes apart where the labels are of {counts.classes}; use "
            "judges of the same classes."
        )
    theirs, own = _names(counts), _names(judge)
    if not theirs or not own or theirs == own:
        return labels
    if len(set(own)) < len(own) or set(theirs) != set(own):
        raise InputError(
            f"The classifier {name!r} has other classes ({_first(own)}) than the labels are of ({_first(theirs)}); use judges "
            "of the same classes."
        )
    return [own.index(theirs[label]) for label in labels]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def _pair(guide: Guide) -> Pair:
    match guide:
        case ClassifierFree():
            return guide, None
        case ClassifierGuidance():
            return None, guide
        case None:
            return None, None
        case _:
            return guide


def _followed(
    denoiser: Denoiser,
    pair: Pair,
    judges: Mapping[str, Classifier],
    labels: list[int],
    numbers: Mapping[str, list[int]],
    prompts: Prompts,
    seed: int,
    at_once: int,
    options: Mapping[str, Any],
    report: Callable[[int, int], None],
) -> Outcome:
    """One run, and what the judges say of it. numbers: the labels as every judge counts its classes."""
    guidance, classifier = pair
    n, seconds = len(labels), 0.0
    first: list[tuple[int, bool, float, int, int]] = []  # what the steps of the first part were
    curves: dict[str, list[float]] = {judge: [] for judge in judges}
    losses: dict[str, list[float]] = {judge: [] for judge in judges}
    correct: dict[str, list[bool]] = {judge: [] for judge in judges}

    def run(low: int) -> Iterator[Step]:
        part = slice(low, low + at_once)
        return trajectory(
            denoiser, None if prompts is None else prompts[part], guidance=guidance, classifier=classifier,
            labels=labels[part], seed=seed + low, **options,
        )  # fmt: skip

    with warnings.catch_warnings(action="ignore"):
        next(run(0))  # what a library does only the first time is not timed
    for low in range(0, n, at_once):
        targets = {judge: torch.tensor(own[low : low + at_once]) for judge, own in numbers.items()}
        many, step = min(at_once, n - low), None
        with warnings.catch_warnings():
            if low:  # said once is enough
                warnings.simplefilter("ignore")
            for step, taken in _timed(run(low), denoiser.device):
                seconds += taken
                if not low:
                    calls = step.denoiser_calls, step.classifier_calls
                    first.append((step.index, step.guided, step.timestep, *calls))
                verdicts = _verdicts(denoiser, judges, step.prediction.x, step.x0, step.timestep, targets)
                for judge, (loss, _) in verdicts.items():
                    curves[judge] += [] if low else [0.0]
                    curves[judge][step.index] += float(loss.sum()) / n
                report(low * step.steps + (step.index + 1) * many, n * step.steps)
        assert step is not None
        for judge, (loss, right) in _verdicts(denoiser, judges, None, step.after, 0, targets).items():
            losses[judge] += loss.tolist()
            correct[judge] += right.tolist()
    return Outcome(
        by_classifier=classifier is not None,
        guided=[j for j, guided, *_ in first if guided],
        timesteps=[t for _, _, t, *_ in first],
        denoiser_calls=sum(calls for *_, calls, _ in first),
        classifier_calls=sum(calls for *_, calls in first),
        seconds=seconds,
        curves=curves,
        losses=losses,
        correct=correct,
    )


def _timed(steps: Iterator[Step], device: torch.device) -> Iterator[tuple[Step, float]]:
    """Every step, and the seconds it took; a device that works behind our back is waited for."""
    while True:
        began = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        if device.type != "cpu":
            torch.accelerator.synchronize()
        yield step, time.perf_counter() - began


@torch.no_grad()
def _verdicts(
    denoiser: Denoiser,
    judges: Mapping[str, Classifier],
    noisy: Tensor | None,
    clean: Tensor,
    t: float,
    labels: Mapping[str, Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """For every judge, -log p(y | .) and whether y is its first choice, one a sample.

    noisy: what noise-aware judges see, at timestep t; None for finished samples: those see `clean` too, in latents if they are
    of a latent model. The others see `clean` decoded.
    """
    pixels = None
    if noisy is None or not all(judge.noise_aware for judge in judges.values()):
        pixels = denoiser.decode(clean).clamp(-1, 1)
    if noisy is None:
        noisy = pixels if pixels is not None and pixels.shape == clean.shape else clean
    found = {}
    for name, judge in judges.items():
        seen = noisy if judge.noise_aware or pixels is None else pixels
        logits = judge.logits(seen, torch.full((len(seen),), round(t), device=seen.device)).cpu()
        loss = -logits.log_softmax(1).gather(1, labels[name][:, None])[:, 0]
        found[name] = loss, logits.argmax(1) == labels[name]
    return found
