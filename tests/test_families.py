"""SDXL, DiT, PixArt, SD3 and Flux: tiny random pipelines read by `load`, against their diffusers pipelines and plain hooks."""

import json
import re
import shutil
import sys

import pytest
import tiny
import torch
from conftest import GOLDEN, relative, smooth_picture
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import denoscope as ds
from denoscope.cli.main import main
from denoscope.denoisers.protocol import Modulated
from denoscope.features import PRESETS, as_extractor, ditf
from denoscope.sampling import ClassifierFree, sample, trajectory

NAMES = ("xl", "dit", "pixart", "sd3", "flux")
TRANSFORMERS = NAMES[1:]
PROMPT = "a photo of a cat"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """{name: (pipeline, the denoiser loaded from its folder, folder)}, made when first asked for."""
    kept = {}

    def make(name, **options):
        key = (name, *options.items())
        if key not in kept:
            pipe, folder = tiny.saved(tmp_path_factory.mktemp(name) / "pipeline", name, **options)
            kept[key] = (pipe, ds.load(folder, device="cpu"), folder)
        return kept[key]

    return make


def conditioning(pipe, name, height, width):
    """Arguments of the network as the pipeline itself makes them, for PROMPT and a picture of this size."""
    if name == "xl":
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        ids = pipe._get_add_time_ids((height, width), (0, 0), (height, width), torch.float32, 20)
        return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    if name == "dit":
        return {"class_labels": torch.tensor([1])}
    if name == "pixart":
        tokens, mask, _, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        size = torch.tensor([[height, width]]).float(), torch.tensor([[height / width]])
        added = dict(zip(("resolution", "aspect_ratio"), size, strict=True))
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "added_cond_kwargs": added}
    if name == "sd3":
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}
    tokens, pooled, ids = pipe.encode_prompt(PROMPT)
    places = pipe._prepare_latent_image_ids(1, height // 16, width // 16, torch.device("cpu"), torch.float32)
    guidance = torch.tensor([3.5]) if pipe.transformer.config.guidance_embeds else None
    return {
        "encoder_hidden_states": tokens, "pooled_projections": pooled, "txt_ids": ids, "img_ids": places, "guidance": guidance,
    }  # fmt: skip


def called(pipe, name, noisy, told):
    """The network's own output for noisy latents at what it is told of the timestep, [1, outputs, h, w]."""
    h, w = noisy.shape[-2:]
    given = conditioning(pipe, name, 8 * h, 8 * w)
    t = torch.tensor([told])
    if name == "xl":
        return pipe.unet(noisy, t, **given).sample
    if name != "flux":
        return pipe.transformer(noisy, timestep=t, **given).sample
    packed = pipe._pack_latents(noisy, 1, noisy.shape[1], h, w)
    return pipe._unpack_latents(pipe.transformer(packed, timestep=t / 1000, **given).sample, 8 * h, 8 * w, 8)


def told(name, t):
    """Training timestep t as the network is told it: flows count noise levels, SD3's shifted by 3."""
    level = (t + 1) / 1000
    return {"sd3": 1000 * 3 * level / (1 + 2 * level), "flux": 1000 * level}.get(name, t)


def hooked(module, run):
    """What a module returns during `run()`."""
    found = []
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        run()
    handle.remove()
    return found[-1]


def prompt(name):
    return 1 if name == "dit" else PROMPT


def noisy_latents(pipe, name, picture, t, eps, size=(64, 64)):
    x = picture.resized(size, "bicubic")[None]
    config = pipe.vae.config
    with torch.no_grad():
        x0 = (pipe.vae.encode(x).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
    if name in ("sd3", "flux"):
        level = told(name, t) / 1000
        return (1 - level) * x0 + level * eps
    alphabar = pipe.scheduler.alphas_cumprod[t]
    return alphabar.sqrt() * x0 + (1 - alphabar).sqrt() * eps


def block(pipe, n):
    lists = [*pipe.transformer.transformer_blocks, *getattr(pipe.transformer, "single_transformer_blocks", [])]
    return lists[n]


def image_map(output, h=4, w=4):
    """Tokens of the image, which come last, as [1, channels, h, w]."""
    tokens = output[-1] if isinstance(output, tuple) else output
    return tokens[:, -h * w :].mT.unflatten(-1, (h, w))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# reading


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_is_what_the_pipeline_predicts(made, name):
    pipe, denoiser, _ = made(name)
    noisy = randn(1, 4, 8, 8)
    with torch.no_grad():
        direct = called(pipe, name, noisy, told(name, 300))
        output = denoiser.output(noisy, torch.tensor(told(name, 300)), denoiser.condition([prompt(name)]))
        eps = denoiser.predict(noisy, 300, denoiser.condition([prompt(name)]))
    assert relative(output, direct) < 1e-5
    level = told(name, 300) / 1000  # eps = x + (1 - s) v for a flow
    expected = noisy + (1 - level) * direct if name in ("sd3", "flux") else direct[:, :4]
    assert relative(eps, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_in_the_scale_of_the_pipeline(made, name):
    pipe, denoiser, _ = made(name)
    pixels = smooth_picture(0).resized((64, 48))[None]
    config = pipe.vae.config
    with torch.no_grad():
        expected = (pipe.vae.encode(pixels).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
        back = pipe.vae.decode(expected / config.scaling_factor + (config.shift_factor or 0)).sample
        assert torch.allclose(denoiser.encode(pixels), expected, atol=1e-5)
        assert torch.allclose(denoiser.decode(expected), back, atol=1e-5)
    assert denoiser.latent_shape(64, 96) == (4, 8, 12)
    assert denoiser.latent_shape() == ((4, 128, 128) if name == "flux" else (4, 8, 8))
    with pytest.raises(ds.InputError, match="multiples of"):
        denoiser.latent_shape(65, 64)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_are_the_hooked_block_of_the_plain_pipeline(made, name, n):
    pipe, denoiser, _ = made(name)
    picture, eps = smooth_picture(1), randn(2, 4, 8, 8)
    options = {"t": 259, "site": f"block.{n}", "size": 64, "prompt": prompt(name), "adaln": False, "massive": "keep"}
    fm = ds.features(denoiser, picture, noise=ds.Noise(eps), **options)
    noisy = noisy_latents(pipe, name, picture, 259, eps)
    direct = [
        image_map(hooked(block(pipe, n), lambda one=one: called(pipe, name, one[None], told(name, 259))))
        for one in noisy
    ]
    assert relative(fm.values, torch.cat(direct).mean(0)) < 1e-5
    assert (fm.recipe["adaln"], fm.recipe["massive"]) == (False, "keep")


def test_sdxl_features_are_the_hooked_decoder_block(made):
    pipe, denoiser, _ = made("xl")
    picture, eps = smooth_picture(1), randn(2, 4, 8, 8)
    fm = ds.features(denoiser, picture, noise=ds.Noise(eps), t=261, site="up.0", size=64, prompt=PROMPT)
    noisy = noisy_latents(pipe, "xl", picture, 261, eps)
    direct = [hooked(pipe.unet.up_blocks[0], lambda one=one: called(pipe, "xl", one[None], 261)) for one in noisy]
    assert relative(fm.values, torch.cat(direct).mean(0)) < 1e-5
    names = {site.name for site in denoiser.sites()}
    assert {"down.1.attn.0.block.1.query", "mid.attn.0.block.0.cross_map", "up.1"} <= names


def test_published_flux_level_and_block(made):
    """The published t = 260 is a noise level of 0.26; its block 28 is read at its input."""
    semantic = PRESETS["flux"]["semantic"]
    _, denoiser, _ = made("flux")
    assert denoiser.schedule.noise[semantic["t"]].item() == pytest.approx(0.26)
    assert (semantic["site"], semantic["ensemble"], semantic["size"]) == ("block.27", 8, "long640")
    assert denoiser.schedule.noise[PRESETS["flux"]["temporal"]["t"]].item() == pytest.approx(0.09)


@pytest.mark.parametrize("name", NAMES)
def test_every_site_has_the_announced_shape(made, name):
    _, denoiser, _ = made(name)
    noisy, condition = randn(1, 4, 16, 16), denoiser.condition([prompt(name)])
    sites = denoiser.sites()
    assert len({site.name for site in sites}) == len(sites)
    with torch.no_grad(), ds.Watch(denoiser, [site.name for site in sites], stop=False) as seen:
        denoiser.predict(noisy, 100, condition)
    for site in sites:
        value, side = seen[site.name], 128 / site.stride
        assert value.shape[1] == site.channels, site
        if site.kind == "map":
            assert value.shape[2] == side**2, site
        else:
            assert tuple(value.shape[-2:]) == (side, side), site
    if name in TRANSFORMERS:
        blocks = [site for site in sites if site.kind == "block"]
        assert [site.name for site in blocks] == [f"block.{n}" for n in range(4 if name == "flux" else 3)]
        assert {site.stride for site in blocks} == {16.0}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_early_stop_reads_what_a_full_pass_reads(made, name):
    _, denoiser, _ = made(name)
    noisy, condition = randn(1, 4, 8, 8), denoiser.condition(None)
    names = [f"block.{n}" for n in range(3)]
    with torch.no_grad(), ds.Watch(denoiser, names, stop=False) as full:
        before = denoiser.predict(noisy, 100, condition)
    for one in names:
        with torch.no_grad(), ds.Watch(denoiser, [one]) as early:
            denoiser.predict(noisy, 100, condition)
            pytest.fail("the forward pass went on")
        assert torch.equal(early[one], full[one])
    with torch.no_grad():
        assert torch.equal(denoiser.predict(noisy, 100, condition), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.network.modules())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pictures_that_are_not_square(made, name):
    pipe, denoiser, _ = made(name)
    picture, eps = smooth_picture(2), randn(1, 4, 8, 10)
    options = {"t": 100, "site": "block.1", "prompt": prompt(name), "adaln": False, "massive": "keep"}
    fm = ds.features(denoiser, picture, size="80x64", noise=ds.Noise(eps), **options)
    assert fm.values.shape[1:] == (4, 5)
    if name == "dit":
        with torch.no_grad(), pytest.raises(ds.InputError, match="squares only"):
            denoiser.predict(eps, 100, denoiser.condition(None))
        with torch.no_grad(), pytest.raises(ds.InputError, match="squares only"):  # 4 x 16 patches are 8 x 8 in number
            denoiser.predict(randn(1, 4, 8, 32), 100, denoiser.condition(None))
        return
    noisy = noisy_latents(pipe, name, picture, 100, eps, (80, 64))
    direct = image_map(hooked(block(pipe, 1), lambda: called(pipe, name, noisy, told(name, 100))), 4, 5)
    assert relative(fm.values, direct[0]) < 1e-5
    with pytest.raises(ds.InputError, match="multiples of 16; use size 80x64"):
        ds.features(denoiser, picture, size="72x64", **options)


@pytest.mark.parametrize("name", NAMES)
def test_noise_does_not_depend_on_the_batch(made, name):
    _, denoiser, _ = made(name)
    options = {"t": 200, "site": "up.0" if name == "xl" else "block.1", "size": 64, "ensemble": 3, "seed": 5}
    one, two = (ds.features(denoiser, smooth_picture(3), chunk=chunk, **options).values for chunk in (1, 3))
    assert relative(one, two) < 1e-5
    other = ds.features(denoiser, smooth_picture(3), **{**options, "seed": 6}).values
    assert relative(other, one) > 1e-3


@pytest.mark.parametrize(("name", "options"), [("sd3", {}), ("sd3", {"qk_norm": "rms_norm"}), ("flux", {})])
@pytest.mark.parametrize("n", [0, 2])
def test_joint_attention_maps_are_those_of_the_network(made, name, options, n):
    """The two parts of the map times the values of image and prompt are what the network's own attention mixed."""
    _, denoiser, _ = made(name, **options)
    site, noisy = f"block.{n}", randn(1, 4, 8, 8)
    own = denoiser.network.get_submodule(next(s.module for s in denoiser.sites() if s.name == f"{site}.self_map"))
    mixed, values = [], {}
    handles = [
        own.to_v.register_forward_hook(lambda m, args, output: values.__setitem__("image", output)),
        own.register_forward_hook(lambda m, args, output: mixed.append(output)),
    ]
    if getattr(own, "add_v_proj", None) is not None:
        handles.append(
            own.add_v_proj.register_forward_hook(lambda m, args, output: values.__setitem__("prompt", output))
        )
    with torch.no_grad(), ds.Watch(denoiser, [f"{site}.self_map", f"{site}.cross_map"], stop=False) as seen:
        denoiser.predict(noisy, 100, denoiser.condition([PROMPT]))
    for handle in handles:
        handle.remove()
    weights = torch.cat([seen[f"{site}.cross_map"], seen[f"{site}.self_map"]], -1)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    every = torch.cat([values["prompt"], values["image"]], 1) if "prompt" in values else values["image"]
    result = (weights @ every.unflatten(-1, (own.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    result = own.to_out[0](result) if getattr(own, "to_out", None) else result
    expected = mixed[0][0] if isinstance(mixed[0], tuple) else mixed[0]
    assert torch.allclose(result, expected[:, -16:], atol=1e-5)


def test_cross_attention_ignores_padding(made):
    _, denoiser, _ = made("pixart")
    noisy, condition = randn(1, 4, 8, 8), denoiser.condition([PROMPT])
    words = int(condition.extra["encoder_attention_mask"].sum())
    with torch.no_grad(), ds.Watch(denoiser, ["block.1.cross_map", "block.1.self_map"]) as seen:
        denoiser.predict(noisy, 100, condition)
    weights = seen["block.1.cross_map"]
    assert weights.shape == (1, 3, 16, 120)
    assert words == 6
    assert weights[..., :words].min() > 0
    assert weights[..., words:].abs().max() == 0


# conditions


def test_pixart_is_told_the_size_of_the_picture(made):
    pipe, denoiser, _ = made("pixart", told_size=True)
    for shape in ((8, 8), (12, 8)):
        noisy = randn(1, 4, *shape)
        with torch.no_grad():
            output = denoiser.output(noisy, 300, denoiser.condition([PROMPT.upper()]))
            assert relative(output, called(pipe, "pixart", noisy, 300)) < 1e-5


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_second_attention_of_sd35_medium(made, n):
    pipe, denoiser, _ = made("sd3", dual_attention_layers=(0, 1), qk_norm="rms_norm")
    eps, options = randn(1, 4, 8, 8), {"t": 104, "size": 64, "prompt": PROMPT, "massive": "keep"}
    fm = ds.features(denoiser, smooth_picture(1), site=f"block.{n}", noise=ds.Noise(eps), **options)
    noisy = noisy_latents(pipe, "sd3", smooth_picture(1), 104, eps)
    reader = block(pipe, n + 1).norm1 if n < 2 else pipe.transformer.norm_out
    output = hooked(reader, lambda: called(pipe, "sd3", noisy, told("sd3", 104)))
    assert relative(fm.values, image_map(output[0] if n < 2 else output)[0]) < 2e-5


def test_t5_says_what_it_cannot_read(made):
    _, denoiser, _ = made("pixart")
    with pytest.warns(UserWarning, match=r"vocabulary does not hold: café\."):
        denoiser.condition(["a café"])
    with pytest.warns(UserWarning, match="longer than 120 tokens"):
        denoiser.condition(["a cat " * 100])


def test_pixart_sigma_reads_longer_prompts(made):
    assert made("pixart", sigma=True)[1].text.length == 300


def test_sd3_without_t5(made):
    pipe, denoiser, folder = made("sd3", with_t5=False)
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    condition, noisy = denoiser.condition([PROMPT]), randn(1, 4, 8, 8)
    assert condition.tokens[:, 77:].abs().max() == 0
    with torch.no_grad():
        assert relative(denoiser.output(noisy, 300.0, condition), called(pipe, "sd3", noisy, 300.0)) < 1e-5


def test_sd3_knows_how_large_pictures_may_be(made):
    _, denoiser, _ = made("sd3")
    with pytest.raises(ds.InputError, match="up to 256 pixels"):
        ds.features(denoiser, smooth_picture(0), site="block.0", size="272x64")


def test_flux_without_guidance(made):
    pipe, denoiser, _ = made("flux", guidance=False)
    noisy = randn(1, 4, 8, 8)
    with torch.no_grad():
        output = denoiser.output(noisy, 300.0, denoiser.condition([PROMPT]))
    assert relative(output, called(pipe, "flux", noisy, 300.0)) < 1e-5


def test_dit_labels(made):
    _, denoiser, _ = made("dit")
    asked = ["goldfish", "0", "tinca TINCA", ""]
    assert denoiser.condition(asked).extra["class_labels"].tolist() == [1, 0, 0, 1000]
    assert denoiser.condition(None, 2).extra["class_labels"].tolist() == [1000, 1000]
    for wrong in (1000, -1, "a cat", "1000"):
        with pytest.raises(
            ds.InputError, match=re.escape(f"from 0 to 999 or names as its model_index.json lists them, not {wrong!r}")
        ):
            denoiser.condition([wrong])


def test_nothing_is_zeros_for_sdxl(made):
    _, denoiser, _ = made("xl")
    assert denoiser.condition(None).tokens.abs().max() == 0
    assert denoiser.condition([""]).tokens.abs().max() > 0


@pytest.mark.parametrize("name", ["xl", "pixart", "sd3", "flux"])
def test_text_models_refuse_class_numbers(made, name):
    with pytest.raises(ds.InputError, match="by prompts, not by class numbers"):
        made(name)[1].condition([3])


def test_sites_are_listed_on_the_command_line(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["denoscope", "models", str(made("flux")[2])])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["block.3", "block", "32", "16"] in lines
    assert not any(line[0] == "block.3.query" for line in lines if line)


# the treatment of DiTF


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_modulation_is_that_of_the_layer_that_reads_the_block(made, name, n):
    """For one member and with all channels kept, the features are what the reader's own AdaLN made in the plain pipeline."""
    pipe, denoiser, _ = made(name)
    count = len([site for site in denoiser.sites() if site.kind == "block"])
    if n >= count:
        return
    noisy = randn(1, 4, 8, 8)
    eps, options = randn(1, 4, 8, 8), {"t": 259, "size": 64, "prompt": prompt(name)}
    fm = ds.features(denoiser, smooth_picture(1), site=f"block.{n}", noise=ds.Noise(eps), massive="keep", **options)
    noisy = noisy_latents(pipe, name, smooth_picture(1), 259, eps)
    network = pipe.transformer

    def run():
        return called(pipe, name, noisy, told(name, 259))

    if n + 1 == count:  # the final layer; what it makes goes into the last projection
        last = network.proj_out_2 if name == "dit" else network.proj_out
        seen = []
        handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            run()
        handle.remove()
        expected = seen[0]
    elif name == "pixart":  # modulated inside the block, on its way into the attention
        expected, seen = None, []
        handle = block(pipe, n + 1).attn1.to_q.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            run()
        handle.remove()
        expected = seen[0]
    else:
        reader = block(pipe, n + 1)
        expected = hooked(reader.norm1 if hasattr(reader, "norm1") else reader.norm, run)[0]
    assert relative(fm.values, image_map(expected)[0]) < 2e-5
    assert fm.recipe["massive_channels"] == []


def test_the_treatment_in_the_order_of_the_published_code(made):
    """Mean over members, massive channels to zero, LayerNorm without affine, (1 + scale) x + shift."""
    _, denoiser, _ = made("flux")
    eps, options = randn(3, 4, 8, 8), {"t": 259, "site": "block.2", "size": 64, "prompt": PROMPT}
    picture = smooth_picture(1)
    raw = ds.features(denoiser, picture, noise=ds.Noise(eps), adaln=False, massive="keep", **options).values
    fm = ds.features(denoiser, picture, noise=ds.Noise(eps), massive="3,17", **options)
    shift, scale = denoiser.modulation(2, 259, denoiser.condition([PROMPT]))
    flat = raw.flatten(1).T.double()
    flat[:, [3, 17]] = 0
    normal = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert relative(fm.values.flatten(1).T.double(), normal * (1 + scale.double()) + shift.double()) < 1e-5
    assert fm.recipe["massive_channels"] == [3, 17]
    zeroed = ds.features(denoiser, picture, noise=ds.Noise(eps), adaln=False, massive="3,17", **options).values
    assert zeroed[[3, 17]].abs().max() == 0
    kept = [c for c in range(32) if c not in (3, 17)]
    assert torch.equal(zeroed[kept], raw[kept])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_massive_channels_are_found_and_are_the_same_for_every_picture(made, name):
    _, denoiser, folder = made(name)
    denoiser = ds.load(folder, device="cpu")
    network = denoiser.network.transformer if name == "flux" else denoiser.network
    target = network.transformer_blocks[0].ff.net[2]
    with torch.no_grad():  # what training does to a few channels
        target.bias[[2, 9]] += torch.tensor([4e3, -3e3])
    maps = [ds.features(denoiser, smooth_picture(n), site="block.0", t=259, ensemble=1, size=64) for n in range(2)]
    assert [fm.recipe["massive_channels"] for fm in maps] == [[2, 9], [2, 9]]
    again = ds.features(ds.load(folder, device="cpu"), smooth_picture(0), site="block.0", t=259, ensemble=1, size=64)
    assert again.recipe["massive_channels"] == []
    plain = ds.features(
        denoiser, smooth_picture(0), site="block.0", t=259, ensemble=1, size=64, massive="keep", adaln=False
    )
    cells = F.normalize(plain.values.flatten(1), dim=0)
    assert (cells.T @ cells).min() > 0.99  # untreated, every place looks like every other
    cells = F.normalize(maps[0].values.flatten(1), dim=0)
    assert (cells.T @ cells).min() < 0.9


def test_published_channels_are_for_the_published_width(made):
    _, denoiser, _ = made("flux")
    assert ditf.channels_to_zero(denoiser, "zero", "block.1", 259, width=3072) == (154, 1446)
    assert ditf.channels_to_zero(denoiser, "zero", "block.1", 259, width=32) == ()
    assert ditf.channels_to_zero(made("sd3")[1], "zero", "block.1", 259, width=3072) == ()


def test_the_treatment_is_for_outputs_of_transformer_blocks(made, sd):
    _, denoiser, _ = made("dit")
    options = {"t": 100, "ensemble": 1, "size": 64}
    query = as_extractor(denoiser, site="block.1.query", **options)
    assert (query.recipe.adaln, query.recipe.massive) == (False, "keep")
    default = as_extractor(denoiser, site="block.1", **options)
    assert (default.recipe.adaln, default.recipe.massive) == (True, "zero")
    assert default.describe() != as_extractor(denoiser, site="block.1", adaln=False, **options).describe()
    for model, site in ((denoiser, "block.1.query"), (sd, "up.1")):
        for wrong in ({"adaln": True}, {"massive": "zero"}):
            with pytest.raises(ds.InputError, match=r"adaln and massive are for outputs of transformer blocks"):
                as_extractor(model, site=site, **options, **wrong)
    for wrong in ("most", "16", "-1", "3;4"):
        with pytest.raises(ds.InputError, match='"zero", "keep" or channels from 0 to 15'):
            ds.features(denoiser, smooth_picture(0), site="block.1", massive=wrong, **options)
    assert isinstance(denoiser, Modulated)
    assert not isinstance(sd, Modulated)


# sampling


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["xl", "sd3", "flux"])
def test_samples_are_those_of_the_pipeline(made, name, guided):
    pipe, denoiser, _ = made(name)
    call = {"prompt": [PROMPT, "a horse"], "num_inference_steps": 3, "height": 64, "width": 96, "output_type": "latent"}
    if name == "flux":
        call |= {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]} if guided else {}
    else:
        call["guidance_scale"] = 4.0 if guided else 1.0
    direct = pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)]).images
    if name == "flux":
        direct = pipe._unpack_latents(direct, 64, 96, 8)
    guidance = ClassifierFree(4.0) if guided else None
    solver = pipe.scheduler if name == "xl" else "auto"
    steps = list(trajectory(denoiser, call["prompt"], steps=3, guidance=guidance, solver=solver, seed=7, size=(96, 64)))
    assert relative(steps[-1].after, direct) < 1e-5


def test_flux_levels_are_shifted_by_the_size(made, tmp_path):
    _, _, folder = made("flux")
    pipe, shifted = made("flux")[0], shutil.copytree(folder, tmp_path / "dev")
    path = shifted / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15})
    )
    denoiser, dev = ds.load(shifted, device="cpu"), type(pipe)(**{
        **pipe.components, "scheduler": type(pipe.scheduler).from_pretrained(shifted / "scheduler"),
    })  # fmt: skip
    dev.set_progress_bar_config(disable=True)
    direct = dev(
        PROMPT,
        height=64,
        width=64,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    )
    steps = list(trajectory(denoiser, [PROMPT], steps=3, seed=1, size=64))
    assert relative(steps[-1].after, pipe._unpack_latents(direct.images, 64, 64, 8)) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_samples_are_those_of_the_pipeline(made, scale):
    """The pipeline gives pictures only; they agree with its own scheduler's steps and learned variances left out."""
    pipe, denoiser, _ = made("dit")
    call = {"guidance_scale": scale, "num_inference_steps": 3, "output_type": "pt"}
    direct = pipe([1, 0], **call, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]).images
    guidance = None if scale == 1 else ClassifierFree(scale)
    steps = list(trajectory(denoiser, [1, 0], steps=3, guidance=guidance, seed=3))
    pictures = (denoiser.decode(steps[-1].after) / 2 + 0.5).clamp(0, 1)
    assert (pictures - direct).abs().max() < 1e-5


def test_pixart_samples_are_those_of_the_pipeline(made):
    pipe, denoiser, _ = made("pixart")
    call = {
        "num_inference_steps": 3,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "use_resolution_binning": False,
    }
    direct = pipe(PROMPT, guidance_scale=4.0, generator=torch.Generator().manual_seed(2), **call).images
    steps = list(trajectory(denoiser, [PROMPT], steps=3, guidance=ClassifierFree(4.0), seed=2, size=64))
    assert relative(steps[-1].after, direct) < 1e-5
    assert sample(denoiser, [PROMPT], steps=2, size=64)


def test_watching_while_sampling(made):
    _, denoiser, _ = made("sd3")
    for step in trajectory(denoiser, [PROMPT], steps=2, size=64, watch=["block.1"], guidance=ClassifierFree(3.0)):
        assert step.watched["block.1"].shape == step.watched_unconditional["block.1"].shape == (1, 16, 4, 4)


# CleanDIFT


SD = GOLDEN / "dift-sd" / "pipeline"


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A checkpoint of the U-Net of the recorded pipeline, its weights changed, as one file."""
    state = load_file(SD / "unet" / "diffusion_pytorch_model.safetensors")
    state = {name: value * (1 + 0.1 * randn(*value.shape, seed=n)) for n, (name, value) in enumerate(state.items())}
    path = tmp_path_factory.mktemp("cleandift") / "cleandift_unet.safetensors"
    save_file(state, path)
    return path, state


def test_another_unet_in_a_pipeline(tuned, sd, tmp_path):
    path, state = tuned
    full = {"unet_feature_extractor_cleandift." + name: value for name, value in state.items()}
    save_file({**full, "timestep": torch.tensor(261.0)}, tmp_path / "full.safetensors")
    folder = shutil.copytree(SD / "unet", tmp_path / "unet")
    shutil.copy(path, folder / "diffusion_pytorch_model.safetensors")
    models = [
        ds.load(SD, device="cpu", unet=path),
        ds.load(f"{SD}+{path}", device="cpu"),
        ds.load(SD, device="cpu", unet=folder),
        ds.load(SD, device="cpu", unet=tmp_path / "full.safetensors"),
    ]
    assert models[0].name == f"{SD}+{path}" == models[1].name
    for model in models:
        own = model.network.state_dict()
        assert all(torch.equal(own[name], value) for name, value in state.items())
    fm = [
        ds.features(model, smooth_picture(0), t=261, site="up.1", size=64, noise="none").values
        for model in (*models, sd)
    ]
    assert torch.equal(fm[0], fm[1])
    assert relative(fm[0], fm[-1]) > 1e-3
    assert ds.load(SD, device="cpu", dtype="bfloat16", unet=path).dtype == torch.bfloat16


def test_clean_features_are_those_of_the_published_code(sd):
    """Latents sampled from the posterior, no noise, timestep 261, the second decoder block after its upsampler."""
    picture, draws = smooth_picture(0), randn(1, 4, 8, 8)
    fm = ds.features(sd, picture, preset="clean", size=64, prompt="A photo of a dog", noise=ds.Noise(None, draws))
    with torch.no_grad():
        distribution = sd.vae.encode(picture.resized((64, 64))[None]).latent_dist
        latents = (distribution.mean + distribution.std * draws) * sd.vae.config.scaling_factor
        tokens = sd.text(["A photo of a dog"])
        direct = hooked(sd.unet.up_blocks[1], lambda: sd.unet(latents, 261, encoder_hidden_states=tokens))
    assert relative(fm.values, direct[0]) < 1e-5
    mode = ds.features(sd, picture, preset="clean", size=64, prompt="A photo of a dog")
    assert mode.recipe["noise"] == "none"
    assert mode.recipe["ensemble"] == 1
    same = ds.features(sd, picture, t=261, site="up.1", noise="none", size=64, prompt="A photo of a dog", seed=9)
    assert torch.equal(mode.values, same.values)
    clean = as_extractor(sd, preset="clean").describe()
    assert clean["noise"] == "none"
    assert clean != as_extractor(sd).describe()


def test_unets_that_do_not_fit_are_named(tuned, tmp_path, made, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, state = tuned
    short = dict(list(state.items())[1:])
    save_file(short, tmp_path / "short.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(path.read_bytes()[:500])
    for unet, error, sentence in [
        (tmp_path / "short.safetensors", ds.InputError, f"does not fit the U-Net.*{next(iter(state))}"),
        (tmp_path / "damaged.safetensors", ds.InputError, "damaged"),
        (tmp_path / "gone.safetensors", ds.MissingError, "no U-Net checkpoint"),
        ("nobody/nothing/unet.safetensors", ds.MissingError, "could not be loaded"),
        (SD, ds.InputError, "no diffusers folder of a UNet2DConditionModel"),
    ]:
        with pytest.raises(error, match=sentence):
            ds.load(SD, device="cpu", unet=unet)
    with pytest.raises(ds.InputError, match="has no U-Net"):
        ds.load(made("dit")[2], device="cpu", unet=path)
    with pytest.raises(ds.InputError, match="is a checkpoint itself"):
        ds.load(path, device="cpu", unet=path)
    with pytest.raises(ds.InputError, match="no draws at all"):
        ds.Noise(None)


# what cannot be loaded


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_refiner_is_refused(made, tmp_path):
    folder = shutil.copytree(made("xl")[2], tmp_path / "refiner")
    edit(folder / "model_index.json", requires_aesthetics_score=True, text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ds.InputError, match="SDXL refiner"):
        ds.load(folder, device="cpu")
    edit(folder / "model_index.json", requires_aesthetics_score=False)
    with pytest.raises(ds.MissingError, match="no tokenizer, which a pipeline of its kind needs"):
        ds.load(folder, device="cpu")


def test_inpainting_models_are_refused(made, tmp_path):
    folder = shutil.copytree(made("flux")[2], tmp_path / "fill")
    edit(folder / "vae" / "config.json", latent_channels=2)
    shutil.rmtree(folder / "vae")
    tiny.vae(2).save_pretrained(folder / "vae")
    with pytest.raises(ds.InputError, match="4 input channels where 2 latent channels.*inpainting"):
        ds.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "part"), [("sd3", "tokenizer_2"), ("flux", "text_encoder_2"), ("pixart", "tokenizer"), ("dit", "vae")]
)
def test_missing_parts_are_named(made, tmp_path, name, part):
    folder = shutil.copytree(made(name)[2], tmp_path / name)
    edit(folder / "model_index.json", **{part: [None, None]})
    with pytest.raises(ds.MissingError, match=f"has no {part}, which"):
        ds.load(folder, device="cpu")


def test_unknown_networks_are_told_what_is_known(made, tmp_path):
    folder = shutil.copytree(made("dit")[2], tmp_path / "sana")
    edit(folder / "model_index.json", transformer=["diffusers", "SanaTransformer2DModel"])
    with pytest.raises(
        ds.InputError, match="built on SanaTransformer2DModel; supported are UNet2D.*DiT.*PixArt.*SD3.*Flux"
    ):
        ds.load(folder, device="cpu")
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    assert ds.load(folder, device="cpu").family == "dit"  # as older pipelines name it
    with pytest.raises(ds.InputError, match="transformer alone; load the pipeline"):
        ds.load(folder / "transformer", device="cpu")
