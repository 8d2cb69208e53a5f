"""Label propagation against the dense formula and the recordings; labels in and out; tracking what moves."""

import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import denoscope as ds
from denoscope.correspondence.labels import (
    PALETTE,
    box_labels,
    hard_mask,
    joint_cells,
    joint_maps,
    mask_maps,
    read_mask_labels,
    write_mask,
)
from denoscope.correspondence.tracking import propagation_settings
from denoscope.features import as_extractor

EVAL = GOLDEN / "dift-eval"


def dense(features, first, context, radius, topk, temperature):
    """The whole affinity of the specification, one frame after another."""
    h, w = features[0].shape[1:]
    unit = [torch.nn.functional.normalize(f.flatten(1), dim=0) for f in features]
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    far = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    window = (far <= radius).float() if radius else torch.ones(h * w, h * w)
    found = [first.flatten(1)]
    for k in range(1, len(features)):
        sources = [0, *range(max(1, k - context), k)]
        affinity = torch.cat([torch.exp(unit[s].T @ unit[k] / temperature) * window for s in sources])
        least = affinity.topk(min(topk, len(affinity)), dim=0).values[-1]
        affinity[affinity < least] = 0
        affinity /= affinity.sum(0)
        found.append(torch.cat([found[s] for s in sources], 1) @ affinity)
    return torch.stack(found).unflatten(2, (h, w))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 5), st.integers(1, 30), st.integers(1, 12),
    st.sampled_from([0.05, 0.2, 1]), st.integers(0, 99),
)  # fmt: skip
def test_the_windowed_result_is_that_of_the_dense_formula(h, w, context, radius, topk, chunk, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(4, h, w, generator=generator) for _ in range(5)]
    first = torch.rand(3, h, w, generator=generator)
    given = {"context": context, "radius": radius, "topk": topk, "temperature": temperature}
    found = torch.stack(list(ds.propagate_labels(features, first, chunk=chunk, **given)))
    torch.testing.assert_close(found, dense(features, first, **given), atol=1e-5, rtol=1e-4)


def test_ties_with_the_last_of_the_best_survive():
    one = torch.zeros(2, 1, 5)
    one[0] = 1  # all cells alike: every source in the window is tied, whatever k
    first = torch.tensor([[[1.0, 0, 0, 0, 0]]])
    soft = list(ds.propagate_labels([one, one], first, radius=1, topk=1))[1]
    torch.testing.assert_close(soft, torch.tensor([[[1 / 2, 1 / 3, 0, 0, 0]]]))


def test_recorded_soft_and_hard_labels():
    recorded, said = load_file(EVAL / "labelprop.safetensors"), json.loads((EVAL / "labelprop.json").read_text())
    mask = read_mask_labels(EVAL / "labelprop/Annotations/480p/vid/00000.png")
    first, numbers = mask_maps(mask, tuple(said["feat_hw"][::-1]))
    assert torch.equal(first, recorded["first_seg"][0])
    assert np.array_equal(mask, recorded["hard"][0].numpy())
    softs = ds.propagate_labels(
        recorded["features"],
        first,
        context=said["n_last_frames"],
        radius=said["size_mask_neighborhood"],
        topk=said["topk"],
        temperature=said["temperature"],
    )
    next(softs)
    for soft, expected, hard in zip(softs, recorded["soft"], recorded["hard"][1:], strict=True):
        torch.testing.assert_close(soft, expected, atol=1e-5, rtol=0)
        found = hard_mask(soft, numbers, tuple(said["resized_hw"][::-1]), tuple(said["frame_wh"]))
        assert np.array_equal(found, hard.numpy())


def test_labels_that_sum_to_one_go_on_doing_so_and_channels_may_be_permuted():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(6, 7, 9, generator=generator) for _ in range(4)]
    first = torch.nn.functional.one_hot(torch.randint(3, (7, 9), generator=generator)).permute(2, 0, 1).float()
    softs = list(ds.propagate_labels(features, first, radius=2))
    torch.testing.assert_close(torch.stack(softs).sum(1), torch.ones(4, 7, 9))
    again = ds.propagate_labels([f[[3, 1, 5, 0, 2, 4]] for f in features], first, radius=2)
    torch.testing.assert_close(torch.stack(list(again)), torch.stack(softs), atol=1e-5, rtol=1e-4)
    still = list(ds.propagate_labels([features[0]] * 4, first, topk=1))
    assert torch.equal(still[-1], first)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one._base is None:
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return out


def test_the_affinity_is_never_whole_and_old_features_are_let_go():
    alive, h, w, context = [], 30, 52, 5

    def features():
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            values = torch.randn(8, h, w, generator=generator)
            alive.append(weakref.ref(values))
            yield values
            del values
            assert sum(one() is not None for one in alive) <= 1  # raw features are dropped at once

    first = torch.ones(1, h, w)
    with Largest() as largest:
        for _ in ds.propagate_labels(features(), first, context=context, radius=7):
            pass
    assert largest.elements < (context + 1) * (h * w) ** 2 / 40


def test_features_are_taken_one_by_one():
    asked = []

    def features():
        for index in range(100):
            asked.append(index)
            yield torch.ones(1, 2, 2)

    softs = ds.propagate_labels(features(), torch.ones(1, 2, 2))
    next(softs), next(softs)
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"context": -1}, "0 or more"),
        ({"topk": 0}, "at least 1"),
        ({"temperature": 0.0}, "positive"),
        ({"temperature": float("nan")}, "positive"),
        ({"chunk": 0}, "at least 1 cell"),
        ({"first": torch.full((1, 2, 2), torch.nan)}, "finite"),
    ],
)
def test_wrong_settings_are_told_at_once(change, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        ds.propagate_labels(**{"features": iter([]), "first": torch.ones(1, 2, 2), **change})


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (torch.ones(3, 2, 4), "Frame 1 has features"),
        (torch.ones(4, 2, 2), "4 channels but the first 3"),
        (torch.full((3, 2, 2), torch.inf), "frame 1 are not finite"),
    ],
)
def test_features_that_change_are_told(second, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        list(ds.propagate_labels([torch.ones(3, 2, 2), second], torch.ones(1, 2, 2)))


# labels


def saved(tmp_path, image):
    image.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_masks_hold_palette_indices_and_void_is_background(tmp_path):
    labels = np.array([[0, 1, 200], [3, 255, 0]], np.uint8)
    path = write_mask(labels, tmp_path / "m.png")
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        as_colours = image.convert("RGB")
    expected = [[0, 1, 200], [3, 0, 0]]
    assert read_mask_labels(path).tolist() == expected
    assert read_mask_labels(saved(tmp_path, Image.fromarray(labels))).tolist() == expected
    assert read_mask_labels(labels).tolist() == expected
    back = np.array(PALETTE).reshape(-1, 3)[255]
    assert (back == (224, 224, 192)).all()
    assert read_mask_labels(saved(tmp_path, as_colours)).tolist() == expected  # the palette's colours are its numbers


def test_masks_in_black_and_white_with_soft_edges_and_in_flat_colours(tmp_path):
    white = np.zeros((20, 20), np.uint8)
    white[5:15, 5:15] = 255
    one = np.asarray(white == 255, np.uint8)
    assert np.array_equal(read_mask_labels(saved(tmp_path, Image.fromarray(white))), one)
    assert np.array_equal(read_mask_labels(saved(tmp_path, Image.fromarray(white).convert("1"))), one)
    soft = np.zeros((200, 200), np.uint8)
    soft[50:150, 50:150] = 255
    soft[49, 50:150], soft[150, 50:150] = 90, 200
    found = read_mask_labels(saved(tmp_path, Image.fromarray(soft)))
    assert found[49].max() == 0
    assert found[150].max() == 1
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[0, 3], colours[2], colours[3] = (9, 200, 9), (250, 10, 10), (9, 200, 9)
    assert read_mask_labels(saved(tmp_path, Image.fromarray(colours))).tolist() == [
        [0, 0, 0, 1], [0] * 4, [2] * 4, [1] * 4,
    ]  # fmt: skip
    clear = Image.fromarray(colours).convert("RGBA")
    clear.putalpha(Image.fromarray(np.array([[255] * 4] * 3 + [[0] * 4], np.uint8)))
    assert read_mask_labels(saved(tmp_path, clear))[3].max() == 0


def test_a_small_object_beside_void_is_not_taken_for_soft_edges(tmp_path):
    labels = np.zeros((40, 40), np.uint8)
    labels[:4], labels[10, 10] = 255, 1
    assert read_mask_labels(saved(tmp_path, Image.fromarray(labels))).sum() == 1


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.zeros((4, 4), np.uint8), "empty"),
        (np.full((4, 4), 0.5), "whole numbers"),
        (np.zeros((4, 4, 3), np.uint8), "height, width"),
        (np.full((2, 2), -1), "use 0 to 254"),
        (np.arange(100, dtype=np.uint8).reshape(10, 10), "100 levels"),
        (Image.effect_noise((32, 32), 50), "levels"),
        (Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)), "81 colours"),
    ],
)
def test_masks_that_are_none_are_told(mask, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        read_mask_labels(mask)


def test_damaged_and_missing_masks_are_told(tmp_path):
    with pytest.raises(ds.MissingError, match="no mask"):
        read_mask_labels(tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(ds.InputError, match="cannot be read"):
        read_mask_labels(tmp_path / "bad.png")


def test_numbers_that_do_not_occur_change_nothing():
    generator = torch.Generator().manual_seed(3)
    soft = torch.rand(3, 5, 6, generator=generator)
    found = hard_mask(soft, [0, 4, 9], (48, 40), (50, 41))
    wide = torch.zeros(10, 5, 6)
    wide[[0, 4, 9]] = soft
    assert np.array_equal(found, hard_mask(wide, list(range(10)), (48, 40), (50, 41)))
    assert set(np.unique(found)) == {0, 4, 9}


def test_a_mask_of_the_whole_picture_stays_whole():
    maps, numbers = mask_maps(np.ones((8, 8), np.uint8), (4, 4))
    assert hard_mask(maps, numbers, (8, 8), (8, 8)).min() == 1


def test_boxes_become_objects_and_small_ones_lie_on_top():
    labels = box_labels([(0, 0, 9, 9), (2, 3, 4, 4)], (12, 10))
    assert (labels == 2).sum() == 3 * 2
    assert labels[9, 9] == 1
    assert labels[9, 10] == 0
    for wrong, sentence in [
        ([(0, 0, 50, 5)], "no box inside"), ([(5, 5, 2, 8)], "no box inside"), ([(1, 2, 3)], "four numbers"),
        ([], "0 boxes"), ([(1, 1, 3, 3), (1, 1, 3, 3)], "hidden"), ([(float("nan"), 0, 3, 3)], "no box inside"),
    ]:  # fmt: skip
        with pytest.raises(ds.InputError, match=sentence):
            box_labels(wrong, (12, 10))


@given(st.floats(-6, 20), st.floats(-6, 16))
def test_a_joint_is_found_again_near_where_it_was_drawn(x, y):
    maps, official = (joint_maps(torch.tensor([[x, y]]), (14, 10), official) for official in (False, True))
    if x >= 1.5 and y >= 1.5:
        assert torch.equal(maps, official)
    inside = -0.5 <= x < 13.5 and -0.5 <= y < 9.5
    found = joint_cells(maps)[0]
    if inside:
        assert maps[1].max() == 1
        assert (found - torch.tensor([x, y])).abs().max() <= 1
    if maps[1].max() == 0:
        assert found.tolist() == [-1, -1]
    assert torch.equal(maps[0], (maps[1] == 0).float())


# tracking


def moving(count=6, size=(96, 64), step=4):
    """A textured patch that moves to the right by `step` pixels a frame before a grey wall, and its corners."""
    patch = np.random.default_rng(5).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    back, patch = np.full((size[1], size[0], 3), 128, np.uint8), np.kron(patch, np.ones((4, 4, 1), np.uint8))
    frames, corners = [], []
    for index in range(count):
        image, x = back.copy(), 16 + index * step
        image[20:44, x : x + 24] = patch
        frames.append(ds.read(image))
        corners.append((x, 20, x + 23, 43))
    return frames, corners


class Colours:
    """Features that are alike where the colours of 4 x 4 pixels are: random waves of the mean colour."""

    name = "colours"

    def describe(self):
        return {"model": self.name}

    def __call__(self, picture, prompt=None):
        cells = torch.nn.functional.avg_pool2d(picture.pixels, 4)
        waves = 40 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        angles = torch.einsum("kc,chw->khw", waves, cells)
        frame = ds.Frame.of(picture.size).resize((cells.shape[2], cells.shape[1]))
        return ds.FeatureMap(torch.cat([angles.cos(), angles.sin()]), frame, self.describe())


@pytest.fixture
def colours():
    return Colours()


def test_masks_follow_what_moves(colours):
    frames, corners = moving()
    mask = box_labels(corners[:1], frames[0].size) * 7
    tracked = list(ds.track(colours, frames, mask=mask, radius=4, topk=3, temperature=0.05))
    assert [one.index for one in tracked] == list(range(6))
    assert np.array_equal(tracked[0].mask, mask)
    for one, corner in zip(tracked, corners, strict=True):
        truth = box_labels([corner], frames[0].size) > 0
        assert (truth & (one.mask == 7)).sum() / (truth | (one.mask == 7)).sum() > 0.95
        assert one.objects == [7]
        assert one.scores[0] > 0.5


def test_boxes_follow_what_moves(colours):
    frames, corners = moving()
    for one, corner in zip(
        ds.track(colours, frames, boxes=corners[:1], radius=4, topk=3, temperature=0.05), corners, strict=True
    ):
        assert np.abs(np.subtract(one.rows()[0]["box"], corner)).max() <= 1


def test_points_follow_what_moves_and_keep_their_place_in_the_cell(colours):
    frames, corners = moving()
    start = torch.tensor([[corners[0][0] + 9.0, 30.0], [corners[0][0] + 15.5, 34.0]]).double()
    for one, corner in zip(ds.track(colours, frames, points=start, radius=4, topk=1), corners, strict=True):
        moved = start + torch.tensor([corner[0] - corners[0][0], 0])
        assert (one.points - moved).abs().max() < 0.01
        assert one.mask is None


def test_a_point_that_nothing_looks_like_any_more_is_lost(colours):
    image = np.full((8, 48, 3), 200, np.uint8)
    image[:, :12] = 10
    gone = np.full_like(image, 200)
    first, last = ds.track(colours, [ds.read(image), ds.read(gone)], points=[(2, 2), (40, 4)], topk=1, temperature=0.01)
    assert first.rows()[0] == {"object": 0, "score": 1.0, "x": 2.0, "y": 2.0}
    assert last.rows()[0] == {"object": 0, "score": 0.0, "x": None, "y": None}
    assert last.rows()[1]["x"] is not None
    assert last.draw().size == (48, 8)


def test_the_preset_and_the_propagation_are_the_models_own(seedling, adm, sd, colours):
    assert propagation_settings(as_extractor(adm)) == {"context": 28, "radius": 15, "topk": 10, "temperature": 0.1}
    assert propagation_settings(as_extractor(sd))["temperature"] == 0.2
    assert propagation_settings(colours)["topk"] == 15
    frames, corners = moving(2)
    one = list(ds.track(seedling, frames, boxes=corners[:1], ensemble=1, radius=3))[1]
    assert one.recipe["preset"] == "temporal"
    assert one.recipe["propagation"]["radius"] == 3


def test_tracking_holds_one_frame_at_a_time(colours):
    alive = []

    class Video(list):
        def __iter__(self):
            for index in range(12):
                picture = ds.read(np.random.default_rng(index).integers(0, 256, (32, 48, 3), dtype=np.uint8))
                alive.append(weakref.ref(picture))
                yield picture
                del picture
                assert sum(one() is not None for one in alive) <= 3

    for one in ds.track(colours, Video([0] * 12), points=[(8, 8)], context=2, radius=2):
        assert one.picture.size == (48, 32)
        del one


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({}, "one of mask, points or boxes"),
        ({"points": [(1, 1)], "boxes": [(1, 1, 5, 5)]}, "one of mask, points or boxes"),
        ({"points": [(96, 1)]}, "outside the picture"),
        ({"mask": np.ones((10, 10), np.uint8)}, "The mask is 10x10 but the first frame 96x64"),
        ({"boxes": [(1, 1, 99, 5)]}, "no box inside"),
        ({"points": [(1, 1)], "topk": 0}, "topk"),
    ],
)
def test_labels_that_do_not_fit_are_told(colours, labels, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        ds.track(colours, moving(2)[0], **labels)


def test_an_object_too_small_for_the_features_is_told(colours):
    mask = np.zeros((64, 96), np.uint8)
    mask[:30], mask[61, 93] = 1, 2
    with pytest.warns(UserWarning, match="Object 2 is smaller"):
        tracked = list(ds.track(colours, moving(2)[0], mask=mask))
    assert tracked[1].scores[1] == 0
    assert tracked[1].rows()[1]["box"] is None


@pytest.mark.parametrize("labels", [{"points": [(20, 30), (50, 12)]}, {"boxes": [(16, 20, 39, 43)]}])
def test_tracks_are_saved_in_every_format_and_drawn(colours, labels, tmp_path):
    frames, _ = moving(4)
    found = ds.Tracks.collect(ds.track(colours, frames, **labels, radius=3))
    assert len(found) == 4
    assert found.points.shape == (4, len(next(iter(labels.values()))), 2)
    whole = json.loads(found.save(tmp_path / "t.json").read_text())
    assert whole["frames"][3]["objects"] == found.frames[3]["objects"]
    assert len(found.save(tmp_path / "t.csv").read_text().splitlines()) == 1 + 4 * len(whole["frames"][0]["objects"])
    with np.load(found.save(tmp_path / "t.npz")) as arrays:
        assert np.allclose(arrays["points"], found.points)
    with Image.open(found.save(tmp_path / "t.png")) as drawn:
        assert drawn.size == (96, 64)
        assert np.array(drawn.convert("RGB")).tobytes() != frames[0].image().tobytes()
    with pytest.raises(ds.InputError, match="saved as"):
        found.save(tmp_path / "t.txt")


def test_only_masks_are_saved_as_masks(colours, tmp_path):
    frames, corners = moving(2)
    by_box, by_point = (
        next(iter(ds.track(colours, frames, **one))) for one in ({"boxes": corners[:1]}, {"points": [(9, 9)]})
    )
    assert np.array_equal(read_mask_labels(by_box.save(tmp_path / "a.png")), by_box.mask)
    with pytest.raises(ds.InputError, match="saved as .png"):
        by_box.save(tmp_path / "a.jpg")
    with pytest.raises(ds.InputError, match="no mask"):
        by_point.save(tmp_path / "b.png")


def test_memory_at_480p():
    """60 x 104 cells, 29 context frames: the dense formula would hold 4.5 GB three times over (channels only cost time)."""
    program = """
import resource, torch
from denoscope.correspondence.propagation import _step
torch.set_num_threads(1)
frame = torch.nn.functional.normalize(torch.randn(60, 104, 64), dim=2).permute(2, 0, 1)
first = torch.nn.functional.one_hot(torch.randint(2, (60, 104))).permute(2, 0, 1).float()
unit = frame.permute(1, 2, 0).contiguous()
sources, labels = [unit.clone() for _ in range(29)], torch.stack([first] * 29)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_step(unit, sources, labels, 15, 15, 0.2, 8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(found.stdout) / 1024 < 200  # MiB; the requirement is 1.5 GB
