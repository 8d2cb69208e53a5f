"""Model-fitting diagnosis on a process that is known: pixels are independent Gaussians, classifiers read channel means."""

import csv
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import denoscope as ds
from denoscope.denoisers import Condition, NoiseSchedule
from denoscope.denoisers.classifiers import Classifier
from denoscope.sampling import ClassifierFree, ClassifierGuidance, GuidanceSchedule, diagnose, trajectory
from denoscope.sampling.diagnosis import ModelFitting, Outcome, paired

LABELS = [0, 1, 2] * 10
SETTINGS: dict[str, Any] = {"steps": 12, "solver": "ddpm"}
fifth = partial(GuidanceSchedule.power, rate=5)


class Gaussian:
    """Every pixel is drawn from N(0, 1/4), on its own; told a class, that channel's from N(1/2, 1/4)."""

    name, family, presets, multiple, minimum = "gaussian", "pixel", {}, 1, 1
    schedule, device, dtype = NoiseSchedule.from_config({"beta_schedule": "linear"}), torch.device("cpu"), torch.float32
    posterior = encode = predict = sites = staticmethod(NotImplemented.__class__)
    network = nn.Identity()

    def condition(self, prompts: Any, batch: int = 1) -> Condition:
        mean = torch.zeros(batch if prompts is None else len(prompts), 3)
        for row, label in zip(mean, prompts or (), strict=False):
            row[label] = 0.5
        return Condition(extra={"mean": mean})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        return (3, 4, 4)

    def output(self, noisy: Tensor, t: Any, condition: Condition) -> Tensor:
        a, s = self.schedule.at(t.long(), noisy)
        mean = condition.expand(len(noisy)).extra["mean"][:, :, None, None]
        return s * (noisy - a * mean) / (a**2 / 4 + s**2)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Means(nn.Module):
    """The likeliest class is the channel with the largest mean over some columns."""

    def __init__(self, columns: slice, gain: float = 8.0):
        super().__init__()
        self.columns, self.gain, self.seen = columns, gain, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.detach().clone(), int(t[0])))
        return self.gain * x[..., self.columns].mean((2, 3))


class Clean(Means):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, torch.zeros(1))


def left(kind: Any = Means) -> Classifier:
    return Classifier.of(kind(slice(0, 2)), 3, name="left")


def right(kind: Any = Means) -> Classifier:
    return Classifier.of(kind(slice(2, 4)), 3, name="right")


@pytest.fixture(scope="module")
def fitted() -> ModelFitting:
    """A guide that reads the left half, and judges that read the right one: they agree by chance."""
    on = left()
    runs = {
        "full": ClassifierGuidance(on, 6.0),
        "compressed": ClassifierGuidance(on, 6.0, fifth),
        "told": (ClassifierFree(2.0, fifth), None),
        "nothing": None,
    }
    off = {"right": right(), "clean": right(Clean)}
    return diagnose(Gaussian(), runs, labels=LABELS, on=on, off=off, prompts=LABELS, at_once=7, **SETTINGS)


def test_a_guide_judged_by_itself_fits_nothing() -> None:
    on = left()
    found = diagnose(
        Gaussian(), {"full": ClassifierGuidance(on, 6.0)}, labels=LABELS, on=on, off={"same": left()}, **SETTINGS
    )
    (row,) = found.table()
    assert row["gap same"] == 0
    assert row["ratio same"] == 1
    assert row["accuracy on"] > 0.9
    assert found.outcomes["full"].curves["on"] == found.outcomes["full"].curves["same"]
    assert "does not show" in found.recommendation
    assert "30 samples" in found.recommendation


def test_a_guide_that_nobody_agrees_with_is_found_out() -> None:
    on = left()
    runs, off = {"full": ClassifierGuidance(on, 6.0)}, {"right": right()}
    found = diagnose(Gaussian(), runs, labels=LABELS, on=on, off=off, **SETTINGS)
    (row,) = found.table()
    assert row["accuracy on"] > 0.9
    assert row["gap right"] > 2 * row["gap error right"] > 0
    assert row["ratio right"] > 2
    assert f"points: full {100 * row['gap right']:.1f} ± {100 * row['gap error right']:.1f}" in found.recommendation
    alone = diagnose(Gaussian(), runs, labels=LABELS, off=off, **SETTINGS)
    assert "guiding classifier" not in alone.recommendation
    assert alone.outcomes["full"].correct["right"] == found.outcomes["full"].correct["right"]


def test_costs_curves_and_guided_steps_are_those_of_the_runs(fitted: ModelFitting) -> None:
    rows = {row["run"]: row for row in fitted.table()}
    guided = GuidanceSchedule.power(12, 5).positions
    assert fitted.outcomes["compressed"].guided == list(guided)
    calls = {name: (row["denoiser_calls"], row["classifier_calls"]) for name, row in rows.items()}
    few = len(guided)
    assert calls == {"full": (12, 12), "compressed": (12, few), "told": (12 + few, 0), "nothing": (12, 0)}
    for run in fitted.outcomes.values():
        assert len(run.timesteps) == 12
        assert set(run.curves) == {"on", "right", "clean"}
        assert all(len(curve) == 12 for curve in run.curves.values())
        assert all(len(run.correct[judge]) == len(run.losses[judge]) == 30 for judge in run.curves)
    assert fitted.outcomes["full"].timesteps[0] == 999
    told, nothing = (fitted.outcomes[name] for name in ("told", "nothing"))
    assert told.accuracy("right") == nothing.accuracy("right") == 1  # the model is told the class


def test_judges_see_what_they_are_said_to_see() -> None:
    noisy, clean = right(), right(Clean)
    found = diagnose(Gaussian(), {"nothing": None}, labels=[0, 1], off={"a": noisy, "b": clean}, seed=5, **SETTINGS)
    steps = list(trajectory(Gaussian(), seed=[5, 6], **SETTINGS))
    for step, (a, t), (b, _) in zip(steps, noisy.module.seen, clean.module.seen, strict=False):
        assert t == step.timestep
        assert torch.equal(a, step.prediction.x)
        assert torch.equal(b, step.x0.clamp(-1, 1))
    for module in (noisy.module, clean.module):
        last, t = module.seen[-1]
        assert len(module.seen) == 13
        assert t == 0
        assert torch.equal(last, steps[-1].after.clamp(-1, 1))
    loss = -clean.logits(steps[0].x0.clamp(-1, 1)).log_softmax(1)
    expected = (loss[0, 0] + loss[1, 1]).item() / 2
    assert found.outcomes["nothing"].curves["b"][0] == pytest.approx(expected, abs=1e-6)


def test_batches_do_not_matter(fitted: ModelFitting) -> None:
    on = left()
    again = diagnose(
        Gaussian(), {"compressed": ClassifierGuidance(on, 6.0, fifth)}, labels=LABELS, on=on, off={"right": right()},
        prompts=LABELS, at_once=30, **SETTINGS,
    )  # fmt: skip
    one, other = again.outcomes["compressed"], fitted.outcomes["compressed"]
    assert one.correct["on"] == other.correct["on"]
    assert one.curves["right"] == pytest.approx(other.curves["right"], abs=1e-5)
    assert one.losses["right"] == pytest.approx(other.losses["right"], abs=1e-4)


def outcome(calls: int, right: int, n: int, by_classifier: bool = True) -> Outcome:
    """The guide is always right, the judge about the first `right` samples."""
    verdicts = {"on": [True] * n, "off": [i < right for i in range(n)]}
    return Outcome(by_classifier, [0], [0.0], calls, 0, 1.0, {"on": [0.0], "off": [1.0]}, {}, verdicts)


@pytest.mark.parametrize(
    ("n", "right", "words", "absent"),
    [
        (100, {"full": (100, 80), "gap": (62, 79)}, "gap is the cheapest within one standard error", "full is the"),
        (100, {"full": (100, 80), "gap": (62, 60)}, "full has the best off accuracy, 80.0 % at 100", "within one"),
        (100, {"full": (100, 80), "gap": (62, 60)}, "; nothing cheaper comes so close", "cheapest"),
        (100, {"full": (100, 60), "gap": (62, 80)}, "gap has the best off accuracy, 80.0 % at 62", "nothing cheaper"),
        (
            100,
            {"full": (100, 79), "gap": (62, 80)},
            "62 network calls a sample (full within one standard error).",
            "gap is",
        ),
        (100, {"full": (100, 80), "gap": (62, 98)}, "(points: full 20.0 ± 4.5)", "gap 2.0"),
        (100, {"full": (100, 97), "gap": (62, 98)}, "Model-fitting does not show", "points:"),
        (20, {"full": (100, 18), "gap": (62, 19)}, "Model-fitting does not show", "points:"),
        (19, {"full": (100, 1), "gap": (62, 2)}, "so few carry no verdict; take 20 or more", "full"),
        (100, {"full": (100, 80)}, "standard error of up to 4.0 points", "cheapest"),
    ],
)
def test_the_recommendation_says_what_the_numbers_say(n: int, right: Any, words: str, absent: str) -> None:
    outcomes = {name: outcome(calls, many, n) for name, (calls, many) in right.items()}
    found = ModelFitting(outcomes, {"labels": [0] * n, "judges": {"on": {}, "off": {}}})
    assert words in found.recommendation
    assert absent not in found.recommendation
    assert f"{n} samples" in found.recommendation
    assert found.recommendation.count(". ") <= 2


def test_paired_is_mcnemar() -> None:
    difference, error = paired([1, 1, 1, 0, 1], [0, 0, 1, 1, 1])
    assert difference == pytest.approx(1 / 5)
    assert difference / error == pytest.approx((2 - 1) / (2 + 1) ** 0.5)


def test_saved(fitted: ModelFitting, tmp_path: Any) -> None:
    for suffix in ("json", "csv", "png"):
        fitted.save(tmp_path / f"d.{suffix}")
    saved = json.loads((tmp_path / "d.json").read_text())
    assert saved["table"] == fitted.table()
    assert saved["recommendation"] == fitted.recommendation
    assert saved["outcomes"]["full"]["curves"]["clean"] == fitted.outcomes["full"].curves["clean"]
    assert saved["judges"]["clean"] == {"name": "right", "noise_aware": False, "classes": 3}
    assert saved["labels"] == LABELS
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["full", "compressed", "told", "nothing"]
    assert float(rows[0]["accuracy clean"]) == fitted.outcomes["full"].accuracy("clean")
    assert ds.read(tmp_path / "d.png").width > 900
    with pytest.raises(ds.InputError, match=r"\.json, \.csv or \.png"):
        fitted.save(tmp_path / "d.txt")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"runs": {}}, "at least one run"),
        ({"off": {}}, "one off-sampling classifier"),
        ({"labels": []}, "one label"),
        ({"off": {"on": right()}}, "cannot be called 'on'"),
        ({"labels": [0, 3]}, "has no class 3"),
        ({"on": left()}, "guided by another classifier"),
        ({"prompts": [0]}, "There are 2 labels for 1 samples"),
    ],
)
def test_mistakes_are_named(changed: dict[str, Any], sentence: str) -> None:
    options = {"runs": {"full": ClassifierGuidance(left(), 1.0)}, "labels": [0, 1], "off": {"right": right()}}
    with pytest.raises(ds.InputError, match=sentence):
        diagnose(Gaussian(), **{**options, **SETTINGS, **changed})


class Turned(Means):
    """Its classes are in another order."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).flip(1)


def test_classes_are_matched_by_name() -> None:
    names = ("a", "b", "c")
    one = Classifier.of(Means(slice(0, 2)), 3, names=names)
    other = Classifier.of(Turned(slice(0, 2)), 3, names=names[::-1])
    unnamed = Classifier.of(Means(slice(0, 2)), 3, names=("LABEL_0", "LABEL_1", "LABEL_2"))
    off = {"other": other, "unnamed": unnamed}
    found = diagnose(
        Gaussian(), {"full": ClassifierGuidance(one, 6.0)}, labels=LABELS, on=one, off=off, at_once=7, **SETTINGS
    )
    run = found.outcomes["full"]
    assert run.correct["on"] == run.correct["other"] == run.correct["unnamed"]
    assert run.losses["on"] == pytest.approx(run.losses["other"], abs=1e-6)
    assert run.curves["on"] == pytest.approx(run.curves["other"], abs=1e-6)
    wrong = [
        (Classifier.of(Means(slice(0, 2)), 3, names=("a", "b", "d")), r"other classes \(a, b, d\) than the labels"),
        (Classifier.of(Means(slice(0, 2)), 4), "tells 4 classes apart where the labels are of 3"),
    ]
    for judge, sentence in wrong:
        with pytest.raises(ds.InputError, match=sentence):
            diagnose(Gaussian(), {"nothing": None}, labels=[0], on=one, off={"judge": judge}, **SETTINGS)
