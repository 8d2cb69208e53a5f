"""`denoscope shift`: what it prints and writes, and that it goes on where it stopped."""

import json

import pytest
from conftest import GOLDEN, smooth_picture
from PIL import Image

import denoscope as ds

QUICK = ("--size", "long32", "--draws", 1, "--seeds", 2, "--steps", 3)
FILES = {
    "shift.json", "shift.csv", "shift.png", "features.png", "differences.png", "gate.json", "gate.csv", "gate.png",
    "repainted.png", "records",
}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    """Three pictures of different shapes, and a file of techniques."""
    for seed, size in enumerate([(72, 48), (48, 64), (60, 60)]):
        ds.write(smooth_picture(seed, *size), tmp_path / "photos" / f"{seed}.png")
    (tmp_path / "techniques.toml").write_text('[label]\nprompt = "bird"\n[again]\nsecond_t = 200\n')
    return tmp_path / "photos"


def test_everything(run, photos, tmp_path):
    out = tmp_path / "out"
    command = ("shift", "seedling", photos, "--techniques", tmp_path / "techniques.toml", *QUICK, "--out", out)
    command += ("--site", "up.1", "--site", "up.2", "--curve", "300", "--pictures", 2)
    status, printed, errors = run(*command)
    assert status == 0, errors
    assert {path.name for path in out.iterdir()} == FILES
    for text in ("up.1 at t = 50", "up.2 at t = 50", "3 pictures", "Image-to-image cannot tell: again", "strength 0.7"):
        assert text in printed
    shift, gate = (json.loads((out / f"{name}.json").read_text()) for name in ("shift", "gate"))
    assert shift["settings"]["t"] == [50, 300]
    assert len(shift["rows"]) == 3 * 2 * 2  # techniques, sites, timesteps
    assert [row["technique"] for row in gate["rows"]] == ["plain", "label"]
    for kind, rows in (("features", 2), ("repainted", 1)):
        with Image.open(out / f"{kind}.png") as image:
            assert image.height > 2 * rows * 100  # two pictures, a row for each site

    records = {path: path.read_bytes() for path in (out / "records").glob("*.jsonl")}
    ds.write(smooth_picture(7, 48, 48), photos / "3.png")
    status, printed, errors = run(*command)
    assert status == 0, errors
    assert "shift: 3 of 4 are done already" in errors
    for path, before in records.items():  # nothing is done again
        assert path.read_bytes().startswith(before)
        assert len(path.read_bytes().splitlines()) == 4
    assert "4 pictures" in printed
    assert json.loads((out / "shift.json").read_text())["pictures"][:3] == shift["pictures"]


def test_one_picture_with_the_built_in_techniques(run, photos, tmp_path):
    out, quick = tmp_path / "out", ("--site", "up.1", "--size", "64", "--draws", "1", "--no-gate")
    model = GOLDEN / "content-shift-features" / "pipeline"
    status, printed, errors = run("shift", model, photos / "0.png", *quick, "--out", out)
    assert status == 0, errors
    assert "the prompt alone is varied" in printed
    assert "One picture: no interval" in printed
    told = json.loads((out / "shift.json").read_text())["settings"]["techniques"]
    assert list(told) == ["plain", "quality", "low-quality"]
    assert told["quality"]["prompt"].startswith("a photo, high quality")
    assert not (out / "gate.json").exists()


def test_a_picture_that_cannot_be_read_or_measured(run, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG broken")
    Image.new("RGB", (48, 48), "white").save(photos / "flat.png")
    out = tmp_path / "out"
    status, _, errors = run(
        "shift", "seedling", photos, "--techniques", tmp_path / "techniques.toml", *QUICK, "--no-gate", "--out", out
    )
    assert status == 2
    assert "broken.png" in errors
    assert "of 5 pictures failed" in errors
    assert len(json.loads((out / "shift.json").read_text())["pictures"]) >= 3


def test_curves_by_default(run, photos, tmp_path):
    """Of the pictures that are drawn; what is read for them is not read again without."""
    out, told = (
        tmp_path / "out",
        ("--techniques", tmp_path / "techniques.toml", *QUICK[:2], "--draws", 2, "--site", "up.1"),
    )
    command = ("shift", "seedling", photos, *told, "--no-gate", "--pictures", 2, "--normalise", "--out", out)
    status, printed, errors = run(*command)
    assert status == 0, errors
    assert "diff / norm" in printed
    found = json.loads((out / "shift.json").read_text())
    assert (found["settings"]["t"], found["settings"]["curve"], found["settings"]["normalise"]) == (
        [50], [100, 200, 300], True,
    )  # fmt: skip
    assert {row["t"]: row["pictures"] for row in found["rows"]} == {50: 3, 100: 2, 200: 2, 300: 2}
    assert [len(row["diff"]) for row in found["pictures"][0]["rows"][::3]] == [2, 1, 1, 1]
    with Image.open(out / "shift.png") as image:
        tall = image.height
    (photos / "0.png").rename(photos / "9.png")  # now the last
    status, printed, errors = run(*command)
    assert status == 0, errors
    again = json.loads((out / "shift.json").read_text())
    assert {row["t"]: row["pictures"] for row in again["rows"]} == {50: 3, 100: 3, 200: 3, 300: 3}
    assert "2 of 3 are done already" in errors  # of 2.png the curve was missing
    assert run(*command, "--no-curve")[0] == 0
    assert {row["t"] for row in json.loads((out / "shift.json").read_text())["rows"]} == {50}
    with Image.open(out / "shift.png") as image:
        assert image.height < tall / 2
    status, _, errors = run(*command, "--no-curve", "--curve", "100")
    assert (status, "give one of them" in errors) == (2, True)


def test_other_settings_are_other_records(run, photos, tmp_path):
    scores = []
    for pool in (1, 4):
        given = ("--techniques", tmp_path / "techniques.toml", "--size", "long32", "--site", "up.2", "--draws", 1)
        feature = ("--feature", f"pool={pool}", "--no-gate", "--no-curve", "--pictures", 0, "--out", tmp_path / "out")
        status, _, errors = run("shift", "seedling", photos, *given, *feature)
        assert status == 0, errors
        scores.append([row["score"] for row in json.loads((tmp_path / "out" / "shift.json").read_text())["rows"]])
    assert scores[0] != scores[1]


def test_timesteps_of_the_published_code(run, photos, tmp_path):
    model, few = GOLDEN / "content-shift-features" / "pipeline", ("--no-gate", "--no-curve", "--pictures", 0)
    given = ("--site", "up.1", "--size", 64, "--draws", 1, "--feature", "timestep_mode=gdf", *few)
    status, _, errors = run("shift", model, photos / "0.png", *given, "--out", tmp_path / "out")
    assert status == 0, errors
    told = json.loads((tmp_path / "out" / "shift.json").read_text())["settings"]["techniques"]
    assert {one["timestep_mode"] for one in told.values()} == {"gdf"}


def test_no_verdict_from_few_pictures(run, photos, tmp_path):
    given = ("--techniques", tmp_path / "techniques.toml", *QUICK, "--site", "up.1", "--no-curve", "--pictures", 0)
    status, printed, errors = run("shift", "seedling", photos, *given, "--out", tmp_path / "out")
    assert status == 0, errors
    assert "3 pictures tell too little of others for a verdict; give at least 6." in printed
    rows = json.loads((tmp_path / "out" / "gate.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["", "undecided"]
    assert rows[1]["psnr_low"] < rows[1]["psnr_high"]  # the numbers are there


def test_recipe_and_plain_prompt(run, photos, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'model = "seedling"\nt = 30\nsite = "up.2"\nsize = "long48"\nprompt = "bird"\n'
    )
    (tmp_path / "face.json").write_text('{"face": {"prompt": "face"}, "late": {"second_t": 90}}')
    status, _, errors = run(
        "shift", "seedling", photos / "0.png", "--techniques", tmp_path / "face.json", "--recipe", tmp_path / "recipe.toml",
        "--draws", 1, "--no-gate", "--pictures", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, errors
    told = json.loads((tmp_path / "out" / "shift.json").read_text())["settings"]
    assert (told["t"], told["sites"], told["size"]) == ([30], ["up.2"], "long48")
    assert [told["techniques"][name]["prompt"] for name in ("plain", "face", "late")] == ["bird", "face", "bird"]


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("seedling", ("--techniques", "nowhere.toml"), "nowhere.toml"),
        ("seedling", ("--techniques", "empty.toml"), "names no techniques"),
        ("seedling", ("--techniques", "sized.toml"), "'big' sets 'size'"),
        ("seedling", ("--curve", "x"), "--curve 'x' is not understood"),
        ("seedling", ("--ref", "none", "--techniques", "face.toml"), "The reference is"),
        ("seedling", ("--strength", "2", "--techniques", "face.toml"), "between 0 and 1"),
        ("seedling", ("--wrong-control", "--techniques", "face.toml"), "No technique has a ControlNet"),
        (
            "seedling",
            ("--t", "90", "--techniques", "low.toml"),
            "The technique 'low' has denoise_from = 80, which starts below t = 90",
        ),
        ("seedling", ("--techniques", "typed.toml"), "guidance is a number, not 'three'"),
        ("seedling", (), "does not know the words"),
        ("sift", (), "no diffusion model"),
    ],
)
def test_mistakes(run, photos, tmp_path, monkeypatch, model, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "sized.toml").write_text("[big]\nsize = 96\n")
    (tmp_path / "face.toml").write_text('[face]\nprompt = "face"\n')
    (tmp_path / "low.toml").write_text("[low]\ndenoise_from = 80\n")
    (tmp_path / "typed.toml").write_text('[typed]\nguidance = "three"\n')
    status, _, errors = run("shift", model, photos, *more, "--out", tmp_path / "out")
    assert status == 2
    assert message in errors


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_short_denoising_is_drawn_as_far_as_it_reaches(run, photos, tmp_path):
    """Also where the preset is read below or above it, which the image-to-image check has nothing to do with."""
    (tmp_path / "short.toml").write_text('[short]\ndenoise_from = 12\n[above]\ndenoise_from = "+2"\nprompt = "face"\n')
    status, printed, errors = run(
        "shift", "seedling", photos / "0.png", "--techniques", tmp_path / "short.toml", "--t", 10, "--curve", "15", *QUICK,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, errors
    assert printed.count("left out there") == 1
    assert "'short' has denoise_from = 12, which starts below t = 15" in printed
    rows = json.loads((tmp_path / "out" / "shift.json").read_text())["rows"]
    cells = [(row["technique"], row["t"]) for row in rows]
    assert sorted(cells) == sorted([("plain", 10), ("short", 10), ("above", 10), ("plain", 15), ("above", 15)])


def test_folder_without_pictures(run, tmp_path):
    (tmp_path / "none").mkdir()
    status, _, errors = run("shift", "seedling", tmp_path / "none")
    assert (status, "holds no images" in errors) == (2, True)
