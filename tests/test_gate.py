"""GATE's image-to-image check: the measures, the verdict, and what both say of models whose answer is known."""

import csv
import json
import warnings

import numpy as np
import pytest
import tiny
import torch
from conftest import smooth_picture
from diffusers import ControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import denoscope as ds
from denoscope.errors import InputError
from denoscope.features.bootstrap import interval
from denoscope.features.gate import SAMPLED, Gate, GateChoices, Gatekeeper, gate
from denoscope.features.likeness import FEWEST, edge_f1, psnr, ssim, verdict
from denoscope.features.shift import ShiftMeter, content_shift
from denoscope.features.weights import weights_digest

SMALL = {"size": "long48"}
QUICK = {"seeds": 2, "steps": 4}


def lines(*columns, side=24):
    """White vertical lines, two pixels wide, on black."""
    pixels = torch.zeros(3, side, side)
    for x in columns:
        pixels[:, :, x : x + 2] = 1
    return pixels


def test_psnr():
    one = torch.full((3, 16, 16), 0.5)
    assert psnr(one, one + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(one, one + 0.01) == pytest.approx(40, abs=1e-3)
    assert psnr(one, one) == 100


def test_ssim():
    one = smooth_picture(0).pixels
    assert ssim(one, one) == pytest.approx(1)
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    worse = [ssim(one, (one + s * noise).clamp(0, 1)) for s in (0.02, 0.1, 0.4)]
    assert sorted(worse, reverse=True) == worse


def test_edge_f1():
    one = lines(8)
    assert edge_f1(one, one) == 1
    assert edge_f1(one, lines(9)) == 1  # within a pixel
    assert edge_f1(one, lines(9), tolerance=0) < 1
    assert edge_f1(one, lines(16)) == 0
    half = edge_f1(one, lines(8, 16))  # all of one is found, half of the other is right
    assert half == pytest.approx(2 / 3, abs=0.05)
    flat = torch.zeros(3, 24, 24)
    assert (edge_f1(flat, flat), edge_f1(flat, one), edge_f1(one, flat)) == (1, 0, 0)


@given(st.integers(0, 2**31), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_edge_f1_is_symmetric_and_grows_with_the_tolerance(seed, tolerance):
    one, two = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(seed))
    found = edge_f1(one, two, tolerance=tolerance)
    assert found == pytest.approx(edge_f1(two, one, tolerance=tolerance))
    assert 0 <= found <= edge_f1(one, two, tolerance=tolerance + 1) <= 1


UP, SOME, DOWN, ZERO = (0.2, 0.4), (-0.2, 0.4), (-0.4, -0.2), (0.0, 0.0)


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ((UP, UP, UP), "helps"),
        ((UP, UP, SOME), "helps"),
        ((UP, UP, DOWN), "undecided"),
        ((UP, SOME, SOME), "undecided"),
        ((DOWN, ZERO, DOWN), "hurts"),
        ((SOME, SOME, SOME), "undecided"),
        ((ZERO, ZERO, ZERO), "no effect"),
        (((0.01, 0.02), (0.001, 0.002), (0.001, 0.002)), "no effect"),  # surely there, but too little to count
        ((DOWN, (-0.002, -0.001), (-0.03, 0.02)), "undecided"),  # sure of one alone
        ((UP, UP, None), "undecided"),
    ],
)
def test_verdict(spans, said):
    assert verdict(dict(zip(("psnr", "ssim", "edge_f1"), spans, strict=True))) == said


def test_no_verdict_from_few_pictures():
    spans = dict.fromkeys(("psnr", "ssim", "edge_f1"), UP)
    assert [verdict(spans, pictures=n) for n in (1, FEWEST - 1, FEWEST)] == ["undecided", "undecided", "helps"]


def wrong_verdicts(pictures, seeds, runs=120):
    """Share of verdicts for a side where nothing but chance differs: pictures and seeds vary, and the measures together."""
    rng, wrong = np.random.default_rng(0), 0
    for run in range(runs):
        of_picture, of_seed = rng.standard_normal((pictures, 1)), rng.standard_normal((pictures, seeds))
        spans = {}
        for measure, size in (("psnr", 1.0), ("ssim", 0.05), ("edge_f1", 0.1)):
            own = 0.5 * (0.84 * of_picture + 0.55 * rng.standard_normal(of_picture.shape))
            own = own + 0.84 * of_seed + 0.55 * rng.standard_normal(of_seed.shape)
            spans[measure] = interval(size * own, resamples=400, seed=run)
        wrong += verdict(spans) in ("helps", "hurts")
    return wrong / runs


def test_where_verdicts_begin_few_are_wrong():
    assert wrong_verdicts(1, 2) > 0.4
    assert wrong_verdicts(FEWEST, 4) < 0.1


def test_techniques_that_say_the_same_have_no_effect(seedling):
    """And what is compared with plain does not depend on what else is compared, nor on the order."""
    pictures = [smooth_picture(0, 96, 64), smooth_picture(1, 64, 96)]
    techniques = {
        "twin": {"prompt": "bird"},
        "guided": {"guidance": 3},
        "plain": {"prompt": "bird"},
        "face": {"prompt": "face"},
    }
    found = gate(seedling, pictures, techniques, settings=SMALL, **QUICK)
    assert {row.verdict for row in found.rows[1:]} == {"undecided"}  # of two pictures
    rows = {row.technique: row for row in found.rows}
    assert list(rows) == ["plain", "twin", "guided", "face"]
    assert Gate.of(found.records * 3, found.settings).rows[1].verdict == "no effect"
    assert rows["twin"].intervals == dict.fromkeys(("psnr", "ssim", "edge_f1"), (0, 0))
    assert abs(rows["guided"].changes["psnr"]) > 1e-3
    alone = gate(seedling, pictures, {"plain": {"prompt": "bird"}, "face": {"prompt": "face"}}, settings=SMALL, **QUICK)
    assert alone.rows[1].means["psnr"] == pytest.approx(rows["face"].means["psnr"], abs=1e-3)
    assert alone.rows[1].means["ssim"] == pytest.approx(rows["face"].means["ssim"], abs=1e-4)
    assert gate(seedling, pictures, techniques, settings=SMALL, seed=1, **QUICK).rows[0].means != rows["plain"].means


def test_stronger_repainting_is_less_like_the_input(seedling):
    means = [
        gate(seedling, [smooth_picture(2, 64, 48)], {}, settings=SMALL, strength=s, steps=10, seeds=2)
        .rows[0]
        .means["psnr"]
        for s in (0.2, 0.5, 0.9)
    ]
    assert sorted(means, reverse=True) == means


def test_only_what_image_to_image_can_tell(sd):
    picture = smooth_picture(0)
    techniques = {"early": {"second_t": 200}, "cat": {"prompt": "a cat"}, "both": {"second_t": 200, "prompt": "a cat"}}
    keeper = Gatekeeper(sd, techniques, GateChoices(**QUICK), size=80)
    assert keeper.skipped == ["early"]
    images = keeper.repaint(picture)
    assert list(images) == ["input", "plain", "cat", "both"]
    assert torch.equal(images["cat"], images["both"])
    assert images["input"].shape == (1, 3, 80, 80)
    assert images["plain"].shape == (2, 3, 80, 80)
    assert not torch.equal(images["plain"][0], images["plain"][1])


def test_sizes_are_rounded_to_what_can_be_repainted(sd, seedling):
    assert Gatekeeper(sd, {}, size=0).size(smooth_picture(0, 101, 69)) == (104, 72)
    assert Gatekeeper(seedling, {}, size=0).size(smooth_picture(0, 30, 18)) == (32, 16)
    assert Gatekeeper(seedling, {}).size(smooth_picture(0, 192, 96)) == (96, 48)  # of the preset's sizes, the last


def test_saved(seedling, tmp_path):
    found = gate(seedling, [smooth_picture(0, 48, 48)], {"face": {"prompt": "face"}}, settings=SMALL, seeds=3, steps=2)
    assert found.rows[1].intervals["psnr"] is not None  # of one picture, over its seeds
    document = json.loads(found.save(tmp_path / "gate.json").read_text())
    chosen = {
        "strength": 0.7,
        "seeds": 3,
        "steps": 2,
        "guidance": None,
        "margins": {"psnr": 0.1, "ssim": 0.005, "edge_f1": 0.01},
    }
    assert chosen.items() <= document["settings"].items()
    assert Gate.of(document["pictures"], document["settings"]).rows == found.rows
    with found.save(tmp_path / "gate.csv").open() as file:
        assert [line["technique"] for line in csv.DictReader(file)] == ["plain", "face"]
    with np.load(found.save(tmp_path / "gate.npz")) as arrays:
        assert arrays["psnr"].shape == (1, 2, 3)
    with Image.open(found.save(tmp_path / "gate.png")) as image:
        assert image.width > image.height
    single = gate(seedling, [smooth_picture(0, 48, 48)], {"face": {"prompt": "face"}}, settings=SMALL, seeds=1, steps=2)
    assert (single.rows[1].intervals["psnr"], single.rows[1].verdict) == (None, "undecided")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "between 0 and 1"),
        ({"strength": 0.1, "steps": 4}, "leaves none of 4 steps"),
        ({"seeds": 0}, "at least 1 seed"),
        ({"margins": {"lpips": 1}}, "no margin 'lpips'"),
        ({"noise": 1}, "no choice 'noise'"),
        ({"wrong_control": True}, "No technique has a ControlNet"),
    ],
)
def test_what_cannot_be_checked(seedling, options, message):
    with pytest.raises(InputError, match=message):
        gate(seedling, [smooth_picture(0)], {}, settings=SMALL, **options)


def test_nothing_to_show(seedling, tmp_path):
    found = gate(seedling, [ds.read(smooth_picture(0))], {}, settings=SMALL, seeds=1, steps=2)
    with pytest.raises(InputError, match="no technique beside plain"):
        found.save(tmp_path / "gate.png")
    with pytest.raises(InputError, match="no pictures"):
        gate(seedling, [], {}, settings=SMALL)


def test_controls_and_adapters(sd, tmp_path):
    """What acts changes the picture, what has scale 0 does not, and the model is as it was."""
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(sd.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    network.save_pretrained(tmp_path / "control")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = sd.unet.get_submodule(layer).weight.shape
    save_file(
        {f"unet.{layer}.lora_A.weight": torch.randn(2, into), f"unet.{layer}.lora_B.weight": torch.randn(out, 2)},
        tmp_path / "lora.safetensors",
    )
    control, lora = str(tmp_path / "control"), str(tmp_path / "lora.safetensors")
    techniques = {
        "edges": {"control": {"model": control, "low": 2, "high": 4}},
        "no edges": {"control": f"{control}@0"},
        "adapted": {"lora": lora},
        "not adapted": {"lora": f"{lora}@0"},
    }
    keeper = Gatekeeper(sd, techniques, GateChoices(**QUICK), wrong_control=True, size="80x64")
    weights = weights_digest(sd.network)
    pictures = [smooth_picture(0), smooth_picture(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # smooth pictures have no edges at the published thresholds
        images = keeper.repaint(*pictures)
        found = gate(sd, pictures, techniques, wrong_control=True, settings={"size": "80x64"}, **QUICK)
    plain = images["plain"]
    for name in ("no edges", "not adapted", "wrong:no edges"):
        assert torch.allclose(images[name], plain, atol=1e-4)
    for name in ("edges", "adapted", "wrong:edges"):
        assert (images[name] - plain).abs().max() > 1e-3
    assert (images["edges"] - images["wrong:edges"]).abs().max() > 1e-3
    assert weights_digest(sd.network) == weights
    enough = Gate.of(found.records * 3, found.settings)
    assert {row.technique: row.verdict for row in enough.rows}["no edges"] == "no effect"
    assert [row.technique for row in found.rows][-2:] == ["wrong:edges", "wrong:no edges"]


def test_pictures_without_edges_have_no_control(sd):
    """Neither their own, nor as the wrong one of another picture."""
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(sd.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    flat, other = ds.Picture(torch.full((3, 64, 64), 0.5)), ds.Picture(torch.zeros(3, 64, 64))
    other.pixels[:, 20:40, 20:40] = 1
    keeper = Gatekeeper(sd, {"edges": {"control": network}}, GateChoices(**QUICK), wrong_control=True, size="64")
    with pytest.warns(UserWarning, match="no edges"):
        images, turned = keeper.repaint(flat, other), keeper.repaint(other, flat)
    assert torch.equal(images["edges"], images["plain"])
    assert torch.equal(turned["wrong:edges"], turned["plain"])
    assert not torch.equal(images["wrong:edges"], images["plain"])
    assert not torch.equal(turned["edges"], turned["plain"])


def test_guidance_towards_nothing_is_said(sd):
    techniques = {"guided": {"guidance": 3}, "empty": {"guidance": 3, "prompt": ""}, "cat": {"prompt": "a cat"}}
    keeper = Gatekeeper(sd, techniques, GateChoices(**QUICK), size="64")
    with pytest.warns(UserWarning, match="Guidance has no effect"):
        images = keeper.repaint(smooth_picture(0))
    assert torch.equal(images["guided"], images["plain"])
    assert torch.allclose(images["empty"], images["plain"], atol=1e-5)


def test_long_prompts_are_guided_and_do_not_depend_on_each_other(sd):
    long = {
        name: {"prompt": " ".join(["cat"] * n), "long_prompts": "chunks", "guidance": 2.0}
        for name, n in (("a", 75), ("b", 90))
    }
    together, alone = (
        Gatekeeper(sd, some, GateChoices(seeds=1, steps=4), size="64").repaint(smooth_picture(0))
        for some in (long, {"a": long["a"]})
    )
    assert torch.allclose(together["a"], alone["a"], atol=1e-5)
    assert (together["a"] - together["b"]).abs().max() > 1e-4


@pytest.mark.parametrize("changed", [{"size": "long32"}, {"resample": "linear"}, *({name: None} for name in SAMPLED)])
def test_everything_that_decides_the_check_is_recorded(seedling, changed, tmp_path):
    other = {
        "prompt": "face", "guidance": 2, "long_prompts": "chunks", "lora": str(tmp_path / "lora"),
        "control": str(tmp_path / "control"),
    }  # fmt: skip
    (name,) = changed
    own = {"x": {name: other[name]}} if name in SAMPLED else {}
    one, two = (
        Gatekeeper(seedling, techniques, **{**SMALL, **settings}).settings()
        for techniques, settings in (({"x": {}}, {}), ({"x": {}, **own}, {} if own else changed))
    )
    assert one != two


def test_files_that_change_are_other_techniques(sd, tmp_path):
    words = tmp_path / "words.json"
    told = []
    for caption in ("a cat", "a dog"):
        words.write_text(f'{{"p": "{caption}"}}')
        given = {"words": {"prompt": f"@{words}"}}
        told.append((Gatekeeper(sd, given, size="64").settings(), ShiftMeter(sd, given, size="64").settings()))
    assert all(before != after for before, after in zip(*told, strict=True))


def test_class_labels(tmp_path):
    """Models that are told class numbers, which have transformer blocks."""
    _, folder = tiny.saved(tmp_path, "dit")
    dit = ds.load(folder, device="cpu")
    techniques = {"tench": {"prompt": 0}, "goldfish": {"prompt": 1}}
    found = content_shift(dit, [smooth_picture(0)], techniques, draws=1, sites="block.1", settings={"size": 64})
    assert [row.technique for row in found.rows] == ["plain", "tench", "goldfish"]
    assert found.settings["adaln"] is True
    checked = gate(dit, [smooth_picture(0)], techniques, settings={"size": 64, "site": "block.1"}, **QUICK)
    assert checked.rows[1].means["psnr"] != checked.rows[2].means["psnr"]
    with pytest.raises(InputError, match="noise of squares only.*a square size, such as 96"):
        gate(dit, [smooth_picture(0)], techniques, settings={"size": "96x64", "site": "block.1"}, **QUICK)
