"""Flip alignment: a mirrored picture is found, with coordinates of the picture as the user has it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from hypothesis import given
from hypothesis import strategies as st

import denoscope as ds
from denoscope.correspondence import align_flip, counterparts, mirror, transfer, transfer_aligned, unmirrored
from denoscope.correspondence.mirroring import SPAIR_SWAPS, cells_within, instance_distance
from denoscope.features import BASELINES, Joint
from denoscope.images import Frame

SIFT = BASELINES["sift"](size="128x96", stride=4)


def leaning(seed: int = 0) -> ds.Picture:
    """Stripes and blobs that lean one way, so that the mirror image differs everywhere."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:96, 0:128].astype(float)
    plane = 0.5 + 0.25 * np.sin((x + 0.7 * y) / 4)
    for _ in range(14):
        cx, cy, a = rng.uniform(10, 118), rng.uniform(10, 86), rng.uniform(0.2, 0.5)
        u, v = x - cx, (y - cy) - 0.8 * (x - cx)
        plane += a * np.exp(-(u**2 / 60 + v**2 / 12)) * rng.choice([-1, 1])
    return ds.read(np.clip(np.stack([plane] * 3, -1), 0, 1))


POINTS = torch.tensor([[x, y] for x in (34, 62, 98) for y in (30, 62)], dtype=torch.float64)


def test_a_mirrored_copy_is_found_with_flip_and_not_without() -> None:
    source = leaning()
    target = mirror(source)
    expected = torch.stack([127 - POINTS[:, 0], POINTS[:, 1]], 1)
    without = ds.match(SIFT, source, target, POINTS)
    flipped = ds.match(SIFT, source, target, POINTS, flip=True, cycle=True)
    assert (flipped.points - expected).norm(dim=1).max() < 1.5
    assert ((without.points - expected).norm(dim=1) > 8).double().mean() > 0.5
    assert flipped.recipe["mirrored"] is True
    assert json.loads(json.dumps(flipped.to_dict()))["recipe"]["mirrored"] is True
    assert torch.equal(flipped.source_points, POINTS)
    assert flipped.cycle is not None
    assert flipped.cycle.max() < 1.5
    assert flipped.source.picture is not None
    assert torch.equal(flipped.source.picture.pixels, source.pixels)


def test_the_same_picture_is_left_as_it_is() -> None:
    source = leaning(1)
    plain, flipped = (ds.match(SIFT, source, source, POINTS, flip=flip) for flip in (False, True))
    assert torch.equal(plain.points, flipped.points)
    assert torch.equal(plain.scores, flipped.scores)
    assert "mirrored" not in plain.recipe
    assert flipped.recipe["mirrored"] is False


def test_every_target_has_its_own_choice() -> None:
    source = leaning(2)
    found = ds.match(SIFT, source, [source, mirror(source)], POINTS, flip=True)
    assert [one.recipe["mirrored"] for one in found] == [False, True]


def test_joint_features_with_a_pca_flip_too() -> None:
    source = leaning(3)
    joint = Joint([SIFT, BASELINES["rgb"](size="128x96", stride=4)], pca=16)
    found = ds.match(joint, source, mirror(source), POINTS, flip=True)
    expected = torch.stack([127 - POINTS[:, 0], POINTS[:, 1]], 1)
    assert found.recipe["mirrored"] is True
    assert (found.points - expected).norm(dim=1).max() < 1.5


@given(
    picture=st.tuples(st.integers(2, 300), st.integers(2, 300)),
    grid=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    left=st.integers(0, 9),
    right=st.integers(0, 9),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_unmirrored_maps_lie_over_the_picture(picture, grid, left, right, share) -> None:
    """What a map of the mirror image has at W - 1 - x, it has at x when it is laid back; also where the grid is padded."""
    frame = Frame.of(picture).resize(grid).pad(left=left, right=right)
    values = torch.randn(3, frame.grid[1], frame.grid[0], generator=torch.Generator().manual_seed(0))
    fm = ds.FeatureMap(values, frame)
    back = unmirrored(fm)
    point = torch.tensor([[share[k] * (picture[k] - 1) for k in (0, 1)]], dtype=torch.float64)
    there = torch.tensor([[picture[0] - 1, 0]], dtype=torch.float64) + point * torch.tensor([-1, 1])
    assert torch.allclose(back.at(point), fm.at(there), atol=1e-4)
    again = unmirrored(back)
    assert torch.equal(again.values, fm.values)
    assert np.allclose(again.frame.offset, frame.offset, atol=1e-9)


def feature_map(values: torch.Tensor, picture: tuple[int, int]) -> ds.FeatureMap:
    return ds.FeatureMap(values, Frame.of(picture).resize((values.shape[2], values.shape[1])))


def test_distance_is_to_the_nearest_unit_feature() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 4, 5, generator=g), torch.randn(6, 3, 7, generator=g)
    a[:, 0, 0] = 0  # no length: at distance 1 from every unit vector
    one, two = feature_map(a, (50, 40)), feature_map(b, (70, 30))
    expected = torch.cdist(
        torch.nn.functional.normalize(a, dim=0).flatten(1).mT, torch.nn.functional.normalize(b, dim=0).flatten(1).mT
    ).amin(1)
    assert instance_distance(one, two) == pytest.approx(expected.mean().item(), abs=1e-5)
    inside = expected.view(4, 5)[1:3, 2:4].mean().item()
    assert instance_distance(one, two, (20, 10, 38, 28)) == pytest.approx(inside, abs=1e-5)
    mask = np.zeros((40, 50), bool)
    mask[10:30, 20:40] = True
    assert instance_distance(one, two, mask) == pytest.approx(inside, abs=1e-5)
    assert instance_distance(one, one) == pytest.approx(0, abs=1e-3)


def test_the_region_decides_what_is_compared() -> None:
    """The object in the left half is mirrored, the larger background is not: only the region of the object tells."""
    thing, ground = leaning(4).pixels, leaning(5).pixels
    source, target = ground.clone(), ground.clone()
    source[:, 16:80, 8:60] = thing[:, 16:80, 8:60]
    target[:, 16:80, 8:60] = thing[:, 16:80, 8:60].flip(2)
    points = torch.tensor([[24.0, 40], [30, 54]], dtype=torch.float64)
    colours = BASELINES["rgb"](size="128x96", stride=4)
    whole = ds.match(colours, source, target, points, flip=True)
    boxed = ds.match(colours, source, target, points, flip=True, region=(18, 26, 50, 70))
    assert not whole.recipe["mirrored"]
    assert boxed.recipe["mirrored"]


def test_a_small_region_has_its_nearest_cell() -> None:
    fm = feature_map(torch.zeros(2, 4, 5), (50, 40))
    assert cells_within(fm, (21.0, 12.0, 22.0, 12.5)).nonzero().tolist() == [[1, 2]]
    dot = torch.zeros(40, 50)
    dot[39, 49] = 1
    assert cells_within(fm, dot).nonzero().tolist() == [[3, 4]]
    assert cells_within(fm, None).all()


def test_wrong_regions() -> None:
    fm, picture = feature_map(torch.zeros(2, 4, 5), (50, 40)), smooth_picture(0, 50, 40)
    for region, message in [
        ((1, 2, 3), "mask of 40x50"),
        (np.zeros((40, 50)), "region is empty"),
        (np.ones((50, 40)), "mask of 40x50"),
        ((60, 10, 70, 20), "does not lie in the picture"),
        ((30, 10, 20, 20), "does not lie in the picture"),
        ((float("nan"), 0, 9, 9), "does not lie in the picture"),
        ("box", "mask of 40x50"),
    ]:
        with pytest.raises(ds.InputError, match=message):
            cells_within(fm, region)
    with pytest.raises(ds.InputError, match="ask for flip too"):
        ds.match(BASELINES["rgb"](), picture, picture, [(3, 3)], region=(0, 0, 9, 9))


def test_annotated_points_change_sides_with_their_counterparts() -> None:
    """Left and right points of a symmetric kind: in the mirror image the left one is where the picture has its right one."""
    source = leaning(6)
    target = mirror(source)
    turned = unmirrored(SIFT(mirror(source)), source)
    maps = SIFT(source), turned, SIFT(target)
    ids = [0, 4, 5, 9]
    points = torch.tensor([[62, 30], [34, 62], [98, 62], [62, 62]], dtype=torch.float64)
    partners = counterparts(ids, [(4, 5), (9, 10)])
    assert partners == [0, 2, 1, -1]
    found = transfer_aligned(*maps, points, partners=partners)
    expected = points[[0, 2, 1]] * torch.tensor([-1.0, 1]) + torch.tensor([127.0, 0])
    assert (found.points[:3] - expected).norm(dim=1).max() < 1.5
    alone = transfer(maps[0], maps[2], points[3:])
    assert torch.equal(found.points[3:], alone.points)
    assert torch.equal(found.scores[3:], alone.scores)
    assert torch.equal(found.source_points, points)
    assert found.recipe["mirrored"]
    same = transfer_aligned(maps[0], turned, maps[0], points, partners=partners)
    assert torch.equal(same.points, transfer(maps[0], maps[0], points).points)
    assert not same.recipe["mirrored"]
    assert align_flip(*maps).mirrored_distance < align_flip(*maps).distance
    for wrong in ([0], [0, 1, 2, 4], [0, 1, 2, -2]):
        with pytest.raises(ds.InputError, match="as many partners"):
            transfer_aligned(*maps, points, partners=wrong)


def test_swaps_of_spair_are_pairs_of_its_keypoints() -> None:
    assert len(SPAIR_SWAPS) == 18
    for category, swaps in SPAIR_SWAPS.items():
        named = [kind for pair in swaps for kind in pair]
        assert len(named) == len(set(named)), category
        assert set(named) <= set(range(30)), category
        other = counterparts(range(30), swaps)
        assert [other[k] for k in other] == list(range(30))
        assert other != list(range(30))


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from denoscope.cli.main import app

    source = leaning(7)
    ds.write(source.image(), tmp_path / "a.png")
    ds.write(mirror(source).image(), tmp_path / "b.png")
    command = [
        "match",
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        "--points",
        "34,30;98,62",
        "--out",
        str(tmp_path),
    ]
    given = ["--model", "sift", "--size", "128x96", "--join", "rgb@@128x96@0.5", "--pca", "24", "--flip"]
    made = CliRunner().invoke(app, command + given, catch_exceptions=False)
    assert made.exit_code == 0
    assert "mirrored" in made.stdout
    written = json.loads((tmp_path / "matches.json").read_text())
    assert written["recipe"]["mirrored"] is True
    assert written["recipe"]["weights"] == [1, 0.5]
    assert abs(written["matches"][0]["x"] - 93) < 6
    assert written["source"]["path"].endswith("a.png")
