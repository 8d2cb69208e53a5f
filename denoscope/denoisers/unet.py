"""Denoisers whose network is a diffusers U-Net: Stable Diffusion 1.x / 2.x, and pixel-space models with or without text.

The families differ only in their parts: a VAE or none, a text encoder, class labels or nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from denoscope.denoisers import autoencoder
from denoscope.denoisers.protocol import Condition, Posterior
from denoscope.denoisers.residuals import of_rows, summed
from denoscope.denoisers.schedule import NoiseSchedule, Timestep
from denoscope.denoisers.text import TextEncoder
from denoscope.errors import InputError
from denoscope.sites import Site, Skeleton, unet_sites


@contextmanager
def _embedded(network: Any) -> Iterator[None]:
    """Inside, a ControlNet takes what its embedding made of the pixels before (`control_input`)."""
    own, network.controlnet_cond_embedding = network.controlnet_cond_embedding, nn.Identity()
    try:
        yield
    finally:
        network.controlnet_cond_embedding = own


class UNetDenoiser:
    """A `UNet2DConditionModel` or `UNet2DModel` with an optional `AutoencoderKL` and an optional text encoder.

    null_class: the class number that stands for "any" in class-conditional models trained with dropped labels.
    """

    def __init__(
        self,
        unet: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any = None,
        text: TextEncoder | None = None,
        name: str = "unet",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        null_class: int | None = None,
    ):
        channels = unet.config.in_channels
        expected = (vae.config.latent_channels,) if vae is not None else (1, 3)
        if channels not in expected:
            what = "latent" if vae is not None else "pixel"
            raise InputError(
                f"{name} takes {channels} input channels where {expected[-1]} {what} channels are required; inpainting, "
                "upscaling and depth models cannot be read, use the base text-to-image model."
            )
        self.unet, self.vae, self.text = unet, vae, text
        self.schedule, self.name, self.presets, self.null_class = schedule, name, presets or {}, null_class
        self.family = "stable-diffusion" if vae is not None else "pixel"
        self.stride = autoencoder.stride(vae) if vae is not None else 1
        self.multiple = 1
        depth = len(unet.config.block_out_channels) - 1
        self.minimum = 64 if vae is not None else 2 ** (depth + 1)
        self._sites: list[Site] | None = None

    @property
    def network(self) -> nn.Module:
        return self.unet

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        if self.vae is not None:
            return autoencoder.posterior(self.vae, pixels)
        pixels = pixels.to(self.device)
        return Posterior(pixels.mean(1, keepdim=True) if self.unet.config.in_channels == 1 else pixels)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.posterior(pixels).sample(noise)

    def decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents.expand(-1, 3, *latents.shape[2:])
        return autoencoder.decode(self.vae, latents)

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        if self.text is not None:
            asked = [""] * batch if prompts is None else list(prompts)
            if not all(isinstance(prompt, str) for prompt in asked):
                raise InputError(f"{self.name} is told what to see by prompts, not by class numbers.")
            return Condition(self.text([str(prompt) for prompt in asked]))
        classes = self.unet.config.get("num_class_embeds")
        if classes:
            null = [] if self.null_class is None else [self.null_class] * batch
            labels = null if prompts is None else list(prompts)
            if not labels:
                raise InputError(
                    f"{self.name} needs a class number from 0 to {classes - 1} for every picture; it has none that stands for "
                    "any class (null_class in denoscope.json), as classifier-free guidance needs."
                )
            if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
                raise InputError(f"{self.name} takes class numbers from 0 to {classes - 1}, not {labels}.")
            return Condition(extra={"class_labels": torch.tensor(labels, device=self.device)})
        if prompts is not None and any(prompt != "" for prompt in prompts):
            raise InputError(f"{self.name} is unconditional; leave the prompt empty.")
        return Condition()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        unit = 1 if isinstance(self.unet, UNet2DConditionModel) else 2 ** (len(self.unet.config.block_out_channels) - 1)
        config: Any = self.unet.config
        own = config.sample_size or 64
        sides = [own, own] if isinstance(own, int) else list(own)
        asked = [
            side if pixels is None else pixels / self.stride
            for pixels, side in zip((height, width), sides, strict=True)
        ]
        if any(side < 1 or side % unit for side in asked):
            raise InputError(f"{self.name} makes pictures whose sides are multiples of {self.stride * unit} pixels.")
        return (config.in_channels, *map(int, asked))

    def output(self, noisy: Tensor, t: float | Tensor, condition: Condition) -> Tensor:
        condition, noisy = condition.expand(noisy.shape[0]), noisy.to(self.dtype)
        given = self._given(noisy, condition)
        added = self._added(noisy, t, condition, given) if condition.controls else {}
        return self.unet(noisy, t, return_dict=False, **given, **added)[0].float()

    def _added(self, noisy: Tensor, t: float | Tensor, condition: Condition, given: dict[str, Any]) -> dict[str, Any]:
        """What ControlNets add to the skips and to the middle block."""
        batch = noisy.shape[0]

        def run(network: Any, image: Tensor, rows: Any) -> list[Tensor]:
            told = of_rows({"timestep": t, "sample": noisy, **given}, rows, batch)
            with _embedded(network) if image.shape[1] == network.conv_in.out_channels else nullcontext():
                down, mid = network(controlnet_cond=image, return_dict=False, **told)
            return [*down, mid]

        found = summed(condition.controls, run)
        if found is None:
            return {}
        return {"down_block_additional_residuals": found[:-1], "mid_block_additional_residual": found[-1]}

    def _given(self, noisy: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network is called with beside noisy latents and timestep."""
        given: dict[str, Any] = {name: value.to(noisy.device) for name, value in condition.extra.items()}
        if condition.tokens is not None:
            given["encoder_hidden_states"] = condition.tokens.to(self.dtype)
        return given

    def _dummy(self) -> Condition:
        """A condition of one row with the right shapes, on the default device."""
        config = self.unet.config
        cross = config.get("cross_attention_dim")
        tokens = None if cross is None else torch.zeros(1, self.text.length if self.text else 77, cross)
        labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if config.get("num_class_embeds") else {}
        return Condition(tokens, labels)

    def predict(self, noisy: Tensor, t: Timestep, condition: Condition) -> Tensor:
        output = self.output(noisy, self.schedule.timestep(t).to(noisy.device), condition)
        return self.schedule.eps(output[:, : noisy.shape[1]], noisy.float(), t)

    def sites(self, sizes: bool = True) -> list[Site]:
        if not sizes:
            return unet_sites(self.unet)
        if self._sites is None:
            config = dict(self.unet.config)
            with torch.device("meta"):
                skeleton = Skeleton(type(self.unet).from_config(config).to(self.dtype), unet_sites(self.unet))
                width = 512 if self.vae is not None else 16 * self.minimum
                side = width // self.stride
                noisy = torch.zeros(1, config["in_channels"], side, side, dtype=self.dtype)
                given, t = self._given(noisy, self._dummy()), torch.zeros((), dtype=torch.long)
                self._sites = skeleton.measured(lambda network: network(noisy, t, **given), width)
        return self._sites
