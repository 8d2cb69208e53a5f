"""`Encoder`: one protocol for dense networks that are no diffusion models (DINO, CLIP, SAM …)."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denoscope.sites import Site


@runtime_checkable
class Encoder(Protocol):
    """A pretrained network that makes features of a picture. Pixels are float32 in [-1, 1], as for a `Denoiser`.

    name: what it was loaded from. family: "dino", "dinov2", "dinov3", "clip" or "sam". presets: settings by task.
    multiple: picture sides must be multiples of this (the patch). minimum: smallest picture side in pixels.
    canvas: side of the square that pictures are padded to at the right and below, for networks of one size (SAM); None: any
        size. Sites then cover the canvas, and the picture is its upper left part.
    mean, std: of the RGB values in [0, 1] that the network was trained on; `forward` normalises with them.
    """

    name: str
    family: str
    presets: Mapping[str, Mapping[str, Any]]
    multiple: int
    minimum: int
    canvas: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def network(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def sites(self, sizes: bool = True) -> list[Site]:
        """Every place that can be read, in the order of the forward pass. Runs no weights.

        Channels and strides are filled in unless `sizes` is false (they take a dry run of a weightless copy).
        """
        ...

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels rows columns"]:
        """The site "out" for normalised pixels, float32. Follows the caller's grad mode; watch it to read other sites.

        Raises InputError for sides that are no multiples of the patch, or larger than the canvas.
        """
        ...
