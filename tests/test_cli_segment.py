"""`denoscope segment` as a user runs it."""

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_few_shot import as_grey, saved_scene, scene

QUICK = ("--model", "rgb", "--size", "64", "--voters", 2, "--epochs", 5)


@pytest.fixture
def folders(tmp_path):
    """Examples and pictures to segment."""
    for k in range(3):
        as_grey(saved_scene(tmp_path / "examples", k, f"e{k}"), tmp_path / "examples" / f"e{k}.png")
    for k in range(3, 6):
        saved_scene(tmp_path / "photos", k, f"p{k}", ".png")
    return tmp_path


def test_examples_teach_and_everything_is_written(run, folders):
    out = folders / "out"
    asked = (
        "segment",
        folders / "photos",
        "--examples",
        folders / "examples",
        "--names",
        "grass,ball",
        "--out",
        out,
        *QUICK,
    )
    status, text, _ = run(*asked)
    assert status == 0
    assert "2 classes from 9,216 pixels of 3 examples" in text
    for k in range(3, 6):
        with Image.open(out / "masks" / f"p{k}.png") as mask:
            assert mask.mode == "P"
            found, truth = np.array(mask) == 1, scene(k)[1] == 1
        assert (found & truth).sum() / (found | truth).sum() > 0.6
        for part in ("overlays", "uncertainty"):
            with Image.open(out / part / f"p{k}.png") as image:
                assert image.width == 64
    summary = json.loads((out / "summary.json").read_text())
    by_doubt = sorted(summary["pictures"], key=lambda one: -one["uncertainty"])
    assert summary["label_next"] == [by_doubt[0]["picture"]]
    assert f"worth labelling next: {by_doubt[0]['picture']}" in text
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert [int(row["grass"]) + int(row["ball"]) for row in rows] == [64 * 48] * 3
    assert json.loads((out / "classes.json").read_text())[1]["name"] == "ball"
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 400
    assert not (out / ".pixels").exists()

    # the same again trains nothing and segments nothing
    before = {path: path.stat().st_mtime_ns for folder in ("masks", "overlays") for path in (out / folder).iterdir()}
    before[out / "classifier.safetensors"] = (out / "classifier.safetensors").stat().st_mtime_ns
    (out / "masks" / "p4.png").unlink()
    status, text, _ = run(*asked)
    assert status == 0
    assert "trained before" in text
    changed = [path.name for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert sorted(changed) == ["p4.png", "p4.png"]
    assert "done 3 of 3 (2 kept from before)" in text
    assert "done 3 of 3 (all kept from before)" in run(*asked)[1]

    # other examples train anew, which makes all masks anew
    as_grey(np.zeros((48, 64), np.uint8), folders / "examples" / "e0.png")
    status, text, _ = run(*asked)
    assert status == 0
    assert "trained before" not in text
    assert (out / "masks" / "p3.png").stat().st_mtime_ns != before[out / "masks" / "p3.png"]


def test_a_trained_classifier_is_used_without_examples(run, folders):
    base = ("--examples", folders / "examples", "--out", folders / "one", *QUICK)
    assert run("segment", *base)[0] == 0  # trains alone
    assert not (folders / "one" / "masks").exists()
    file = folders / "one" / "classifier.safetensors"
    status, text, _ = run("segment", folders / "photos", "--classifier", file, "--out", folders / "two")
    assert status == 0
    assert "p4" in text
    assert run("segment", folders / "photos", *base)[0] == 0
    for k in range(3, 6):
        one, two = (np.array(Image.open(folders / where / "masks" / f"p{k}.png")) for where in ("one", "two"))
        assert np.array_equal(one, two)
    for option in (
        ("--t", 3),
        ("--side", 64),
        ("--feature", "pool=2"),
        ("--model", "rgb"),
        ("--ignore", 3),
        ("--seed", 0),
    ):
        status, _, text = run("segment", folders / "photos", "--classifier", file, *option)
        assert status == 2
        assert f"{option[0]} belongs to the training" in text


def test_features_of_a_diffusion_model(run, folders):
    out = folders / "out"
    options = ("--ensemble", 1, "--size", "48", "--voters", 2, "--epochs", 1, "--pixels", 50, "--t", 30)
    status, _, _ = run(
        "segment", folders / "photos" / "p3.png", "--examples", folders / "examples", "--out", out, *options
    )
    assert status == 0
    recipe = json.loads((out / "summary.json").read_text())["recipe"]
    assert (recipe["extractor"]["model"], recipe["extractor"]["t"], recipe["pixels"]) == ("seedling", 30, 50)
    asked = (
        "segment",
        folders / "photos" / "p3.png",
        "--classifier",
        out / "classifier.safetensors",
        "--out",
        folders / "b",
    )
    assert run(*asked)[0] == 0
    one, two = (np.array(Image.open(where / "masks" / "p3.png")) for where in (out, folders / "b"))
    assert np.array_equal(one, two)
    kept = folders / "b" / "numbers" / "p3.json"
    before = json.loads(kept.read_text())["key"]
    assert run(*asked, "--dtype", "bfloat16")[0] == 0  # other features, so that nothing of before is shown again
    assert json.loads(kept.read_text())["key"] != before


@pytest.fixture
def parts(folders, sd):
    """What a classifier may read, in one folder: model, ControlNet, LoRA, captions and recipe."""
    shutil.copytree(GOLDEN / "dift-sd" / "pipeline", folders / "sd")
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(sd.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    network.save_pretrained(folders / "edges")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = sd.network.get_submodule(layer).weight.shape
    pair = {f"unet.{layer}.lora_A.weight": torch.randn(2, into), f"unet.{layer}.lora_B.weight": torch.randn(out, 2)}
    save_file(pair, folders / "lora.safetensors")
    (folders / "words.json").write_text(json.dumps({f"{c}{k}": "a photo" for c in "ep" for k in range(6)}))
    (folders / "recipe.toml").write_text(
        'model = "sd"\namalgamate = "mean"\n[techniques.edges]\ncontrol = "edges@0.5"\n[techniques.style]\n'
        'lora = [{ path = "lora.safetensors" }]\n'
    )
    return folders


@pytest.mark.parametrize("how", ["options", "recipe", "join"])
def test_a_classifier_is_used_from_another_folder(run, parts, monkeypatch, how):
    """Trained with relative paths: of a model, ControlNet, LoRA, captions, recipe."""
    features = {
        "options": ("--model", "sd", "--feature", "control=edges@0.5", "--feature", "lora=lora.safetensors",
                    "--prompt", "@words.json"),
        "recipe": ("--recipe", "recipe.toml"),
        "join": ("--model", "rgb", "--join", "sd@up.0@64"),
    }[how]  # fmt: skip
    asked = ("segment", "photos/p3.png", "--examples", "examples", "--out", "out", "--voters", 2, "--epochs", 1)
    asked += ("--pixels", 50, "--size", "64", *(("--ensemble", 1) if how != "join" else ()), *features)
    monkeypatch.chdir(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pictures without edges
        assert run(*asked)[0] == 0
        (parts / "elsewhere").mkdir()
        monkeypatch.chdir(parts / "elsewhere")
        used = ("segment", "../photos/p3.png", "--classifier", "../out/classifier.safetensors", "--out", "found")
        status, _, wrong = run(*used)
        assert status == 0, wrong
        one, two = (np.array(Image.open(where / "masks" / "p3.png")) for where in (parts / "out", Path("found")))
        assert np.array_equal(one, two)

        monkeypatch.chdir(parts)  # the same command again, spelt otherwise, trains nothing
        again = [f"{parts}/{one}" if (parts / str(one)).is_dir() else one for one in asked]
        status, said, _ = run(*again)
        assert (status, "trained before" in said) == (0, True)

        # what is not there is named, and what is there but another is not used
        gone = {"options": "edges", "recipe": "lora.safetensors", "join": "sd"}[how]
        shutil.move(parts / gone, parts / "gone")
        status, _, wrong = run("segment", "photos", "--classifier", "out/classifier.safetensors", "--out", "b")
        assert status == 2
        assert wrong == (
            f"Error: out/classifier.safetensors reads {parts / gone}, which is not there; put it back, or train the "
            "classifier again.\n"
        )
        if how != "recipe":
            shutil.move(parts / "gone", parts / gone)
            weights = next((parts / gone).rglob("diffusion_pytorch_model.safetensors"))
            save_file({k: v * 1.5 for k, v in load_file(weights).items()}, weights)
            status, _, wrong = run("segment", "photos", "--classifier", "out/classifier.safetensors", "--out", "b")
            assert status == 2
            assert "was trained on other features" in wrong


def test_mistakes_are_one_sentence(run, folders):
    photos, examples = folders / "photos", folders / "examples"
    for arguments, sentence in (
        ((photos,), "Say what to learn from: --examples FOLDER, or --classifier FILE"),
        ((photos, "--examples", folders / "none"), "There is no folder"),
        ((photos, "--examples", photos), "No picture in"),
        ((folders / "none", "--examples", examples), "There is no file"),
        ((photos, "--classifier", folders / "none"), "There is no classifier"),
        (("--classifier", folders / "none"), "Name the pictures"),
        ((photos, "--examples", examples, "--voters", 0, *QUICK[:4]), "--voters must be at least 1, not 0"),
        ((photos, "--examples", examples, "--epochs", 0), "--epochs must be at least 1, not 0"),
        ((photos, "--examples", examples, "--finest", 0), "--finest must be at least 8, not 0"),
        ((photos, "--classifier", folders / "none", "--finest", 7), "--finest must be at least 8, not 7"),
        ((photos, "--examples", examples, "--side", 2, *QUICK[:4]), "--side must be at least 8, not 2"),
        ((photos, "--examples", examples, "--names", "grass", *QUICK), "has class 1, which is beyond the 1 name "),
        ((photos, "--examples", examples, "--feature", "colour=3"), "no setting 'colour'"),
    ):
        status, _, text = run("segment", *arguments, "--out", folders / "out")
        assert status == 2, arguments
        assert sentence in text, (sentence, text)
        assert "Traceback" not in text


def test_a_stopped_run_says_how_to_go_on(run, folders, monkeypatch):
    said = print
    asked = ("segment", folders / "photos", "--examples", folders / "examples", "--out", folders / "out", *QUICK)

    def stop_at(text):
        def stopping(*values, **options):
            said(*values, **options)
            if str(values[0]).startswith(text):
                raise KeyboardInterrupt

        return stopping

    for text in ("features: 2 of 3", "segmented 1 of 3"):
        with monkeypatch.context() as patch:
            patch.setattr("builtins.print", stop_at(text))
            status, out, error = run(*asked)
        assert status != 0
        assert text in out
        assert "segment: stopped; the same command goes on from what was kept last." in error
        assert "Traceback" not in error
    status, out, _ = run(*asked)
    assert status == 0
    assert "trained before" in out
    assert "done 3 of 3 (1 kept from before)" in out


def test_one_network_disputes_nothing(run, folders):
    asked = ("segment", folders / "photos", "--examples", folders / "examples", "--out", folders / "out", *QUICK)
    status, text, _ = run(*asked, "--voters", 1)
    assert status == 0
    assert "labelling next" not in text
    assert json.loads((folders / "out" / "summary.json").read_text())["label_next"] == []


def test_a_damaged_picture_does_not_stop_the_others(run, folders):
    (folders / "photos" / "p4.png").write_bytes(b"nothing")
    out = folders / "out"
    status, text, error = run("segment", folders / "photos", "--examples", folders / "examples", "--out", out, *QUICK)
    assert status == 2
    assert "1 of 3 pictures failed" in error
    assert "p5" in text
    assert (out / "masks" / "p5.png").is_file()
    assert len(json.loads((out / "summary.json").read_text())["pictures"]) == 2
