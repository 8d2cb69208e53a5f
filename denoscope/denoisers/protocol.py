"""`Denoiser`: one protocol for every pretrained diffusion model.

How the families fit:

- Stable Diffusion, SDXL, pixel-space U-Nets (unet.py, sdxl.py): SDXL's `tokens` are the hidden states of its two text encoders
  side by side, its pooled embedding is in `extra`, and `output` tells the network the picture's size.
- DiT, PixArt, SD3, Flux (transformer.py): `schedule.prediction` is "flow" where they are rectified flows (timesteps stay
  integers 0..999, noise level (t + 1) / 1000 before the scheduler's shift). Flux packs its latents into tokens inside
  `network`, so latents are maps for all. They are also `Modulated`.
- Video U-Nets: latents get a frame axis `[batch, channels, frames, height, width]`; nothing here assumes four axes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denoscope.denoisers.schedule import NoiseSchedule, Timestep
from denoscope.sites import Site


@dataclass(frozen=True, eq=False)
class Condition:
    """What the network is told about the picture: prompt tokens and whatever else a family needs, one row per sample."""

    tokens: Float[Tensor, "batch length width"] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def expand(self, batch: int) -> "Condition":
        """A condition of one row repeated for `batch` samples (without copying)."""

        def rows(value: Tensor) -> Tensor:
            return value if value.shape[0] == batch else value.expand(batch, *value.shape[1:])

        tokens = None if self.tokens is None else rows(self.tokens)
        return Condition(tokens, {name: rows(value) for name, value in self.extra.items()})

    def beside(self, other: "Condition") -> "Condition":
        """The rows of this one and then those of another, for one forward pass over both."""
        tokens = None if self.tokens is None or other.tokens is None else torch.cat([self.tokens, other.tokens])
        return Condition(tokens, {name: torch.cat([value, other.extra[name]]) for name, value in self.extra.items()})


@dataclass(frozen=True, eq=False)
class Posterior:
    """The autoencoder's distribution over latents, already scaled: `mean + std * noise`. Pixel-space models have no `std`."""

    mean: Float[Tensor, "batch channels *size"]
    std: Float[Tensor, "batch channels *size"] | None = None

    def sample(self, noise: Tensor | None) -> Float[Tensor, "batch channels *size"]:
        """Latents for the given draws (broadcast over members); the mode when `noise` is None."""
        if noise is None or self.std is None:
            return self.mean
        return self.mean + self.std * noise.to(self.mean)


@runtime_checkable
class Denoiser(Protocol):
    """A pretrained diffusion model. Pixels are float32 in [-1, 1]; latents are float32 in the scale the network was trained on.

    name: what it was loaded from. family: key of its default presets. presets: its own, which win.
    multiple: picture sides must be multiples of this (1: any). minimum: smallest picture side in pixels.
    """

    name: str
    family: str
    presets: Mapping[str, Mapping[str, Any]]
    schedule: NoiseSchedule
    multiple: int
    minimum: int

    @property
    def network(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def posterior(self, pixels: Float[Tensor, "batch 3 height width"]) -> Posterior:
        """The distribution of latents of a picture: the expensive half of `encode`, done once for a whole ensemble."""
        ...

    def encode(self, pixels: Float[Tensor, "batch 3 height width"], noise: Tensor | None = None) -> Tensor:
        """Latents: the posterior's mode, or a sample of it for given `noise`."""
        ...

    def decode(self, latents: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Pixels in [-1, 1] (not clamped)."""
        ...

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        """Condition for prompts or class labels, one row each; None is the unconditional one, `batch` rows.

        Raises InputError when the model cannot be told such a thing.
        """
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """[channels, *size] of the latents of a picture of so many pixels; without a size, as the model was trained."""
        ...

    def output(
        self, noisy: Float[Tensor, "batch channels *size"], t: float | Tensor, condition: Condition
    ) -> Float[Tensor, "batch outputs *size"]:
        """What the network itself returns, float32: `schedule.prediction`, and beyond `channels` what it says of variances.

        t: as the network is told it (`schedule.timestep`), fractions included. Follows the caller's grad mode.
        """
        ...

    def predict(
        self, noisy: Float[Tensor, "batch channels *size"], t: Timestep, condition: Condition
    ) -> Float[Tensor, "batch channels *size"]:
        """The noise in `noisy` at training timestep `t` (epsilon, whatever the network was trained to predict), float32."""
        ...

    def sites(self, sizes: bool = True) -> list[Site]:
        """Every place that can be read, in the order of the forward pass. Runs no weights.

        Channels and strides are filled in unless `sizes` is false (they take a dry run of a weightless copy).
        """
        ...


@runtime_checkable
class Modulated(Protocol):
    """A transformer whose blocks normalise their input adaptively: AdaLN, `LayerNorm(x) (1 + scale) + shift`.

    Peebles and Xie, arXiv 2212.09748, section 3.2; scale and shift come from timestep and condition.
    """

    def modulation(
        self, block: int, t: Timestep, condition: Condition, size: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """(shift, scale) of the first AdaLN of whatever reads the output of block `block`: the next block, or the final layer.

        condition: one row. size: (height, width) of the latents, for families that are told it.
        """
        ...


@runtime_checkable
class Timed(Protocol):
    """A model whose pipeline chooses the sampler's noise levels itself."""

    def timing(self, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """What its pipeline gives to the scheduler's `set_timesteps` for latents of `shape`: `sigmas`, `mu`."""
        ...
