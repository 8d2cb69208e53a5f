"""Few-shot segmentation benchmarks: the published mean IoU, layouts, splits, tables and pictures."""

import csv
import json

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_few_shot import scene

import denoscope as ds
from denoscope.benchmarks.protocol import Benchmark
from denoscope.benchmarks.running import FeatureStore, evaluate, methods
from denoscope.benchmarks.segmentation import ADE20K, CamVid, FewShot, counts, mean_iou, read_labels
from denoscope.features.baselines import BASELINES

HEADS = GOLDEN / "content-shift-heads"
QUICK = {"models": 2, "epochs": 5, "runs": 2}


def features(picture, category):
    return BASELINES["rgb"](size="64x48", stride=4)(picture)


# the measure


def test_the_recorded_mean_iou():
    fixture, expected = load_file(HEADS / "fixture.safetensors"), json.loads((HEADS / "expected.json").read_text())
    both, either = np.zeros(5, int), np.zeros(5, int)
    for predicted, truth in zip(fixture["miou.preds"], fixture["miou.gts"], strict=True):
        known = truth.long().numpy().copy()
        known[known == 255] = -1
        one, other = counts(predicted.short().numpy(), known.astype(np.int16), 5)
        both, either = both + one, either + other
    mean, each = mean_iou(both, either, range(5))
    assert mean == pytest.approx(expected["miou"]["miou"], abs=1e-9)
    published = [float(line.split()[-1]) for line in expected["miou"]["per_class"]]
    assert each == pytest.approx(published, abs=5e-5)


@given(st.integers(0, 10_000), st.integers(2, 5))
def test_counts_are_as_defined_pixel_by_pixel(seed, classes):
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, classes, (6, 7)).astype(np.int16)
    truth = rng.integers(-1, classes, (6, 7)).astype(np.int16)
    for convention in ("official", "standard"):
        inside = (truth >= 0) | (convention == "official")
        both, either = counts(predicted, truth, classes, convention)
        for k in range(classes):
            one, other = (predicted == k) & inside, truth == k
            assert both[k] == (one & other).sum()
            assert either[k] == (one | other).sum()
    full = np.maximum(truth, 0)
    assert mean_iou(*counts(full, full, classes), np.unique(full).tolist())[0] == pytest.approx(1)


def test_conventions_differ_in_classes_that_are_nowhere():
    both, either = [4, 0, 0], [5, 0, 3]
    assert mean_iou(both, either, range(3), "official")[0] == pytest.approx(0.8 / 3)
    assert mean_iou(both, either, range(3), "standard")[0] == pytest.approx(0.8 / 2)
    assert mean_iou(both, either, [1], "standard")[0] == 0
    with pytest.raises(ds.InputError, match="no convention 'own'"):
        counts(np.zeros((2, 2), np.int16), np.zeros((2, 2), np.int16), 2, "own")
    with pytest.raises(ds.InputError, match=r"is \[2, 2\] but the truth \[2, 3\]"):
        counts(np.zeros((2, 2), np.int16), np.zeros((2, 3), np.int16), 2)


# layouts


def save_pair(seed, picture, mask, shift=0):
    for path in (picture, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    image, labels = scene(seed)
    image.image().save(picture)
    labels = (labels + shift).astype(np.uint8)
    if mask.suffix == ".npy":
        np.save(mask, labels)
    else:
        Image.fromarray(labels).save(mask)


@pytest.fixture
def scarce(tmp_path):
    """A set in the layout of ddpm-segmentation."""
    for k in range(6):
        folder = tmp_path / "discs" / "real" / ("train" if k < 4 else "test")
        save_pair(k, folder / f"{k}.png", folder / f"{k}.npy")
    return tmp_path / "discs"


@pytest.fixture
def camvid(tmp_path):
    for k in range(7):
        part = "train" if k < 4 else "val"
        save_pair(k, tmp_path / part / f"{k}.jpg", tmp_path / f"{part}annot" / f"{k}.png", shift=2)
    path = tmp_path / "valannot" / "4.png"
    labels = np.array(Image.open(path))
    labels[:10] = 11
    Image.fromarray(labels).save(path)
    return tmp_path


def test_label_scarce_runs_shuffle_train_and_test_or_keep_them(scarce):
    shuffled, fixed = FewShot(scarce), FewShot(scarce, split="fixed", runs=3)
    assert isinstance(shuffled, Benchmark)
    splits = [item.data for item in shuffled.items()]
    assert len(splits) == 5
    assert all((len(split.train), len(split.test)) == (4, 2) for split in splits)
    assert all({file.stem for file, _ in (*s.train, *s.test)} == set("012345") for s in splits)
    assert len({tuple(sorted(file.stem for file, _ in split.test)) for split in splits}) > 1
    assert [item.key for item in shuffled.items()] == [item.key for item in FewShot(scarce).items()]
    kept = [item.data for item in fixed.items()]
    assert all([file.stem for file, _ in split.test] == ["4", "5"] for split in kept)
    assert [split.seed for split in kept] == [0, 1, 2]


def test_published_sets_have_their_classes_and_ignored_labels(tmp_path):
    horse, bedroom = FewShot(tmp_path / "horse-21"), FewShot(tmp_path / "bedroom_28")
    assert len(horse.classes) == len(horse.counted) == 21
    assert len(bedroom.classes) == 29
    assert list(bedroom.counted) == list(range(1, 29))
    assert bedroom.ignore == 0
    assert bedroom.classes.names[28] == "table staff"
    assert len(FewShot(tmp_path, set="ffhq_34").classes) == 34
    with pytest.raises(ds.InputError, match="no set 'cows'"):
        FewShot(tmp_path, set="cows")
    with pytest.raises(ds.InputError, match="shuffled"):
        FewShot(tmp_path, split="half")


def test_a_run_beats_the_majority_and_fills_the_table(scarce, tmp_path):
    benchmark = FewShot(scarce, side=32, **QUICK)
    items = benchmark.items()
    records = [json.loads(json.dumps(benchmark.run(item, features))) for item in items]
    plain = [benchmark.baselines()["majority class"](item) for item in items]
    assert benchmark.score(items[0], records[0]) > 0.75 > benchmark.score(items[0], plain[0])
    assert sum(records[0]["pixels"]) == 2 * 32 * 32  # compared at the size that is asked for
    rows = benchmark.rows(items, records)
    assert [row["category"] for row in rows] == ["all", "class 0", "class 1"]
    assert rows[0]["mIoU"] == pytest.approx(np.mean([100 * benchmark.score(items[k], records[k]) for k in range(2)]))
    assert rows[0]["mIoU"] == pytest.approx(np.mean([row["mIoU"] for row in rows[1:]]))
    drawn = benchmark.draw(items[0], records[0])
    assert drawn.width > 900
    again = benchmark.run(items[0], features)
    assert again["intersections"] == records[0]["intersections"]


def test_the_harness_runs_resumes_and_draws(camvid, tmp_path):
    benchmark = CamVid(camvid, shots=2, pixels=300, side=64, **QUICK)
    store = FeatureStore(BASELINES["rgb"](size="64x48", stride=4))
    report = evaluate(benchmark, methods(benchmark, [store], baselines=True), tmp_path / "out", pictures=1)
    assert list(report.rows) == ["rgb", "majority class"]
    assert report.rows["rgb"][0]["mIoU"] > report.rows["majority class"][0]["mIoU"] + 10
    assert (tmp_path / "out" / "camvid.csv").is_file()
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2

    def nothing(jobs, done):
        assert not jobs
        assert done == 4
        return jobs

    assert evaluate(benchmark, methods(benchmark, [store], baselines=True), tmp_path / "out", track=nothing).rows


def test_camvid_leaves_out_what_is_unlabelled_and_classes_that_are_nowhere(camvid):
    benchmark = CamVid(camvid, shots=3, **QUICK)
    items = benchmark.items()
    assert all((len(item.data.train), len(item.data.test)) == (3, 3) for item in items)
    record = benchmark.majority(items[0])
    assert sum(record["pixels"]) == 3 * 64 * 48 - 10 * 64
    rows = {row["category"]: row for row in benchmark.rows(items, [record, record])}
    assert rows["sky"]["mIoU"] is None
    assert rows["pole"]["mIoU"] > 50
    assert rows["road"]["mIoU"] == 0
    assert rows["all"]["mIoU"] == pytest.approx(rows["pole"]["mIoU"] / 2)
    assert rows["all"]["± runs"] == rows["pole"]["± runs"] == 0
    assert {row["± runs"] for row in benchmark.rows(items[:1], [record])} == {None}  # n - 1 is 0
    with pytest.raises(ds.InputError, match="shots=9 is not possible"):
        CamVid(camvid, shots=9).items()
    assert len(CamVid(camvid, shots=1, test=2).items()[0].data.test) == 2


def test_ade20k_counts_from_one_and_ignores_other(tmp_path):
    for k in range(3):
        save_pair(
            k, tmp_path / "images" / "validation" / f"{k}.jpg", tmp_path / "annotations" / "validation" / f"{k}.png"
        )
    benchmark = ADE20K(tmp_path, shots=2, train="validation", runs=1)
    (item,) = benchmark.items()
    assert len(item.data.test) == 1
    assert item.data.test[0] not in item.data.train
    truth = benchmark.truth(item.data.test[0][1])
    assert sorted(np.unique(truth)) == [-1, 0]  # label 1 is class 0
    assert len(benchmark.classes) == 150
    assert benchmark.majority(item)["intersections"][0] == (truth == 0).sum()
    table = ["Idx\tRatio\tTrain\tVal\tName", *(f"{k}\t0\t0\t0\tthing {k}, item" for k in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(table))
    assert benchmark.classes.names[149] == "thing 150"
    with pytest.raises(ds.MissingError, match="images/training"):
        ADE20K(tmp_path).items()
    with pytest.raises(ds.InputError, match="leaves no picture"):
        ADE20K(tmp_path, shots=3, train="validation").items()


def test_the_table_shows_the_classes_that_occur_and_the_files_all(run, tmp_path):
    for k in range(3):
        save_pair(k, tmp_path / "images/validation" / f"{k}.jpg", tmp_path / "annotations/validation" / f"{k}.png", 1)
    settings = ("shots=2", "train=validation", "runs=1", "models=1", "epochs=1", "side=32")
    asked = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "out"
    status, text, _ = run("bench", "ade20k", "--model", "rgb", "--data", tmp_path, *asked, "--size", "64", "--out", out)
    assert status == 0
    shown = [line.split()[:2] for line in text.splitlines() if line.startswith("  label")]
    assert shown == [["label", "1"], ["label", "2"]]
    with (out / "ade20k.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 151
    assert {row["± runs"] for row in rows} == {""}


def test_what_is_wrong_is_told_with_its_path(scarce, tmp_path):
    with pytest.raises(ds.MissingError, match=r"not in the layout of ddpm-segmentation: .*real/train"):
        FewShot(tmp_path).items()
    (scarce / "real" / "train" / "2.npy").unlink()
    with pytest.raises(ds.MissingError, match=r"2\.png has no mask .*2\.npy"):
        FewShot(scarce).items()
    np.save(scarce / "real" / "train" / "2.npy", np.full((48, 64), 40))
    with pytest.raises(ds.InputError, match=r"2\.npy has label 40, but there are 21 classes"):
        FewShot(scarce, set="horse_21").majority(FewShot(scarce, split="fixed").items()[0])
    with pytest.raises(ds.MissingError, match="no mask"):
        read_labels(scarce / "none.npy", 255)
    with pytest.raises(ds.InputError, match="masks hold class numbers"):
        read_labels(scarce / "real" / "train" / "2.png", 255)
    with pytest.raises(ds.InputError, match="no convention"):
        CamVid(scarce, convention="mine")
    with pytest.raises(ds.InputError, match="At least 1 run"):
        CamVid(scarce, runs=0)
