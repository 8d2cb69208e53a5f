"""HPatches: the recorded official evaluation, the layout, and what counts as wrong."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from scenes import Patches, homography_pair

import denoscope as ds
from denoscope.benchmarks.hpatches import HPatches
from denoscope.benchmarks.protocol import Benchmark
from denoscope.benchmarks.running import FeatureStore, evaluate, methods
from denoscope.correspondence import describe, match_keypoints, read_keypoints
from denoscope.images import Frame

ROOT = GOLDEN / "dift-eval" / "hpatches" / "hpatches-sequences-release"
KEYPOINTS = GOLDEN / "dift-eval" / "hpatches" / "superpoint-1k"


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "dift-eval" / "hpatches_tensors.safetensors")


def injected(recorded):
    """The recorded features, in the place of a model's."""

    def features(picture, category):
        values = recorded[f"{picture.path.parent.name}.{picture.path.stem}"][0]
        return ds.FeatureMap(values, Frame.of(picture.size).resize((values.shape[2], values.shape[1])))

    return features


def test_official_key_points_descriptors_and_matches(recorded):
    """Bit for bit."""
    features, compared = injected(recorded), 0
    for sequence in ("i_alpha", "v_beta"):
        maps, points = {}, {}
        for k in range(1, 7):
            maps[k] = features(ds.read(ROOT / sequence / f"{k}.ppm"), "")
            points[k] = read_keypoints(KEYPOINTS / f"{sequence}-{k}.kp")
            assert torch.equal(points[k].float(), recorded[f"{sequence}.{k}.keypoints"])
            assert torch.equal(describe(maps[k], points[k], "official"), recorded[f"{sequence}.{k}.descriptors"])
        for metric in ("cosine", "l2"):
            for k in range(2, 7):
                found = match_keypoints(
                    maps[1], maps[k], points[1], points[k], metric=metric, convention="official", method="lmeds"
                )
                assert torch.equal(found.points_a.float(), recorded[f"{metric}.{sequence}.{k}.pts_a"])
                assert torch.equal(found.points_b.float(), recorded[f"{metric}.{sequence}.{k}.pts_b"])
                compared += len(found)
    assert compared == 893


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("method", ["lmeds", "ransac"])
def test_official_homographies(recorded, metric, method):
    expected = json.loads((GOLDEN / "dift-eval" / "hpatches_expected.json").read_text())[f"{metric}/{method}"]
    benchmark = HPatches(ROOT, keypoints=str(KEYPOINTS), metric=metric, method=method, convention="official")
    assert isinstance(benchmark, Benchmark)
    items = benchmark.items()
    records = [benchmark.run(item, injected(recorded)) for item in items]
    theirs = {f"{pair['seq']}/1-{pair['im']}": pair for pair in expected["pairs"]}
    assert [item.key for item in items] == list(theirs)
    for item, record in zip(items, records, strict=True):
        pair = theirs[item.key]
        assert record["matches"] == pair["n_matches"]
        if method == "lmeds":
            assert record["corner_error"] == pytest.approx(pair["mean_corner_dist"], abs=5e-4)
            assert np.allclose(record["H"], pair["H"], atol=1e-3, rtol=1e-3)
    rows = {row["category"]: row for row in benchmark.rows(items, records)}
    for ours, name in (("all", "overall"), ("i", "i"), ("v", "v")):
        accuracies = [rows[ours][f"acc@{p}"] for p in (1, 3, 5)]
        # RANSAC differs between versions of OpenCV: one pair may change sides
        off = 0 if method == "lmeds" else 100 / rows[ours]["count"]
        assert np.abs(np.array(accuracies) - expected[name]).max() <= off + 1e-9


def sequence(folder, seed, pictures=4, size=(80, 64), suffix=".png"):
    """A sequence of one picture under mild homographies."""
    folder.mkdir(parents=True)
    one, _, _ = homography_pair(seed, size)
    one.image().save(folder / f"1{suffix}")
    for k in range(2, pictures + 1):
        _, _, matrix = homography_pair(seed + k, size, 0.05)
        moved = cv2.warpPerspective(np.array(one.image()), matrix, size, borderMode=cv2.BORDER_REFLECT)
        ds.read(moved).image().save(folder / f"{k}{suffix}")
        np.savetxt(folder / f"H_1_{k}", matrix)


def test_any_number_of_pictures_and_failures_count_as_wrong(tmp_path):
    sequence(tmp_path / "v_one", 0, pictures=3)
    sequence(tmp_path / "i_two", 10, pictures=2, suffix=".jpg")
    ds.read(np.full((64, 80, 3), 80, np.uint8)).image().save(tmp_path / "i_two" / "3.jpg")  # nothing to find there
    np.savetxt(tmp_path / "i_two" / "H_1_3", np.eye(3))
    (tmp_path / "notes").mkdir()
    benchmark = HPatches(tmp_path, n=300)
    items = benchmark.items()
    assert [item.key for item in items] == ["i_two/1-2", "i_two/1-3", "v_one/1-2", "v_one/1-3"]
    stores = [FeatureStore(Patches())]
    compared = methods(benchmark, stores, baselines=True)
    report = evaluate(benchmark, compared, tmp_path / "out", pictures=2)
    for name in ("patches", "opencv-sift"):
        rows = {row["category"]: row for row in report.rows[name]}
        assert (rows["all"]["count"], rows["all"]["failed"]) == (4, 1)
        assert (rows["i"]["count"], rows["i"]["failed"]) == (2, 1)
        assert rows["i"]["acc@5"] == 50  # the failed pair is wrong, the other right
        assert rows["v"]["acc@5"] == 100
        assert rows["i"]["mma@5"] <= 50
        assert rows["v"]["mma@1"] <= rows["v"]["mma@3"] <= rows["v"]["mma@5"]
        assert rows["all"]["acc@3"] == pytest.approx((rows["i"]["acc@3"] + rows["v"]["acc@3"]) / 2)
    assert set(report.rows) == {"patches", "opencv-sift", "opencv-orb"}
    drawn = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert len(drawn) == 4
    assert drawn[2] == "hpatches-worst-1-i_two_1-3.png"


def test_layouts_that_are_wrong(tmp_path):
    with pytest.raises(ds.MissingError, match="no folder"):
        HPatches(tmp_path / "nowhere").items()
    with pytest.raises(ds.MissingError, match="looked for folders i_NAME and v_NAME"):
        HPatches(tmp_path).items()
    sequence(tmp_path / "set" / "v_one", 0, pictures=2)
    with pytest.raises(ds.MissingError, match=rf"name {tmp_path / 'set'}"):
        HPatches(tmp_path).items()
    with pytest.raises(ds.MissingError, match=f"name its parent {tmp_path / 'set'}"):
        HPatches(tmp_path / "set" / "v_one").items()
    with pytest.raises(ds.MissingError, match=r"v_one-1\.kp"):
        HPatches(tmp_path / "set", keypoints=str(tmp_path)).items()
    (tmp_path / "v_one-1.kp").write_text("5 5\n70 90\n")
    (tmp_path / "v_one-2.kp").write_text("5 5\n")
    benchmark = HPatches(tmp_path / "set", keypoints=str(tmp_path))
    with pytest.raises(ds.InputError, match=r"v_one-1\.kp: Point 1 at \(70, 90\)"):
        benchmark.run(benchmark.items()[0], FeatureStore(Patches()))
    (tmp_path / "set" / "v_one" / "H_1_2").write_text("1 0 0")
    with pytest.raises(ds.InputError, match="H_1_2 does not hold"):
        HPatches(tmp_path / "set").items()
    (tmp_path / "set" / "v_one" / "H_1_2").unlink()
    with pytest.raises(ds.MissingError, match="H_1_2"):
        HPatches(tmp_path / "set").items()
    (tmp_path / "set" / "v_one" / "1.png").unlink()
    with pytest.raises(ds.MissingError, match=r"needs pictures 1\.ppm"):
        HPatches(tmp_path / "set").items()
    for options in ({"metric": "l1"}, {"convention": "x"}, {"method": "x"}, {"threshold": 0.0}, {"n": 0}):
        with pytest.raises(ds.InputError):
            HPatches(ROOT, **options)


def test_the_sequences_with_large_pictures_can_be_left_out(tmp_path):
    for name in ("v_talent", "v_wall", "i_dc"):
        sequence(tmp_path / name, 0, pictures=2)
    shutil.copytree(tmp_path / "v_wall", tmp_path / "i_fog")
    assert [item.key for item in HPatches(tmp_path, small=True).items()] == ["i_fog/1-2", "v_wall/1-2"]
    assert len(HPatches(tmp_path).items()) == 4
