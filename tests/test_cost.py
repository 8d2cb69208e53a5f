"""Cost of DIFT on the true Stable Diffusion 2.1 architecture, counted without weights or time (meta tensors)."""

import pytest
import torch
from conftest import smooth_picture
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import denoscope as ds
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.unet import UNetDenoiser


class OneToken:
    """Stands for the published tokenizer, which is not ours to ship: any prompt is 77 padding tokens."""

    model_max_length, unk_token_id = 77, None

    def __call__(self, prompt, **options):
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.zeros(1, 77, dtype=torch.long) if options else [0]})


@pytest.fixture(scope="module")
def sd21():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024, use_linear_projection=True,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
        )
    schedule = ds.NoiseSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    )
    return UNetDenoiser(unet, schedule, vae=vae, text=TextEncoder(OneToken(), text), name="sd21")


def test_flops_of_one_picture(sd21):
    """768 x 768, t = 261, up.1, ensemble of 8: the published code needs 29.9 TFLOP, 8 x (2609 + 1126) G."""
    assert sum(p.numel() for p in sd21.network.parameters()) == 865_910_724
    with FlopCounterMode(display=False) as counter:
        fm = ds.features(sd21, smooth_picture(0), preset="semantic")
    assert tuple(fm.values.shape) == (1280, 48, 48)
    assert counter.get_total_flops() <= 11.7e12
    with FlopCounterMode(display=False) as again:  # the prompt is encoded once and kept
        ds.features(sd21, smooth_picture(0), preset="semantic")
    assert again.get_total_flops() < counter.get_total_flops()


@pytest.mark.parametrize(
    ("site", "channels", "stride"), [("up.0", 1280, 32), ("up.1", 1280, 16), ("up.2", 640, 8), ("up.3", 320, 8)]
)
def test_sites_of_the_published_model(sd21, site, channels, stride):
    found = {s.name: s for s in sd21.sites()}[site]
    assert (found.channels, found.stride) == (channels, stride)


def test_layers_of_the_published_adm():
    """Output blocks of the unconditional 256 x 256 model: channels and strides as published, 552.8 M parameters."""
    from denoscope.denoisers.adm import ADMConfig, ADMDenoiser, ADMUNet

    with torch.device("meta"):
        denoiser = ADMDenoiser(ADMUNet(ADMConfig()))
    assert round(sum(p.numel() for p in denoiser.network.parameters()) / 1e6, 1) == 552.8
    table = {site.name: (site.channels, site.stride) for site in denoiser.sites()}
    channels = [1024] * 6 + [512] * 6 + [256] * 6
    strides = [32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1, 1]
    assert [table[f"out.{i}"] for i in range(18)] == list(zip(channels, strides, strict=True))
    assert table["up.0"] == table["out.2"]
