"""The benchmark harness and the semantic data sets: recorded protocols, resuming, layouts, bad folders."""

import io
import json

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, smooth_picture
from PIL import Image
from safetensors.torch import load_file
from scipy.io import savemat
from typer.testing import CliRunner

import denoscope as ds
from denoscope.benchmarks.cub import CUB, square_around
from denoscope.benchmarks.keypoints import Keypoints
from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.proposal_flow import PFPascal, PFWillow
from denoscope.benchmarks.running import FeatureStore, Method, evaluate, methods, spread
from denoscope.benchmarks.semantic import Semantic
from denoscope.benchmarks.spair import SPair
from denoscope.cli.main import app
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import InputError, MissingError
from denoscope.features import Joint
from denoscope.features.baselines import BASELINES
from denoscope.images import Frame, as_points

EVAL = GOLDEN / "dift-eval"


class Counting:
    """Position features that count how often they are made."""

    name = "counting"

    def __init__(self):
        self.made = 0

    def describe(self):
        return {"model": "counting"}

    def __call__(self, picture, prompt=None):
        self.made += 1
        return BASELINES["position"]()(picture)


def test_spair_protocol_equals_the_recorded_evaluation(tmp_path):
    maps = load_file(EVAL / "spair_features.safetensors")
    expected = json.loads((EVAL / "spair_expected.json").read_text())

    def features(picture, category):
        values = maps[f"{category}/{picture.path.stem}"][0]
        return ds.FeatureMap(values, Frame.of(picture.size).resize((values.shape[2], values.shape[1])))

    benchmark = SPair(EVAL / "SPair-71k", alphas=(0.1, 0.01, 0.05, 0.15))
    run = Method("recorded", lambda item: benchmark.run(item, features), {})
    report = evaluate(benchmark, [run], tmp_path)
    rows = {row["category"]: row for row in report.rows["recorded"]}
    for category, values in expected["official_stdout"].items():
        row = rows["all" if category == "All" else category]
        assert row["bbox@0.1"] == pytest.approx(values["per_image"], abs=0.005)
        assert row["bbox@0.1 point"] == pytest.approx(values["per_point"], abs=0.005)


def test_pf_willow_protocol_equals_the_recorded_evaluation():
    tensors = load_file(EVAL / "pfwillow.safetensors")
    expected = json.loads((EVAL / "pfwillow_expected.json").read_text())
    benchmark = PFWillow(EVAL / "PF-WILLOW", thresholds=("kp", "kp_padded", "img"))
    items = benchmark.items()
    records = []
    for i, item in enumerate(items):
        assert torch.allclose(item.data.source_points, tensors[f"p{i}.trg_kps256"].double().mT, atol=1e-4)
        assert torch.allclose(item.data.target_points, tensors[f"p{i}.src_kps256"].double().mT, atol=1e-4)
        records.append({"points": tensors[f"p{i}.pred_src256"].mT.tolist()})
    row = benchmark.rows(items, records)[0]
    for key, values in expected.items():
        kind, alpha = key.split("@")
        ours = "img" if kind == "img" else "kp_padded"
        assert row[f"{ours}@{alpha}"] == pytest.approx(values["mean"], abs=1e-6)
        for item, official, exact in zip(
            items, values["threshold_official"], values["threshold_excluding_padding"], strict=True
        ):
            assert item.data.threshold(ours) == pytest.approx(official, abs=1e-3)
            assert item.data.threshold("kp" if ours == "kp_padded" else "img") == pytest.approx(exact, abs=1e-3)
    assert row["kp@0.1"] < row["kp_padded@0.1"]  # the padded threshold is too lenient
    assert [row["category"] for row in benchmark.rows(items, records)[1:]] == ["car(G)", "duck(S)", "winebottle(woC)"]


def test_the_position_baseline_copies_the_relative_position():
    benchmark = SPair(EVAL / "SPair-71k")
    for item in benchmark.items():
        found = as_points(benchmark.run(item, lambda picture, _: BASELINES["position"]()(picture))["points"])
        scale = torch.tensor(item.data.target_size) / torch.tensor(item.data.source_size)
        copied = (item.data.source_points + 0.5) * scale - 0.5
        assert (found - copied).abs().max() <= 1.0


def test_a_stopped_run_goes_on_where_it_was_and_equals_one_that_was_not(tmp_path):
    benchmark, whole, again = SPair(EVAL / "SPair-71k"), Counting(), Counting()
    reference = evaluate(benchmark, methods(benchmark, [FeatureStore(whole)]), tmp_path / "one")
    calls = iter(range(4))

    def stops(item):
        next(calls)  # StopIteration after four items
        return benchmark.run(item, FeatureStore(again))

    with pytest.raises(StopIteration):
        evaluate(benchmark, [Method("counting", stops, {"model": "counting"})], tmp_path / "two")
    [records] = (tmp_path / "two" / "records").iterdir()
    with records.open("a") as file:
        file.write('{"key": "half a li')  # killed while writing
    ran = []

    def counted(item):
        ran.append(item.key)
        return benchmark.run(item, FeatureStore(again))

    report = evaluate(benchmark, [Method("counting", counted, {"model": "counting"})], tmp_path / "two")
    assert len(ran) == len(benchmark.items()) - 4
    assert report.rows == reference.rows
    assert all(json.loads(line) for line in records.read_text().splitlines())


def test_other_settings_are_not_mixed_up(tmp_path):
    ran = []

    def method(settings):
        def run(item):
            ran.append(item.key)
            return {"points": item.data.target_points.tolist()}

        return Method("same name", run, settings)

    narrow, wide = SPair(EVAL / "SPair-71k", categories=("bus",)), SPair(EVAL / "SPair-71k", soft=1.0)
    evaluate(narrow, [method({"t": 1})], tmp_path)
    first = len(ran)
    evaluate(narrow, [method({"t": 1})], tmp_path)
    assert len(ran) == first
    evaluate(narrow, [method({"t": 2})], tmp_path)
    assert len(ran) == 2 * first
    evaluate(wide, [method({"t": 1})], tmp_path)
    assert len(ran) == 2 * first + len(wide.items())


def test_every_picture_is_extracted_once_and_read_from_disk_afterwards(tmp_path):
    benchmark, extractor = SPair(EVAL / "SPair-71k"), Counting()
    pictures = {name for item in benchmark.items() for name in (item.data.source, item.data.target)}
    evaluate(benchmark, methods(benchmark, [FeatureStore(extractor, folder=tmp_path / "f")]), tmp_path / "one")
    assert extractor.made == len(pictures)
    evaluate(benchmark, methods(benchmark, [FeatureStore(extractor, folder=tmp_path / "f")]), tmp_path / "two")
    assert extractor.made == len(pictures)
    next((tmp_path / "f").iterdir()).write_bytes(b"damaged")
    evaluate(benchmark, methods(benchmark, [FeatureStore(extractor, folder=tmp_path / "f")]), tmp_path / "three")
    assert extractor.made == len(pictures) + 1


def test_the_limit_is_spread_over_the_items():
    items = SPair(EVAL / "SPair-71k").items()
    some = spread(items, 4)
    assert len(some) == 4
    assert {item.category for item in some} == {item.category for item in items}
    with pytest.raises(InputError, match="at least 1"):
        spread(items, 0)


def test_pf_pascal_layout(tmp_path):
    for folder in ("JPEGImages", "Annotations/dog", "Annotations/cat"):
        (tmp_path / folder).mkdir(parents=True)
    for name, size in (("a", (40, 20)), ("b", (20, 80))):
        smooth_picture(1, *size).image().save(tmp_path / "JPEGImages" / f"{name}.jpg")
    marks = np.array([[10.0, 10.0], [np.nan, np.nan], [20.0, 5.0]])
    savemat(tmp_path / "Annotations/dog/a.mat", {"kps": marks, "bbox": np.array([[4, 2, 36, 18]])})
    savemat(tmp_path / "Annotations/cat/a.mat", {"kps": marks * 0, "bbox": np.array([[0, 0, 1, 1]])})
    savemat(tmp_path / "Annotations/dog/b.mat", {"kps": marks * 0.9, "bbox": np.array([[1, 1, 18, 70]])})
    text = "source_image,target_image,class\nPF-PASCAL/JPEGImages/a.jpg,PF-PASCAL/JPEGImages/b.jpg,12\n"
    (tmp_path / "test_pairs.csv").write_text(text)
    [item] = PFPascal(tmp_path).items()
    assert item.category == "dog"
    assert item.data.target_points.tolist() == [[64, 128], [128, 64]]  # image A, squeezed to 256 x 256
    assert torch.allclose(item.data.source_points, torch.tensor([[115.2, 28.8], [230.4, 14.4]]).double())
    assert item.data.threshold("bbox") == pytest.approx(32 * 256 / 40)
    assert PFPascal(tmp_path).picture(item.data.source).size == (256, 256)
    (tmp_path / "Annotations/dog/b.mat").unlink()
    with pytest.raises(MissingError, match=r"Annotations/dog/b\.mat"):
        PFPascal(tmp_path).items()


def cub(root, count):
    (root / "images" / "001.Bird").mkdir(parents=True)
    (root / "parts").mkdir()
    lines = {"images.txt": [], "train_test_split.txt": [], "bounding_boxes.txt": [], "parts/part_locs.txt": []}
    for i in range(1, count + 1):
        smooth_picture(i, 60, 50).image().save(root / "images" / "001.Bird" / f"b{i}.jpg")
        lines["images.txt"].append(f"{i} 001.Bird/b{i}.jpg")
        lines["train_test_split.txt"].append(f"{i} {int(i == 1)}")
        lines["bounding_boxes.txt"].append(f"{i} 11.0 6.0 40.0 20.0")
        lines["parts/part_locs.txt"] += [f"{i} {part} {12 + part} {7 + part} {int(part != i)}" for part in range(1, 5)]
    for name, rows in lines.items():
        (root / name).write_text("\n".join(rows) + "\n")


def test_cub_subsets_and_squares(tmp_path):
    cub(tmp_path, 5)
    benchmark = CUB(tmp_path, subsets=2, pictures=2)
    items = benchmark.items()
    assert len(items) == 2 * 2  # every ordered pair of each subset
    assert not any("b1" in item.key for item in items)  # a training picture
    # box 10..49 x 5..24, 5 % of 40 and 20 around it, rounded: 8..51 x 4..25, made square: 44 x 44
    left, top, right, bottom = square_around([11.0, 6.0, 40.0, 20.0])
    assert (left, top, right - left, bottom - top) == (8, -7, 44, 44)
    pair = items[0].data
    first = int(pair.source[-5])
    seen = [part for part in range(1, 5) if part not in (first, int(pair.target[-5]))]
    expected = [[(11 + p - left) * 256 / 44, (6 + p - top) * 256 / 44] for p in seen]
    assert torch.allclose(pair.source_points, torch.tensor(expected).double())
    assert pair.threshold("img") == 256
    cut = benchmark.picture(pair.source)
    assert cut.size == (256, 256)
    assert torch.allclose(cut.pixels[:, 0], cut.pixels[:, 30], atol=0.03)  # above the picture its first row repeats
    rows = benchmark.rows(items, [{"points": item.data.target_points.tolist()} for item in items])
    assert [row["category"] for row in rows] == ["all", "subset 0", "subset 1"]
    assert rows[0]["img@0.1"] == 100
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "one.txt").write_text("001.Bird/b2.jpg\nb3.jpg\nb1.jpg\n")
    assert len(CUB(tmp_path, lists=str(tmp_path / "lists")).items()) == 6
    with pytest.raises(InputError, match="fewer subsets"):
        CUB(tmp_path).items()


def parquet(path, count=6):
    rows = []
    for i in range(count):
        file = io.BytesIO()
        smooth_picture(i, 64, 64).image().save(file, "png")
        marks = [[5.0 + i, 6.0], [30.0, 31.0], [50.0, 20.0 + i], [60.0, 60.0]]
        rows.append(
            {"img": {"bytes": file.getvalue(), "path": ""}, "kps_xy": marks, "kps_visible": [True, True, True, i > 2]}
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_keypoints_of_a_parquet_file(tmp_path):
    parquet(tmp_path / "some.parquet")
    benchmark = Keypoints(tmp_path / "some.parquet", pairs_drawn=7)
    items = benchmark.items()
    assert len(items) == 7
    assert [i.key for i in items] == [i.key for i in Keypoints(tmp_path / "some.parquet", pairs_drawn=7).items()]
    cropped = Keypoints(tmp_path / "some.parquet", pairs_drawn=4, jitter=True)
    for item in cropped.items():
        picture = cropped.picture(item.data.target)
        assert 40 <= picture.width == picture.height <= 64
        assert ((item.data.target_points >= 0) & (item.data.target_points < picture.width)).all()
    with pytest.raises(MissingError, match="no parquet file"):
        Keypoints(tmp_path / "none.parquet").items()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(InputError, match="not a parquet file"):
        Keypoints(tmp_path / "bad.parquet").items()


@pytest.mark.parametrize(
    ("factory", "wanted"),
    [(SPair, "PairAnnotation"), (PFWillow, "test_pairs.csv"), (PFPascal, "test_pairs.csv"), (CUB, "images.txt")],
)
def test_a_wrong_folder_says_what_was_looked_for(tmp_path, factory, wanted):
    with pytest.raises(MissingError, match=wanted) as caught:
        factory(tmp_path).items()
    assert str(tmp_path) in str(caught.value)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def test_bench_on_the_command_line(tmp_path):
    out = tmp_path / "out"
    arguments = (
        "bench",
        "spair",
        "--data",
        EVAL / "SPair-71k",
        "--limit",
        5,
        "--size",
        "long48",
        "--baselines",
        "--out",
        out,
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "spair.json").read_text())
    assert set(report["rows"]) == {"seedling", *BASELINES}
    assert (out / "spair.csv").read_text().startswith("method,category,count,bbox@0.1,bbox@0.1 point,")
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert sum("worst" in name for name in pictures) == 3
    assert sum("best" in name for name in pictures) == 2  # of five, no picture twice
    assert all(ds.read(out / "pictures" / name).width > 100 for name in pictures)
    before = {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()}
    assert run(*arguments).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()} == before


def test_sweep_on_the_command_line(tmp_path):
    grid = ("--t", "0:40:20", "--site", "up.0,up.1", "--ensemble", "1,2", "--size", "long32", "--limit", 3)
    result = run("sweep", "spair", "--data", EVAL / "SPair-71k", *grid, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    cells = json.loads((tmp_path / "spair-sweep.json").read_text())["cells"]
    assert len({(cell["t"], cell["site"], cell["ensemble"]) for cell in cells}) == 3 * 2 * 2
    assert ds.read(tmp_path / "spair-sweep.png").width > 300
    one = run("bench", "spair", "--data", EVAL / "SPair-71k", "--t", 20, "--site", "up.1", "--ensemble", 2, "--size", "long32",
              "--limit", 3, "--pictures", 0, "--out", tmp_path / "one")  # fmt: skip
    assert one.exit_code == 0, one.output
    row = json.loads((tmp_path / "one" / "spair.json").read_text())["rows"]["seedling"][0]
    cell = next(c for c in cells if (c["t"], c["site"], c["ensemble"]) == (20, "up.1", 2))
    assert cell["bbox@0.1"] == pytest.approx(row["bbox@0.1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "nothing", "--data", "."), "choose one of spair"),
        (("bench", "spair", "--data", "missing"), "PairAnnotation"),
        (("bench", "spair", "--data", EVAL / "SPair-71k", "--set", "colour=red"), "alphas=0.1,0.05,0.01"),
        (("bench", "spair", "--data", EVAL / "SPair-71k", "--set", "soft=much"), "default is 0.0"),
        (("bench", "spair", "--data", EVAL / "SPair-71k", "--set", "thresholds=iou"), "no threshold 'iou'"),
        (("bench", "spair", "--data", EVAL / "SPair-71k", "--set", "categories=whale"), "no pairs of whale"),
        (("sweep", "spair", "--data", EVAL / "SPair-71k", "--t", "a,b"), "--t 'a,b'"),
        (("sweep", "spair", "--data", EVAL / "SPair-71k", "--site", "up.9"), "no site 'up.9'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, arguments, message):
    result = run(*arguments, "--out", tmp_path)
    assert isinstance(result.exception, (InputError, MissingError)), result.output
    assert message in str(result.exception)


def test_flip_swaps_left_and_right_keypoints(tmp_path):
    """A mirrored photo is another animal that looks the other way: its left eye is where the mirror has the right one."""
    picture = smooth_picture(3, 80, 48)
    picture.image().save(tmp_path / "one.png")
    picture.image().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "two.png")
    points = torch.tensor([[10.0, 20.0], [30.0, 22.0], [60.0, 40.0]], dtype=torch.float64)
    mirrored = torch.stack([79 - points[:, 0], points[:, 1]], 1)

    class Turned(Semantic):
        def pairs(self):
            names = str(tmp_path / "one.png"), str(tmp_path / "two.png")
            box = (0.0, 0.0, 79.0, 47.0)
            return [Pair(*names, "animal", points, mirrored[[1, 0, 2]], box, (80, 48), box, key="a", ids=(4, 7, 9))]

    features = FeatureStore(BASELINES["rgb"](size=0, stride=1))
    for flip, swaps, right in ((False, (), 0), (True, ("4-7",), 100), (True, (), 100 / 3)):
        benchmark = Turned(tmp_path, flip=flip, swaps=swaps, alphas=(0.02,))
        [item] = benchmark.items()
        record = benchmark.run(item, features)
        assert benchmark.rows([item], [record])[0]["bbox@0.02"] == pytest.approx(right)
        assert record.get("mirrored", False) == flip
    with pytest.raises(InputError, match="LEFT-RIGHT"):
        Turned(tmp_path, swaps=("4:7",))


def test_joint_features_keep_their_parts_on_disk(tmp_path):
    """What is read back can still be reduced together with the other picture of a pair."""
    benchmark = SPair(EVAL / "SPair-71k")
    joint = Joint([BASELINES["rgb"](), BASELINES["sift"]()], pca=8)
    item = benchmark.items()[0]
    made = benchmark.run(item, FeatureStore(joint, folder=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert benchmark.run(item, FeatureStore(joint, folder=tmp_path)) == made
    source, target = (joint(benchmark.picture(name)) for name in (item.data.source, item.data.target))
    assert made["points"] == ds.transfer(source, target, item.data.source_points).points.tolist()


def test_features_of_a_model_that_was_trained_on_are_made_again(tmp_path):
    unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)  # fmt: skip
    model = UNetDenoiser(unet.eval(), ds.NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000)))
    picture, settings = smooth_picture(1, 32, 32), {"t": 10, "site": "up.0", "ensemble": 1, "size": 0}

    def made():
        FeatureStore(ds.as_extractor(model, **settings), folder=tmp_path)(picture)
        return len(list(tmp_path.iterdir()))

    assert made() == made() == 1
    with torch.no_grad():
        unet.conv_in.weight.add_(1e-3)
    assert made() == 2


def test_records_of_a_corrected_file_are_made_anew(tmp_path):
    from denoscope.benchmarks.pairs import Pairs
    from denoscope.benchmarks.running import options_of

    path = tmp_path / "pairs.json"
    told = []
    for points in ([[1, 1]], [[2, 1]], [[1, 1]]):
        pair = {"source": "a.png", "target": "b.png", "source_points": points, "target_points": points}
        path.write_text(json.dumps([pair]))
        told.append(options_of(Pairs(path)))
    assert told[0] != told[1]
    assert told[0] == told[2]
