"""`load`: every kind of model that is promised, and a sentence for every kind of mistake."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, smooth_picture
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import denoscope as ds

PIPELINE = GOLDEN / "dift-sd" / "pipeline"


@pytest.fixture
def pipeline(tmp_path):
    return shutil.copytree(PIPELINE, tmp_path / "pipeline")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pixel_model(**options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


def test_stable_diffusion_decodes_what_it_encodes(sd):
    pixels = smooth_picture(0).resized((64, 64))[None]
    latents = sd.encode(pixels)
    assert latents.shape == (1, 4, 8, 8)
    with torch.no_grad():
        direct = sd.vae.decode(sd.vae.encode(pixels).latent_dist.mode()).sample
    assert torch.allclose(sd.decode(latents), direct, atol=1e-4)
    assert (sd.family, sd.dtype, sd.device.type) == ("stable-diffusion", torch.float32, "cpu")
    assert ds.load(PIPELINE, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_bfloat16_features_stay_close(sd):
    half = ds.load(PIPELINE, device="cpu", dtype="bfloat16")
    options = {"size": 64, "ensemble": 1, "site": "up.0", "t": 100}
    exact, rough = (ds.features(one, smooth_picture(1), **options).values for one in (sd, half))
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("as_pipeline", [True, False])
def test_pixel_space_unets(tmp_path, as_pipeline):
    unet, scheduler = pixel_model(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if as_pipeline:
        unet.save_pretrained(tmp_path / "unet")
        scheduler.save_pretrained(tmp_path / "scheduler")
        index = {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    else:
        unet.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
    (tmp_path / "denoscope.json").write_text(
        json.dumps({"presets": {"semantic": {"t": 7, "site": "up.0", "ensemble": 1, "size": "32"}}})
    )
    denoiser = ds.load(tmp_path, device="cpu")
    fm = ds.features(denoiser, smooth_picture(0))
    assert fm.values.shape == (16, 32, 32)
    assert fm.recipe["t"] == 7
    noisy = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(denoiser.predict(noisy, 9, denoiser.condition(None)), unet(noisy, 9).sample, atol=1e-5)
    assert "up.0.attn.0.self_map" in {site.name for site in denoiser.sites()}
    with pytest.raises(ds.InputError, match="unconditional"):
        denoiser.condition(["a cat"])


def test_class_labels(tmp_path):
    pixel_model(num_class_embeds=5).save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    denoiser = ds.load(tmp_path, device="cpu")
    one, two = (
        ds.features(denoiser, smooth_picture(0), prompt=label, size=32, t=1, ensemble=1).values for label in (0, 3)
    )
    assert not torch.equal(one, two)
    for wrong in ([7], ["cat"]):
        with pytest.raises(ds.InputError, match="class numbers from 0 to 4"):
            denoiser.condition(wrong)
    with pytest.raises(ds.InputError, match="needs a class number"):
        denoiser.condition(None)
    assert len(denoiser.sites()) > 10


def test_adm_files(tmp_path, adm):
    state = load_file(GOLDEN / "dift-adm" / "unet.safetensors")
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors")
    shape = {
        "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1, 1],
        "attention_resolutions": [2, 4], "num_head_channels": 16,
    }  # fmt: skip
    for name in ("a.pt", "b.safetensors"):
        with pytest.raises(ds.InputError, match="not an ADM checkpoint of the expected architecture.*json"):
            ds.load(tmp_path / name, device="cpu")
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(shape))
        loaded = ds.load(tmp_path / name, device="cpu")
        options = {"size": 32, "t": 41, "site": "out.3", "ensemble": 1}
        one, two = (ds.features(model, smooth_picture(0), **options).values for model in (loaded, adm))
        assert torch.allclose(one, two, atol=1e-5)
    (tmp_path / "a.json").write_text('{"channels": 3}')
    with pytest.raises(ds.InputError, match="unknown key 'channels'"):
        ds.load(tmp_path / "a.pt", device="cpu")
    (tmp_path / "c.pt").write_bytes(b"not weights")
    torch.save({"model": state}, tmp_path / "d.pt")
    for name in ("c.pt", "d.pt"):
        with pytest.raises(ds.InputError, match="not a checkpoint of plain tensors"):
            ds.load(tmp_path / name, device="cpu")


def test_what_cannot_be_loaded_is_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name, error, sentence in [
        ("no-such-model", ds.MissingError, "no model 'no-such-model'"),
        ("", ds.MissingError, "no name"),
        (tmp_path / "empty", ds.MissingError, "not a diffusers folder"),
        (tmp_path / "notes.txt", ds.InputError, "not a checkpoint"),
        (tmp_path / "gone.safetensors", ds.MissingError, "no model"),
    ]:
        with pytest.raises(error, match=sentence):
            ds.load(name, device="cpu")
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ds.InputError, match="are damaged; fetch them again"):
        ds.load(pipeline, device="cpu")
    weights.unlink()
    with pytest.raises(ds.MissingError, match="could not be loaded"):
        ds.load(pipeline, device="cpu")
    weights.write_bytes(whole)
    (pipeline / "scheduler" / "scheduler_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(ds.MissingError, match="no scheduler_config.json"):
        ds.load(pipeline, device="cpu")
    (tmp_path / "kept.json").rename(pipeline / "scheduler" / "scheduler_config.json")
    index = pipeline / "model_index.json"
    edit(index, tokenizer=["someones_code", "Tokenizer"])
    with pytest.raises(ds.InputError, match="only library classes"):
        ds.load(pipeline, device="cpu")
    edit(index, unet=[None, None], transformer=["diffusers", "SanaTransformer2DModel"])
    with pytest.raises(ds.InputError, match="built on SanaTransformer2DModel; supported are"):
        ds.load(pipeline, device="cpu")
    index.write_text("{")
    with pytest.raises(ds.InputError, match="not valid JSON"):
        ds.load(pipeline, device="cpu")


def test_inpainting_models_are_refused(sd):
    from diffusers import UNet2DConditionModel

    from denoscope.denoisers.unet import UNetDenoiser

    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**sd.unet.config, "in_channels": 9})
    with pytest.raises(ds.InputError, match="9 input channels where 4 latent channels.*inpainting"):
        UNetDenoiser(unet, sd.schedule, vae=sd.vae)


def test_an_unreachable_hub_is_named(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ds.MissingError, match="nobody/nothing could not be loaded"):
        ds.load("nobody/nothing", device="cpu")


def test_an_encoder_is_no_diffusion_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 32}')
    with pytest.raises(ds.InputError, match="load_encoder"):
        ds.load(tmp_path)
