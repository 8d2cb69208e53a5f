"""The DAVIS benchmark: its numbers against the official evaluation's, its layout, its baselines."""

import json
import shutil

import cv2
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis.extra.numpy import arrays
from PIL import Image

import denoscope as ds
from denoscope.benchmarks.davis import (
    DAVIS,
    boundary,
    boundary_accuracy,
    read_annotation,
    region_similarity,
    statistics,
)
from denoscope.benchmarks.protocol import Benchmark
from denoscope.features.baselines import BASELINES

ROOT, RESULTS = GOLDEN / "dift-eval" / "DAVIS", GOLDEN / "dift-eval" / "davis_results"
NAMES = {"J&F": "JF_mean", "J mean": "J_mean", "J recall": "J_recall", "J decay": "J_decay"}
NAMES |= {"F mean": "F_mean", "F recall": "F_recall", "F decay": "F_decay"}


@pytest.fixture
def davis():
    return DAVIS(ROOT)


@pytest.fixture
def own(tmp_path):
    """A copy of the recordings that may be spoilt."""
    return DAVIS(shutil.copytree(ROOT, tmp_path / "DAVIS"))


def features(picture, category):
    return BASELINES["rgb"](size="0", stride=4)(picture)


def test_recorded_results_have_the_official_numbers(davis):
    assert isinstance(davis, Benchmark)
    expected = json.loads((ROOT.parent / "davis_expected.json").read_text())
    items = davis.items()
    assert [item.key for item in items] == ["swan", "dance"]
    records = [davis.read_results(RESULTS)(item) for item in items]
    for item, record in zip(items, records, strict=True):
        assert record["frames"] == expected["per_frame"][item.key]["frames"]
        for key in "JF":
            assert np.abs(np.subtract(record[key], expected["per_frame"][item.key][key])).max() < 1e-12
    rows = davis.rows(items, records)
    assert [row["category"] for row in rows] == ["all", "swan", "dance"]
    assert [row["count"] for row in rows] == [5, 2, 3]
    for ours, official in NAMES.items():
        assert rows[0][ours] / 100 == pytest.approx(expected["global"][official], abs=1e-12)
    swan = [expected["J_M_per_object"][f"swan_{number}"] for number in (1, 2)]
    assert rows[1]["J mean"] / 100 == pytest.approx(np.mean(swan), abs=1e-12)


def test_masks_of_the_truth_are_perfect_and_drawn(davis):
    item = davis.items()[1]
    record = davis.read_results(ROOT / "Annotations" / "480p")(item)
    assert davis.score(item, record) == 1
    row = davis.rows([item], [record])[0]
    assert row["J&F"] == 100
    drawn = davis.draw(item, json.loads(json.dumps(record)))
    assert drawn.width > 3 * 200


def test_tracking_and_baselines_fill_the_protocol(davis, tmp_path):
    tracked = DAVIS(ROOT, sequences=("swan",), radius=4, results=str(tmp_path))
    item = tracked.items()[0]
    record = json.loads(json.dumps(tracked.run(item, features)))
    assert len(record["J"]) == len(record["objects"]) == 2
    assert all(len(values) == len(item.data.frames) - 2 for values in record["J"] + record["F"])
    written = sorted(path.name for path in (tmp_path / "features" / "swan").iterdir())
    assert written == [truth.name for truth in item.data.truths]
    with Image.open(tmp_path / "features" / "swan" / written[0]) as first:
        assert first.mode == "P"
        assert np.array_equal(np.array(first), read_annotation(item.data.truths[0]))
    again = davis.read_results(tmp_path / "features")(item)
    assert (again["J"], again["F"]) == (record["J"], record["F"])
    for baseline in davis.baselines().values():
        found = json.loads(json.dumps(baseline(item)))
        assert np.shape(found["J"]) == np.shape(record["J"])


def test_flow_follows_what_copying_loses(tmp_path):
    rng = np.random.default_rng(0)
    back = cv2.GaussianBlur(rng.integers(0, 256, (96, 160, 3), dtype=np.uint8), (0, 0), 2)
    patch = cv2.GaussianBlur(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), (0, 0), 1.5)
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part / "480p" / "slide").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("slide\n")
    for index in range(8):
        frame, mask = back.copy(), np.zeros((96, 160), np.uint8)
        place = slice(28, 68), slice(20 + 5 * index, 60 + 5 * index)
        frame[place], mask[place] = patch, 1
        Image.fromarray(frame).save(tmp_path / "JPEGImages/480p/slide" / f"{index:05d}.jpg", quality=95)
        Image.fromarray(mask).save(tmp_path / "Annotations/480p/slide" / f"{index:05d}.png")
    davis = DAVIS(tmp_path)
    item = davis.items()[0]
    scores = {name: davis.score(item, run(item)) for name, run in davis.baselines().items()}
    assert scores["optical flow"] > scores["first mask"] + 0.25


# metrics

masks = arrays(bool, (9, 11))


@given(masks, masks)
def test_measures_are_symmetric_and_bounded(one, other):
    for measure in (region_similarity, boundary_accuracy):
        assert measure(one, one) == 1
        assert 0 <= measure(one, other) == measure(other, one) <= 1


@given(masks)
def test_boundaries_are_as_defined_pixel_by_pixel(region):
    h, w = region.shape
    for y in range(h):
        for x in range(w):
            near = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            differs = any(region[y, x] != region[j, i] for j, i in near if j < h and i < w)
            assert boundary(region)[y, x] == differs


def test_measures_on_masks_whose_values_are_known():
    empty, square, shifted = (np.zeros((100, 100), bool) for _ in range(3))
    square[20:60, 20:60] = True
    shifted[20:60, 21:61] = True
    assert region_similarity(empty, empty) == boundary_accuracy(empty, empty) == 1
    assert region_similarity(square, empty) == boundary_accuracy(square, empty) == boundary_accuracy(empty, square) == 0
    assert region_similarity(square, shifted) == 39 / 41
    assert boundary_accuracy(square, shifted) == 1  # the radius is ceil(0.008 * 141.4) = 2


def test_statistics_take_quarters_that_share_their_ends_also_past_256_frames():
    assert statistics([1, 1, 1, 0, 0, 0, 0, 0]) == (3 / 8, 3 / 8, 1.0)
    assert statistics([0.5]) == (0.5, 0, 0)
    mean, recall, decay = statistics(np.linspace(1, 0, 400).tolist())
    assert (mean, recall) == (pytest.approx(0.5), 0.5)
    assert decay == pytest.approx(0.75, abs=0.01)


# layout


def test_void_is_background(own):
    path = own.items()[0].data.truths[0]
    labels = np.array(Image.open(path))
    labels[:2] = 255
    Image.fromarray(labels).save(path)
    assert read_annotation(path)[:2].max() == 0


def test_what_is_missing_is_told_with_its_path(own, tmp_path):
    (own.root / "Annotations/480p/swan/00003.png").unlink()
    with pytest.raises(
        ds.MissingError, match=r"Frame 00003 of swan has no annotation.*Annotations/480p/swan/00003\.png"
    ):
        own.items()
    with pytest.raises(ds.MissingError, match=r"no .*val\.txt \(did you mean the folder DAVIS in it\?\)"):
        DAVIS(tmp_path).items()
    with pytest.raises(ds.InputError, match="does not list 'goose'"):
        DAVIS(ROOT, sequences=("goose",)).items()
    shutil.rmtree(own.root / "JPEGImages/480p/swan")
    with pytest.raises(ds.MissingError, match="holds 0"):
        own.items()


def spoilt(folder, change):
    shutil.copytree(RESULTS, folder)
    path = folder / "swan" / "00002.png"
    change(path)
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.unlink(), "no mask .*swan/00002.png"),
        (lambda path: path.write_bytes(b"?"), "00002.png is damaged"),
        (lambda path: Image.open(path).convert("RGB").save(path), "00002.png is a picture in RGB"),
        (lambda path: Image.open(path).resize((9, 7)).save(path), "Frame 00002 of swan: the mask is 9x7"),
        (lambda path: Image.fromarray(np.array(Image.open(path)) + 7).save(path), "00002 of swan has a label"),
    ],
)
def test_results_that_cannot_be_measured_name_sequence_and_frame(davis, tmp_path, change, sentence):
    folder = spoilt(tmp_path / "results", change)
    with pytest.raises(ds.DenoscopeError, match=sentence):
        davis.read_results(folder)(davis.items()[0])


def test_a_first_annotation_without_objects_is_told(own):
    item = own.items()[0]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(item.data.truths[0])
    with pytest.raises(ds.InputError, match="shows no object"):
        own.copied(item)
