"""`denoscope sample` and `denoscope guidance` as a user meets them."""

import dataclasses
import json
import subprocess
import sys
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from PIL import Image
from safetensors.torch import save_file

import denoscope as ds
from denoscope.cli.guidance import placement
from denoscope.denoisers.classifiers import ADMClassifier, ADMClassifierConfig, Classifier, save_classifier

QUICK = ["--size", "16", "--steps", "4"]
TINY = ADMClassifierConfig(
    model_channels=32, classes=3, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_head_channels=32,
    image_size=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, seedling):
    """The embedded model is loaded once for all tests."""
    load = ds.load
    monkeypatch.setattr("denoscope.denoisers.load", lambda m, *rest: seedling if m == "seedling" else load(m, *rest))


@pytest.fixture(scope="session")
def guide(tmp_path_factory):
    """Files of two noise-aware classifiers with random weights."""
    folder = tmp_path_factory.mktemp("classifiers")
    for seed, name in enumerate(("on", "off")):
        torch.manual_seed(seed)
        module = ADMClassifier(TINY).requires_grad_(False).eval()
        save_classifier(Classifier.of(module, names=("cat", "dog", "face")), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """A model that takes class numbers 0 to 4, 4 being any."""
    folder = tmp_path_factory.mktemp("numbered")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    UNet2DModel(16, layers_per_block=1, norm_num_groups=4, num_class_embeds=5, **blocks).save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder)
    (folder / "denoscope.json").write_text('{"null_class": 4}')
    return folder


def pixels(folder: Any) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def same(one: Any, other: Any) -> bool:
    """To a level of 8 bits."""
    return one.keys() == other.keys() and all(np.abs(one[k].astype(int) - other[k]).max() <= 1 for k in one)


def record(folder: Any) -> Any:
    return json.loads((folder / "samples.json").read_text())


def test_pictures_are_those_of_the_library(run, tmp_path, seedling):
    out = tmp_path / "o"
    options = ["--rate", 2, "--rule", "gap", "--guidance", 4, "--seed", 7, "--at-once", 3, "--negative", "dog"]
    status, printed, _ = run("sample", "cat", "a face", "--count", 2, *QUICK, *options, "--out", out)
    assert status == 0
    assert "4 pictures; 3 of 4 steps guided, 7 network calls and" in printed
    assert str(out / "grid.png") in printed
    guidance = ds.ClassifierFree(4.0, ds.GuidanceSchedule.power(4, 2), "gap")
    prompts = ["cat", "a face", "cat", "a face"]
    made = ds.sample(seedling, prompts, seed=7, steps=4, size=(16, 16), guidance=guidance, negative=["dog"])
    files = [f"00000{i}.png" for i in range(4)]
    assert same(pixels(out), {file: np.array(p.image()) for file, p in zip(files, made.pictures, strict=True)})
    found = record(out)
    assert [(row["file"], row["prompt"], row["seed"]) for row in found["samples"]] == list(
        zip(files, prompts, [7, 8, 9, 10], strict=True)
    )
    assert found["runs"]["asked"]["guided_steps"] == [0, 2, 3]
    assert found["runs"]["asked"]["samples"] == 4
    assert found["settings"]["guidance"] == 4
    assert sorted(p.name for p in out.iterdir()) == [*files, "grid.png", "samples.json"]


def test_a_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    out, command = tmp_path / "o", ["sample", "cat", *QUICK, "--at-once", 2, "--out", tmp_path / "o"]
    whole, calls = ds.sample, []

    def stopped(*given, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*given, **options)

    monkeypatch.setattr("denoscope.sampling.sample", stopped)
    status, printed, _ = run(*command, "--count", 4)
    assert status == 130
    assert [p.name for p in sorted(out.iterdir())] == ["000000.png", "000001.png", "samples.json"]
    before = pixels(out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.png")}
    assert run(*command, "--count", 4)[0] == 0
    assert calls == [[0, 1], [2, 3], [2, 3]]
    assert same(before, {name: found for name, found in pixels(out).items() if name in before})
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}
    (out / "000002.png").unlink()  # a hole is filled, the rest is kept, more can be asked for
    status, printed, _ = run(*command, "--count", 5)
    assert status == 0
    assert "5 pictures" in printed
    assert calls[3:] == [[2, 4]]
    assert run(*command, "--count", 5)[0] == 0
    assert len(calls) == 4
    (at_once := tmp_path / "p").mkdir()
    assert run("sample", "cat", *QUICK, "--count", 5, "--out", at_once)[0] == 0
    assert same(pixels(out), pixels(at_once))


def test_other_settings_need_another_folder(run, tmp_path):
    out = tmp_path / "o"
    assert run("sample", "cat", *QUICK, "--out", out)[0] == 0
    status, printed, err = run("sample", "cat", *QUICK, "--out", out, "--rate", 2, "--seed", 1)
    assert (status, printed) == (2, "")
    assert "other settings (schedule, seed); name another folder" in err
    (out / "samples.json").write_text("[1")
    assert "samples.json is damaged" in run("sample", "cat", *QUICK, "--out", out)[2]
    (out / "samples.json").write_text("[1]")
    assert "samples.json of something else" in run("sample", "cat", *QUICK, "--out", out)[2]
    (out / "samples.json").unlink()
    assert "pictures of unknown settings" in run("sample", "cat", *QUICK, "--out", out)[2]


def test_nothing_in_the_folder_is_left_without_a_record_or_unreadable(run, tmp_path):
    out = tmp_path / "o"
    command = ["sample", "cat", "dog", *QUICK, "--out", out]
    assert run(*command, "--count", 3)[0] == 0
    before = (out / "samples.json").read_bytes()
    status, printed, err = run(*command, "--count", 2)
    assert (status, printed) == (2, "")
    assert "holds 000005.png, more than --count asks for; give --count 3 or more" in err
    assert (out / "samples.json").read_bytes() == before
    (out / "000001.png").write_bytes((out / "000001.png").read_bytes()[:60])
    status, _, err = run(*command, "--count", 3)
    assert status == 2
    assert "000001.png is damaged; delete it and run the same command again" in err
    (out / "000001.png").unlink()
    assert run(*command, "--count", 3)[0] == 0


def test_the_report_compares_with_guidance_on_every_step(run, tmp_path, guide):
    out, full = tmp_path / "o", tmp_path / "f"
    given = ["sample", "cat", "dog", "2", *QUICK, "--classifier", guide / "on.safetensors", "--scale", 9]
    status, printed, _ = run(*given, "--rate", 4, "--always-last", 0, "--report", "--out", out)
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("asked", "full"))}
    assert rows["asked"][:6] == ["1", "of", "4", "4", "1", "0.62"]
    assert rows["full"][:6] == ["4", "of", "4", "4", "4", "1.00"]
    assert run(*given, "--out", full)[0] == 0
    assert same(pixels(out / "full"), pixels(full))
    found = record(out)
    difference = np.mean([np.abs(one.astype(float) - pixels(full)[name]) for name, one in pixels(out).items()])
    assert found["report"]["mean_difference"] == pytest.approx(difference, abs=0.02)
    assert found["report"]["relative_cost"] == 5 / 8
    assert ds.read(out / "grid.png").height > 1.9 * ds.read(full / "grid.png").height
    times = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png")}
    again = run(*given, "--rate", 4, "--always-last", 0, "--report", "--out", out)[1]
    assert [line for line in again.splitlines() if line.startswith("asked")] == [
        line for line in printed.splitlines() if line.startswith("asked")
    ]
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_whole_numbers_are_class_numbers_where_the_model_takes_those(run, tmp_path, numbered, guide):
    given = ["--model", numbered, *QUICK]
    assert run("sample", "3", "0", *given, "--guidance", 2, "--out", tmp_path / "n")[0] == 0
    assert record(tmp_path / "n")["settings"]["told"] == [3, 0]
    assert record(tmp_path / "n")["runs"]["asked"]["network_calls"] == {"denoiser": 8, "classifier": 0}
    status, _, err = run("sample", "5", *given, "--out", tmp_path / "m")
    assert status == 2
    assert "takes class numbers from 0 to 4" in err
    assert "takes class numbers from 0 to 4" in run("sample", "cat", *given, "--out", tmp_path / "m")[2]
    classifier = ["--classifier", guide / "on.safetensors"]
    assert run("sample", "dog", *given, *classifier, "--out", tmp_path / "c")[0] == 0
    assert record(tmp_path / "c")["settings"]["told"] == [1]
    assert run("sample", "2", "face", *QUICK, *classifier, "--out", tmp_path / "d")[0] == 0
    assert record(tmp_path / "d")["settings"]["told"] is None
    one, other = list(pixels(tmp_path / "d").values())
    assert not np.array_equal(one, other)  # two seeds
    prompted = ["--prompt", "a {}", "--guidance", 2, "--rate", 2]
    assert run("sample", "dog", *QUICK, *classifier, *prompted, "--out", tmp_path / "e")[0] == 0
    assert record(tmp_path / "e")["settings"]["told"] == ["a dog"]
    assert record(tmp_path / "e")["runs"]["asked"]["network_calls"] == {"denoiser": 7, "classifier": 3}


def test_only_the_white_of_a_mask_is_repainted(run, tmp_path):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
    mask = np.zeros((24, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ["sample", "face", "--steps", 4, "--start", tmp_path / "photo.png"]
    assert run(*given, "--mask", tmp_path / "mask.png", "--out", tmp_path / "o")[0] == 0
    (made,) = pixels(tmp_path / "o").values()
    assert made.shape == photo.shape
    assert np.abs(made[:, 16:].astype(int) - photo[:, 16:]).max() <= 1
    assert np.abs(made[:, :16].astype(int) - photo[:, :16]).mean() > 20
    assert record(tmp_path / "o")["settings"]["strength"] == 1
    assert run(*given, "--strength", 0.5, "--schedule", "steps:0", "--out", tmp_path / "p")[0] == 0
    assert record(tmp_path / "p")["runs"]["asked"] | {"seconds": 0} == {
        "guided_steps": [0], "network_calls": {"denoiser": 3, "classifier": 0}, "steps": 2, "samples": 1, "seconds": 0,
    }  # fmt: skip


def told(folder: Any, text: str, name: str = "recipe.toml") -> Any:
    """A recipe file."""
    (folder / name).write_text(text)
    return folder / name


def test_a_recipe_says_what_is_sampled(run, tmp_path):
    reading = 't = 51\nsite = "up.0"\nensemble = 2\ndenoise_from = 60\nsecond_t = 20\njoin = ["rgb"]\npca = 3\n'
    head = f'model = "seedling"\n{reading}'
    recipe = told(tmp_path, head + 'prompt = "cat"\nguidance = 2.5\nsize = "24x16"\nseed = 7\n')
    assert run("sample", "--recipe", recipe, "--steps", 4, "--out", tmp_path / "a") == (0, ANY, "")
    explicit = ["--guidance", 2.5, "--size", "24x16", "--seed", 7, "--steps", 4]
    assert run("sample", "cat", *explicit, "--out", tmp_path / "b")[0] == 0
    assert record(tmp_path / "a")["settings"] == record(tmp_path / "b")["settings"]
    assert same(pixels(tmp_path / "a"), pixels(tmp_path / "b"))
    # what the user says wins
    others = ["dog", "face", "--guidance", 1, "--size", 16, "--seed", 3, "--steps", 4]
    assert run("sample", "--recipe", recipe, *others, "--out", tmp_path / "c")[0] == 0
    assert run("sample", *others, "--out", tmp_path / "d")[0] == 0
    assert record(tmp_path / "c")["settings"] == record(tmp_path / "d")["settings"]
    assert same(pixels(tmp_path / "c"), pixels(tmp_path / "d"))
    # the scale needs something to guide towards, sizes relative to a picture need a picture, several are about reading
    for number, size in enumerate(("'long24'", "0", '"16+24"')):
        bare = told(tmp_path, f"{head}guidance = 2\nsize = {size}\n")
        assert run("sample", "--recipe", bare, "--steps", 2, "--out", tmp_path / f"e{number}")[0] == 0
        found = record(tmp_path / f"e{number}")["settings"]
        assert (found["guidance"], found["size"], found["prompts"]) == (1, None, [])


def test_the_model_of_a_recipe(run, tmp_path, numbered):
    recipe = told(tmp_path, f'model = "{numbered}"\nprompt = 3\nguidance = 2\n')
    assert run("sample", "--recipe", recipe, "--steps", 3, "--out", tmp_path / "a")[0] == 0
    assert run("sample", "3", "--model", numbered, "--guidance", 2, "--steps", 3, "--out", tmp_path / "b")[0] == 0
    assert record(tmp_path / "a")["settings"]["told"] == [3]
    assert same(pixels(tmp_path / "a"), pixels(tmp_path / "b"))
    assert run("sample", "cat", "--recipe", recipe, "--model", "seedling", *QUICK, "--out", tmp_path / "c")[0] == 0
    assert record(tmp_path / "c")["settings"]["model"] == "seedling"


@pytest.fixture(scope="session")
def stable(tmp_path_factory):
    """A pipeline, a ControlNet for it, a LoRA and a picture, in one folder."""
    folder = tmp_path_factory.mktemp("stable")
    (folder / "model").symlink_to(GOLDEN / "dift-sd" / "pipeline")
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "model", subfolder="unet")
    network = ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(folder / "edges")
    name, layer = next((n, m) for n, m in unet.named_modules() if n.endswith("attn1.to_v"))
    down = torch.randn(2, layer.in_features, generator=generator)
    up = torch.randn(layer.out_features, 2, generator=generator)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, folder / "lora.safetensors")
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(folder / "photo.png")
    return folder


@pytest.mark.filterwarnings("default")
def test_controls_and_loras_of_a_recipe(run, tmp_path, stable):
    shown = 'control = [{ model = "edges", image = "photo.png", scale = 0.7 }]\n'
    head = 'model = "model"\nprompt = "a cat"\nguidance = 2\nsize = 64\nlora = "lora.safetensors@0.5"\n'
    common = ["a cat", "--model", stable / "model", "--guidance", 2, "--size", 64, "--steps", 4]
    lora = ["--lora", f"{stable / 'lora.safetensors'}@0.5"]
    control = ["--control", f"{stable / 'edges'}@0.7", "--control-image"]

    def made(name: str, *arguments: Any) -> Any:
        status, _, error = run(*arguments, "--out", tmp_path / name)
        assert status == 0, error
        return pixels(tmp_path / name), error

    quick = ["--steps", 4]
    recipe = told(stable, head + shown)
    with_both, _ = made("a", "sample", "--recipe", recipe, *quick)
    assert same(with_both, made("b", "sample", *common, *lora, *control, stable / "photo.png")[0])
    plain, _ = made("c", "sample", *common)
    assert not same(plain, with_both)
    # its own edges: of the picture to start from, or of another that is named; without either they are left out, with a word
    edges = told(stable, head + 'img2img = 0.5\ncontrol = "edges@0.7"\n')
    found, error = made("d", "sample", "--recipe", edges, *quick)
    assert "The ControlNet" in error
    assert "left out" in error
    assert same(found, made("e", "sample", *common, *lora)[0])
    start = ["--start", stable / "photo.png"]
    started, error = made("f", "sample", "--recipe", edges, *start, *quick)
    given = [*common, *lora, *control, f"canny:{stable / 'photo.png'}"]
    assert error == ""
    assert same(started, made("g", "sample", *given, *start, "--strength", 0.5)[0])
    named = ["--control-image", f"canny:{stable / 'photo.png'}"]
    assert same(made("h", "sample", "--recipe", edges, *named, *quick)[0], made("i", "sample", *given)[0])
    assert not same(
        made("j", "sample", "--recipe", recipe, "--lora", f"{stable / 'lora.safetensors'}@0", *quick)[0], with_both
    )


@pytest.mark.filterwarnings("default")
def test_a_recipe_whose_prompts_are_of_pictures(run, tmp_path):
    Image.new("RGB", (16, 16), "green").save(tmp_path / "photo.png")
    told(tmp_path, '{"photo.png": "cat"}', "captions.json")
    recipe = told(tmp_path, 'model = "seedling"\nprompt = "@captions.json"\nsize = "long16"\n')
    given = ["--start", tmp_path / "photo.png", "--steps", 4]
    assert run("sample", "--recipe", recipe, *given, "--out", tmp_path / "a") == (0, ANY, "")
    assert record(tmp_path / "a")["settings"]["prompts"] == ["cat"]
    status, _, error = run("sample", "--recipe", recipe, *QUICK, "--out", tmp_path / "b")
    assert (status, record(tmp_path / "b")["settings"]["prompts"]) == (0, [])
    assert "captions.json is another one for each picture" in error


def test_a_recipe_beside_a_classifier(run, tmp_path, guide):
    recipe = told(tmp_path, 'model = "seedling"\nprompt = "a photo"\nguidance = 2\nsize = 16\nseed = 4\n')
    judged = ["--classifier", guide / "on.safetensors", "--scale", 20, "--steps", 4]
    assert run("sample", "dog", "--recipe", recipe, *judged, "--out", tmp_path / "a")[0] == 0
    given = ["--prompt", "a photo", "--guidance", 2, "--size", 16, "--seed", 4]
    assert run("sample", "dog", *given, *judged, "--out", tmp_path / "b")[0] == 0
    assert record(tmp_path / "a")["settings"] == record(tmp_path / "b")["settings"]
    assert same(pixels(tmp_path / "a"), pixels(tmp_path / "b"))


@pytest.mark.filterwarnings("default")
def test_a_recipe_of_several_techniques_says_what_they_share(run, tmp_path):
    techniques = 'amalgamate = "mean"\n[techniques.words]\nprompt = "cat"\n[techniques.more]\nprompt = "dog"\n'
    recipe = told(tmp_path, f'model = "seedling"\nseed = 5\nsize = 16\n{techniques}')
    status, _, error = run("sample", "--recipe", recipe, "--steps", 2, "--out", tmp_path / "a")
    assert (status, record(tmp_path / "a")["settings"]["prompts"]) == (0, [])
    assert "several techniques; what stands above them is taken" in error


@pytest.mark.filterwarnings("default")
def test_long_prompts_of_a_recipe_are_read_to_their_end(run, tmp_path, stable):
    words = " ".join(["a"] * 90 + ["cat"])
    files = {how: told(stable, f'model = "model"\nprompt = "{words}"\nlong_prompts = "{how}"\n', f"{how}.toml") for how in
              ("cut", "chunks")}  # fmt: skip
    errors = {}
    for how, recipe in files.items():
        status, _, errors[how] = run("sample", "--recipe", recipe, "--steps", 2, "--out", tmp_path / how)
        assert status == 0
    assert ("ignored: " in errors["cut"], errors["chunks"]) == (True, "")
    assert not same(pixels(tmp_path / "cut"), pixels(tmp_path / "chunks"))


def test_diagnose_with_a_recipe(run, tmp_path, guide, stable):
    quick = ["--rates", "1", "--no-baselines", "--labels", "cat", "--count", 1, "--steps", 2]
    for name in ("on64", "off64"):
        module = ADMClassifier(dataclasses.replace(TINY, image_size=8, in_channels=4)).requires_grad_(False).eval()
        save_classifier(Classifier.of(module, names=("cat", "dog", "face")), tmp_path / f"{name}.safetensors")

    def losses(name: str, *arguments: Any) -> Any:
        on, off = (
            tmp_path / f"{one}64.safetensors" if name in "cde" else guide / f"{one}.safetensors"
            for one in ("on", "off")
        )
        status, _, error = run(
            "guidance", "diagnose", *arguments, "--on", on, "--off", off, *quick, "--out", tmp_path / name
        )
        assert status == 0, error
        return json.loads((tmp_path / name / "diagnosis.json").read_text())

    recipe = told(tmp_path, 'model = "seedling"\nt = 51\nprompt = "a cat"\nsize = 16\nseed = 3\n')
    one = losses("a", "--recipe", recipe)
    other = losses("b", "--prompt", "a cat", "--size", 16, "--seed", 3)
    assert one["outcomes"]["full"]["losses"] == other["outcomes"]["full"]["losses"]
    assert (one["prompts"], one["size"], one["seed"]) == (["a cat"], [16, 16], 3)
    shown = 'control = [{ model = "edges", image = "photo.png" }]\n'
    texts = {"c": "", "d": 'lora = "lora.safetensors@0.5"\n', "e": shown}
    found = {}
    for name, more in texts.items():
        head = 'model = "model"\nprompt = "a cat"\nsize = 64\n'
        found[name] = losses(name, "--recipe", told(stable, head + more, f"{name}.toml"))
    assert len({json.dumps(one["outcomes"]["full"]["curves"]) for one in found.values()}) == 3
    assert found["d"]["lora"][0][:2] == [str(stable / "lora.safetensors"), 0.5]
    assert found["e"]["control"][0]["model"] == str(stable / "edges")


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("power", (0, 5, 8, 9)),
        ("uniform", (0, 5, 8, 9)),
        ("interval:0.3-0.8", (3, 4, 5, 6, 7)),
        ("first:0.4", (0, 1, 2, 3)),
        ("early-stop", (0, 1, 2)),
        ("early-stop:0.5", (0, 1, 2, 3, 4, 5)),
        ("steps:0,5,9", (0, 5, 9)),
        ("sigma:2-5", (5, 6, 7)),
        ("all", tuple(range(10))),
        ("none", ()),
    ],
)
def test_schedules_in_words(text, positions):
    sigmas = [10.0 - j for j in range(10)]
    assert placement(10, text, None, None, None, sigmas).positions == positions
    assert len(placement(10, "random:4", None, None, None).positions) == 4
    assert placement(10, None, 5, None, 0).positions == (0, 5)
    assert placement(10, None, None, None, None).positions == tuple(range(10))


def test_schedule_prints_only_json_when_asked(run, tmp_path):
    status, out, err = run("guidance", "schedule", "--rate", 5, "--k", 2, "--json", "--plot", tmp_path / "s.png")
    assert (status, err) == (0, "")
    found, schedule = json.loads(out), ds.GuidanceSchedule.power(50, 5, 2)
    assert found["positions"] == [0, 2, 4, 8, 12, 18, 24, 32, 40, 48, 49]
    assert found["weights"] == list(schedule.weights("gap"))
    assert sum(found["weights"]) == 50
    expected = {
        "network_calls": 61,
        "relative_cost": 0.61,
        "steps": 50,
        "rate": 5,
        "k": 2,
        "rule": "gap",
        "kind": "cfg",
    }
    assert {key: found[key] for key in expected} == expected
    assert ds.read(tmp_path / "s.png").width > 500
    cost = ["--kind", "classifier", "--classifier-cost", 2, "--rule", "mask", "--steps", 10, "--schedule", "steps:0,9"]
    assert json.loads(run("guidance", "schedule", *cost, "--json")[1]) == {
        "positions": [0, 9], "weights": [1, *[0] * 8, 1], "network_calls": 12, "relative_cost": 14 / 30, "steps": 10,
        "rule": "mask", "schedule": "explicit", "kind": "classifier", "rate": None, "k": None,
    }  # fmt: skip
    out = run("guidance", "schedule", "--steps", 10)[1]
    assert out.splitlines() == [
        "power r5 k1: 4 of 10 steps guided, 14 of 20 network calls, relative cost 0.7",
        "guided steps: 0 5 8 9",
        "weights (gap): 5 3 1 1",
    ]


def test_diagnose_prints_a_table_and_a_recommendation(run, tmp_path, guide):
    judges = ["--on", guide / "on.safetensors", "--off", guide / "off.safetensors"]
    settings = ["--labels", "cat, 1", "--count", 2, "--scale", 50, "--rates", "1,2", *QUICK]
    status, out, _ = run("guidance", "diagnose", *judges, *settings, "--out", tmp_path / "o")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["full", "compressed", "UG", "ES"]
    assert lines[0].split()[:4] == ["run", "guided", "calls", "seconds"]
    assert "This rests on 4 samples: so few carry no verdict" in out
    saved = json.loads((tmp_path / "o" / "diagnosis.json").read_text())
    assert saved["labels"] == [0, 1, 0, 1]
    assert saved["outcomes"]["compressed r2"]["guided"] == [0, 2, 3]
    assert saved["recommendation"] in out
    assert ds.read(tmp_path / "o" / "diagnosis.png").width > 900
    assert len((tmp_path / "o" / "diagnosis.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "cat", "--rate", 0.5], "rate is 0.5"),
        (["sample", "cat", "--rate", 9], "from 1 (every step) to 4"),
        (["sample", "cat", "--rate", 2, "--k", 0], "k is 0"),
        (["sample", "cat", "--rate", 2, "--rule", "some"], "--rule 'some' is unknown; use mask"),
        (["sample", "cat", "--rule", "gap"], "--rule is about skipped steps"),
        (["sample", "cat", "--report"], "--report is about skipped steps"),
        (["sample", "cat", "--schedule", "often"], "Schedule 'often' is not understood"),
        (["sample", "cat", "--schedule", "interval:1"], "Schedule 'interval:1' is not understood"),
        (["sample", "cat", "--schedule", "first:0.5", "--rate", 2], "--rate has no meaning for the schedule first"),
        (["sample", "cat", "--schedule", "random:9"], "--schedule random:9: count is 9"),
        (["sample", "cat", "--steps", 1], "--steps is 1"),
        (["sample", "cat", "--steps", 5000], "from 2 to 1000"),
        (["sample", "cat", "--solver", "quick"], "Solver 'quick' is unknown"),
        (["sample", "cat", "--combine", "sum"], "--combine 'sum' is unknown"),
        (["sample", "cat", "--combine", "apg", "--guidance", 1], "--combine belongs to classifier-free guidance"),
        (["sample", "cat", "--guidance", 1, "--rate", 2], "--rate skips guidance and there is none"),
        (["sample", "cat", "--guidance", "nan"], "finite numbers"),
        (["sample", "--guidance", 3], "needs something to guide towards"),
        (["sample", "cat", "--scale", 2], "--scale belongs to guidance by a classifier"),
        (["sample", "cat", "--size", 4], "too small"),
        (["sample", "cat", "--size", "4x4x4"], "--size '4x4x4' is not understood"),
        (["sample", "cat", "--size", 50000], "--size 50000 is too large; sides have at most 16384 pixels"),
        (["sample", "cat", "--start", "PHOTO", "--mask", "MASK"], "is 16x8 but --start"),
        (["sample", "cat", "--start", "PHOTO", "--mask", "MASK"], "resize the mask to 32x32"),
        (["sample", "cat", "--out", "/proc/foo"], "--out /proc/foo cannot be written to"),
        (["sample", "cat", "--mask", "m.png"], "--mask belongs to a picture"),
        (["sample", "cat", "--start", "none.png"], "no file none.png"),
        (["sample", "cat", "--start", "PHOTO", "--strength", 2], "--strength is 2"),
        (["sample", "cat", "--count", 0], "at least 1"),
        (["sample", "cat", "--seed", -1], "--seed is -1"),
        (["sample", "cat", "--out", "PHOTO"], "name a folder"),
        (["sample", "cat", "--classifier", "none.pt"], "no classifier 'none.pt'"),
        (["sample", "--classifier", "GUIDE"], "Name the classes"),
        (["sample", "bird", "--classifier", "GUIDE"], "has no class 'bird'"),
        (["sample", "3", "--classifier", "GUIDE"], "has no class 3"),
        (["sample", "cat", "--classifier", "GUIDE", "--guide-at", "end"], "--guide-at 'end' is unknown"),
        (["sample", "cat", "--classifier", "GUIDE", "--size", 32], "takes 16x16 pixels, not 32x32"),
        (["sample", "cat", "--model", "none"], "no model 'none'"),
        (["sample", "cat", "--classifier", "GUIDE", "--guidance", 3], "give --prompt"),
        (["sample", "--recipe", "none.toml"], "no file none.toml"),
        (["sample", "--recipe", 'prompt = "cat"'], "does not say which model"),
        (["sample", "--recipe", 'model = "seedling"\nprompt = true'], "prompt is text or a class number, not True"),
        (["sample", "--recipe", 'model = "seedling"\nimg2img = 2'], "recipe.toml: The strength of img2img lies"),
        (["sample", "--recipe", 'model = "seedling"\nlong_prompts = "no"'], "long_prompts is cut or chunks"),
        (["sample", "--recipe", 'model = "seedling"\nlora = "none.safetensors"'], "no LoRA 'none.safetensors'"),
        (["guidance", "schedule", "--rate", 60], "rate is 60"),
        (["guidance", "schedule", "--steps", 1, "--schedule", "all"], "number of steps is 1"),
        (["guidance", "schedule", "--k", -1], "k is -1"),
        (["guidance", "schedule", "--kind", "dear"], "--kind 'dear' is unknown"),
        (["guidance", "schedule", "--schedule", "sigma:1-2"], "needs a model's noise levels"),
        (["guidance", "schedule", "--plot", "s.txt"], "cannot be written as .txt"),
        (["guidance", "schedule", "--plot", "INSIDE"], "lies in a file, not in a folder"),
        (["guidance", "schedule", "--plot", "/proc/foo/x.png"], "--plot /proc/foo/x.png cannot be written"),
        (["guidance", "diagnose", "--on", "none.pt", "--off", "GUIDE"], "no classifier 'none.pt'"),
        (["guidance", "diagnose", "--on", "GUIDE", "--off", "OFF", "--labels", "0,bird"], "has no class 'bird'"),
        (["guidance", "diagnose", "--on", "GUIDE", "--off", "OFF", "--rates", "few"], "--rates 'few'"),
        (["guidance", "diagnose", "--on", "GUIDE", "--off", "OFF"], "--rates 1,5 (by default 1,5) holds 5"),
        (["guidance", "diagnose", "--on", "GUIDE", "--off", "GUIDE"], "is also given as --on"),
        (["guidance", "diagnose", "--on", "GUIDE", "--off", "GUIDE", "--count", 0], "at least 1"),
        (["guidance", "diagnose", "--on", "GUIDE", "--off", "GUIDE", "--scale", "nan"], "--scale is nan"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, guide, arguments, sentence):
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    Image.new("RGB", (16, 8), "white").save(tmp_path / "mask.png")
    places = {
        "PHOTO": tmp_path / "photo.png",
        "MASK": tmp_path / "mask.png",
        "INSIDE": tmp_path / "photo.png" / "x.png",
    }
    places |= {"GUIDE": guide / "on.safetensors", "OFF": guide / "off.safetensors"}
    given = [told(tmp_path, a) if " = " in str(a) else places.get(a, a) for a in arguments]
    quick = [] if given[1] == "schedule" else QUICK
    out = [] if "--out" in given or given[1] == "schedule" else ["--out", tmp_path / "o"]
    first = 2 if given[0] == "guidance" else 1
    status, printed, err = run(*given[:first], *quick, *out, *given[first:])
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
    assert printed == ""
    assert not list((tmp_path / "o").glob("*"))


def test_sizes_of_a_recipe_that_no_picture_can_have(run, tmp_path):
    for size, sentence in (
        ('"big"', "Size 'big' is not understood"),
        ("4", "too small"),
        ("true", "is not understood"),
    ):
        recipe = told(tmp_path, f'model = "seedling"\nsize = {size}\n')
        status, _, error = run("sample", "--recipe", recipe, "--steps", 2, "--out", tmp_path / "o")
        assert (status, sentence in error) == (2, True), error
    assert not (tmp_path / "o").exists()


def test_the_front_door_holds_what_it_names_and_opens_quickly():
    for name in ds.__all__:
        assert getattr(ds, name) is not None
    program = "import sys, denoscope; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
