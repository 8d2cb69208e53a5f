"""Pixels to latents and back through a pipeline's `AutoencoderKL`, in the scale that its denoiser was trained on."""

from typing import Any

import torch
from torch import Tensor

from denoscope.denoisers.protocol import Posterior


def stride(vae: Any) -> int:
    """Picture pixels per latent cell."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def posterior(vae: Any, pixels: Tensor) -> Posterior:
    """`(latents - shift) * scale`, mean and deviation."""
    distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return Posterior((distribution.mean.float() - shift) * scale, distribution.std.float() * scale)


def decode(vae: Any, latents: Tensor) -> Tensor:
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float()
