"""DiTF: what makes the features of diffusion transformers match: AdaLN modulation and zeroed massive channels.

Gan, Tu, Chen, Chen, Li, Harandi and Lin, "Unleashing Diffusion Transformers for Visual Correspondence by Modulating Massive
Activations", NeurIPS 2025 (arXiv 2505.18584): a few channels of the stream between blocks are so large at every token that all
tokens look alike. Zero them, then normalise and modulate the stream as the block that reads it does, with its own scale and
shift. In the order of the published code: average over the ensemble, zero, LayerNorm (no affine, eps 1e-6), modulate.

The published code numbers a feature by the block that reads it, and we by the block that makes it: its FLUX.1 block 28 is our
`block.27`. Zeroed channels are zero where the LayerNorm sees them; after it they hold what zero became.
"""

import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from denoscope.denoisers.noise import draw
from denoscope.denoisers.protocol import Condition, Denoiser, Modulated
from denoscope.errors import InputError
from denoscope.sites import Watch

PUBLISHED = {("flux", 3072): (154, 1446)}  # by family and width
RATIO = 20
_found: WeakKeyDictionary[Any, dict[tuple[str, str, int], tuple[int, ...]]] = WeakKeyDictionary()


def applies(denoiser: Denoiser, site: str) -> bool:
    """Whether a site is a stream that an AdaLN layer reads."""
    return isinstance(denoiser, Modulated) and re.fullmatch(r"block\.\d+", site) is not None


def treated(
    values: Float[Tensor, "channels height width"],
    channels: tuple[int, ...] = (),
    shift: Float[Tensor, " channels"] | None = None,
    scale: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "channels height width"]:
    """`LayerNorm(values with channels zeroed) (1 + scale) + shift`; without shift and scale only the zeroing."""
    if channels:
        values = values.index_fill(0, torch.tensor(channels, device=values.device), 0)
    if shift is None or scale is None:
        return values
    normal = F.layer_norm(values.movedim(0, -1), values.shape[:1], eps=1e-6)
    return (normal * (1 + scale) + shift).movedim(-1, 0)


def massive_channels(values: Float[Tensor, "channels *cells"]) -> tuple[int, ...]:
    """Channels whose mean magnitude over tokens is more than 20 times that of the median channel; our rule, not published."""
    magnitude = values.flatten(1).abs().mean(1)
    return tuple((magnitude > RATIO * magnitude.median()).nonzero().flatten().tolist())


def channels_to_zero(
    denoiser: Denoiser, massive: str, site: str, t: int, width: int, weights: str = ""
) -> tuple[int, ...]:
    """The channels that a recipe's `massive` stands for at a site of `width` channels.

    massive: "keep" (none), "zero", or numbers such as "154,1446". For "zero" the published channels are taken where there are
    any; else they are measured once per model, site and timestep on smooth random latents that never change, not on the user's
    picture, so that any two pictures lose the same ones. weights: what tells apart the weights that a model has for a while
    (under a LoRA), of which each has channels of its own.

    Raises InputError when it cannot be understood.
    """
    if massive == "keep":
        return ()
    if massive != "zero":
        if not re.fullmatch(r"\d+(,\d+)*", massive) or max(map(int, massive.split(","))) >= width:
            raise InputError(
                f'massive is "zero", "keep" or channels from 0 to {width - 1} such as "154,1446", not {massive!r}.'
            )
        return tuple(sorted(set(map(int, massive.split(",")))))
    if published := PUBLISHED.get((denoiser.family, width)):
        return published
    known, key = _found.setdefault(denoiser, {}), (weights, site, t)
    if key not in known:
        known[key] = massive_channels(_reference(denoiser, site, t))
    return known[key]


@torch.no_grad()
def _reference(denoiser: Denoiser, site: str, t: int) -> Tensor:
    """The stream of fixed latents, 16 x 16 tokens: a smooth random field with the noise of t, no prompt."""
    side = denoiser.minimum
    channels, *size = denoiser.latent_shape(side, side)
    size = [edge * max(1, 16 * denoiser.multiple // side) for edge in size]
    smooth = F.interpolate(draw((1, channels, 4, 4), "massive", "x0"), size, mode="bilinear", align_corners=False)
    eps = draw((1, channels, *size), "massive", "eps").to(denoiser.device)
    noisy = denoiser.schedule.add_noise(smooth.to(denoiser.device), eps, t)
    with Watch(denoiser, [site]) as seen:
        denoiser.predict(noisy, t, denoiser.condition(None))
    return seen[site][0].float()


def modulation(denoiser: Any, site: str, t: int, condition: Condition, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(shift, scale) of what reads a `block.N`; size: of the latents."""
    return denoiser.modulation(int(site.removeprefix("block.")), t, condition, size)
