"""Edit propagation: the warp of a known scene, the exact nearest neighbours, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scenes import Patches, homography_pair, textured
from torch.nn import functional as F

import denoscope as ds
from denoscope.cli.main import main
from denoscope.correspondence import corner_error
from denoscope.correspondence.edits import absurd, nearest, normalised, read_edit
from denoscope.images import Frame

SIZE = (96, 80)
BOX = torch.tensor([[20.0, 20.0], [70.0, 20.0], [70.0, 60.0], [20.0, 60.0]], dtype=torch.float64)


@pytest.fixture
def edit():
    image = Image.new("RGBA", SIZE)
    pen = ImageDraw.Draw(image)
    pen.rectangle((25, 20, 70, 60), fill=(255, 230, 0, 255))
    pen.ellipse((40, 30, 55, 45), fill=(0, 0, 255, 128))
    return image


@pytest.mark.parametrize(
    "options", [{}, {"convention": "official"}, {"cycle": 3}, {"fit": "affine"}, {"method": "usac-magsac"}]
)
def test_an_edit_lands_where_the_homography_takes_it(edit, options):
    one, two, truth = homography_pair(5, SIZE, 0.02 if "fit" in options else 0.06)
    found = ds.propagate_edit(Patches(), edit, one, two, points=300, **options)
    assert found.ok
    box = torch.tensor([[25.0, 20.0], [70.0, 20.0], [70.0, 60.0], [25.0, 60.0]], dtype=torch.float64)
    assert corner_error(found.matrix, truth, SIZE) < 4  # extrapolated from the edit to the whole picture
    homogeneous = torch.cat([box, torch.ones(4, 1)], 1).double()
    ours, theirs = (homogeneous @ torch.from_numpy(np.asarray(m)).mT for m in (found.matrix, truth))
    assert (ours[:, :2] / ours[:, 2:] - theirs[:, :2] / theirs[:, 2:]).norm(dim=1).max() < 2
    assert found.inliers.float().mean() > 0.6
    # the composite is the sticker over the target
    sticker, target, image = (np.asarray(i).astype(float) for i in (found.sticker, two.image(), found.image))
    alpha = sticker[..., 3:] / 255
    assert np.abs(alpha * sticker[..., :3] + (1 - alpha) * target - image).max() <= 0.5
    x, y = (ours[:, :2] / ours[:, 2:]).mean(0).round().long().tolist()
    assert sticker[y, x, 3] > 100
    inside = sticker[..., 3] == 255  # colours stay what they were painted in: yellow, or yellow to blue
    assert (sticker[inside][:, 2] < 255 * 0.6).all()


def test_no_fringe_of_the_colours_under_transparent_pixels(edit):
    """The transparent pixels of the edit are black; a yellow edge must not darken."""
    one, two, _ = homography_pair(5, SIZE, 0.06)
    plain = Image.new("RGBA", SIZE)
    ImageDraw.Draw(plain).rectangle((25, 20, 70, 60), fill=(255, 230, 0, 255))
    found = ds.propagate_edit(Patches(), plain, one, two, points=200)
    sticker = np.asarray(found.sticker).astype(int)
    edge = (sticker[..., 3] > 20) & (sticker[..., 3] < 235)
    assert edge.sum() > 20
    assert np.abs(sticker[edge][:, :3] - [255, 230, 0]).max() < 16
    official = ds.propagate_edit(Patches(), plain, one, two, points=200, convention="official")
    sticker = np.asarray(official.sticker).astype(int)
    edge = (sticker[..., 3] > 20) & (sticker[..., 3] < 235)
    assert np.abs(sticker[edge][:, :3] - [255, 230, 0]).max() > 100  # as published


@given(st.integers(0, 10_000), st.sampled_from(["exact", "official"]))
def test_nearest_neighbours_are_those_of_the_enlarged_maps(seed, convention):
    generator = torch.Generator().manual_seed(seed)
    sizes, cells = [(23, 17), (19, 26)], [(6, 5), (5, 7)]
    one, two = (
        ds.FeatureMap(torch.randn(8, c[1], c[0], generator=generator), Frame.of(s).resize(c))
        for s, c in zip(sizes, cells, strict=True)
    )
    large = [
        F.interpolate(
            F.normalize(fm.values, dim=0)[None].double(), fm.frame.picture[::-1], mode="bilinear",
            align_corners=convention == "official",
        )[0]
        for fm in (one, two)
    ]  # fmt: skip
    points = torch.tensor([[0.0, 0.0], [22, 16], [7, 9], [15, 3]], dtype=torch.float64)
    found = nearest(normalised(one, convention), normalised(two, convention), points)
    vectors = torch.stack([large[0][:, int(y), int(x)] for x, y in points])
    distance = torch.cdist(vectors, large[1].flatten(1).mT) ** 2
    index = (found[:, 1] * 19 + found[:, 0]).long()
    assert (distance.gather(1, index[:, None])[:, 0] <= distance.amin(1) + 1e-5).all()


def test_the_seed_decides_the_points(edit):
    one, two, _ = homography_pair(5, SIZE)
    first, same, other = (ds.propagate_edit(Patches(), edit, one, two, points=50, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.source_points, same.source_points)
    assert np.array_equal(first.matrix, same.matrix)
    assert not torch.equal(first.source_points, other.source_points)
    x, y = first.source_points.long().T
    assert (np.asarray(edit)[y, x, 3] > 0).all()


def test_maps_that_nobody_wants():
    size = (100, 80)
    fine = np.array([[0.9, 0.1, 3], [-0.1, 1.1, 2], [1e-4, 0, 1]])
    assert absurd(fine, BOX, size, size) == ""
    assert absurd(5 * fine, BOX, size, size) == ""
    assert absurd(-fine, BOX, size, size) == ""
    mirror = np.array([[-1.0, 0, 99], [0, 1, 0], [0, 0, 1]])
    half_turn = np.array([[-1.0, 0, 99], [0, -1, 79], [0, 0, 1]])
    assert "mirrored" in absurd(mirror, BOX, size, size)
    assert absurd(half_turn, BOX, size, size) == ""
    assert "horizon" in absurd(np.array([[1, 0, 0], [0, 1, 0], [-1 / 45, 0, 1]]), BOX, size, size)
    assert "foreshortened" in absurd(np.array([[1, 0, 0], [0, 1, 0], [-1 / 76, 0, 1]]), BOX, size, size)
    assert "squashed" in absurd(np.diag([0.3, 3.0, 1]), BOX, size, size)
    assert "shrunk" in absurd(np.diag([0.05, 0.05, 1]), BOX, size, size)
    assert absurd(np.diag([0.05, 0.05, 1]), BOX, size, (5, 4)) == ""  # the target is as much smaller
    assert "enlarged" in absurd(np.diag([9.0, 9.0, 1]), BOX, size, size)
    assert "outside" in absurd(np.array([[1.0, 0, 200], [0, 1, 0], [0, 0, 1]]), BOX, size, size)


def test_what_cannot_be_placed_is_a_result(edit, tmp_path):
    one = textured(0, *SIZE)
    flat = ds.read(np.full((60, 50, 3), 90, np.uint8))
    mirrored = ds.read(np.ascontiguousarray(np.array(one.image())[:, ::-1]))
    good, empty = ds.propagate_edit(Patches(), edit, one, [one, flat], points=200)
    assert good.ok
    assert not empty.ok
    assert empty.reason
    assert np.array_equal(np.asarray(empty.image), np.asarray(flat.image()))
    assert not np.asarray(empty.sticker).any()
    turned = ds.propagate_edit(Patches(reach=0), edit, one, mirrored, points=200)
    assert not turned.ok
    for name in ("a.json", "a.npz", "a.png"):
        assert empty.save(tmp_path / name).stat().st_size > 50
    assert json.loads((tmp_path / "a.json").read_text())["ok"] is False
    with pytest.raises(ds.InputError, match="saved as"):
        good.save(tmp_path / "a.txt")


def test_mistakes_are_named(edit, tmp_path):
    one = textured(0, *SIZE)
    edit.convert("RGB").save(tmp_path / "flat.png")
    edit.resize((50, 40)).save(tmp_path / "small.png")
    Image.new("RGBA", SIZE).save(tmp_path / "empty.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for what, sentence in [
        (tmp_path / "flat.png", "flat.png has no transparency"),
        (tmp_path / "small.png", "small.png is 50x40 but its source 96x80"),
        (tmp_path / "empty.png", "empty.png is transparent everywhere"),
        (tmp_path / "broken.png", "not an image"),
        (np.zeros((80, 96, 3), np.uint8), "RGBA"),
    ]:
        with pytest.raises(ds.InputError, match=sentence):
            ds.propagate_edit(Patches(), what, one, one)
    with pytest.raises(ds.MissingError, match="nowhere"):
        read_edit(tmp_path / "nowhere.png", SIZE)
    for options, sentence in [
        ({"points": 0}, "at least 1 point"),
        ({"fit": "fundamental"}, "homography, affine, similarity"),
        ({"cycle": math.nan}, "0 or more"),
        ({"convention": "x"}, "'exact' or 'official'"),
        ({"threshold": -1}, "positive"),
        ({"method": "x"}, "usac-magsac"),
    ]:
        with pytest.raises(ds.InputError, match=sentence):
            ds.propagate_edit(Patches(), edit, one, one, **options)
    palette = edit.quantize(16)
    assert palette.mode == "P"
    assert read_edit(palette, SIZE).shape == (80, 96, 4)


def test_command(edit, tmp_path, monkeypatch, capsys):
    one, two, _ = homography_pair(5, SIZE, 0.05)
    edit.save(tmp_path / "edit.png")
    flat = ds.read(np.full((80, 96, 3), 90, np.uint8))
    for name, picture in (("one", one), ("two", two), ("flat", flat)):
        picture.image().save(tmp_path / f"{name}.png")
    out = tmp_path / "o"
    files = [tmp_path / f"{name}.png" for name in ("edit", "one", "two", "flat")]
    options = ["--size", "long96", "--ensemble", 1, "--points", 200, "--stickers", "--out", out]
    monkeypatch.setattr("sys.argv", ["denoscope", "propagate", *map(str, [*files, *options])])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "not placed" in capsys.readouterr().out
    saved = json.loads((out / "edits.json").read_text())
    assert [target["ok"] for target in saved["targets"]] == [True, False]
    names = {path.name for path in out.iterdir()}
    assert names == {"two.png", "two_edit.png", "contact_sheet.png", "edits.json"}
    with Image.open(out / "two_edit.png") as written:
        assert written.mode == "RGBA"
    monkeypatch.setattr("sys.argv", ["denoscope", "propagate", *map(str, [files[1], *files[1:], *options])])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no transparency" in capsys.readouterr().err
