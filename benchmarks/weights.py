"""How long naming the weights of a model takes, at the size of Stable Diffusion 1.5 with random weights.

python benchmarks/weights.py

`first`: every byte is read. `again`: nothing has changed. `one layer`: one of its tensors has. Seconds are those of all
processors together.
"""

import time
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from denoscope.denoisers import NoiseSchedule
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.features.weights import weights_digest


def random(module: nn.Module) -> Any:
    """A module made on the meta device, with random bits that are finite numbers."""
    module.to_empty(device="cpu")
    for value in [*module.parameters(), *module.buffers()]:
        if value.is_floating_point():
            value.data.uniform_(-0.1, 0.1)
        else:
            value.data.zero_()
    return module


def stable_diffusion() -> UNetDenoiser:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        config: Any = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
        config |= {
            f"{way}_block_types": (f"{way.title()}{coder}Block2D",) * 4
            for way, coder in (("down", "Encoder"), ("up", "Decoder"))
        }
        vae = diffusers.AutoencoderKL(**config)
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12
            )
        )
    told = TextEncoder(SimpleNamespace(model_max_length=77), random(text))
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    return UNetDenoiser(random(unet), schedule, vae=random(vae), text=told)


def timed(model: Any) -> float:
    """Seconds of processor time, so that other programs do not count."""
    started = time.process_time()
    weights_digest(model)
    return time.process_time() - started


def main() -> None:
    model = stable_diffusion()
    count = sum(p.numel() for m in (model.unet, model.vae, model.text.encoder) for p in m.parameters())  # pyright: ignore[reportOptionalMemberAccess]
    print(f"{count / 1e6:.0f} M parameters, float32, {torch.get_num_threads()} thread(s)")
    print(f"first      {timed(model):.3f} s")
    print(f"again      {min(timed(model) for _ in range(3)):.3f} s")
    with torch.no_grad():
        model.unet.conv_in.weight.add_(1)
    print(f"one layer  {timed(model):.3f} s")


if __name__ == "__main__":
    main()
