"""The store of labelled pixels: what is in it, that it is made once, and that it is never in memory."""

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import denoscope as ds
from denoscope.images import Frame
from denoscope.segmentation.ensemble import fit
from denoscope.segmentation.examples import Example
from denoscope.segmentation.few_shot import gather, label_size
from denoscope.segmentation.pixels import (
    IGNORED,
    PixelStore,
    chosen_pixels,
    interpolated,
    resized_labels,
    without_small,
)


def feature_map(seed, channels=5, grid=(7, 4), picture=(40, 30), scale=1.0):
    values = torch.randn(channels, grid[1], grid[0], generator=torch.Generator().manual_seed(seed)) * scale
    return ds.FeatureMap(values, Frame.of(picture).resize(grid))


def labels_of(seed, size=(40, 30), classes=3, unknown=0.2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size[::-1]).astype(np.int16)
    return np.where(rng.random(size[::-1]) < unknown, IGNORED, labels).astype(np.int16)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 17), st.integers(1, 17), st.integers(0, 99))
def test_interpolation_is_that_of_the_enlarged_map(columns, rows, width, height, seed):
    fm = feature_map(seed, 3, (columns, rows), (2 * columns, 3 * rows))
    whole = F.interpolate(fm.values[None], (height, width), mode="bilinear", align_corners=False)[0]
    places = torch.randperm(width * height, generator=torch.Generator().manual_seed(seed))
    found = interpolated(fm.values.flatten(1).mT.contiguous(), fm.frame, (width, height), places)
    assert (found - whole.flatten(1).mT[places]).abs().max() < 1e-5


def test_features_of_a_part_of_the_picture_are_where_they_belong():
    frame = Frame.of((40, 30)).resize((8, 6)).crop(2, 1, 4, 3)
    column = torch.arange(4.0).repeat(3)[:, None]  # the column of every cell
    places = torch.arange(40 * 30)
    found = interpolated(column, frame, (40, 30), places)[:, 0].view(30, 40)
    x = ((torch.arange(40) + 0.5) / 5 - 2 - 0.5).clamp(0, 3)
    assert torch.allclose(found, x.expand(30, 40), atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 30))
def test_pixels_of_a_class_are_drawn_by_the_seed(seed, most):
    labels = labels_of(seed, (11, 9), 4)
    every = chosen_pixels(labels)
    assert np.array_equal(np.flatnonzero(labels.ravel() != IGNORED), every)
    some = chosen_pixels(labels, most, seed)
    assert np.array_equal(some, chosen_pixels(labels, most, seed))
    assert set(some) <= set(every)
    assert (np.diff(some) > 0).all()
    for number in range(4):
        assert (labels.ravel()[some] == number).sum() == min(most, (labels == number).sum())


def test_small_annotations_are_ignored():
    labels = np.zeros((10, 10), np.int16)
    labels[0], labels[1, :9] = 1, 1  # 19 pixels
    labels[4:6] = 2  # 20 pixels
    kept = without_small(labels)
    assert sorted(np.unique(kept)) == [IGNORED, 0, 2]
    assert (kept == IGNORED).sum() == 19
    assert np.array_equal(without_small(labels, 0), labels)


def test_label_maps_keep_the_aspect_or_are_square_as_published():
    assert label_size((640, 480), 128) == (128, 96)
    assert label_size((90, 120), 128) == label_size((90, 120), None) == (90, 120)
    assert label_size((90, 120), (256, 256)) == (256, 256)
    with pytest.raises(ds.InputError, match="at least 8"):
        label_size((640, 480), 4)
    labels = np.array([[0, 1], [2, IGNORED]], np.int16)
    assert np.array_equal(resized_labels(labels, (4, 4)), labels.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_any_pixels_of_any_picture_are_read_back(tmp_path, precision):
    store, values, classes = PixelStore(tmp_path, precision), [], []
    for k in range(4):
        fm, labels = feature_map(k), labels_of(k)
        places = chosen_pixels(labels, 50)
        store.add(fm, labels, places, ["picture", k])
        whole = F.interpolate(fm.values[None], (30, 40), mode="bilinear", align_corners=False)[0].flatten(1).mT
        values.append(whole[places])
        classes.append(torch.from_numpy(labels.ravel()[places]))
    assert len(store) == sum(map(len, values))
    assert store.channels == 5
    assert store.classes.tolist() == [0, 1, 2]
    rows = torch.randint(0, len(store), (3, 200), generator=torch.Generator().manual_seed(0))
    found, labels = store.take(rows)
    assert torch.equal(labels, torch.cat(classes)[rows].long())
    assert (found - torch.cat(values)[rows]).abs().max() < (2e-3 if precision == "float16" else 1e-5)
    assert store.bytes == len(store) * (5 * np.dtype(precision).itemsize + 2)


class Counting:
    """Features that count how often they are made."""

    def __init__(self, fail=None):
        self.made, self.fail = [], fail

    def __call__(self, picture):
        if picture.size[0] == self.fail:
            raise KeyboardInterrupt
        self.made.append(picture.size[0])
        return ds.FeatureMap(picture.resized((6, 4)), Frame.of(picture.size).resize((6, 4)))


def test_what_was_written_before_a_stop_is_not_made_again(tmp_path):
    rng = np.random.default_rng(0)
    examples = [Example(ds.read(rng.random((30, width, 3))), labels_of(width, (width, 30))) for width in (40, 41, 42)]
    first = Counting(fail=42)
    with pytest.raises(KeyboardInterrupt):
        gather(PixelStore(tmp_path), examples, first, {"model": "a"})
    assert first.made == [40, 41]
    again, store = Counting(), PixelStore(tmp_path)
    gather(store, examples, again, {"model": "a"})
    assert again.made == [42]
    assert len(list(tmp_path.iterdir())) == 6
    rows = torch.arange(len(store))
    for told in ({"model": "b"}, {"model": "a", "t": 3}):  # other features are other files
        other = Counting()
        gather(PixelStore(tmp_path), examples, other, told)
        assert other.made == [40, 41, 42]
    fresh = PixelStore(tmp_path / "fresh")
    gather(fresh, examples, Counting(), {"model": "a"})
    assert torch.equal(store.take(rows)[0], fresh.take(rows)[0])


def test_features_that_do_not_fit_leave_no_file(tmp_path):
    labels = labels_of(0)
    places = chosen_pixels(labels)
    with pytest.raises(ds.InputError, match="too large for float16; keep the pixels in float32"):
        PixelStore(tmp_path).add(feature_map(0, scale=1e5), labels, places, 0)
    PixelStore(tmp_path / "exact", "float32").add(feature_map(0, scale=1e5), labels, places, 0)
    broken = feature_map(0)
    broken.values[0, 0, 0] = torch.nan
    with pytest.raises(ds.InputError, match="not finite"):
        PixelStore(tmp_path).add(broken, labels, places, 1)
    assert not [path for path in tmp_path.glob("*.npy") if "labels" not in path.name]
    store = PixelStore(tmp_path)
    store.add(feature_map(0), labels, places, 2)
    with pytest.raises(ds.InputError, match="here are 5 and 6"):
        store.add(feature_map(0, channels=6), labels, places, 3)


def test_damaged_files_are_named(tmp_path):
    labels = labels_of(0)
    PixelStore(tmp_path).add(feature_map(0), labels, chosen_pixels(labels), "a")
    (file,) = [path for path in tmp_path.glob("*.npy") if "labels" not in path.name]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ds.InputError, match=f"{file.name} is damaged"):
        PixelStore(tmp_path).open("a")
    file.write_bytes(b"")
    with pytest.raises(ds.InputError, match=f"{file.name} is damaged"):
        PixelStore(tmp_path).open("a")


def test_training_reads_batches_and_never_holds_the_pixels(tmp_path):
    store = PixelStore(tmp_path)
    labels = labels_of(0, (400, 300), 2, unknown=0)
    store.add(feature_map(0, channels=64, picture=(400, 300)), labels, chosen_pixels(labels), 0)
    assert store.bytes > 15_000_000
    tracemalloc.start()  # NumPy's allocations; memory maps are none
    try:
        reports = []
        with pytest.raises(StopIteration):
            fit(store, 2, models=2, report=lambda step, left: reports.append(step) if step < 200 else next(iter(())))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(reports) == 199
    assert peak < store.bytes / 10
