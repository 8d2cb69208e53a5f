"""Key points, robust estimation and sparse matching, on scenes whose geometry is known."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from conftest import smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import Patches, homography_pair, textured
from torch.nn import functional as F

import denoscope as ds
from denoscope.cli.main import main
from denoscope.correspondence import corner_error, describe, detect, estimate, match_keypoints, read_keypoints
from denoscope.correspondence.geometric import METHODS, camera_matrix, project, read_homography
from denoscope.correspondence.keypoints import detect_and_describe, keypoints_of
from denoscope.images import Frame, grid_points
from denoscope.images.geometry import draw_lines, flow_colours, warp

SIZE = (96, 80)
seeds = st.integers(0, 10_000)


def matches_of(matrix, seed, count=60, wrong=12, size=(320, 240)):
    """Points, where the matrix takes them, and which of them were replaced by something at least 40 pixels off."""
    rng = np.random.default_rng(seed)
    a = torch.from_numpy(rng.uniform(0, 1, (count, 2)) * size)
    b = project(matrix, a)
    right = torch.arange(count) >= wrong
    turn = torch.from_numpy(rng.uniform(0, 2 * math.pi, (wrong, 1)))
    b[:wrong] += torch.cat([turn.cos(), turn.sin()], 1) * torch.from_numpy(rng.uniform(40, 90, (wrong, 1)))
    return a, b, right


def random_homography(seed):
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0], [319, 0], [319, 239], [0, 239]], np.float32)
    return cv2.getPerspectiveTransform(corners, (corners + rng.uniform(-40, 40, (4, 2))).astype(np.float32))


@settings(max_examples=15)
@given(seeds, st.sampled_from(sorted(METHODS)))
def test_a_homography_is_recovered_from_matches_of_which_a_fifth_is_wrong(seed, method):
    truth = random_homography(seed)
    a, b, right = matches_of(truth, seed)
    found = estimate(a, b, "homography", method, 2)
    assert found.ok
    assert corner_error(found.matrix, truth, (320, 240)) < 0.1
    assert torch.equal(found.inliers, right)
    cv2.setRNGSeed(seed)
    again = estimate(a, b, "homography", method, 2)
    assert np.array_equal(again.matrix, found.matrix)


@pytest.mark.parametrize(("matrix", "freedoms"), [("affine", 6), ("similarity", 4)])
def test_maps_with_fewer_freedoms(matrix, freedoms):
    turn = np.array([[0.8, -0.5, 30.0], [0.5, 0.8, -12.0], [0, 0, 1]])
    truth = turn if freedoms == 4 else turn @ np.array([[1, 0.3, 0], [0, 0.7, 0], [0, 0, 1]])
    a, b, right = matches_of(truth, 3)
    found = estimate(a, b, matrix, "ransac", 2)
    assert corner_error(found.matrix, truth, (320, 240)) < 0.1
    assert torch.equal(found.inliers, right)


def two_views(seed, count=80, wrong=15):
    """Points of a scene before two cameras with a known pose, in pixels."""
    rng = np.random.default_rng(seed)
    camera = camera_matrix(300, (320, 240))
    rotation, _ = cv2.Rodrigues(rng.uniform(-0.2, 0.2, 3))
    move = rng.normal(size=3)
    move /= np.linalg.norm(move)
    scene = np.hstack([rng.uniform(-1.5, 1.5, (count, 2)), rng.uniform(4, 8, (count, 1))])
    a, b = scene @ camera.T, (scene @ rotation.T + move) @ camera.T
    a, b = a[:, :2] / a[:, 2:], b[:, :2] / b[:, 2:]
    b[:wrong] += rng.choice([-1, 1], (wrong, 2)) * rng.uniform(40, 80, (wrong, 2))
    return a, b, camera, rotation, move


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_pose_of_the_second_camera_is_recovered(seed):
    a, b, camera, rotation, move = two_views(seed)
    found = estimate(a, b, "essential", "usac-magsac", 1, camera)
    assert found.ok
    assert np.allclose(found.rotation, rotation, atol=1e-3)
    assert np.allclose(found.translation, move, atol=1e-2)
    assert found.inliers[15:].all()
    values = np.linalg.svd(found.matrix, compute_uv=False)
    assert np.allclose(values, [1, 1, 0], atol=1e-6)


@pytest.mark.parametrize("method", ["usac-magsac", "ransac", "lmeds"])
def test_the_fundamental_matrix_puts_right_matches_on_their_lines(method):
    a, b, *_ = two_views(4)
    found = estimate(a, b, "fundamental", method, 1)
    assert found.ok
    one, two = (np.hstack([points, np.ones((len(points), 1))])[15:] for points in (a, b))
    lines = one @ found.matrix.T
    off = np.abs((two * lines).sum(1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert off.max() < 0.5
    assert found.inliers[15:].all()


def test_what_cannot_be_estimated_is_a_result():
    spread = np.random.default_rng(0).uniform(0, 100, (12, 2))
    line = np.stack([np.arange(12.0), 2 * np.arange(12.0)], 1)
    cases = [
        ((spread[:3], spread[:3]), "homography", "3 matches are too few for a homography, which needs 4"),
        ((spread[:7], spread[:7]), "fundamental", "7 matches are too few"),
        ((spread[:4], spread[:4]), "essential", "4 matches are too few"),
        ((spread[:0], spread[:0]), "homography", "0 matches"),
        ((spread, np.ones((12, 2))), "homography", "fewer than 4 distinct points"),
        ((line, line), "homography", "one line"),
    ]
    for points, matrix, reason in cases:
        for method in ("usac-magsac", "ransac", "lmeds"):
            found = estimate(*points, matrix, method, intrinsics=np.eye(3))
            assert not found.ok
            assert reason in found.reason
            assert len(found.inliers) == len(points[0])
            assert not found.inliers.any()
    found = estimate(spread, np.random.default_rng(1).uniform(0, 1e4, (12, 2)), "homography", "usac-magsac", 0.01)
    assert found.inliers.sum() <= 5  # nothing agrees, whatever OpenCV makes of it


@given(seeds, st.floats(-30, 30), st.floats(-30, 30), st.floats(0.01, 100))
def test_corner_error(seed, dx, dy, scale):
    """Spec 7a.7."""
    truth = random_homography(seed)
    shift = np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1]])
    assert corner_error(truth, truth, (320, 240)) == 0
    assert corner_error(shift @ truth, truth, (320, 240)) == pytest.approx(math.hypot(dx, dy), abs=1e-6)
    assert corner_error(scale * truth, truth, (320, 240)) == pytest.approx(0, abs=1e-6)
    assert corner_error(None, truth, (320, 240)) == math.inf
    assert corner_error(np.zeros((3, 3)), truth, (320, 240)) == math.inf


def test_key_points_are_distinct_strong_and_where_they_seem_to_be():
    """Blobs at known places: SIFT finds their middles to a fifth of a pixel, without the half pixel of its default."""
    image = np.full((120, 160), 30.0)
    centres = [(40.0, 30.0), (100.0, 35.0), (60.0, 85.0), (125.0, 90.0)]
    y, x = np.mgrid[:120, :160]
    for cx, cy in centres:
        image += 200 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 4.0**2))
    picture = ds.read(image.clip(0, 255).astype(np.uint8))
    found = detect(picture)
    assert len(found.unique(dim=0)) == len(found)
    for centre in centres:
        assert (found - torch.tensor(centre)).norm(dim=1).min() < 0.2
    busy = textured(0, 160, 120)
    many, described = detect_and_describe(busy, n=50)
    assert (len(many), described.shape) == (50, (50, 128))
    assert torch.equal(detect(busy, n=20), many[:20])
    assert detect_and_describe(busy, "orb", 30)[1].dtype == np.uint8
    assert detect(ds.read(np.full((40, 40, 3), 128, np.uint8))).shape == (0, 2)


def test_key_point_files(tmp_path):
    points = torch.tensor([[1.5, 2], [30, 4.25], [7, 0]], dtype=torch.float64)
    rows = points.tolist()
    (tmp_path / "a.kp").write_text("".join(f"{x} {y}\n" for x, y in rows))
    (tmp_path / "b.kp").write_text("\n".join(f"{x} {y} 0.9 12" for x, y in rows) + "\n\n")
    (tmp_path / "c.csv").write_text("score,x,y\n" + "".join(f"1,{x},{y}\n" for x, y in rows))
    (tmp_path / "d.json").write_text(json.dumps({"points": rows}))
    np.savez(tmp_path / "e.npz", keypoints=points.numpy(), descriptors=np.zeros((3, 2)))
    with open(tmp_path / "1.ppm.d2-net", "wb") as file:
        np.savez(file, keypoints=np.hstack([points.numpy(), np.ones((3, 1))]))
    for path in tmp_path.iterdir():
        assert torch.equal(read_keypoints(path), points)
    picture = smooth_picture(0)
    assert torch.equal(keypoints_of(picture, tmp_path / "1.ppm.d2-net"), points)
    assert torch.equal(keypoints_of(picture, "grid:4"), grid_points(picture.size, 4))
    assert len(keypoints_of(picture, "grid")) == 32 * 32
    bad = {
        "t.kp": "1 2\n3\n",
        "u.kp": "1 nan\n",
        "v.npz": "text",
        "w.csv": "1,2,3\n",
        "x.json": "[[1]]",
        "y.txt": "x y\n",
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ds.InputError, match=name):
            read_keypoints(tmp_path / name)
    (tmp_path / "z.kp").write_text("10 10\n90 10\n")
    with pytest.raises(ds.InputError, match=r"z.kp: Point 1 at \(90, 10\) lies outside the picture of 72x56"):
        keypoints_of(picture, tmp_path / "z.kp")
    with pytest.raises(ds.MissingError, match="nowhere"):
        read_keypoints(tmp_path / "nowhere.kp")
    with pytest.raises(ds.InputError, match="write sift, orb, grid, grid:N or a file"):
        keypoints_of(picture, "surf")


@given(seeds)
def test_conventions_of_sampling(seed):
    """ "exact" lies on the enlarged map; "official" is off by (x / (W - 1) - 1/2) pixels, as far from the border it shows."""
    generator = torch.Generator().manual_seed(seed)
    fm = ds.FeatureMap(torch.randn(5, 6, 8, generator=generator), Frame.of((64, 48)).resize((8, 6)))
    points = torch.rand(20, 2, generator=generator, dtype=torch.float64) * torch.tensor([50.0, 34.0]) + 6
    assert torch.equal(describe(fm, points), fm.at(points))
    whole = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="xy"), -1).double()
    enlarged = F.interpolate(fm.values[None], (48, 64), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(describe(fm, whole.reshape(-1, 2)), enlarged.flatten(1).mT, atol=1e-5)
    size = torch.tensor([64.0, 48.0], dtype=torch.float64)
    shifted = points * size / (size - 1) - 0.5
    assert torch.allclose(describe(fm, points, "official"), fm.at(shifted), atol=1e-4)
    assert describe(fm, points[:0]).shape == (0, 5)


def test_two_views_of_one_scene(tmp_path):
    one, two, truth = homography_pair(0, SIZE)
    found = ds.match_geometric(Patches(), one, two)
    assert found.ok
    assert corner_error(found.matrix, truth, SIZE) < 1
    off = (project(truth, found.points_a) - found.points_b).norm(dim=1)
    assert (off[found.inliers] < 4).all()
    # the warped picture is the other one, wherever it covers it
    seen = warp(np.full((*SIZE[::-1], 4), 255, np.uint8), found.matrix, two.size)[..., 3] == 255
    drawn, target = (np.asarray(image).astype(float) for image in (found.warped("blend"), two.image()))
    assert np.abs(drawn - target)[seen].mean() < 6
    assert np.array_equal(drawn[~seen & (warp_of(found, two) == 0)], target[~seen & (warp_of(found, two) == 0)])
    for name in ("m.json", "m.csv", "m.npz", "m.png"):
        found.save(tmp_path / name)
    saved = json.loads((tmp_path / "m.json").read_text())
    assert np.array_equal(saved["matrix"], found.matrix)
    assert [row["inlier"] for row in saved["matches"]] == found.inliers.tolist()
    assert saved["recipe"]["method"] == "usac-magsac"
    arrays = np.load(tmp_path / "m.npz")
    assert np.array_equal(arrays["points_b"], found.points_b.numpy())
    assert (tmp_path / "m.csv").read_text().count("\n") == len(found) + 1
    with pytest.raises(ds.InputError, match="saved as"):
        found.save(tmp_path / "m.txt")


def warp_of(found, target):
    alpha = np.full((found.source.height, found.source.width, 4), 255, np.uint8)
    return warp(alpha, found.matrix, target.size)[..., 3]


def test_features_and_key_points_given_apart_give_the_same():
    one, two, _ = homography_pair(1, SIZE)
    maps, points = [Patches()(picture) for picture in (one, two)], [detect(picture, n=200) for picture in (one, two)]
    together = ds.match_geometric(Patches(), one, two, *points, metric="l2", method="ransac", convention="official")
    apart = match_keypoints(*maps, *points, metric="l2", method="ransac", convention="official")
    assert torch.equal(together.points_b, apart.points_b)
    assert np.array_equal(together.matrix, apart.matrix)
    twice = match_keypoints(*maps, torch.cat([points[0], points[0]]), points[1], metric="l2", convention="official")
    assert twice.keypoints == (len(points[0]), len(points[1]))
    assert torch.equal(twice.points_a, apart.points_a)


def test_nothing_to_match_is_a_result_that_can_be_drawn(tmp_path):
    one, flat = textured(2, *SIZE), ds.read(np.full((50, 60, 3), 128, np.uint8))
    found = ds.match_geometric(Patches(), one, flat)
    assert (found.ok, len(found), found.matrix) == (False, 0, None)
    assert found.keypoints[1] == 0
    assert found.draw().width > 500
    for name in ("m.json", "m.csv", "m.npz"):
        assert found.save(tmp_path / name).stat().st_size > 20
    with pytest.raises(ds.InputError, match="no homography to warp by: 0 matches"):
        found.warped()


def test_mistakes_are_named(tmp_path):
    one, two = textured(0, *SIZE), textured(1, *SIZE)
    model, points = Patches(), [[5, 5], [20, 20]]
    for options, sentence in [
        ({"matrix": "affinity"}, "homography, affine, similarity, fundamental, essential"),
        ({"method": "magsac"}, "usac-magsac"),
        ({"metric": "l1"}, "'cosine' or 'l2'"),
        ({"convention": "exactly"}, "'exact' or 'official'"),
        ({"threshold": 0}, "positive number of pixels"),
        ({"matrix": "essential"}, "focal length"),
        ({"matrix": "essential", "focal": -1}, "positive"),
        ({"matrix": "essential", "intrinsics": np.zeros((3, 3))}, "invertible"),
        ({"matrix": "similarity"}, "ransac or lmeds"),
        ({"keypoints": points}, "those of B"),
        ({"keypoints": points, "keypoints_b": [[500, 5]]}, "outside the picture"),
        ({"n": 0}, "at least 1"),
    ]:
        with pytest.raises(ds.InputError, match=sentence):
            ds.match_geometric(model, one, two, **options)
    with pytest.raises(ds.InputError, match="finite"):
        estimate([[math.nan, 1]] * 5, [[1, 1]] * 5)
    with pytest.raises(ds.InputError, match="2 points cannot match 3"):
        estimate([[1, 1]] * 2, [[1, 1]] * 3)
    (tmp_path / "H").write_text("1 0 0\n0 1\n")
    with pytest.raises(ds.InputError, match="invertible 3 x 3"):
        read_homography(tmp_path / "H")


def test_drawing_lines_and_colours():
    one, two = textured(0, 60, 40), textured(1, 30, 50)
    points = torch.tensor([[5.0, 5.0], [50.0, 30.0]], dtype=torch.float64)
    image = draw_lines(one, two, points, points / 2, torch.tensor([True, False]), title="two", side=300)
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    for line in ((0, 158, 115), (213, 94, 0)):  # green for the inlier, orange for the outlier
        assert np.abs(pixels - line).sum(1).min() < 60
    around = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [np.nan, 0]], np.float32)
    right, down, left, up, still, unknown = flow_colours(around, 1.0).tolist()
    assert still == [255, 255, 255]
    assert unknown == [0, 0, 0]
    assert len({tuple(colour) for colour in (right, down, left, up)}) == 4


def test_command(tmp_path, monkeypatch, capsys):
    one, two, truth = homography_pair(3, (160, 128))
    for name, picture in (("a", one), ("b", two)):
        picture.image().save(tmp_path / f"{name}.png")
    np.savetxt(tmp_path / "H", truth)

    def run(*arguments):
        given = ["denoscope", "match", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *map(str, arguments)]
        monkeypatch.setattr("sys.argv", given)
        try:
            main()
        except SystemExit as stopped:
            return stopped.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    quick = ["--size", "long96", "--ensemble", 1, "--out", tmp_path / "o"]
    status, said = run("--geometric", "--truth", tmp_path / "H", *quick)
    assert status == 0
    assert "corner error" in said.out
    saved = json.loads((tmp_path / "o" / "matches.json").read_text())
    assert saved["recipe"]["preset"] == "geometric"
    assert saved["corner_error"] == pytest.approx(corner_error(saved["matrix"], truth, one.size))
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"matches.json", "matches.png", "warped.png"}
    status, _ = run("--geometric", "--grid", 12, "--estimate", "fundamental", *quick)
    assert status == 0
    assert not (tmp_path / "o" / "warped.png").exists()
    for arguments, sentence in [
        (["--grid", 3, "--metric", "l2"], "--metric belongs to --geometric"),
        (["--geometric", "--points", "1,1"], "--points does not go with --geometric"),
        (["--geometric", "--keypoints", "none.kp"], "There is no key point file"),
        (["--geometric", "--truth", "none"], "There is no homography"),
        (["--geometric", tmp_path / "a.png"], "single TARGET"),
    ]:
        status, said = run(*arguments, *quick)
        assert status == 2
        assert sentence in said.err
