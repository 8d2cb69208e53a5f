"""The command line as a user meets it: files written, tables printed, mistakes in one sentence with exit status 2."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import GOLDEN, smooth_picture
from PIL import Image

import denoscope as ds
from denoscope.cli.options import parse_points

PIPELINE = str(GOLDEN / "dift-sd" / "pipeline")
QUICK = ["--size", "64", "--ensemble", "1"]
BAD = {"j.csv": "row,col\n1,2\n", "k.csv": "1,2,3\n", "l.json": '["12", "10"]', "m.json": "[[true, 1]]"}
COMMAND = [sys.executable, "-c", "from denoscope.cli.main import main; main()"]


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("one", "two", "three")]
    for i, path in enumerate(paths):
        smooth_picture(i, 72, 56).image().save(path)
    return paths


def test_match_writes_a_picture_and_every_number(run, photos, tmp_path):
    options = ["--points", "10,20;60,40", "-m", PIPELINE, "--prompt", "a photo of a cat", "--mutual", "--seed", 3]
    status, out, _ = run("match", *photos[:2], *options, *QUICK, "--out", tmp_path / "o")
    assert status == 0
    assert str(tmp_path / "o" / "matches.png") in out
    saved = json.loads((tmp_path / "o" / "matches.json").read_text())
    settings = {"prompt": "a photo of a cat", "size": 64, "ensemble": 1, "seed": 3}
    same = ds.match(ds.load(PIPELINE), *photos[:2], [[10, 20], [60, 40]], cycle=True, **settings)
    assert saved["matches"] == same.rows()
    assert saved["recipe"]["t"] == 261
    assert saved["source"]["path"] == str(photos[0])
    assert ds.read(tmp_path / "o" / "matches.png").width > 500
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["matches.json", "matches.png"]


def test_match_many_targets_grids_and_masks(run, photos, tmp_path):
    out, model = tmp_path / "o", ["-m", PIPELINE, *QUICK]
    assert run("match", *photos, "--grid", 3, "--out", out, *model)[0] == 0
    saved = json.loads((out / "matches.json").read_text())
    assert [len(one["matches"]) for one in saved] == [9, 9]
    mask = Image.new("L", (72, 56))
    mask.paste(255, (30, 20, 50, 40))
    mask.save(tmp_path / "mask.png")
    options = ["--mask", tmp_path / "mask.png", "--grid", 4, "--heat", "--soft", 1]
    assert run("match", *photos[:2], *options, "--out", out, *model)[0] == 0
    rows = json.loads((out / "matches.json").read_text())["matches"]
    assert len(rows) == 16
    assert all(30 <= row["source_x"] < 50 and 20 <= row["source_y"] < 40 for row in rows)


def test_features_are_saved_and_not_made_twice(run, photos, tmp_path):
    out, options = tmp_path / "o", ["--out", tmp_path / "o", "-m", PIPELINE, *QUICK, "--site", "up.0"]
    status, printed, _ = run("features", tmp_path, *options)
    assert status == 0
    assert "3 of 3 pictures: 24 channels, e.g. 2x2 cells" in printed
    fm = ds.FeatureMap.load(out / "one.safetensors")
    again = ds.features(ds.load(PIPELINE), photos[0], size=64, ensemble=1, site="up.0")
    assert (fm.values - again.values).abs().max() < 1e-6
    assert ds.read(out / "one.png").size == (72, 56)
    times = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert run("features", *photos, *options)[0] == 0
    assert times == {p: p.stat().st_mtime_ns for p in times}
    assert run("features", *photos, *options, "--seed", 1)[0] == 0
    assert all(p.stat().st_mtime_ns > before for p, before in times.items())
    (out / "two.safetensors").write_bytes(b"damaged")
    smooth_picture(9).image().save(photos[2])  # the same name, another picture
    old = ds.FeatureMap.load(out / "three.safetensors").values
    assert run("features", *photos, *options, "--seed", 1)[0] == 0
    assert ds.FeatureMap.load(out / "two.safetensors").values.isfinite().all()
    assert (ds.FeatureMap.load(out / "three.safetensors").values - old).abs().max() > 0.01


def test_pictures_of_one_name_do_not_overwrite_each_other(run, photos, tmp_path):
    for place in ("a", "b/a", "c"):
        (tmp_path / "many" / place).mkdir(parents=True)
        smooth_picture(1).image().save(tmp_path / "many" / place / "p.png")
    assert run("features", tmp_path / "many", "--out", tmp_path / "o", "-m", PIPELINE, *QUICK)[0] == 0
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 3


def test_features_go_on_past_a_broken_picture(run, photos, tmp_path):
    photos[1].write_bytes(b"nothing")
    status, out, err = run("features", *photos, "--out", tmp_path / "o", "-m", PIPELINE, *QUICK)
    assert status == 2
    assert "2 of 3 pictures" in out
    assert "1 of 3 pictures failed" in err
    assert "two.png is not an image" in err


def test_models_lists_sites(run):
    status, out, _ = run("models")
    assert status == 0
    assert "seedling" in out
    status, out, _ = run("models", PIPELINE)
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("up", "down", "mid"))}
    assert rows["up.1"] == ["block", "24", "16"]
    assert "up.1.attn.0.query" not in rows
    _, out, _ = run("models", PIPELINE, "--sites")
    assert "up.1.attn.0.cross_map" in out


def test_demo_on_the_embedded_model(run, tmp_path):
    status, out, _ = run("demo", "--out", tmp_path / "o")
    assert status == 0
    assert "collins.jpg to hopper.jpg" in out
    for name in ("faces.png", "faces_heat.png", "faces_pca.png", "faces.json", "cat.png", "cat.json"):
        assert (tmp_path / "o" / name).stat().st_size > 500


def test_demo_with_a_recipe(run, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'model = "seedling"\nt = 20\nsite = "up.0"\nensemble = 1\nsize = "long32"\nseed = 2\n'
    )
    status, _, error = run("demo", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "o")
    assert (status, error) == (0, "")
    found = json.loads((tmp_path / "o" / "faces.json").read_text())["recipe"]
    wanted = {"t": 20, "site": "up.0", "ensemble": 1, "prompt": None, "seed": 2}
    assert {key: found[key] for key in wanted} == wanted
    (tmp_path / "rgb.toml").write_text('model = "rgb"\n')
    assert run("demo", "--recipe", tmp_path / "rgb.toml", "--out", tmp_path / "p")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["match", "ONE", "TWO"], "Say which points"),
        (["match", "ONE", "TWO", "--points", "1,2", "--grid", 3], "either --points"),
        (["match", "ONE", "TWO", "--points", "one,two"], "not understood"),
        (["match", "ONE", "TWO", "--points", ";"], "no points"),
        (["match", "ONE", "TWO", "--points", "1,2,3"], "two numbers"),
        (["match", "ONE", "TWO", "--points", "nan,2"], "Point 0"),
        (["match", "ONE", "TWO", "--points", "100,20"], "outside the picture of 72x56"),
        (["match", "ONE", "TWO", "--points", "none.json"], "no points file"),
        (["match", "ONE", "none.png", "--grid", 2], "no file none.png"),
        (["match", "ONE", "TWO", "--grid", 2, "--model", "no-such-model"], "no model 'no-such-model'"),
        (["match", "ONE", "TWO", "--grid", 2, "--t", 1000], "not in [0, 1000)"),
        (["match", "ONE", "TWO", "--grid", 2, "--site", "up.8"], "no site 'up.8'"),
        (["match", "ONE", "TWO", "--grid", 2, "--device", "quantum"], "Device 'quantum'"),
        (["match", "ONE", "TWO", "--grid", 2, "--dtype", "int8"], "'int8' is not a floating-point type"),
        (["match", "ONE", "TWO", "TWO", "--grid", 2, "--heat"], "single TARGET"),
        (["match", "ONE", "TWO", "--grid", 2, "--soft", -1], "0 or more feature cells"),
        (["match", "ONE", "TWO", "--grid", 99], "finer than the picture"),
        (["match", "ONE", "TWO", "--points", "[/a]"], "Points '[/a]' are not understood"),
        (["match", "ONE", "b[/x].png", "--grid", 2], "no file b[/x].png"),
        (["match", "ONE", "TWO", "--grid", 2, "--size", "99999999"], "megapixels"),
        (["match", "ONE", "TWO", "--grid", 2, "--size", "long0"], "too small"),
        (["features", "EMPTY"], "holds no images"),
        (["features", "ONE", "TWO", "--t", 5000], "not in [0, 1000)"),
        (["features", "ONE", "ONE"], "named twice"),
        (["train", "denoiser", "none.toml"], "no training configuration"),
    ],
)
def test_mistakes_are_one_sentence(run, photos, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    places = {"ONE": photos[0], "TWO": photos[1], "EMPTY": tmp_path / "empty"}
    given = [places.get(a, a) for a in arguments]
    model = [] if "--model" in given or given[0] == "train" else ["--model", PIPELINE]
    status, out, err = run(*given, *model, "--out", tmp_path / "o")
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""


def test_the_traceback_is_there_when_asked_for(run, photos, tmp_path):
    with pytest.raises(ds.InputError):
        run("--debug", "match", photos[0], photos[1], "--points", "x", "--out", tmp_path)


def test_points_come_from_text_and_files(tmp_path):
    files = {
        "a.json": "[[1, 2.5], [30, 4]]",
        "b.json": '{"points": [[1, 2.5], [30, 4]]}',
        "c.csv": "x,y\n1,2.5\n30,4\n",
        "d.csv": "1,2.5\n30,4\n",
        "e.csv": "\ufeffname,Y,X\nnose,2.5,1\near,4,30\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for text in ("1,2.5;30,4", " 1 , 2.5 ; 30,4 ;", *[str(tmp_path / name) for name in files]):
        assert parse_points(text) == [(1.0, 2.5), (30.0, 4.0)]
    for name, content in {
        "f.json": "[1, 2",
        "g.json": '{"spots": []}',
        "h.csv": "x,y\n1,up\n",
        "i.csv": "3\n",
        **BAD,
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ds.InputError, match=name):
            parse_points(str(tmp_path / name))


def test_the_command_starts_without_waiting_for_torch():
    program = "import sys, denoscope.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([*COMMAND[:2], program], capture_output=True, text=True, check=True).stdout.strip() == "False"
    version = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == ds.__version__


def test_ctrl_c_leaves_nothing_half_done(tmp_path):
    photo, out = tmp_path / "a.png", tmp_path / "o"
    smooth_picture(0).image().save(photo)
    options = ["--grid", "2", "-m", PIPELINE, "--ensemble", "100000", "--size", "64", "--out", str(out)]
    process = subprocess.Popen(
        [*COMMAND, "match", str(photo), str(photo), *options],
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )
    until = time.monotonic() + 60
    while not out.is_dir() and time.monotonic() < until:  # made when the options have been read, before any long work
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert not list(out.glob("*"))


def test_other_settings_of_the_features(run, photos, tmp_path):
    fast = ["--model", PIPELINE, *QUICK, "--points", "5,5", "--out", tmp_path]
    status, _, error = run("match", *photos[:2], *fast, "--feature", "noise=none", "--feature", "resample=linear")
    assert status == 0, error
    recipe = json.loads((tmp_path / "matches.json").read_text())["recipe"]
    assert (recipe["noise"], recipe["resample"]) == ("none", "linear")
    for wrong, message in (
        ("colour=red", "known are noise"),
        ("noise=loud", "with none as the value"),
        ("adaln=yes", "transformer"),
    ):
        status, _, error = run("match", *photos[:2], *fast, "--feature", wrong)
        assert status == 2
        assert message in error


def test_features_do_not_overwrite_their_pictures(run, photos):
    before = photos[0].read_bytes()
    assert photos[0].suffix == ".png"
    status, _, error = run("features", photos[0], *QUICK, "--model", PIPELINE, "--out", photos[0].parent)
    assert status == 2
    assert "would be overwritten" in error
    assert photos[0].read_bytes() == before
