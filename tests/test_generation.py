"""Evaluation of generated pictures: against torchmetrics, scipy, loops and analytic cases; readers against bad files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from denoscope.benchmarks.generation import (
    Statistics,
    evaluate_generation,
    frechet_distance,
    inception_score,
    noise_floor,
    precision_recall,
    read_reference,
    read_samples,
)
from denoscope.errors import InputError, MissingError


def drawn(seed: int, n: int, d: int) -> Tensor:
    """Correlated Gaussian features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + seed


class Pooled(nn.Module):
    """Twelve features of a picture, in the place of Inception's."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.double(), 2).flatten(1)


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return real, (real[:50] // 2 + 20)


def test_frechet_distance_is_that_of_torchmetrics(pictures: tuple[Tensor, Tensor]) -> None:
    real, fake = pictures
    theirs = FrechetInceptionDistance(feature=Pooled()).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(Pooled()(real), Pooled()(fake))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_frechet_distance_is_that_of_scipy_and_of_stored_statistics() -> None:
    a, b = drawn(1, 80, 6), drawn(2, 70, 6)
    s, t = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = (a.mean(0) - b.mean(0)).square().sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(Statistics.of(a), b) == frechet_distance(a, Statistics.of(b)) == frechet_distance(a, b)


def test_frechet_distance_of_known_gaussians() -> None:
    """Commuting covariances: |m|^2 + sum (sqrt(l_a) - sqrt(l_b))^2; singular ones (rank 2 and 1) as well."""
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    one, other = torch.tensor([4.0, 9.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 16.0, 0.0])
    a = Statistics(torch.zeros_like(mean), one.double().diag())
    b = Statistics(mean, other.double().diag())
    assert frechet_distance(a, b) == pytest.approx(5.25 + 1 + 9 + 16, abs=1e-9)
    turn = torch.linalg.qr(drawn(3, 4, 4))[0]
    a, b = (Statistics(turn @ x.mu, turn @ x.sigma @ turn.T) for x in (a, b))
    assert frechet_distance(a, b) == pytest.approx(31.25, abs=1e-6)


def test_frechet_distance_with_fewer_samples_than_dimensions() -> None:
    a = drawn(4, 10, 64)
    assert frechet_distance(a, a) < 1e-8 * a.var(0).sum()
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 64, rel=1e-9)
    assert frechet_distance(a.float(), a.float() * 2) == pytest.approx(frechet_distance(a, a * 2), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 40), m=st.integers(5, 40), d=st.integers(1, 8))
def test_invariances(seed: int, n: int, m: int, d: int) -> None:
    """The order of samples, a common turn and shift change nothing; a common scale squares; the distance is symmetric;
    precision and recall are each other's mirror."""
    a, b = drawn(seed, n, d), drawn(seed + 1, m, d)
    distance, scale = frechet_distance(a, b), float(a.var(0).sum() + b.var(0).sum() + 1)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    shuffled = a[torch.randperm(n, generator=generator)]
    assert frechet_distance(shuffled, b) == pytest.approx(distance, abs=1e-6 * scale)
    assert frechet_distance(b, a) == pytest.approx(distance, abs=1e-6 * scale)
    assert frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(distance, abs=1e-6 * scale)
    assert frechet_distance(4 * a, 4 * b) == pytest.approx(16 * distance, abs=1e-4 * scale)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * scale)
    precision, recall = precision_recall(a, b)
    assert precision_recall(b, a) == (recall, precision)
    assert precision_recall(shuffled, b) == precision_recall(4 * a, 4 * b) == (precision, recall)
    assert precision_recall(a, shuffled) == (1, 1)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("memory", [2**27, 1, 8 * 3 * 40])
def test_precision_recall_is_that_of_a_loop(k: int, memory: int) -> None:
    real, fake = drawn(5, 40, 3), drawn(5, 60, 3)[35:] + 0.7  # the first five are pictures of `real`, moved

    def share(inside: Tensor, of: Tensor) -> float:
        radii = [sorted(float((x - y).norm()) for y in of)[k] for x in of]  # the nearest is the sample itself
        return float(np.mean([any((x - y).norm() <= r for y, r in zip(of, radii, strict=True)) for x in inside]))

    precision, recall = precision_recall(real, fake, k, memory)
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision == pytest.approx(share(fake, real))
    assert recall == pytest.approx(share(real, fake))


def test_precision_recall_of_known_sets() -> None:
    """Copies are inside although their balls have no extent; a collapsed set is precise and recalls little; far is neither."""
    real = drawn(6, 30, 4) + 1e4  # far from the origin, where products cancel
    assert precision_recall(real, real.repeat_interleave(5, 0)) == (1, 1)
    precision, recall = precision_recall(real, real[:1].repeat(10, 1))
    assert precision == 1
    assert recall == 1 / 30
    assert precision_recall(real, real + 1e6) == (0, 0)


def test_inception_score_is_that_of_torchmetrics(pictures: tuple[Tensor, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its memory use, and one split has no deviation
        theirs = InceptionScore(feature=Pooled(), splits=1)
        theirs.update(pictures[0] // 8)
        expected = theirs.compute()[0].item()
    mean, deviation = inception_score(Pooled()(pictures[0] // 8).softmax(1), splits=1)
    assert mean == pytest.approx(expected, rel=1e-5)
    assert deviation == 0


def test_inception_score_of_known_probabilities() -> None:
    assert inception_score(torch.eye(5).repeat(4, 1), splits=4) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    assert inception_score(torch.full((20, 5), 0.2), splits=2)[0] == pytest.approx(1)
    halves = torch.eye(2).repeat_interleave(10, 0)  # splits are consecutive: one class in each
    assert inception_score(halves, splits=2)[0] == pytest.approx(1)
    assert inception_score(halves, splits=1)[0] == pytest.approx(2)


def test_noise_floor_falls_with_samples_and_is_far_below_a_real_difference() -> None:
    real = drawn(7, 800, 6)
    floor = noise_floor(real)
    assert 0 < floor < noise_floor(real[:100]) < frechet_distance(real, real + 3 * real.std(0))
    assert noise_floor(real, 100) > floor
    assert noise_floor(real, seeds=2) == noise_floor(real, seeds=2)


def test_table_row() -> None:
    real, fake = drawn(8, 50, 4), drawn(8, 90, 4)[50:]
    row = evaluate_generation(fake, real, probabilities=fake.softmax(1), k=2)
    assert row == {
        "samples": 40,
        "fid": frechet_distance(fake, real),
        "precision": precision_recall(real, fake, 2)[0],
        "recall": precision_recall(real, fake, 2)[1],
        "inception_score": inception_score(fake.softmax(1))[0],
    }
    assert evaluate_generation(fake, Statistics.of(real)) == {"samples": 40, "fid": row["fid"]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(drawn(0, 9, 3), drawn(0, 9, 4)), "3 and 4 dimensions"),
        (lambda: frechet_distance(drawn(0, 1, 3), drawn(0, 9, 3)), "at least 2"),
        (lambda: frechet_distance(drawn(0, 9, 3) / 0, drawn(0, 9, 3)), "not finite"),
        (lambda: precision_recall(drawn(0, 9, 3), drawn(0, 9, 4)), "3 and 4 dimensions"),
        (lambda: precision_recall(drawn(0, 9, 3), drawn(0, 3, 3)), "from 1 to 2"),
        (lambda: precision_recall(drawn(0, 9, 3), drawn(0, 9, 3), k=0), "k is 0"),
        (lambda: inception_score(torch.randn(9, 4)), "softmax"),
        (lambda: inception_score(torch.full((9, 4), 0.25)), "10 splits of 9"),
        (lambda: noise_floor(drawn(0, 9, 3), 8), "8 of 9"),
    ],
)
def test_bad_features(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_readers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    mu, sigma = np.arange(2.0), np.eye(2, dtype=np.float32)
    np.savez(tmp_path / "labelled.npz", images, np.array([4, 0, 7]))
    np.savez(tmp_path / "plain.npz", images)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma, mu_s=mu + 1, sigma_s=2 * sigma)
    np.savez(tmp_path / "both.npz", images, mu=mu, sigma=sigma)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in (2, 0, 1):
        Image.fromarray(images[index]).save(folder / f"{index:06}.png")
    (folder / "notes.txt").write_text("no picture")

    read, labels = read_samples(tmp_path / "labelled.npz")
    assert (read == images).all()
    assert labels is not None
    assert labels.tolist() == [4, 0, 7]
    for source in ("plain.npz", "folder"):
        read, labels = read_samples(tmp_path / source)
        assert (read == images).all()
        assert labels is None
    for source in ("plain.npz", "folder", "both.npz"):
        reference = read_reference(tmp_path / source)
        assert reference.images is not None
        assert (reference.images == images).all()
        assert (reference.pool is not None) == (source == "both.npz")
    reference = read_reference(tmp_path / "statistics.npz")
    assert reference.images is None
    assert reference.pool is not None
    assert reference.spatial is not None
    assert frechet_distance(reference.pool, reference.spatial) == pytest.approx(2 + 2 * (1 - 2**0.5) ** 2)


IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("reader", "arrays", "message"),
    [
        (read_samples, {"pictures": IMAGES}, "no pictures"),
        (read_samples, {"arr_0": IMAGES[0]}, r"not uint8 \[4, 4, 3\]"),
        (read_samples, {"arr_0": IMAGES[:0]}, r"\[0, 4, 4, 3\]"),
        (read_samples, {"arr_0": IMAGES / 255}, "not float64"),
        (read_samples, {"arr_0": IMAGES, "arr_1": np.arange(3)}, "each of 2"),
        (read_samples, {"arr_0": IMAGES, "arr_1": np.ones(2)}, "whole number"),
        (read_samples, {"arr_0": np.array([{}])}, "not an .npz file of arrays"),
        (read_reference, {"pictures": IMAGES}, "no reference"),
        (read_reference, {"mu": np.ones(2)}, "only one of mu and sigma"),
        (read_reference, {"arr_0": IMAGES, "sigma_s": np.eye(2)}, "only one of mu_s and sigma_s"),
        (read_reference, {"mu": np.ones(2), "sigma": np.eye(3)}, r"\[d, d\]"),
        (read_reference, {"mu": np.ones(2) * np.nan, "sigma": np.eye(2)}, "not finite"),
    ],
)
def test_bad_files(tmp_path: Path, reader: Any, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "file.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=message) as caught:
        reader(tmp_path / "file.npz")
    assert "\n" not in str(caught.value)
    assert "file.npz" in str(caught.value)


@pytest.mark.parametrize("reader", [read_samples, read_reference])
def test_missing_and_damaged(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(MissingError, match="no file or folder"):
        reader(tmp_path / "nothing.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="holds no images"):
        reader(tmp_path / "empty")
    np.savez(tmp_path / "whole.npz", IMAGES)
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", IMAGES)
    contents = {"cut.npz": whole[:-40], "text.npz": b"hello", "none.npz": b"", "array.npz": None}
    changed = bytearray(whole)
    changed[200] ^= 255  # in the array: the check sum tells
    contents["changed.npz"] = bytes(changed)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            reader(tmp_path / name)
    for name, side in (("0.png", 4), ("1.png", 5)):
        Image.new("RGB", (side, 4)).save(tmp_path / "empty" / name)
    with pytest.raises(InputError, match=r"1\.png is not of the size of 0\.png"):
        reader(tmp_path / "empty")
