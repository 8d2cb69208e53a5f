"""Dense ground truth: its files, the layouts they lie in, and errors against motions that are known."""

import struct

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import Patches, textured

import denoscope as ds
from denoscope.benchmarks.dense import Dense
from denoscope.benchmarks.protocol import Benchmark
from denoscope.benchmarks.running import FeatureStore, evaluate, methods
from denoscope.benchmarks.truth import find_pairs, read_disparity, read_flow

SIZE = (64, 48)


def write_flo(path, flow):
    h, w = flow.shape[:2]
    path.write_bytes(b"PIEH" + struct.pack("<ii", w, h) + flow.astype("<f4").tobytes())


def shifted(seed, dx, dy, size=SIZE):
    """Two windows of one picture: (x, y) of the first is (x + dx, y + dy) of the second."""
    w, h = size
    whole = textured(seed, w + 40, h + 40).pixels
    return tuple(
        ds.Picture(whole[:, 20 - y : 20 - y + h, 20 - x : 20 - x + w].contiguous()) for x, y in ((0, 0), (dx, dy))
    )


def save(folder, pictures, names):
    folder.mkdir(parents=True, exist_ok=True)
    for picture, name in zip(pictures, names, strict=True):
        picture.image().save(folder / name)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_flow_files(tmp_path_factory, w, h, seed):
    path = tmp_path_factory.getbasetemp() / "a.flo"
    rng = np.random.default_rng(seed)
    flow = rng.uniform(-500, 500, (h, w, 2)).astype(np.float32)
    write_flo(path, flow)
    assert np.array_equal(read_flow(path), flow)
    unknown = rng.random((h, w)) < 0.3
    write_flo(path, np.where(unknown[..., None], 1.6e9, flow))
    assert np.array_equal(np.isnan(read_flow(path)).all(-1), unknown)
    kitti = path.with_suffix(".png")  # blue: known, green: v, red: u
    values = np.dstack([~unknown, flow[..., 1] * 64 + 2**15, flow[..., 0] * 64 + 2**15]).round().clip(0, 2**16 - 1)
    cv2.imwrite(str(kitti), values.astype(np.uint16))
    found = read_flow(kitti)
    assert np.array_equal(np.isnan(found).all(-1), unknown)
    assert np.abs(found - flow)[~unknown].max(initial=0) <= 1 / 128 + 1e-4


def test_disparity_files(tmp_path):
    truth = np.array([[0, 3, 250], [7, 0, 1]], np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), truth)
    cv2.imwrite(str(tmp_path / "b.png"), truth.astype(np.uint16) * 256 + 64 * (truth > 0).astype(np.uint16))
    cv2.imwrite(str(tmp_path / "c.pfm"), np.where(truth > 0, truth, np.inf).astype(np.float32))
    cv2.imwrite(str(tmp_path / "d.png"), np.dstack([truth] * 3))
    for name, more in (("a.png", 0), ("b.png", 0.25), ("c.pfm", 0), ("d.png", 0)):
        found = read_disparity(tmp_path / name)
        assert np.array_equal(np.isnan(found), truth == 0)
        assert np.array_equal(found[truth > 0], truth[truth > 0] + np.float32(more))


def test_damaged_files_are_named(tmp_path):
    write_flo(tmp_path / "a.flo", np.zeros((3, 4, 2)))
    whole = (tmp_path / "a.flo").read_bytes()
    for name, content in {"b.flo": whole[:-1], "c.flo": b"", "d.flo": b"XXXX" + whole[4:], "e.png": b"nothing"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ds.InputError, match=name):
            read_flow(tmp_path / name)
    cv2.imwrite(str(tmp_path / "f.png"), np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(ds.InputError, match="16 bits"):
        read_flow(tmp_path / "f.png")
    cv2.imwrite(str(tmp_path / "g.png"), np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    with pytest.raises(ds.InputError, match="different channels"):
        read_disparity(tmp_path / "g.png")
    with pytest.raises(ds.MissingError, match=r"h\.flo"):
        read_flow(tmp_path / "h.flo")


def test_layouts(tmp_path):
    flow = np.zeros((48, 64, 2))
    flow[..., 0] = 5
    one, two = shifted(0, 5, 0)
    save(tmp_path / "JODS" / "bus", (one, two), ("image1.png", "image2.png"))
    write_flo(tmp_path / "JODS" / "bus" / "flow1.flo", flow)
    write_flo(tmp_path / "JODS" / "bus" / "flow2.flo", -flow)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:40] = 255
    cv2.imwrite(str(tmp_path / "JODS" / "bus" / "mask1.png"), mask)
    save(tmp_path / "whale", (one, two), ("frame1.png", "frame2.png"))
    write_flo(tmp_path / "whale" / "truth.flo", flow)
    save(tmp_path / "aloe", (two, one), ("aloeL.png", "aloeR.png"))
    cv2.imwrite(str(tmp_path / "aloe" / "aloeGT.png"), np.full((48, 64), 5, np.uint8))
    save(tmp_path / "motor", (two, one), ("im0.png", "im1.png"))
    cv2.imwrite(str(tmp_path / "motor" / "disp0.pfm"), np.full((48, 64), 5, np.float32))
    kitti = tmp_path / "training"
    save(kitti / "image_2", (two, two), ("000000_10.png", "000001_10.png"))
    save(kitti / "image_2", (one,), ("000000_11.png",))
    save(kitti / "image_3", (one, one), ("000000_10.png", "000001_10.png"))
    (kitti / "flow_occ").mkdir()
    (kitti / "disp_occ_0").mkdir()
    encoded = np.dstack([np.ones((48, 64)), np.full((48, 64), 2**15), np.full((48, 64), 2**15 - 5 * 64)])
    cv2.imwrite(str(kitti / "flow_occ" / "000000_10.png"), encoded.astype(np.uint16))
    for name in ("000000_10.png", "000001_10.png"):
        cv2.imwrite(str(kitti / "disp_occ_0" / name), np.full((48, 64), 5 * 256, np.uint16))
    pairs = {pair.key: pair for pair in find_pairs(tmp_path)}
    assert {key: pair.category for key, pair in pairs.items()} == {
        "JODS/bus/1": "JODS",
        "JODS/bus/2": "JODS",
        "aloe": "stereo",
        "motor": "stereo",
        "training/flow/000000_10": "flow",
        "training/stereo/000000_10": "stereo",
        "training/stereo/000001_10": "stereo",
        "whale": "flow",
    }
    benchmark = Dense(tmp_path, points=60)
    assert isinstance(benchmark, Benchmark)
    # every layout says the same of the same pictures: patches find the motion in each
    report = evaluate(benchmark, methods(benchmark, [FeatureStore(Patches(1, 3))], True), tmp_path / "out", pictures=1)
    for row in report.rows["patches"]:
        assert row["AEPE"] < 0.5
        assert row["pck@1px"] > 97
    for row in report.rows["no motion"]:
        assert row["AEPE"] == pytest.approx(5)
        assert (row["pck@5px"], row["pck@3px"]) == (100, 0)
        assert row["pck@0.05"] == 0  # 5 px is more than 0.05 of 64
    assert report.rows["dis-flow"][0]["AEPE"] < 2
    masked = next(item for item in benchmark.items() if item.key == "JODS/bus/1")
    x, y = np.array(benchmark.baselines()["no motion"](masked)["points"]).T
    assert ((x >= 20) & (x < 40) & (y >= 10) & (y < 30)).all()
    (kitti / "image_2" / "000000_11.png").unlink()
    with pytest.raises(ds.MissingError, match="000000_11"):
        find_pairs(tmp_path)


def test_unknown_and_leaving_pixels_are_left_out(tmp_path):
    flow = np.full((48, 64, 2), 3.0)
    flow[:24] = 1.7e9
    save(tmp_path, shifted(1, 3, 3), ("a1.png", "a2.png"))
    write_flo(tmp_path / "a.flo", flow)
    benchmark = Dense(tmp_path, points=10_000)
    record = benchmark.baselines()["no motion"](benchmark.items()[0])
    x, y = np.array(record["points"]).T
    assert (y.min(), y.max(), x.max()) == (24, 44, 60)  # what moves to 48 or 64 is outside
    assert len(x) == 21 * 61
    for limit in (1, 7, 100, 500):
        few = Dense(tmp_path, points=limit)
        count = len(few.baselines()["no motion"](few.items()[0])["points"])
        assert limit / 4 <= count <= limit


def test_pictures_of_different_sizes_and_mirrored_ones(tmp_path):
    one = textured(3, 60, 48)
    flow = np.zeros((48, 60, 2), np.float32)
    save(tmp_path / "PASCAL" / "x", (one, ds.read(one.image().resize((80, 60)))), ("image1.png", "image2.png"))
    xs, ys = np.meshgrid(np.arange(60), np.arange(48))
    flow[..., 0], flow[..., 1] = (xs + 0.5) * 80 / 60 - 0.5 - xs, (ys + 0.5) * 60 / 48 - 0.5 - ys
    write_flo(tmp_path / "PASCAL" / "x" / "flow1.flo", flow)
    benchmark = Dense(tmp_path, points=50, soft=1.0)
    record = benchmark.baselines()["no motion"](benchmark.items()[0])
    row = benchmark.rows(benchmark.items(), [record])[0]
    assert row["AEPE"] == pytest.approx(0, abs=1e-3)  # no motion relative to the picture is the truth here
    assert benchmark.draw(benchmark.items()[0], record).width > 800
    (tmp_path / "PASCAL" / "x" / "flip_gt.txt").write_text("1\n")
    source, target = benchmark.items()[0].data.pictures()
    assert torch.equal(source.pixels.flip(2), one.pixels)
    assert target.size == (80, 60)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ds.MissingError, match="no folder"):
        Dense(tmp_path / "nowhere").items()
    with pytest.raises(ds.MissingError, match="looked for TSS"):
        Dense(tmp_path).items()
    save(tmp_path / "a", shifted(0, 1, 1), ("x1.png", "y2.png"))
    write_flo(tmp_path / "a" / "t.flo", np.zeros((48, 64, 2)))
    with pytest.raises(ds.MissingError, match="needs two pictures beside it"):
        Dense(tmp_path).items()
    (tmp_path / "a" / "y2.png").rename(tmp_path / "a" / "x2.png")
    write_flo(tmp_path / "a" / "t.flo", np.zeros((40, 64, 2)))
    benchmark = Dense(tmp_path)
    still = benchmark.baselines()["no motion"]
    with pytest.raises(ds.InputError, match=r"t\.flo is 64x40"):
        still(benchmark.items()[0])
    write_flo(tmp_path / "a" / "t.flo", np.full((48, 64, 2), 2e9))
    with pytest.raises(ds.InputError, match="says of no pixel"):
        still(benchmark.items()[0])
    for options in ({"points": 0}, {"soft": -1.0}, {"alpha": 0.0}):
        with pytest.raises(ds.InputError, match="Dense evaluation"):
            Dense(tmp_path, **options)
