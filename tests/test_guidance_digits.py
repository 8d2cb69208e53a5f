"""What compressed guidance is claimed to do, on real digits, in small: a quarter of the guide calls, no loss of quality."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "experiments" / "guidance" / "digits.py"
FULL, COMPRESSED = "full, s=2", "gap r5 k1, s=2"


@pytest.fixture(scope="module")
def digits() -> Any:
    """The experiment's own code."""
    spec = importlib.util.spec_from_file_location("digits_experiment", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(digits: Any) -> dict[str, dict[str, float]]:
    """Full and compressed guidance of a small denoiser by a classifier that saw 100 images."""
    settings = digits.Settings(
        channels=(8, 16), groups=4, iterations=500, learning_rate=4e-3, width=16, classifier_images=100,
        classifier_iterations=300, batch=64, samples=300,
    )  # fmt: skip
    judges, networks = digits.prepare_judges(settings), digits.prepare(0, settings)
    rows = [row for row in digits.CLASSIFIER_ROWS if row.name in (FULL, COMPRESSED)]
    return {row.name: digits.measure(digits.generate(networks, row, 0, settings), networks, judges) for row in rows}


def test_a_quarter_of_the_guide_calls(measured: dict[str, dict[str, float]]) -> None:
    assert measured[FULL]["calls"] == 50
    assert measured[COMPRESSED]["calls"] == 12


def test_no_worse_at_the_same_scale(measured: dict[str, dict[str, float]]) -> None:
    """By the classifier that did not guide, by the one that only saw real digits, and by the distance to real digits."""
    full, compressed = measured[FULL], measured[COMPRESSED]
    assert compressed["off"] >= full["off"] - 1
    assert compressed["held"] >= full["held"] - 1
    assert compressed["fid"] <= full["fid"]


def test_full_guidance_fits_its_guide(measured: dict[str, dict[str, float]]) -> None:
    assert measured[FULL]["on"] - measured[FULL]["off"] >= 2
    assert measured[FULL]["ce_off"] >= 1.15 * measured[FULL]["ce_on"]


def test_strength_is_matched_by_interpolation(digits: Any) -> None:
    """Between measured scales linearly in log s; what falls short of its predecessor counts as equal; no extrapolation."""
    names = ("recall", "precision", "held", "gap")
    sweep = {
        s: {"off": off, "ce_off": 1 / s, "fid": 10 * s, **dict.fromkeys(names, s)}
        for s, off in ((1.0, 80.0), (2.0, 90.0), (4.0, 89.0), (8.0, 96.0))
    }
    assert digits.equal_strength(sweep, "off", 85.0)["scale"] == pytest.approx(2**0.5)
    assert digits.equal_strength(sweep, "off", 85.0)["fid"] == pytest.approx(15)
    assert digits.equal_strength(sweep, "ce_off", 0.5)["scale"] == pytest.approx(2)
    assert digits.equal_strength(sweep, "off", 93.0)["scale"] == pytest.approx(4 * 2**0.5)
    assert digits.equal_strength(sweep, "off", 99.0)["scale"] == pytest.approx(8)
