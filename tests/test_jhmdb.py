"""Pose propagation: the recorded label maps, positions and PCK of VideoWalk's code; layouts; animal videos."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import load_file

import denoscope as ds
from denoscope.benchmarks.jhmdb import JHMDB, JOINTS, AnimalVideo, normalised_errors
from denoscope.benchmarks.protocol import Benchmark
from denoscope.correspondence.labels import joint_cells, joint_maps
from denoscope.features.baselines import BASELINES

ROOT = GOLDEN / "dift-eval" / "JHMDB"


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "dift-eval" / "jhmdb.safetensors")


def features(picture, category):
    return BASELINES["rgb"](size="0", stride=4)(picture)


def test_label_maps_and_positions_are_the_recorded_ones(recorded):
    for number, item in enumerate(JHMDB(ROOT).items()):
        width, height = ds.read(item.data.frames[0]).size
        cells = item.data.truth[0] * 40 / torch.tensor([width, height])
        if f"v{number}.labelmap0" in recorded:
            maps = joint_maps(cells, (40, 40), official=True)
            torch.testing.assert_close(maps[1:].permute(1, 2, 0), recorded[f"v{number}.labelmap0"], atol=1e-6, rtol=0)
        for frame in range(2):
            if f"v{number}.pred{frame}" in recorded:
                found = joint_cells(recorded[f"v{number}.pred{frame}"].permute(2, 0, 1))
                torch.testing.assert_close(found.mT, recorded[f"v{number}.coord{frame}"], atol=1e-4, rtol=0)


def test_recorded_positions_have_the_official_pck(recorded):
    expected = json.loads((GOLDEN / "dift-eval" / "jhmdb_expected.json").read_text())["pck_per_joint_then_mean"]
    benchmark = JHMDB(ROOT)
    assert isinstance(benchmark, Benchmark)
    items, records = benchmark.items(), []
    for number, item in enumerate(items):
        width, height = ds.read(item.data.frames[0]).size
        frames = [recorded[f"v{number}.coord{k}"].mT for k in range(len(item.data.frames))]
        records.append(
            {"points": [[[x / 40 * width, y / 40 * height] if x >= 0 else None for x, y in f.tolist()] for f in frames]}
        )
    rows = benchmark.rows(items, records)
    assert [row["category"] for row in rows] == ["all", *JOINTS]
    for alpha, values in expected.items():
        found = [row[f"PCK@{alpha}"] for row in [*rows[1:], rows[0]]]
        assert found == pytest.approx(values, abs=1e-4)


def test_tracking_fills_the_protocol_and_is_drawn():
    benchmark = JHMDB(ROOT, radius=4)
    item = benchmark.items()[0]
    for run in (lambda item: benchmark.run(item, features), *benchmark.baselines().values()):
        record = json.loads(json.dumps(run(item)))
        assert [len(pose) for pose in record["points"]] == [15] * len(item.data.frames)
        assert 0 <= benchmark.score(item, record) <= 1
        assert benchmark.rows([item], [record])[0]["count"] > 0
        assert benchmark.draw(item, record).width > 300


@pytest.mark.parametrize("official", [True, False])
def test_a_still_video_keeps_its_joints(tmp_path, official):
    """To a cell where they are placed as published, to half a cell and the blur of three cells where exactly."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for index in range(4):
        image.save(tmp_path / f"f{index}.png")
    rows = ["frame,nose_x,nose_y,tail_x,tail_y", *(f"f{i}.png,20.5,21,50,{'' if i == 2 else 40}" for i in range(4))]
    (tmp_path / "keypoints.csv").write_text("\n".join(rows))
    benchmark = AnimalVideo(tmp_path, topk=1, official=official)
    item = benchmark.items()[0]
    record = benchmark.run(item, features)
    error = torch.tensor(record["points"])[1:, 0] - torch.tensor([20.5, 21])
    assert error.abs().max() < (4 if official else 3)
    rows = benchmark.rows([item], [record])
    assert [(row["category"], row["count"]) for row in rows] == [("all", 5), ("nose", 3), ("tail", 2)]
    assert [benchmark.rows([item], [benchmark.copied(item)])[0][c] for c in benchmark.columns] == [100] * 5


def test_errors_are_shares_of_the_box_around_the_joints():
    truth = torch.tensor([[[0.0, 0], [30, 40]], [[0, 0], [30, 40]], [[0, 0], [torch.nan] * 2]]).double()
    predicted = truth + torch.tensor([0.0, 3])
    predicted[2, 0] = truth[2, 0]
    errors = normalised_errors(predicted, truth)
    assert errors[0].isnan().all()  # the first frame is given
    assert errors[1].tolist() == pytest.approx([3 / 30, 3 / 30])
    assert errors[2, 0] == 0  # the box has no extent, and the joint is where it should be
    assert errors[2, 1].isnan()
    predicted[1, 1] = torch.nan  # lost: neither counted nor part of the box, as published
    errors = normalised_errors(predicted, truth)
    assert errors[1].isnan().tolist() == [False, True]
    assert errors[1, 0] == torch.inf


def test_a_list_of_another_machine_is_understood(tmp_path):
    shutil.copytree(ROOT, tmp_path / "copy")
    listed = tmp_path / "copy" / "other.txt"
    lines = (ROOT / "testlist_split1.txt").read_text().split()
    listed.write_text(
        "\n".join(f"/no/such/disk/{a} /no/such/disk/{b}" for a, b in zip(*[iter(lines)] * 2, strict=True))
    )
    assert len(JHMDB(listed).items()) == 3
    assert len(JHMDB(tmp_path / "copy", listed="other.txt").items()) == 3


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("testlist_split1.txt", None, "no list of videos"),
        ("testlist_split1.txt", "", "is empty"),
        ("testlist_split1.txt", "one two three\n", "line 1"),
        ("testlist_split1.txt", "nowhere joint_positions/act0/vid0/joint_positions.mat\n", "names nowhere"),
        ("joint_positions/act0/vid0/joint_positions.mat", "no matrix", "holds no joint positions"),
    ],
)
def test_layouts_that_are_wrong_are_told(tmp_path, name, content, sentence):
    root = shutil.copytree(ROOT, tmp_path / "copy")
    (root / name).unlink()
    if content is not None:
        (root / name).write_text(content)
    with pytest.raises(ds.DenoscopeError, match=sentence):
        JHMDB(root).items()


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("frame,nose_x,tail_y\na.png,1,2\n", "header"),
        ("frame,nose_x,nose_y\na.png,1,two\n", "not a table"),
        ("frame,nose_x,nose_y\na.png,1\n", "not a table"),
        ("frame,nose_x,nose_y\nb.png,1,2\n", "no such file"),
        ("frame,nose_x,nose_y\na.png,1,2\n", "2 or more"),
    ],
)
def test_tables_of_animals_that_are_wrong_are_told(tmp_path, table, sentence):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "keypoints.csv").write_text(table)
    with pytest.raises(ds.DenoscopeError, match=sentence):
        AnimalVideo(tmp_path).items()
    with pytest.raises(ds.MissingError, match=r"keypoints\.csv"):
        AnimalVideo(tmp_path / "none").items()
