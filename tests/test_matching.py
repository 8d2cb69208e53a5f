"""Point transfer and mutual nearest neighbours, against brute force and the recorded official evaluation."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, smooth_picture
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

import denoscope as ds
from denoscope.benchmarks import Pair, pck, read_pairs
from denoscope.images import Frame


def random_map(seed, channels=12, cells=(7, 5), picture=(43, 31)):
    values = torch.randn(channels, cells[1], cells[0], generator=torch.Generator().manual_seed(seed))
    return ds.FeatureMap(values, Frame.of(picture).resize(cells))


def enlarged(fm):
    """The official way: the map interpolated to picture size, in float64."""
    w, h = fm.frame.picture
    return F.interpolate(fm.values[None].double(), (h, w), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("cells", [(7, 5), (1, 1), (1, 6), (20, 30), (60, 40)])
def test_similarity_equals_cosine_of_the_enlarged_map(cells):
    fm, vectors = random_map(0, cells=cells), torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    brute = F.cosine_similarity(vectors.double()[:, :, None, None], enlarged(fm)[None], dim=1)
    assert (fm.similarity(vectors) - brute).abs().max() < 2e-6


def test_features_at_points_equal_the_enlarged_map():
    fm = random_map(2)
    points = torch.tensor([[0, 0], [42, 30], [17, 9]], dtype=torch.float64)
    brute = torch.stack([enlarged(fm)[:, int(y), int(x)] for x, y in points])
    assert torch.allclose(fm.at(points).double(), brute, atol=1e-6)


def test_best_pixel_equals_brute_force_and_ties_go_to_the_first():
    source, target = random_map(3), random_map(4)
    points = torch.tensor([[x, y] for x in range(0, 43, 6) for y in range(0, 31, 6)], dtype=torch.float64)
    found = ds.transfer(source, target, points)
    brute = F.cosine_similarity(source.at(points).double()[:, :, None, None], enlarged(target)[None], dim=1).flatten(1)
    index = (brute >= brute.amax(1, keepdim=True) - 1e-6).to(torch.uint8).argmax(1)
    assert torch.equal(found.points, torch.stack([index % 43, index // 43], 1).double())
    assert torch.allclose(found.scores.double(), brute.amax(1), atol=2e-6)
    flat = ds.FeatureMap(torch.ones(3, 2, 2), Frame.of((9, 9)).resize((2, 2)))
    assert ds.transfer(flat, flat, [[5, 5]]).points.tolist() == [[0, 0]]


def test_official_spair_evaluation():
    """Predictions and PCK of `eval_spair.py`; where cosines tie exactly, any of the best pixels is right."""
    expected = json.loads((GOLDEN / "dift-eval" / "spair_expected.json").read_text())
    maps = load_file(GOLDEN / "dift-eval" / "spair_features.safetensors")
    right, differing, total = [], 0, 0
    pairs = read_pairs(GOLDEN / "dift-eval" / "SPair-71k")
    recorded = expected["predictions_xy"]
    assert len(pairs) == len(recorded) == 12
    for pair in pairs:
        stems = [path.rpartition("/")[2].rpartition(".")[0] for path in (pair.source, pair.target)]
        one, two = (
            ds.FeatureMap(v[0], Frame.of(size).resize((v.shape[3], v.shape[2])))
            for stem, size in zip(stems, (pair.source_size, pair.target_size), strict=True)
            for v in [maps[f"{pair.category}/{stem}"]]
        )
        found = ds.transfer(one, two, pair.source_points)
        key = next(k for k in recorded if f"-{stems[0]}-{stems[1]}:" in k)
        official = torch.tensor(recorded[key], dtype=torch.float64)
        cosine = F.cosine_similarity(one.at(pair.source_points).double()[:, :, None, None], enlarged(two)[None], dim=1)
        for i, (ours, theirs) in enumerate(zip(found.points.long(), official.long(), strict=True)):
            total += 1
            differing += int(not torch.equal(ours, theirs))
            assert cosine[i, ours[1], ours[0]] >= cosine[i].max() - 1e-5
        right.append((pair, official))
    assert total == 70
    assert differing <= 4
    for name, values in expected["derived"].items():
        kind, alpha = name.split("@")
        per_image, per_point = pck([pair.correct(points, float(alpha), kind) for pair, points in right])
        assert (per_image, per_point) == pytest.approx((values["per_image"], values["per_point"]), abs=1e-9)


@pytest.mark.parametrize("family", ["sd", "adm", "seedling"])
def test_a_picture_matches_itself(family, request):
    """Spec 7a.4: the query comes back, or a pixel with the same feature."""
    denoiser, picture = request.getfixturevalue(family), smooth_picture(8, 64, 64)
    points = torch.tensor([[20.0, 20.0], [41.0, 33.0], [33.0, 12.0]], dtype=torch.float64)
    found = ds.match(denoiser, picture, picture, points, size=64, ensemble=2, cycle=True)
    assert (found.scores > 1 - 1e-5).all()
    assert torch.allclose(found.target.at(found.points), found.source.at(points), rtol=1e-3, atol=1e-4)
    assert found.cycle is not None
    assert (found.cycle <= (found.points - points).norm(dim=1) + 1e-9).all()


def test_match_is_features_and_transfer(sd):
    one, two, points = smooth_picture(1), smooth_picture(2), [[5, 5], [60, 40]]
    options = {"size": 64, "ensemble": 2, "seed": 4, "prompt": "a photo of a cat"}
    together = ds.match(sd, one, [two, one], points, **options)
    apart = ds.transfer(ds.features(sd, one, **options), ds.features(sd, two, **options), points)
    assert torch.equal(together[0].points, apart.points)
    assert torch.equal(together[0].scores, apart.scores)
    assert len(together) == 2


def test_soft_argmax_is_the_mean_of_its_window():
    source, target = random_map(5), random_map(6)
    hard = ds.transfer(source, target, [[20, 15]])
    cold = ds.transfer(source, target, [[20, 15]], soft_window=1, temperature=1e-4)
    assert (cold.points - hard.points).abs().max() < 0.5
    hot = ds.transfer(source, target, [[20, 15]], soft_window=1, temperature=1e4)
    x, y = hard.points[0].long().tolist()
    rx, ry = round(43 / 7), round(31 / 5)
    xs, ys = range(max(0, x - rx), min(43, x + rx + 1)), range(max(0, y - ry), min(31, y + ry + 1))
    middle = torch.tensor([[sum(xs) / len(xs), sum(ys) / len(ys)]], dtype=torch.float64)
    assert (hot.points - middle).abs().max() < 0.01


descriptors = st.integers(0, 10_000).map(
    lambda seed: torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
)


@given(descriptors, descriptors, st.sampled_from(["cosine", "l2"]), st.integers(1, 9))
def test_mutual_neighbours(a, b, metric, chunk):
    """Spec 7a.6: symmetric, the identity on itself, and the definition."""
    found = ds.mutual_nearest(a, b, metric, chunk)
    back = ds.mutual_nearest(b, a, metric)
    assert set(zip(found.a.tolist(), found.b.tolist(), strict=True)) == set(
        zip(back.b.tolist(), back.a.tolist(), strict=True)
    )
    itself = ds.mutual_nearest(a, a, metric, chunk)
    assert torch.equal(itself.a, torch.arange(9))
    assert torch.equal(itself.b, torch.arange(9))
    s = -torch.cdist(a, b) if metric == "l2" else F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    wanted = [(i, int(s[i].argmax())) for i in range(9) if int(s[:, int(s[i].argmax())].argmax()) == i]
    assert list(zip(found.a.tolist(), found.b.tolist(), strict=True)) == wanted
    if metric == "cosine":
        scaled = ds.mutual_nearest(3 * a, b, metric)
        assert torch.equal(scaled.b, found.b)


def test_mistakes_are_named():
    one = random_map(0)
    for points, sentence in [
        ([[50, 10]], r"Point 0 at \(50, 10\) lies outside the picture of 43x31"),
        ([[5, 5], [20, 40]], r"Point 1 at \(20, 40\).*swapped"),
        ([[float("nan"), 1]], "Point 0"),
        ([], "no points"),
        ([[1.0, 2.0, 3.0]], r"\[N, 2\]"),
    ]:
        with pytest.raises(ds.InputError, match=sentence):
            ds.transfer(one, one, points)
    with pytest.raises(ds.InputError, match="12 and 8 channels"):
        ds.transfer(one, random_map(0, channels=8), [[1, 1]])
    other = ds.FeatureMap(one.values, one.frame, {"t": 50})
    with pytest.raises(ds.InputError, match=r"different t \(None and 50\)"):
        ds.transfer(one, other, [[1, 1]])
    assert len(ds.transfer(one, other, [[1, 1]], force=True)) == 1
    with pytest.warns(UserWarning, match="zero length"):
        ds.transfer(ds.FeatureMap(torch.zeros(12, 5, 7), one.frame), one, [[1, 1]])
    with pytest.raises(ds.InputError, match="'cosine' or 'l2'"):
        ds.mutual_nearest(torch.ones(2, 2), torch.ones(2, 2), "l1")
    with pytest.raises(ds.InputError, match="not empty"):
        ds.mutual_nearest(torch.ones(0, 2), torch.ones(2, 2))


def test_memory_of_a_large_match():
    """100 points at 768 x 768 with 1280 channels: under 600 MB, where an enlarged map alone would be 3 GB."""
    program = """
import resource, torch
import denoscope as ds
from denoscope.images import Frame
ds.transfer, ds.FeatureMap
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frame = Frame.of((768, 768)).resize((48, 48))
a, b = (ds.FeatureMap(torch.randn(1280, 48, 48), frame) for _ in range(2))
ds.transfer(a, b, torch.rand(100, 2, dtype=torch.float64) * 767)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(out) * (1 if sys.platform == "darwin" else 1024) < 600e6


@given(st.integers(0, 1000), st.integers(2, 8))
def test_pck_properties(seed, count):
    """Spec 7a.5."""
    generator = torch.Generator().manual_seed(seed)
    truth, guess = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 80 for _ in range(2))
    pair = Pair("", "", "cat", truth, truth, (5.0, 5.0, 60.0, 90.0), (100, 100))
    values = [pck([pair.correct(guess, alpha)])[0] for alpha in (0.01, 0.1, 0.3, 1, 2)]
    assert values == sorted(values)
    assert pck([pair.correct(guess)])[0] == pytest.approx(pck([pair.correct(guess)])[1])
    assert pck([pair.correct(truth, 0.0)]) == (100, 100)
    assert (pair.correct(guess, 0.2, "img") >= pair.correct(guess, 0.2, "bbox")).all()
    edge = truth + torch.tensor([8.5, 0.0])  # exactly 0.1 of the box's longer side, 85
    assert pair.correct(edge, 0.1 + 1e-12).all()
    assert not pair.correct(edge, 0.1 - 1e-9).any()
