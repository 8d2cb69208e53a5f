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
from denoscope.errors import InputError
from denoscope.sites import Site


@dataclass(frozen=True, eq=False)
class ControlInput:
    """A ControlNet and what it is shown, one row per sample; see `control.control_input`, which makes it.

    image: as the network takes it: pixels in [0, 1] or [-1, 1], latents, or what its own first layers made of pixels.
    scale: what its residuals are multiplied by, on the CPU; it does not run for rows of scale 0.
    """

    network: nn.Module
    image: Float[Tensor, "batch channels height width"]
    scale: Float[Tensor, " batch"]

    def expand(self, batch: int) -> "ControlInput":
        """One row repeated for `batch` samples (without copying)."""
        return ControlInput(self.network, _repeated(self.image, batch), _repeated(self.scale, batch))

    def rows(self, index: Any) -> "ControlInput":
        return ControlInput(self.network, self.image[index], self.scale[index])


@dataclass(frozen=True, eq=False)
class Condition:
    """What the network is told about the picture: prompt tokens and whatever else a family needs, one row per sample.

    controls: ControlNets that act beside; their residuals add up.
    """

    tokens: Float[Tensor, "batch length width"] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    controls: tuple[ControlInput, ...] = ()

    def expand(self, batch: int) -> "Condition":
        """A condition of one row repeated for `batch` samples (without copying)."""
        tokens = None if self.tokens is None else _repeated(self.tokens, batch)
        extra = {name: _repeated(value, batch) for name, value in self.extra.items()}
        return Condition(tokens, extra, tuple(control.expand(batch) for control in self.controls))

    def rows(self, index: Any) -> "Condition":
        """The rows of an index (a slice, or numbers)."""
        tokens = None if self.tokens is None else self.tokens[index]
        extra = {name: value[index] for name, value in self.extra.items()}
        return Condition(tokens, extra, tuple(control.rows(index) for control in self.controls))

    def beside(self, other: "Condition") -> "Condition":
        """The rows of this one and then those of another, for one forward pass over both."""
        return Condition.stack([self, other])

    @staticmethod
    def stack(conditions: Sequence["Condition"]) -> "Condition":
        """The rows of all, one after the other, for one forward pass.

        A ControlNet that only some of them have does not act on the rows of the others (its scale is 0 there).

        Raises InputError when they cannot share a pass: for prompts of different lengths, and for one ControlNet shown pictures
        of different sizes.
        """
        if not conditions:
            raise InputError("There are no conditions to stack.")
        shapes = {None if one.tokens is None else tuple(one.tokens.shape[1:]) for one in conditions}
        if len(shapes) > 1 or len({frozenset(one.extra) for one in conditions}) > 1:
            raise InputError(f"Conditions of different forms cannot share a forward pass: {sorted(map(str, shapes))}.")
        given = [one.tokens for one in conditions if one.tokens is not None]
        extra = {name: torch.cat([one.extra[name] for one in conditions]) for name in conditions[0].extra}
        return Condition(torch.cat(given) if given else None, extra, _united(conditions))

    @property
    def batch(self) -> int:
        """The number of rows; 0 when nothing is told, which fits any number of samples."""
        rows = [self.tokens, *self.extra.values(), *(control.image for control in self.controls)]
        return next((value.shape[0] for value in rows if value is not None), 0)


def _repeated(value: Tensor, batch: int) -> Tensor:
    return value if value.shape[0] == batch else value.expand(batch, *value.shape[1:])


def _united(conditions: Sequence[Condition]) -> tuple[ControlInput, ...]:
    """Their ControlNets, each with a row for every row of all; one that acts twice in a condition acts twice here."""

    def keyed(one: Condition) -> dict[tuple[int, int], ControlInput]:
        networks = [id(control.network) for control in one.controls]
        return {(net, networks[:k].count(net)): one.controls[k] for k, net in enumerate(networks)}

    tables = [keyed(one) for one in conditions]
    firsts = {key: control for table in reversed(tables) for key, control in table.items()}
    united = []
    for key in dict.fromkeys(key for table in tables for key in table):
        first = firsts[key]
        parts = []
        for one, table in zip(conditions, tables, strict=True):
            rows, found = one.batch, table.get(key)
            if found is not None and found.image.shape[1:] != first.image.shape[1:]:
                shapes = f"{list(first.image.shape[1:])} and {list(found.image.shape[1:])}"
                raise InputError(f"One ControlNet is shown pictures of different sizes, {shapes}; use one size.")
            if found is None and not rows:
                raise InputError("A condition without rows cannot stand beside one with a ControlNet; expand it first.")
            none = ControlInput(first.network, first.image.new_zeros(1, *first.image.shape[1:]), torch.zeros(1))
            parts.append(none.expand(rows) if found is None else found)
        images, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("image", "scale"))
        united.append(ControlInput(first.network, images, scales))
    return tuple(united)


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
