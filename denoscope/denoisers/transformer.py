"""What the denoisers have in common whose network is a transformer over patches of latents (DiT, PixArt, SD3, Flux)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from denoscope.denoisers import autoencoder
from denoscope.denoisers.protocol import Condition, Posterior
from denoscope.denoisers.schedule import NoiseSchedule, Timestep
from denoscope.errors import InputError
from denoscope.sites import Site, Skeleton, transformer_sites


class TransformerDenoiser(ABC):
    """Base of the families; they say how the network is called (`_arguments`) and conditioned (`condition`, `_dummy`).

    LISTS: the network's module lists of blocks, in the order of the forward pass. GRID: see `Site.grid`.
    """

    family = ""
    LISTS: tuple[str, ...] = ("transformer_blocks",)
    GRID = "pos_embed"

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any,
        name: str = "",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._network, self.schedule, self.vae = network, schedule, vae
        self.name, self.presets = name or self.family, presets or {}
        channels = self._channels()
        if channels != vae.config.latent_channels:
            raise InputError(
                f"{self.name} takes {channels} input channels where {vae.config.latent_channels} latent channels are required; "
                "inpainting and control models cannot be read, use the base text-to-image model."
            )
        self.stride = autoencoder.stride(vae)
        self.multiple = self.stride * self.patch
        self.minimum = max(64, self.multiple)
        self._sites: list[Site] | None = None

    @property
    def patch(self) -> int:
        """Latent cells per token side."""
        return self._network.config.patch_size

    def _channels(self) -> int:
        return self._network.config.in_channels

    def _own_side(self) -> int:
        """Side of the latents it was trained on."""
        return self._network.config.sample_size

    def _skeleton(self) -> nn.Module:
        """The network once more; called where modules are made without weights."""
        return type(self._network).from_config(dict(self._network.config))

    @abstractmethod
    def _arguments(self, noisy: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network is called with. t: [batch], float or integer."""

    @abstractmethod
    def _dummy(self) -> Condition:
        """A condition of one row with the right shapes, on the default device."""

    @property
    def network(self) -> nn.Module:
        return self._network

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._network.parameters()).dtype

    def posterior(self, pixels: Tensor) -> Posterior:
        return autoencoder.posterior(self.vae, pixels)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.posterior(pixels).sample(noise)

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        own = self._own_side() * self.stride
        sides = [own if side is None else side for side in (height, width)]
        if any(side < 1 or side % self.multiple for side in sides):
            raise InputError(f"{self.name} makes pictures whose sides are multiples of {self.multiple} pixels.")
        return (self._channels(), *(side // self.stride for side in sides))

    def output(self, noisy: Tensor, t: float | Tensor, condition: Condition) -> Tensor:
        told = self._steps(t, noisy.shape[0], noisy.device)
        condition = condition.expand(noisy.shape[0])
        given = self._arguments(noisy.to(self.dtype), told, condition)
        added = self._added(given, condition) if condition.controls else {}
        return self.network(return_dict=False, **given, **added)[0].float()

    def _added(self, given: dict[str, Any], condition: Condition) -> dict[str, Any]:
        """What ControlNets add to the network's arguments."""
        raise InputError(
            f"There are no ControlNets for {self.name}; use a model of Stable Diffusion, SDXL, SD3 or Flux."
        )

    def predict(self, noisy: Tensor, t: Timestep, condition: Condition) -> Tensor:
        output = self.output(noisy, self.schedule.timestep(t), condition)
        return self.schedule.eps(output[:, : noisy.shape[1]], noisy.float(), t)

    def _steps(self, t: Any, batch: int, device: torch.device) -> Tensor:
        told = torch.as_tensor(t)
        return (told.float() if told.is_floating_point() else told).to(device).expand(batch)

    def sites(self, sizes: bool = True) -> list[Site]:
        if not sizes:
            return transformer_sites(self.network, self.LISTS, self.GRID, self.patch)
        if self._sites is None:
            side = 8 * self.patch
            with torch.device("meta"):
                skeleton = Skeleton(self._skeleton(), self.sites(sizes=False))
                noisy, t = torch.zeros(1, self._channels(), side, side), torch.zeros(1)
                given = self._arguments(noisy, t, self._dummy())
                self._sites = skeleton.measured(lambda network: network(**given), side * self.stride)
        return self._sites

    def modulation(
        self, block: int, t: Timestep, condition: Condition, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        side = self._own_side()
        noisy = torch.zeros(1, self._channels(), *(size or (side, side)), device=self.device, dtype=self.dtype)
        told = self._steps(self.schedule.timestep(t), 1, self.device)
        with torch.no_grad():
            shift, scale = self._modulation(block, self._arguments(noisy, told, condition))
        return shift.flatten().float(), scale.flatten().float()

    @abstractmethod
    def _modulation(self, block: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(shift, scale) from the arguments of the network."""


def asked(name: str, prompts: Any, batch: int) -> list[str]:
    """Prompts, "" for None. Raises InputError for class numbers."""
    found = [""] * batch if prompts is None else list(prompts)
    if not all(isinstance(prompt, str) for prompt in found):
        raise InputError(f"{name} is told what to see by prompts, not by class numbers.")
    return found
