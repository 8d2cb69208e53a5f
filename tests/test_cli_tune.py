"""`denoscope tune` as a user meets it: a recipe that other verbs take, numbers, a heat map, and mistakes in one sentence."""

import json
import shutil
import tomllib

import numpy as np
import pytest
from conftest import GOLDEN, smooth_picture

import denoscope as ds

PIPELINE = GOLDEN / "dift-sd" / "pipeline"
GRID = ["--t", "20", "--sites", "up.1,up.0+up.1", "--budget", "60"]


@pytest.fixture
def data(tmp_path):
    """Three photos, a pair of two of them, masks of all, and techniques that read at 64 pixels."""
    photos, masks = tmp_path / "photos", tmp_path / "photos" / "masks"
    masks.mkdir(parents=True)
    for i, name in enumerate(("one", "two", "three")):
        picture = smooth_picture(i, 72, 56)
        picture.image().save(photos / f"{name}.png")
        np.save(masks / f"{name}.npy", (picture.pixels[0] > picture.pixels[1]).numpy().astype(np.uint8))
    pair = {
        "source": "one.png",
        "target": "two.png",
        "source_points": [[9, 9], [40, 30]],
        "target_points": [[9, 9], [40, 30]],
    }
    swapped = {**pair, "source": "two.png", "target": "one.png"}
    (photos / "pairs.json").write_text(json.dumps([pair, swapped]))
    (tmp_path / "tech.toml").write_text('[plain]\nsize = "64"\n\n[words]\nprompt = "a photo of a cat"\n')
    return tmp_path


def test_the_recipe_is_taken_by_other_verbs(run, data):
    out = data / "found" / "r.toml"
    told = [
        "tune",
        PIPELINE,
        "--pairs",
        data / "photos" / "pairs.json",
        "--techniques",
        data / "tech.toml",
        *GRID,
        "--exhaustive",
    ]
    status, printed, error = run(*told, "--out", out)
    assert status == 0, error
    assert f"Recipe: {out}" in printed
    assert "of a budget of 60" in printed
    assert "the choice has rank" in printed
    assert "the grid alone takes" in " ".join(printed.split())
    made = tomllib.loads(out.read_text())
    assert (made["t"], made["size"]) in ((20, "64"), (261, "64"))
    saved = json.loads((data / "found" / "r-tune" / "tune.json").read_text())
    assert made["notes"]["verdict"] == saved["sentence"]
    assert saved["rows"] <= 60
    assert ds.read(data / "found" / "r-tune" / "tune.png").width > 200
    assert (data / "found" / "r-tune" / "tune.csv").read_text().startswith("technique,t,site,ensemble,rows,value,items")
    status, _, error = run("features", data / "photos" / "one.png", "--recipe", out, "--out", data / "f")
    assert status == 0, error
    fm = ds.FeatureMap.load(data / "f" / "one.safetensors")
    assert (fm.recipe["t"], fm.recipe["ensemble"]) == (made["t"], made["ensemble"])
    assert fm.recipe["size"] == [64, 64]


def test_help_shows_how_a_technique_is_written(run):
    for verb in ("tune", "shift"):
        assert "[label] and prompt" in " ".join(run(verb, "--help")[1].replace("│", " ").split())


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_short_denoising_in_a_file_of_techniques(run, data):
    (data / "short.toml").write_text('[plain]\nsize = "64"\n[fixed]\ndenoise_from = 22\n[above]\ndenoise_from = "+2"\n')
    told = ["tune", PIPELINE, data / "photos" / "one.png", data / "photos" / "two.png", "--preset", "temporal"]
    told += ["--techniques", data / "short.toml", "--t", "20,101", "--sites", "up.1", "--budget", "400"]
    status, printed, error = run(*told, "--out", data / "r.toml")
    assert status == 0, error
    assert "'fixed' has denoise_from = 22, which starts below t = 101 and 51, and is left out there" in printed
    cells = json.loads((data / "r-tune" / "tune.json").read_text())["cells"]
    assert {(cell["technique"], cell["t"]) for cell in cells} >= {("fixed", 20), ("above", 20), ("above", 101)}
    assert ("fixed", 101) not in {(cell["technique"], cell["t"]) for cell in cells}
    (data / "short.toml").write_text("[low]\ndenoise_from = 12\n")
    status, _, error = run(*told, "--out", data / "r.toml")
    assert status == 2
    assert "The technique 'low' has denoise_from = 12" in error


def test_a_recipe_beside_its_model_is_read_from_anywhere(run, data, monkeypatch):
    shutil.copytree(PIPELINE, data / "mymodel")
    monkeypatch.chdir(data)
    (data / "small.toml").write_text('[plain]\nsize = "64"\n')
    told = ["tune", "mymodel", "photos/one.png", "photos/two.png", "--techniques", "small.toml", *GRID]
    status, _, error = run(*told, "--out", "sub/r.toml")
    assert status == 0, error
    assert tomllib.loads((data / "sub" / "r.toml").read_text())["model"] == "../mymodel"
    monkeypatch.chdir(data / "sub")
    status, _, error = run("features", data / "photos" / "one.png", "--recipe", "r.toml", "--out", "f")
    assert status == 0, error
    assert ds.FeatureMap.load("f/one.safetensors").recipe["size"] == [64, 64]


@pytest.mark.parametrize("kind", ["masks", "pictures"])
def test_masks_and_pictures_alone(run, data, kind):
    asked = (
        ["--masks", data / "photos"] if kind == "masks" else [data / "photos" / "one.png", data / "photos" / "two.png"]
    )
    (data / "small.toml").write_text('[plain]\nsize = "64"\n')
    out = data / "r.json"
    status, printed, error = run("tune", PIPELINE, *asked, "--techniques", data / "small.toml", *GRID, "--out", out)
    assert status == 0, error
    assert ("mIoU" if kind == "masks" else "cycle consistency@0.1") in printed
    assert ("without labels" in printed) == (kind == "pictures")
    assert json.loads(out.read_text())["model"]


def test_what_masks_ignore_is_no_class(run, data):
    for name in ("one", "two", "three"):
        path = data / "photos" / "masks" / f"{name}.npy"
        labels = np.load(path)
        labels[:20] = 11
        np.save(path, labels)
    (data / "small.toml").write_text('[plain]\nsize = "64"\n')
    told = ["tune", PIPELINE, "--masks", data / "photos", "--techniques", data / "small.toml", *GRID]
    for more, classes in (((), [0, 1, 11]), (("--ignore", "11"), [0, 1])):
        status, _, error = run(*told, *more, "--out", data / "r.toml")
        assert status == 0, error
        assert json.loads((data / "r-tune" / "tune.json").read_text())["task"]["classes"] == classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Say what to tune for"),
        (("photos/one.png", "--pairs", "photos/pairs.json"), "one of them"),
        (("photos/one.png",), "at least 2 pictures"),
        (("photos/one.png", "photos/none.png"), "none.png"),
        (("--pairs", "missing.json"), "missing.json"),
        (("--masks", "missing"), "missing"),
        (("photos", "--limit", "3"), "--limit is for --pairs"),
        (("photos", "--ignore", "0"), "--ignore is for --masks"),
        (("photos", "--out", "r.txt"), ".toml or .json"),
        (("--pairs", "photos/pairs.json", "--set", "colour=1"), "alphas=0.1"),
        (("--pairs", "photos/pairs.json", "--sites", "up.9"), "up.9"),
        (("--pairs", "photos/pairs.json", "--sites", ","), "names none"),
        (("--pairs", "photos/pairs.json", "--t", "x"), "--t 'x'"),
        (("--pairs", "photos/pairs.json", "--budget", "2"), "takes"),
        (("--pairs", "photos/pairs.json", "--techniques", "photos/pairs.json"), "must hold a table"),
    ],
)
def test_mistakes_are_one_sentence(run, data, monkeypatch, arguments, message):
    monkeypatch.chdir(data)
    status, _, error = run("tune", PIPELINE, *arguments)
    assert status == 2
    assert message in error
    assert "Traceback" not in error
