"""Techniques of content-shift suppression: parity with the published extractor, and what composing them must leave alone."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import GOLDEN, relative, smooth_picture
from diffusers import ControlNetModel, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import denoscope as ds
from denoscope.cli.options import feature_settings
from denoscope.features import (
    Amalgam,
    Dift,
    feature_sets,
    member_maps,
    read_recipe,
    read_techniques,
    recipe,
    write_recipe,
)
from denoscope.features.amalgamation import aggregate
from denoscope.features.denoising import effective
from denoscope.features.dift import ensemble_maps, varied
from denoscope.features.gdf import site_of
from denoscope.features.recipe import within_reach

PUBLISHED = GOLDEN / "content-shift-features"
CASES = {case["name"]: case for case in json.loads((PUBLISHED / "cases.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def recorded():
    return load_file(PUBLISHED / "fixture.safetensors")


@pytest.fixture(scope="module")
def published():
    return ds.load(PUBLISHED / "pipeline", device="cpu")


@pytest.fixture(scope="module")
def edges(published):
    """A ControlNet with something to say: those fresh from training start with layers of zeros."""
    torch.manual_seed(0)
    return ControlNetModel.from_pretrained(PUBLISHED / "controlnet")


def calls(denoiser):
    """Rows of every forward pass made, as they are made."""
    seen = []
    handle = denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    return seen, handle


@pytest.mark.parametrize("name", CASES)
def test_activations_are_those_of_the_published_extractor(published, recorded, name):
    case = CASES[name]
    given = {
        "t": case["t_requested"],
        "size": "128",
        "prompt": "a photo of a cat",
        "ensemble": 1,
        "timestep_mode": "gdf",
    }
    given |= {"pool": case["feature_resize"], "denoise_from": case["denoising_from"]}
    given |= {"control": str(PUBLISHED / "controlnet")} if case["control"] else {}
    known = {site.name for site in published.sites(sizes=False)}
    # raw maps are no features (they are read by a Watch); those of the U-Net itself were never recorded
    layers = [one for one in case["layers"] if not one.startswith("unet") and not one.endswith("map") and one != "attn"]
    names = {site_of(layer, known): layer for layer in layers} | (
        {"attention.up_cross": "attn"} if case["attention"] else {}
    )
    chosen = recipe(published, site="+".join(names), **given)
    for i in range(case["images"]):
        noise = ds.Noise(recorded[f"{name}.draw1"][i : i + 1], recorded[f"{name}.draw0"][i : i + 1])
        found = feature_sets(published, ds.read(PUBLISHED / f"im{i}.png"), {"it": chosen}, noise=noise)["it"]
        assert set(found) == set(names)
        for site, fm in found.items():
            assert relative(fm.values, recorded[f"{name}/{names[site]}"][i]) < 1e-5
            assert fm.recipe["t"] == case["unet_calls_t"][-1]
            assert fm.recipe.get("asked_t", fm.recipe["t"]) == case["t_requested"]


def test_raw_cross_attention_maps_are_those_of_the_published_extractor(published, recorded):
    site = site_of("up-level2-repeat1-vit-block0-cross-map", {one.name for one in published.sites(sizes=False)})
    with ds.Watch(published, [site]) as seen, torch.no_grad():
        published.predict(recorded["map_ffn.unet_input"], 51, published.condition(["a photo of a cat"]))
    assert relative(seen[site], recorded["map_ffn/up-level2-repeat1-vit-block0-cross-map"]) < 1e-5


def test_a_set_is_joined_as_the_published_script_writes_it(published, recorded):
    noise = ds.Noise(recorded["legacy.draw1"], recorded["legacy.draw0"])
    given = {"t": 50, "site": "legacy", "size": "128", "prompt": "a photo of a cat", "timestep_mode": "gdf"}
    fm = ds.features(published, PUBLISHED / "im0.png", noise=noise, **given)
    assert relative(fm.values, recorded["legacy.aggregated"][0]) < 1e-5


def test_timesteps_reached_by_the_published_code(published):
    chosen = recipe(published, t=50, timestep_mode="gdf")
    assert [effective(published, chosen, t) for t in (50, 60, 261)] == [51, 61, 262]  # PNDM, steps_offset 1
    assert effective(published, recipe(published, t=50), 50) == 50


def test_techniques_of_one_picture_share_passes_and_change_nothing(published, edges):
    picture = ds.read(PUBLISHED / "im0.png")
    base = {"t": 50, "site": "up.1+up.2.attn.0.key", "size": "64x96", "ensemble": 2}
    techniques = {
        "plain": {},
        "words": {"prompt": "a cat"},
        "edges": {"control": edges},
        "later": {"t": 261},
        "both": {"prompt": "a cat", "control": ds.Control(edges, scale=0.5), "second_t": 150},
        "guided": {"prompt": "a cat", "guidance": 3.0},
    }
    recipes = {name: recipe(published, **{**base, **one}) for name, one in techniques.items()}
    seen, handle = calls(published)
    together = feature_sets(published, picture, recipes, chunk=100)
    handle.remove()
    assert seen == [2 * (1 + 1 + 1 + 1 + 2 + 2)]  # one pass; two rows more where there are two timesteps or guidance
    for name, one in recipes.items():
        alone = feature_sets(published, picture, {name: one}, chunk=1)[name]
        for site, fm in alone.items():
            assert relative(together[name][site].values, fm.values) < 1e-5
    assert relative(together["edges"]["up.1"].values, together["plain"]["up.1"].values) > 1e-3


def test_what_techniques_are_made_of(published, edges):
    picture = ds.read(PUBLISHED / "im0.png")
    base = {"t": 50, "site": "up.1", "size": "64", "ensemble": 1, "prompt": "a cat"}

    def values(**technique):
        return feature_sets(published, picture, {"": recipe(published, **{**base, **technique})}, noise="shared")[""][
            "up.1"
        ].values

    plain = values()
    assert torch.equal(values(control=ds.Control(edges, scale=0)), plain)
    assert torch.equal(values(denoise_from=50, control=edges), values(control=edges))  # one pass
    assert torch.equal(values(guidance=1.0), plain)
    unconditional = values(prompt="")
    assert torch.equal(values(guidance=0.0), unconditional)
    assert relative(values(guidance=3.0), unconditional + 3 * (plain - unconditional)) < 1e-5
    assert relative(values(second_t=261), (plain + values(t=261)) / 2) < 1e-6
    halved = torch.nn.functional.avg_pool2d(plain, 2)
    assert relative(values(pool=2), halved) < 1e-6
    assert relative(values(img2img=0.3), plain) > 1e-2
    twice = values(control=[edges, edges])
    assert relative(twice, values(control=ds.Control(edges, scale=2.0))) < 1e-5  # residuals are summed


def test_pooling_controls_leave_the_unconditional_features_alone(published, edges):
    """As in diffusers' pipelines and in our sampler."""
    pooling = copy.deepcopy(edges)
    pooling.register_to_config(global_pool_conditions=True)
    base = {"t": 50, "site": "up.1", "size": "64", "ensemble": 1, "prompt": "a cat", "guidance": 0.0}
    recipes = {"none": {}, "edges": {"control": edges}, "pooling": {"control": pooling}}
    found = feature_sets(
        published,
        ds.read(PUBLISHED / "im0.png"),
        {name: recipe(published, **base, **one) for name, one in recipes.items()},
    )
    none, both, pooled = (found[name]["up.1"].values for name in recipes)
    assert relative(pooled, none) < 1e-6
    assert relative(both, none) > 1e-3


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_a_picture_without_edges_has_no_control(published, edges):
    """Bit for bit, beside techniques that do act; a warning says so."""
    flat, base = ds.Picture(torch.full((3, 64, 64), 0.5)), {"t": 50, "site": "up.1", "size": "64", "ensemble": 2}
    for more in ({}, {"denoise_from": 53}, {"img2img": 0.04}, {"guidance": 3.0, "prompt": "a cat"}):
        recipes = {
            "plain": recipe(published, **base, **more),
            "edges": recipe(published, **base, **more, control=edges),
        }
        with pytest.warns(UserWarning, match="no edges"):
            found = feature_sets(published, flat, recipes)
        assert torch.equal(found["edges"]["up.1"].values, found["plain"]["up.1"].values)
        assert found["edges"]["up.1"].recipe["control"]  # it was asked for


def test_short_denoising_takes_the_passes_it_says(published, edges):
    chosen = recipe(published, t=50, site="up.1", size="64", ensemble=2, denoise_from=60, control=edges)
    seen, handle = calls(published)
    feature_sets(published, ds.read(PUBLISHED / "im0.png"), {"": chosen})
    handle.remove()
    assert seen == [2] * 11  # 60, 59, ..., 51, and the reading at 50


@pytest.mark.filterwarnings("ignore:Denoising without")
@pytest.mark.parametrize("mode", ["exact", "gdf"])
def test_denoising_may_start_relative_to_t(published, mode):
    base = {"site": "up.1", "size": "64", "ensemble": 1, "timestep_mode": mode}
    above = recipe(published, t=50, denoise_from="+6", **base)
    assert above.denoise_start == 56
    assert {"denoise_from": "+6", "denoise_start": 56}.items() <= above.described().items()
    later = varied(published, above, {"t": 90})
    assert (later.denoise_from, later.denoise_start) == ("+6", 96)
    told = {"above": above, "there": recipe(published, t=50, denoise_from=56, **base), "later": later}
    found = {name: maps["up.1"] for name, maps in feature_sets(published, smooth_picture(1, 64, 64), told).items()}
    assert torch.equal(found["above"].values, found["there"].values)
    assert relative(found["later"].values, found["there"].values) > 1e-3
    assert [found[name].recipe.get("denoise_start") for name in told] == [56, None, 96]
    assert [found[name].recipe["denoise_from"] for name in told] == ["+6", 56, "+6"]


def test_what_is_below_the_start_of_denoising_is_left_out(published):
    techniques = {
        "plain": {},
        "absolute": {"denoise_from": 60},
        "above": {"denoise_from": "+10"},
        "wrong": {"denoise_from": "x"},
    }
    found, notes = within_reach(published, techniques, [995, 60, 101, 20])
    assert found == {
        "plain": [995, 60, 101, 20],
        "absolute": [60, 20],
        "above": [60, 101, 20],
        "wrong": [995, 60, 101, 20],
    }
    assert len(notes) == 2
    assert notes[0].startswith(
        "'absolute' has denoise_from = 60, which starts below t = 995 and 101, and is left out there;"
    )
    assert "'above' has denoise_from = +10, which would start beyond the last timestep" in notes[1]
    with pytest.raises(
        ds.InputError, match="The technique 'absolute' .* below t = 101; .* relative to t: denoise_from = "
    ):
        within_reach(published, techniques, [101])
    assert within_reach(published, {"off": {}}, [1000]) == ({"off": [1000]}, [])  # which `recipe` refuses


def test_denoise_from_on_the_command_line():
    assert feature_settings(["denoise_from=+10"]) == {"denoise_from": "+10"}
    assert feature_settings(["denoise_from=60"]) == {"denoise_from": 60}
    with pytest.raises(ds.InputError, match="'ten' is no whole number"):
        feature_settings(["denoise_from=ten"])


@pytest.mark.parametrize("sampling", [{"denoise_from": 56}, {"img2img": 0.04}])
def test_techniques_that_sample_share_their_passes_and_change_nothing(published, edges, sampling, tmp_path):
    """Also with a scheduler that draws noise in every step."""
    shutil.copytree(PUBLISHED / "pipeline", tmp_path / "noisy")
    scheduler = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(tmp_path / "noisy" / "scheduler")
    index = tmp_path / "noisy" / "model_index.json"
    index.write_text(index.read_text().replace("PNDMScheduler", "EulerAncestralDiscreteScheduler"))
    denoiser, picture = ds.load(tmp_path / "noisy", device="cpu"), ds.read(PUBLISHED / "im0.png")
    base = {"t": 50, "site": "up.1", "size": "64", "ensemble": 2, "timestep_mode": "gdf", "control": edges, **sampling}
    techniques = {
        "": {},
        "seed": {"seed": 1},
        "words": {"prompt": "a cat on a mat"},
        "half": {"control": ds.Control(edges, scale=0.5)},
    }
    base["prompt"] = "a cat"
    recipes = {name: recipe(denoiser, **{**base, **one}) for name, one in techniques.items()}
    seen, handle = calls(denoiser)
    together = feature_sets(denoiser, picture, recipes)
    handle.remove()
    assert set(seen) == {2 * len(recipes)}
    assert len(seen) > 2
    for name, one in recipes.items():
        alone = feature_sets(denoiser, picture, {name: one})[name]
        assert relative(together[name]["up.1"].values, alone["up.1"].values) < 1e-5


def test_long_prompts_can_be_guided(published):
    words = " ".join(["cat"] * 75)
    base = {"t": 50, "site": "up.1", "size": "64", "ensemble": 1, "prompt": words, "long_prompts": "chunks"}
    recipes = {str(s): recipe(published, **base, guidance=s) for s in (0.0, 1.0, 3.0)}
    recipes["cut"] = recipe(published, **{**base, "long_prompts": "cut"})
    recipes["both"] = recipe(published, **base, guidance=2.0, img2img=0.2)
    found = {k: one["up.1"].values for k, one in feature_sets(published, smooth_picture(9, 64, 64), recipes).items()}
    assert relative(found["3.0"], found["0.0"] + 3 * (found["1.0"] - found["0.0"])) < 1e-5
    assert not torch.equal(found["1.0"], found["cut"])  # the words beyond the 77th token are told


def test_members_average_to_the_features(published):
    picture, chosen = (
        smooth_picture(3, 64, 64),
        recipe(published, t=50, site="up.1", size="64", ensemble=3, second_t=90),
    )
    members = [values["up.1"] for _, _, values in member_maps(published, picture, {"": chosen}, chunk=2)]
    assert len(members) == 3
    assert (
        relative(torch.stack(members).mean(0), feature_sets(published, picture, {"": chosen})[""]["up.1"].values) < 1e-6
    )


@pytest.mark.parametrize(
    ("family", "site", "read_by"),
    [
        ("flux", "block.1", "single_transformer_blocks.0.norm.linear"),
        ("sd3", "block.0", "transformer_blocks.1.norm1.linear"),
    ],
)
def test_transformer_blocks_are_modulated_with_their_loras_and_after_averaging(tmp_path, family, site, read_by):
    pipe, folder = tiny.saved(tmp_path / family, family)
    denoiser, picture, file = ds.load(folder, device="cpu"), smooth_picture(3, 64, 64), tmp_path / "lora.safetensors"
    out, into = pipe.transformer.get_submodule(read_by).weight.shape
    name = f"transformer.{read_by}"
    save_file({f"{name}.lora_A.weight": torch.randn(2, into), f"{name}.lora_B.weight": torch.randn(out, 2)}, file)
    base = {"t": 500, "site": site, "size": "64", "ensemble": 3, "massive": "1"}
    recipes = {"plain": recipe(denoiser, **base), "lora": recipe(denoiser, **base, lora=str(file))}
    found = feature_sets(denoiser, picture, recipes)
    # the stream is the same, what reads it is not
    assert relative(found["lora"][site].values, found["plain"][site].values) > 1e-2
    members = {}
    for key, member, _, values in ensemble_maps(denoiser, picture, recipes, chunk=2):
        members[key, member] = values[site]
    for key in recipes:
        assert relative(members[key, 2], found[key][site].values) < 1e-5
        alone = feature_sets(denoiser, picture, {"": recipe(denoiser, **{**recipes[key].settings(), "ensemble": 1})})
        assert relative(members[key, 0], alone[""][site].values) < 1e-5


def test_timestep_0_is_0_in_the_published_mode_too(published, adm):
    picture = smooth_picture(2, 64, 64)
    base = {"t": 0, "site": "up.1", "size": "64", "ensemble": 1}
    recipes = {
        "exact": recipe(published, **base),
        "gdf": recipe(published, **base, timestep_mode="gdf"),
        "from 0": recipe(published, **base, timestep_mode="gdf", denoise_from=0),
    }
    maps = {name: feature_sets(published, picture, {"": one})[""]["up.1"] for name, one in recipes.items()}
    assert {fm.recipe["t"] for fm in maps.values()} == {0}
    for fm in maps.values():
        assert torch.equal(fm.values, maps["exact"].values)
    for t in (0, 50):
        with pytest.raises(ds.InputError, match="without a scheduler of its own"):
            effective(adm, recipe(adm, t=t, timestep_mode="gdf"), t)


def test_where_the_published_code_cannot_begin_to_denoise(tmp_path):
    shutil.copytree(PUBLISHED / "pipeline", tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").unlink()
    EulerDiscreteScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "pipeline" / "scheduler")
    denoiser = ds.load(tmp_path / "pipeline", device="cpu")
    base = {"t": 50, "timestep_mode": "gdf"}
    assert effective(denoiser, recipe(denoiser, **base), 50) == 49
    assert effective(denoiser, recipe(denoiser, **base, denoise_from=60), 50) == 50
    with pytest.raises(ds.InputError, match="begins at 49 with this scheduler, below t = 50"):
        effective(denoiser, recipe(denoiser, **base, denoise_from=50), 50)


def test_shared_draws_do_not_depend_on_the_timestep(published):
    picture = smooth_picture(4, 64, 64)
    recipes = {str(t): recipe(published, t=t, site="up.1", size="64", ensemble=1) for t in (50, 51)}
    near = feature_sets(published, picture, recipes, noise="shared")
    far = feature_sets(published, picture, recipes)
    gap = relative(near["50"]["up.1"].values, near["51"]["up.1"].values)
    assert gap < relative(far["50"]["up.1"].values, far["51"]["up.1"].values)


def test_sharing_costs_less_than_half_of_the_naive_sequence(published, edges):
    """Six techniques on the practical set, one pass each as the paper has them; naively each is encoded and run whole."""
    picture = ds.read(PUBLISHED / "im0.png")
    base = {"t": 50, "site": "practical", "size": "128", "ensemble": 1}
    techniques = [
        {"prompt": "a cat"},
        {"prompt": "a cat", "seed": 1},
        {},
        {"seed": 2},
        {"control": edges},
        {"control": edges, "seed": 1},
    ]
    recipes = {str(i): recipe(published, **{**base, **one}) for i, one in enumerate(techniques)}
    with FlopCounterMode(display=False) as ours:
        feature_sets(published, picture, recipes)
    pixels = picture.resized((128, 128))[None]
    with FlopCounterMode(display=False) as naive, torch.no_grad():
        for one in recipes.values():
            published.encode(pixels)
            noisy = torch.zeros(1, 4, 16, 16)
            condition = published.condition(None)
            if one.control:
                from denoscope.denoisers.control import control_input

                condition = ds.Condition(condition.tokens, {}, (control_input(published, edges, picture, (128, 128)),))
            published.predict(noisy, 50, condition)
    assert ours.get_total_flops() < 0.5 * naive.get_total_flops()


def test_contradictions_are_named(published):
    cases = [
        ({"denoise_from": 40, "t": 50}, r'40 lies below t = 50. .* relative to t, as text: "\+10"'),
        ({"denoise_from": "40", "t": 50}, r'text such as "\+10" for 10 timesteps above t, not .40'),
        ({"denoise_from": "+960", "t": 50}, "Timestep 1010 is not in"),
        ({"denoise_from": True, "t": 0}, "denoise_from is a timestep, or text"),
        ({"denoise_from": "+5", "t": 50, "second_t": 90}, "second_t"),
        ({"denoise_from": 60, "t": 50, "second_t": 90}, "second_t"),
        ({"noise": "none", "second_t": 90}, "clean latents"),
        ({"noise": "none", "img2img": 0.5}, "clean latents"),
        ({"site": "attention.up_cross", "prompt": "@words.json"}, "one prompt for all"),
        ({"img2img": 1.5}, "between 0 and 1"),
        ({"guidance": float("nan")}, "guidance scale"),
        ({"timestep_mode": "gfd"}, "exact or gdf"),
        ({"pool": 0}, "whole number"),
        ({"control": 3}, "not understood"),
        ({"control": {"model": "x", "strength": 1}}, "'strength'"),
        ({"lora": {"scale": 1}}, "'path'"),
        ({"contrl": "x"}, "no setting 'contrl'"),
        ({"second_t": 1000}, "Timestep 1000"),
        ({"guidance": "three"}, "guidance is a number"),
        ({"seed": True}, "seed is a whole number"),
        ({"control": {"model": "x", "scale": "big"}}, "Control: scale is a number"),
        ({"control": "x@big"}, "scale 'big'"),
        ({"lora": "x@nan"}, "finite number"),
    ]
    for technique, sentence in cases:
        with pytest.raises(ds.InputError, match=sentence):
            recipe(published, **technique)


def test_words_are_channels_of_attention_features(published):
    base = Dift(published, recipe(published, t=50, site="up.1+attention.up_cross", ensemble=1, size="128"))
    techniques = {"a": {"prompt": "a cat"}, "b": {"prompt": "a dog"}}
    with pytest.raises(ds.InputError, match="no mean under several prompts"):
        Amalgam(base, techniques)
    assert Amalgam(base, techniques, "concat").name
    assert Amalgam(base, {"a": techniques["a"], "attention": techniques["b"]}).name


def test_maps_of_words_are_not_compared_under_several_prompts(published):
    picture = smooth_picture(5, 128, 128)
    given = {"t": 50, "site": "up.1+attention.up_cross", "ensemble": 1, "size": "128"}
    cat, dog = (ds.features(published, picture, **given, prompt=prompt) for prompt in ("a cat", "a dog"))
    assert len(ds.transfer(cat, cat, [(3, 4)])) == 1
    with pytest.raises(ds.InputError, match="words of the prompt, so it cannot be compared under 'a cat' and 'a dog'"):
        ds.transfer(cat, dog, [(3, 4)])
    assert len(ds.transfer(cat, dog, [(3, 4)], force=True)) == 1
    apart = [
        ds.features(published, picture, **{**given, "site": "up.1"}, prompt=prompt) for prompt in ("a cat", "a dog")
    ]
    assert len(ds.transfer(*apart, [(3, 4)])) == 1
    base = Dift(published, recipe(published, **given))
    beside = {"a": {"site": "up.1"}, "attention": {"site": "attention.up_cross"}}
    for how in ("mean", "pca:4"):
        one, two = (Amalgam(base, beside, how)(picture, prompt) for prompt in ("a cat", "a dog"))
        assert len(ds.transfer(one, one, [(3, 4)])) == 1
        with pytest.raises(ds.InputError, match="words of the prompt"):
            ds.transfer(one, two, [(3, 4)])


@pytest.mark.filterwarnings("ignore:Denoising without")
@pytest.mark.parametrize("prompt", [None, ""])
def test_guidance_towards_nothing_is_said_and_not_computed(published, prompt):
    picture, base = smooth_picture(6, 64, 64), {"t": 50, "site": "up.1", "size": "64", "ensemble": 1}
    for more in ({}, {"denoise_from": 51}, {"img2img": 0.04}):
        plain = recipe(published, **base, prompt=prompt, **more)
        first, handle = calls(published)
        expected = feature_sets(published, picture, {"": plain})[""]["up.1"]
        handle.remove()
        guided, (seen, handle) = recipe(published, **base, prompt=prompt, guidance=3, **more), calls(published)
        with pytest.warns(UserWarning, match="Guidance has no effect"):
            found = feature_sets(published, picture, {"": guided})[""]["up.1"]
        handle.remove()
        assert torch.equal(found.values, expected.values)
        assert seen == first


def test_denoising_without_control_says_what_it_does(published):
    chosen = recipe(published, t=50, site="up.1", size="64", ensemble=1, denoise_from=52)
    with pytest.warns(UserWarning, match="ControlNet"):
        feature_sets(published, smooth_picture(6, 64, 64), {"": chosen})


names = st.text("abcé-_ .\"'@", min_size=1, max_size=8)
values = st.one_of(st.integers(0, 999), st.floats(0, 9), names)


class TestFiles:
    @settings(max_examples=25, deadline=None)
    @given(
        st.dictionaries(
            names.filter(lambda name: name != "notes"),
            st.fixed_dictionaries({"prompt": names.filter(lambda text: text[0] != "@"), "t": st.integers(0, 999)}),
            min_size=1,
        )
    )
    def test_recipes_come_back_as_they_were(self, tmp_path_factory, techniques):
        folder = tmp_path_factory.mktemp("recipe")
        settings = {
            "t": 50,
            "site": "up.1+up.2",
            "size": "long48+long96",
            "control": [{"model": "some/id", "scale": 0.5}],
        }
        for suffix in (".toml", ".json"):
            path = write_recipe(folder / f"r{suffix}", "seedling", settings, {"found": 1.5}, "mean", techniques)
            found = read_recipe(path)
            assert (found.model, found.settings, found.amalgamate, found.techniques) == (
                "seedling",
                settings,
                "mean",
                techniques,
            )

    def test_paths_are_those_beside_the_file(self, tmp_path, monkeypatch):
        (tmp_path / "canny").mkdir()
        (tmp_path / "words.json").write_text("{}")
        (tmp_path / "t.toml").write_text(
            '[a]\ncontrol = "canny@0.5"\nprompt = "@words.json"\n[b]\ncontrol = [{ model = "canny", image = "canny" }]\n'
        )
        found = read_techniques(tmp_path / "t.toml")
        assert found["a"] == {"control": f"{tmp_path / 'canny'}@0.5", "prompt": f"@{tmp_path / 'words.json'}"}
        assert found["b"] == {"control": [{"model": str(tmp_path / "canny"), "image": "canny"}]}
        monkeypatch.chdir(tmp_path)
        (tmp_path / "deep").mkdir()
        path = write_recipe("deep/r.toml", "seedling", {"control": [{"model": "canny"}]})
        assert "../canny" in path.read_text()
        assert read_recipe(tmp_path / "deep" / "r.toml").settings["control"][0]["model"].endswith("deep/../canny")
        for prompt in ("@words.json", "caption:canny", "preset:horse-21"):
            found = read_recipe(write_recipe("deep/r.json", "seedling", {"prompt": prompt})).settings["prompt"]
            kind, _, name = prompt.partition("@" if prompt[0] == "@" else ":")
            path = found.removeprefix("@").removeprefix("caption:")
            assert found == prompt if kind == "preset" else (tmp_path / name).samefile(path)

    def test_models_are_found_from_where_the_recipe_lies(self, tmp_path, monkeypatch):
        """Whatever they are called: a folder beside, one with a "+" in its name, a pipeline with another U-Net."""
        monkeypatch.chdir(tmp_path)
        for name in ("mymodel", "sd+more", "unet", "seedling", "rgb", "sub"):
            (tmp_path / name).mkdir()
        for name, written in {
            "mymodel": "../mymodel",
            "./mymodel": "../mymodel",
            "sd+more": "../sd+more",
            "mymodel+unet": "../mymodel+../unet",
            "mymodel+some/hub/file.safetensors": "../mymodel+some/hub/file.safetensors",
            "seedling+unet": "seedling+../unet",
            "some/id+unet": "some/id+../unet",
            "seedling": "seedling",
            "rgb": "rgb",
            "some/id": "some/id",
        }.items():
            path = write_recipe("sub/deep.toml", name, {})
            assert f'model = "{written}"' in path.read_text(), name
            found = read_recipe(tmp_path / "sub" / "deep.toml").model
            parts = [part for part in found.split("+") if "/sub/" in part]
            assert len(parts) == written.replace("sd+more", "sd").count("../")
            assert all(Path(part).exists() for part in parts if "sd" not in part)
        monkeypatch.chdir(tmp_path / "sub")
        write_recipe("beside.json", "../mymodel", {})
        assert Path(read_recipe("beside.json").model).samefile(tmp_path / "mymodel")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("t = 5\n", "which model"),
            ('model = "seedling"\ntee = 5\n', "unknown setting 'tee'"),
            ('model = "seedling"\namalgamate = "mean"\n', "both amalgamate and"),
            ("model = \n", "is not TOML"),
        ],
    )
    def test_bad_recipes_are_named(self, tmp_path, text, sentence):
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(ds.InputError, match=sentence):
            read_recipe(tmp_path / "r.toml")

    def test_bad_techniques_are_named(self, tmp_path):
        for text, sentence in (
            ("", "names no techniques"),
            ("x = 1\n", "x is no table"),
            ("[x]\ny = 1\n", r"'y' in \[x\]"),
        ):
            (tmp_path / "t.toml").write_text(text)
            with pytest.raises(ds.InputError, match=sentence):
                read_techniques(tmp_path / "t.toml")
        with pytest.raises(ds.MissingError):
            read_techniques(tmp_path / "none.toml")


def test_verbs_read_features_as_a_recipe_says(run, tmp_path, seedling):
    picture = smooth_picture(7)
    ds.write(picture, tmp_path / "p.png")
    write_recipe(
        tmp_path / "r.toml", "seedling", {"t": 90, "site": "up.2", "ensemble": 1, "size": "long48", "prompt": "bird"}
    )
    status, _, err = run(
        "features", tmp_path / "p.png", "--recipe", tmp_path / "r.toml", "--t", 60, "--out", tmp_path / "out"
    )
    assert status == 0, err
    fm = ds.FeatureMap.load(tmp_path / "out" / "p.safetensors")
    own = ds.features(seedling, tmp_path / "p.png", t=60, site="up.2", ensemble=1, size="long48", prompt="bird")
    assert torch.equal(fm.values, own.values)


def test_what_nobody_said_does_not_win_over_a_recipe(run, tmp_path, seedling):
    ds.write(smooth_picture(7), tmp_path / "p.png")
    found = {}
    for name, model, said in (("file", "seedling", ()), ("said", "another", ("--seed", 3, "--model", "seedling"))):
        (tmp_path / "r.toml").write_text(f'model = "{model}"\nt = 90\nensemble = 1\nsize = [48, 32]\nseed = 7\n')
        command = "features", tmp_path / "p.png", "--recipe", tmp_path / "r.toml", *said, "--out", tmp_path / name
        status, _, err = run(*command)
        assert status == 0, err
        found[name] = ds.FeatureMap.load(tmp_path / name / "p.safetensors").values
    for name, seed in (("file", 7), ("said", 3)):
        own = ds.features(seedling, tmp_path / "p.png", t=90, ensemble=1, size=(48, 32), seed=seed)
        assert torch.equal(found[name], own.values)


def test_benchmarks_read_the_preset_and_the_prompt_of_a_recipe(run, tmp_path):
    text = 'model = "seedling"\npreset = "geometric"\nensemble = 1\nsize = "long32"\nprompt = "face"\n'
    (tmp_path / "r.toml").write_text(text)
    for verb in ("bench", "sweep"):
        out = tmp_path / verb
        command = (
            verb,
            "spair",
            "--data",
            GOLDEN / "dift-eval" / "SPair-71k",
            "--recipe",
            tmp_path / "r.toml",
            "--limit",
            1,
        )
        status, _, err = run(*command, "--out", out)
        assert status == 0, err
        if verb == "bench":
            method = json.loads((out / "spair.json").read_text())["settings"]["methods"]["seedling"]
            assert (method["preset"], method["prompt"]) == ("geometric", "face")


def test_a_recipe_of_several_techniques_is_an_amalgam(run, tmp_path, seedling):
    ds.write(smooth_picture(8), tmp_path / "p.png")
    techniques = {"none": {}, "words": {"prompt": "bird"}}
    base = {"t": 20, "site": "up.1", "ensemble": 1, "size": "long48"}
    write_recipe(tmp_path / "r.toml", "seedling", base, None, "mean", techniques)
    status, _, err = run("features", tmp_path / "p.png", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "out")
    assert status == 0, err
    maps = [ds.features(seedling, tmp_path / "p.png", **base, **one).values for one in techniques.values()]
    found = ds.FeatureMap.load(tmp_path / "out" / "p.safetensors").values
    assert relative(found, torch.stack(maps).mean(0)) < 1e-5
    members = Amalgam(Dift(seedling, recipe(seedling, **base)), techniques).members(ds.read(tmp_path / "p.png"))
    assert relative(aggregate([members["words"]]).values, maps[1]) < 1e-5
