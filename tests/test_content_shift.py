"""The content-shift score: recorded values, what holds for any features, and drift that is known."""

import csv
import json
import warnings
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from conftest import GOLDEN, smooth_picture
from diffusers import ControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import denoscope as ds
from denoscope.errors import InputError
from denoscope.features import Recipe, feature_maps, recipe
from denoscope.features.bootstrap import interval
from denoscope.features.content_shift import diff, laplacian, normalised, score, structure
from denoscope.features.dift import feature_sets
from denoscope.features.shift import ContentShift, ShiftChoices, ShiftMeter, content_shift
from denoscope.images.draw_shift import curves

HEADS = GOLDEN / "content-shift-heads"
RECORDED = json.loads((HEADS / "expected.json").read_text())["gate"]
SEEDS = st.integers(0, 2**31)


def three(seed, channels=5, height=6, width=9):
    """Reference, feature and anchor, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name):
    tensors, expected = load_file(HEADS / "fixture.safetensors"), RECORDED[name]
    ref, feat, anchor = (tensors[f"gate.{role}"] for role in ("ref", "feat", "anchor"))
    stencil, padding = name.removeprefix("laplacian").split("_")
    options = {"neighbours": int(stencil), "padding": "zero" if padding == "constant" else padding}
    assert diff(ref, feat, **options) == pytest.approx(expected["diff"], rel=1e-6)
    assert diff(ref, anchor, **options) == pytest.approx(expected["diff_anchor"], rel=1e-6)
    assert score(ref, feat, anchor, **options) == pytest.approx(expected["score"], abs=1e-6)


def test_laplacian_of_a_point():
    point = torch.zeros(1, 3, 3)
    point[0, 1, 1] = 1
    assert laplacian(point)[0].tolist() == [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
    assert laplacian(point, 8)[0].tolist() == [[1, 1, 1], [1, -8, 1], [1, 1, 1]]
    corner = torch.zeros(1, 2, 2)
    corner[0, 0, 0] = 1
    assert laplacian(corner)[0].tolist() == [[-2, 1], [1, 0]]  # its two copies outside are its neighbours
    assert laplacian(corner, padding="zero")[0].tolist() == [[-4, 1], [1, 0]]


@given(SEEDS, st.sampled_from([4, 8]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_score_ends_and_invariances(seed, neighbours, standardise):
    ref, feat, anchor = three(seed)
    options = {"neighbours": neighbours, "standardise": standardise}
    own = score(ref, feat, anchor, **options)
    assert score(ref, ref, anchor, **options) == 1
    assert score(ref, anchor, anchor, **options) == 0
    shift = torch.randn(5, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert score(ref + shift, feat, anchor - shift, **options) == pytest.approx(own, abs=1e-9)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert score(ref[order], feat[order], anchor[order], **options) == pytest.approx(own, abs=1e-9)
    assert score(-3 * ref, -3 * feat, -3 * anchor, **options) == pytest.approx(own, abs=1e-9)
    assert diff(ref, feat, **options) == pytest.approx(diff(feat, ref, **options))
    assert diff(ref, feat, normalise=True, **options) == pytest.approx(
        diff(7 * ref, 7 * feat, normalise=True, **options)
    )


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_invariant_to_rotations_of_the_channels(seed):
    ref, feat, anchor = three(seed)
    mixing = torch.linalg.qr(three(seed + 1, 1, 5, 5)[0, 0]).Q
    turned = [torch.einsum("dc,chw->dhw", mixing, values) for values in (ref, feat, anchor)]
    assert score(*turned) == pytest.approx(score(ref, feat, anchor), abs=1e-9)


def test_standardised_channels_weigh_alike():
    ref, feat, anchor = three(0)
    loud = torch.tensor([1000.0, 1, 1, 1, 1]).double()[:, None, None]
    one, two = (
        score(ref, feat, anchor, standardise=True),
        score(loud * ref, loud * feat, loud * anchor, standardise=True),
    )
    assert two == pytest.approx(one)
    assert score(loud * ref, loud * feat, loud * anchor) != pytest.approx(score(ref, feat, anchor), abs=1e-3)
    flat = torch.cat([ref[:1], torch.full((1, 6, 9), 0.3, dtype=torch.float64)])
    assert torch.equal(structure(flat, standardise=True), structure(ref[:1], standardise=True))


def test_undefined_and_wrong():
    ref, feat, _ = three(0)
    for anchor in (ref, ref + 1, ref[torch.tensor([1, 0, 2, 4, 3])]):
        with pytest.raises(InputError, match="score is undefined"):
            score(ref, feat, anchor)
    flat = torch.ones(2, 4, 4)
    with pytest.raises(InputError, match="score is undefined"):
        score(flat, flat, flat)
    with pytest.raises(InputError, match="no structure"):
        diff(flat, flat, normalise=True)
    with pytest.raises(InputError, match="same site at the same picture size"):
        score(ref, feat[:, :5], ref)
    with pytest.raises(InputError, match="not finite"):
        diff(ref, feat / 0)
    with pytest.raises(InputError, match="4 or 8 neighbours, not 6"):
        laplacian(ref, 6)
    with pytest.raises(InputError, match="replicate"):
        laplacian(ref, padding="reflect")


def test_known_drift_lowers_the_score(seedling):
    """Features of the picture rolled sideways; the further, the lower, and 0 where it is the anchor (spec, 7c 4)."""
    picture = smooth_picture(3, 96, 64)
    sites = ["up.0", "up.1", "up.2"]

    def rolled(k):
        moved = ds.Picture(picture.pixels.roll(k, 2))
        chosen = recipe(seedling, t=0, ensemble=1, size=0)
        return feature_maps(seedling, moved, chosen, sites, noise="none")

    maps = [rolled(k) for k in (0, 1, 2, 4, 6)]
    for site in sites:
        found = [score(maps[0][site].values, one[site].values, maps[-1][site].values) for one in maps]
        assert (found[0], found[-1]) == (1, 0)
        assert all(a > b for a, b in pairwise(found)), (site, found)


def test_interval():
    assert interval([3.0]) is None
    assert interval([2.0, 2.0, 2.0]) == (2, 2)
    values = torch.randn(40, generator=torch.Generator().manual_seed(1)).numpy() + 1
    low, high = interval(values)
    assert low < values.mean() < high
    half = 1.96 * values.std(ddof=1) / 40**0.5  # normal approximation
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert interval(values) == (low, high) != interval(values, seed=1)
    one_picture = interval([[0.0, 1.0, 2.0, 3.0]])  # its seeds alone
    assert 0 < one_picture[0] < 1.5 < one_picture[1] < 3


# ---- on models ----------------------------------------------------------------------------------------------------

SMALL = {"size": 64, "preset": "semantic"}


def test_scores_are_those_of_the_features(sd):
    """Of one draw: eq. 2 of the maps that `feature_sets` makes from the same noise, at every site and timestep."""
    picture, sites = smooth_picture(0), ["up.1", "up.2.resnet.0"]
    options = {"draws": 1, "anchor_t": 700, "ref_t": 3, "anchor_prompt": "a dog", "neighbours": 8}
    found = content_shift(
        sd, [picture], {"cat": {"prompt": "a cat"}}, t=(60, 200), sites=sites, settings=SMALL, **options
    )
    assert [(row.technique, row.site, row.t) for row in found.rows][:4] == [
        ("plain", "up.1", 60), ("cat", "up.1", 60), ("plain", "up.1", 200), ("cat", "up.1", 200),
    ]  # fmt: skip
    told = {"ref": (3, None), "cat": (200, "a cat"), "anchor": (700, "a dog")}
    recipes = {name: recipe(sd, t=t, prompt=prompt, ensemble=1, **SMALL) for name, (t, prompt) in told.items()}
    maps = feature_sets(sd, picture, recipes, sites=sites, noise="shared")
    for site in sites:
        ref, feat, anchor = (maps[name][site].values for name in told)
        row = next(one for one in found.rows if (one.technique, one.site, one.t) == ("cat", site, 200))
        assert row.score == pytest.approx(score(ref, feat, anchor, neighbours=8), abs=1e-4)
        assert row.diff == pytest.approx(diff(ref, feat, neighbours=8), rel=1e-4)
    assert found.rows[0].score_interval is None  # one picture


def test_draws_are_averaged_after_scoring(sd):
    found = content_shift(sd, [smooth_picture(0), smooth_picture(1)], {}, t=100, draws=3, settings=SMALL)
    record = found.records[0]["rows"][0]
    each = [(away - own) / away for own, away in zip(record["diff"], record["anchor"], strict=True)]
    assert len(each) == 3
    mean = sum(each) / 3
    assert mean != pytest.approx(1 - sum(record["diff"]) / sum(record["anchor"]), abs=1e-6)
    other = found.records[1]["rows"][0]
    second = sum((away - own) / away for own, away in zip(other["diff"], other["anchor"], strict=True)) / 3
    assert found.rows[0].score == pytest.approx((mean + second) / 2)
    low, high = found.rows[0].score_interval
    assert (low, high) == pytest.approx(sorted([mean, second]))  # of two pictures, percentiles reach the ends


def test_where_plain_stands(sd):
    pictures = [smooth_picture(0)]
    at_reference = content_shift(sd, pictures, {"twin": {"prompt": ""}}, t=0, draws=2, settings=SMALL)
    assert [row.score for row in at_reference.rows] == pytest.approx([1, 1], abs=1e-4)
    assert at_reference.rows[1].gain == pytest.approx(0, abs=1e-5)
    at_anchor = content_shift(sd, pictures, {}, t=500, draws=2, settings=SMALL)
    assert at_anchor.rows[0].score == pytest.approx(0, abs=1e-4)
    same = content_shift(sd, pictures, {"cat": {"prompt": "a cat"}}, t=0, draws=1, ref="same", settings=SMALL)
    assert [row.score for row in same.rows] == pytest.approx([1, 1], abs=1e-4)  # each by its own reference
    plain = content_shift(sd, pictures, {"plain": {"prompt": "a cat"}, "x": {"guidance": 2}}, draws=1, settings=SMALL)
    assert plain.settings["techniques"]["x"]["prompt"] == "a cat"


def test_shift_grows_with_noise(seedling):
    pictures = [smooth_picture(seed, 96, 64) for seed in (0, 1)]
    found = content_shift(seedling, pictures, {}, t=(50, 200, 400), sites=("up.0", "up.1", "up.2"), draws=2,
                          settings={"size": "long48"})  # fmt: skip
    for site in found.sites:
        assert [found.ranking(site, t)[0].score for t in (50, 200, 400)] == sorted(
            (row.score for row in found.rows if row.site == site), reverse=True
        )
    assert found.draw().width > found.draw_curves("diff").width / 2


def test_the_legend_of_curves_lies_below_them() -> None:
    points = [(0, 0.5, None), (100, 0.5, None)]
    image = np.asarray(curves({"up.1": {"one": points, "two": points}}, "score").convert("RGB")).astype(int)
    blue = np.abs(image - (0x00, 0x72, 0xB2)).sum(2) < 30
    drawn = np.abs(image - (0xD5, 0x5E, 0x00)).sum(2) < 30  # the second line covers the first
    axis = np.flatnonzero((image.max(2) < 10).mean(1) > 0.5).max()  # the row of the axis of timesteps
    assert drawn[:axis].any()
    assert not blue[:axis].any()  # so the first shows in the legend only
    assert blue[axis:].any()


def test_the_anchor_is_told_nothing_whatever_the_preset_says(sd, monkeypatch):
    preset = {"t": 50, "site": "up.1", "ensemble": 1, "size": "64", "prompt": "a photo of a cat"}
    monkeypatch.setattr(sd, "presets", {"semantic": preset})
    said = content_shift(sd, [smooth_picture(0)], {}, draws=1)
    same = content_shift(sd, [smooth_picture(0)], {}, draws=1, anchor_prompt="a photo of a cat")
    assert said.records[0]["rows"][0]["diff"] == same.records[0]["rows"][0]["diff"]
    assert said.records[0]["rows"][0]["anchor"] != same.records[0]["rows"][0]["anchor"]


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_the_anchor_is_read_where_it_says_whatever_plain_does(sd):
    found = content_shift(sd, [smooth_picture(0)], {"plain": {"denoise_from": 52}}, draws=1, settings=SMALL)
    bare = content_shift(sd, [smooth_picture(0)], {}, draws=1, settings=SMALL)
    assert found.records[0]["rows"][0]["diff"] != bare.records[0]["rows"][0]["diff"]


def edges_of(denoiser, path):
    """A ControlNet of the tiny pipeline that acts, saved."""
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(denoiser.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    network.save_pretrained(path)
    return str(path)


def save_lora(denoiser, path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = denoiser.unet.get_submodule(layer).weight.shape
    weights = {"A": torch.randn(2, into), "B": torch.randn(out, 2)}
    save_file({f"unet.{layer}.lora_{k}.weight": value for k, value in weights.items()}, path)
    return path


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_short_denoising_along_the_curve(sd):
    """What starts below a timestep is left out there; what starts relative to it is the same as from where that is."""
    techniques = {"fixed": {"denoise_from": 52}, "above": {"denoise_from": "+2"}, "late": {"second_t": 90}}
    meter = ShiftMeter(sd, techniques, ShiftChoices(t=(101, 50), draws=1), **SMALL)
    assert len(meter.notes) == 1
    assert "'fixed' has denoise_from = 52, which starts below t = 101, and is left out there" in meter.notes[0]
    told = meter.settings()
    assert told["left_out"] == meter.notes
    assert told["techniques"]["fixed"]["denoise_from"] == 52
    starts = told["techniques"]["above"]["denoise_start"]
    assert (starts["101"], starts["50"]) == (103, 52)
    keep = {}
    found = ContentShift.of([meter.record(smooth_picture(0), keep=keep)], told)
    assert list(keep) == ["reference", "plain", "above", "late"]
    cells = {(row.technique, row.t): row.score for row in found.rows}
    assert cells.keys() == {(name, t) for name in ("plain", *techniques) for t in (101, 50)} - {("fixed", 101)}
    assert cells["above", 50] == pytest.approx(cells["fixed", 50], abs=1e-5)  # batches round otherwise
    assert [row.technique for row in found.ranking(t=101)].count("fixed") == 0
    assert found.draw().height > found.draw_curves().height
    for t, wrong in ((101, {"fixed": {"denoise_from": 52}}), (50, {"plain": {"denoise_from": 20}})):
        with pytest.raises(InputError, match=f"The technique '{next(iter(wrong))}' has .* relative to t"):
            ShiftMeter(sd, wrong, ShiftChoices(t=(t,)), **SMALL)


@pytest.fixture(scope="module")
def edges(sd, tmp_path_factory):
    return edges_of(sd, tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def sd_large():
    """A pipeline with attention maps of the sizes that are read."""
    return ds.load(GOLDEN / "content-shift-features" / "pipeline", device="cpu")


def test_wrong_controls(sd, edges):
    """Edges of the next picture differ from the own ones; at scale 0 neither acts."""
    pictures = [smooth_picture(0), smooth_picture(1, 56, 72), smooth_picture(2)]
    techniques = {"own": {"control": {"model": edges, "low": 5, "high": 10}}, "off": {"control": f"{edges}@0"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # smooth pictures have no edges at the published thresholds
        found = content_shift(sd, pictures, techniques, draws=1, wrong_control=True, settings={"size": "80x64"})
    assert found.techniques == ["plain", "own", "off", "wrong:own", "wrong:off"]
    mean, span, share = found.against("own", "wrong:own")
    assert abs(mean) > 1e-4
    assert span[0] < mean < span[1]
    assert 0 <= share <= 1
    assert found.against("off", "plain")[0] == pytest.approx(0, abs=1e-5)
    assert found.settings["techniques"]["own"]["control"][0]["low"] == 5


OTHER = {  # by field of Recipe: other settings, where they are said, and a second technique's where it takes one
    "t": ("choices", {"t": (60,)}),
    "site": ("choices", {"sites": ("up.2",)}),
    "ensemble": ("choices", {"draws": 2}),
    "size": ("shared", {"size": 80}),
    "prompt": ("technique", {"prompt": "a cat"}),
    "preset": ("shared", {"preset": "geometric"}),
    "resample": ("shared", {"resample": "linear"}),
    "noise": None,  # always drawn: clean latents do not shift
    "adaln": ("shared", {"adaln": False}),
    "massive": ("shared", {"massive": "keep"}),
    "control": ("technique", {"control": "CONTROL"}),
    "lora": ("technique", {"lora": "LORA"}),
    "seed": ("shared", {"seed": 3}),
    "denoise_from": ("technique", {"denoise_from": 52}),
    "img2img": ("technique", {"img2img": 0.1}),
    "second_t": ("technique", {"second_t": 90}),
    "guidance": ("technique", {"guidance": 2}),
    "timestep_mode": ("technique", {"timestep_mode": "gdf"}),
    "pool": ("shared", {"pool": 4}),
    "long_prompts": ("technique", {"long_prompts": "chunks"}),
}


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_everything_that_decides_the_numbers_is_recorded(sd, tmp_path, field):
    """Records of a run are used again by a run with the same settings, so these must name every field of a recipe."""
    if OTHER[field] is None:
        with pytest.raises(InputError, match="sets 'noise'"):
            ShiftMeter(sd, {"x": {"noise": "none"}}, size=64)
        return
    where, other = OTHER[field]
    other = {k: edges_of(sd, tmp_path) if v == "CONTROL" else v for k, v in other.items()}
    denoiser, shared = sd, {"size": 64, "preset": "semantic"}
    choices, technique = {"t": (50,), "sites": ("up.1",), "draws": 1}, {}
    if field in ("adaln", "massive"):
        denoiser = ds.load(tiny.saved(tmp_path, "dit")[1], device="cpu")
        choices["sites"] = ("block.1",)
    if field == "lora":
        other = {"lora": str(save_lora(sd, tmp_path / "lora.safetensors"))}
    told = []
    for more in ({}, other):
        given = {**choices, **(more if where == "choices" else {})}
        settings = {**shared, **(more if where == "shared" else {})}
        own = {"x": {**technique, **(more if where == "technique" else {})}}
        told.append(ShiftMeter(denoiser, own, ShiftChoices(**given), **settings).settings())
    assert json.loads(json.dumps(told[0])) != json.loads(json.dumps(told[1]))


@pytest.mark.parametrize("field", [field.name for field in fields(ShiftChoices)])
def test_every_choice_is_recorded(sd, field):
    other = {
        "t": (60,), "sites": ("up.2",), "ref": "same", "ref_t": 1, "anchor_t": 400, "anchor_prompt": "x", "draws": 1,
        "seed": 1, "neighbours": 8, "padding": "zero", "standardise": True, "normalise": True, "curve": (100,),
    }  # fmt: skip
    one, two = (
        ShiftMeter(sd, {}, replace(ShiftChoices(sites=("up.1",)), **more), **SMALL).settings()
        for more in ({}, {field: other[field]})
    )
    assert one != two


def test_curves_of_some_pictures_cost_a_draw(sd):
    """Further timesteps with the first draw, in the passes that are made anyway."""
    pictures, rows = [smooth_picture(0), smooth_picture(1)], []
    choices = ShiftChoices(sites=("up.1",), draws=3, curve=(100, 200))
    meter = ShiftMeter(sd, {"cat": {"prompt": "a cat"}, "near": {"denoise_from": 150}}, choices, **SMALL)
    assert "'near' has denoise_from = 150, which starts below t = 200" in meter.notes[0]
    meter = ShiftMeter(sd, {"cat": {"prompt": "a cat"}}, choices, **SMALL)
    handle = sd.network.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    records = [meter.record(pictures[0]), meter.record(pictures[1], curve=False)]
    handle.remove()
    reads = 3 * 4  # two techniques, reference and anchor, with three draws each
    assert rows == [reads + 2 * 2, reads]
    found = ContentShift.of(records, meter.settings())
    assert found.times == [50, 100, 200]
    assert [row.pictures for row in found.rows] == [2, 2, 1, 1, 1, 1]
    assert found.settings["curve"] == [100, 200]
    asked = content_shift(
        sd, pictures[:1], {"cat": {"prompt": "a cat"}}, t=(100,), draws=1, sites="up.1", settings=SMALL
    )
    assert found.ranking(t=100)[0].score == pytest.approx(asked.ranking()[0].score, abs=1e-5)
    alone = content_shift(sd, pictures, {"cat": {"prompt": "a cat"}}, draws=3, sites="up.1", settings=SMALL)
    for one, other in zip(found.rows, alone.rows, strict=False):
        assert one.score == pytest.approx(other.score, abs=1e-5)
    assert found.draw().height > 2 * alone.draw().height  # the curves of the score and of diff are below
    with pytest.raises(InputError, match="each of them once"):
        ShiftChoices(t=(50, 100), curve=(100,))
    broken = [records[0], {**records[1], "rows": records[1]["rows"][:1]}]
    with pytest.raises(InputError, match="different techniques, sites or timesteps"):
        ContentShift.of(broken, meter.settings())


def test_normalised_diffs_can_be_compared(sd, tmp_path):
    given = {"t": 100, "draws": 2, "sites": ("up.1", "up.2"), "settings": SMALL}
    plain, shares = (content_shift(sd, [smooth_picture(0)], {}, **given, normalise=n) for n in (False, True))
    for one, two, row in zip(plain.rows, shares.rows, shares.records[0]["rows"], strict=True):
        assert two.score == one.score
        each = [own / norm for own, norm in zip(row["diff"], row["norm"], strict=True)]
        assert two.diff == pytest.approx(sum(each) / 2)
        assert two.diff < one.diff
    assert shares.settings["normalise"] is True
    assert json.loads(shares.save(tmp_path / "s.json").read_text())["rows"][0]["diff"] == shares.rows[0].diff
    with pytest.raises(InputError, match="no structure"):
        normalised([1.0], [0.0])


def test_words_are_compared_under_one_prompt(sd_large):
    pictures, given = [smooth_picture(0)], {"sites": "attention.up_cross", "draws": 1, "settings": {"size": 128}}
    with pytest.raises(InputError, match="words of the prompt.*'' and 'a cat'; give one prompt for all techniques"):
        content_shift(sd_large, pictures, {"cat": {"prompt": "a cat"}}, **given)
    with pytest.raises(InputError, match=r"the same for the anchor \(anchor_prompt\)"):
        content_shift(sd_large, pictures, {"plain": {"prompt": "a cat"}}, **given)
    found = content_shift(
        sd_large, pictures, {"plain": {"prompt": "a cat"}, "two": {"second_t": 90}}, anchor_prompt="a cat", **given
    )
    assert [row.technique for row in found.rows] == ["plain", "two"]


def test_saved(sd, tmp_path):
    pictures = [smooth_picture(0), smooth_picture(1)]
    found = content_shift(sd, pictures, {"cat": {"prompt": "a cat"}}, t=(50, 100), draws=2, settings=SMALL)
    document = json.loads(found.save(tmp_path / "shift.json").read_text())
    chosen = {
        "neighbours": 4,
        "padding": "replicate",
        "ref": "plain",
        "ref_t": 0,
        "anchor_t": 500,
        "anchor_prompt": "",
        "draws": 2,
    }
    assert chosen.items() <= document["settings"].items()
    assert {"scheduler", "versions", "weights", "dtype", "noise", "averaging", "interval"} <= set(document["settings"])
    again = ContentShift.of(document["pictures"], document["settings"])
    assert again.rows == found.rows
    with found.save(tmp_path / "shift.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["technique"] for line in lines] == ["plain", "cat", "plain", "cat"]
    assert float(lines[1]["gain_low"]) <= float(lines[1]["gain"]) <= float(lines[1]["gain_high"])
    with np.load(found.save(tmp_path / "shift.npz")) as arrays:
        assert arrays["diff"].shape == (2, 4, 2)
    with Image.open(found.save(tmp_path / "shift.png")) as image:
        assert min(image.size) > 200


@pytest.mark.parametrize(
    ("techniques", "options", "message"),
    [
        ({"big": {"size": 96}}, {}, "'big' sets 'size'"),
        ({"deep": {"site": "mid"}}, {}, "'deep' sets 'site'"),
        ({"wrong:x": {}}, {}, "needs another name"),
        ({"odd": {"colour": 1}}, {}, "no setting 'colour'"),
        ({}, {"sites": "up.9"}, "up.9"),
        ({}, {"ref": "none"}, '"plain" or "same"'),
        ({}, {"t": ()}, "at least one timestep"),
        ({}, {"t": 1000}, "1000 is not in"),
        ({}, {"draws": 0}, "at least 1 draw"),
        ({}, {"neighbours": 5}, "4 or 8"),
        ({}, {"anchor": 5}, "no choice 'anchor'"),
        ({}, {"anchor_t": 0}, "anchor is the reference itself"),
        ({"cat": {"prompt": "a cat"}}, {"wrong_control": True}, "No technique has a ControlNet"),
    ],
)
def test_what_cannot_be_compared(sd, techniques, options, message):
    with pytest.raises(InputError, match=message):
        content_shift(sd, [smooth_picture(0)], techniques, settings=SMALL, **options)


def test_no_pictures(sd):
    with pytest.raises(InputError, match="no pictures"):
        content_shift(sd, [], {}, settings=SMALL)
    found = content_shift(sd, [smooth_picture(0)], {}, draws=1, settings=SMALL)
    with pytest.raises(InputError, match="was not measured"):
        found.against("plain", "cat")
    with pytest.raises(InputError, match="Nothing was measured at up.3"):
        found.ranking("up.3")
