"""ADM, the pixel-space U-Net of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol, arXiv 2105.05233).

Written for inference on published checkpoints: the state dict has the keys of those files (`input_blocks.N.…`,
`middle_block.…`, `output_blocks.N.…`), residual up- and downsampling, scale-shift norm and the legacy attention order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.denoisers.protocol import Condition, Posterior
from denoscope.denoisers.schedule import NoiseSchedule, Timestep
from denoscope.errors import InputError
from denoscope.sites import Site, Skeleton

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class ADMConfig:
    """Shape of the network; the defaults are the unconditional 256x256 ImageNet model.

    attention_resolutions: strides at which attention layers follow the residual blocks. out_channels: 6 with learned variance.
    image_size: side of the pictures it was trained on, in pixels.
    """

    model_channels: int = 256
    in_channels: int = 3
    out_channels: int = 6
    num_res_blocks: int = 2
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    num_head_channels: int = 64
    num_classes: int | None = None
    image_size: int = 256


class Norm(nn.GroupNorm):
    """Group normalisation with 32 groups, computed in float32."""

    def __init__(self, channels: int):
        super().__init__(32, channels)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


class Residual(nn.Module):
    """Residual block; `resample` halves (-1), keeps (0) or doubles (+1) the resolution inside."""

    def __init__(self, channels: int, out: int, embedding: int, resample: int = 0):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.out_layers = nn.Sequential(Norm(out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == 0:
            return x
        return F.avg_pool2d(x, 2) if self.resample < 0 else F.interpolate(x, scale_factor=2, mode="nearest")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resampled(x)) + h


class Attention(nn.Module):
    """Self-attention over the map, q, k and v of one head lying side by side ("legacy" order)."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        q, k, v = self.qkv(self.norm(tokens)).unflatten(1, (self.heads, -1)).mT.chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
        return (tokens + self.proj_out(h)).view_as(x)


class Layer(nn.Sequential):
    """What the published code numbers as one input or output block."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for part in self:
            x = part(x, embedding) if isinstance(part, Residual) else part(x)
        return x


def timestep_embedding(t: Tensor, width: int) -> Float[Tensor, "batch width"]:
    """Sinusoids of the timestep, cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class ADMUNet(nn.Module):
    """The network. `forward` returns `[batch, out_channels, height, width]`."""

    def __init__(self, config: ADMConfig):
        super().__init__()
        self.config = config
        c, embedding = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(c, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, embedding)
        channels, stride, widths = config.channel_mult[0] * c, 1, [config.channel_mult[0] * c]
        last = len(config.channel_mult) - 1

        def layer(into: int, out: int) -> list[nn.Module]:
            attends = stride in config.attention_resolutions
            return [Residual(into, out, embedding), *([Attention(out, config.num_head_channels)] if attends else [])]

        self.input_blocks = nn.ModuleList([Layer(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Layer(*layer(channels, multiple * c)))
                widths.append(channels := multiple * c)
            if level < last:
                self.input_blocks.append(Layer(Residual(channels, channels, embedding, -1)))
                widths.append(channels)
                stride *= 2
        attention = Attention(channels, config.num_head_channels)
        self.middle_block = Layer(
            Residual(channels, channels, embedding), attention, Residual(channels, channels, embedding)
        )
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                parts = layer(channels + widths.pop(), multiple * c)
                channels = multiple * c
                if level > 0 and index == config.num_res_blocks:
                    parts.append(Residual(channels, channels, embedding, +1))
                    stride //= 2
                self.output_blocks.append(Layer(*parts))
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        if labels is not None:
            embedding = embedding + self.label_emb(labels)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return self.out(x)


def fitted(network: Callable[[Any], Network], config: Any, state: Mapping[str, Tensor], unfit: str) -> Network:
    """`network(config)` with the weights of `state`, frozen, or InputError beginning with `unfit` when they do not fit."""
    with torch.device("meta"):
        made = network(config)
    expected = made.state_dict()
    for key in [*expected, *state]:
        if key not in state or key not in expected or state[key].shape != expected[key].shape:
            raise InputError(
                f"{unfit} of the expected architecture (first difference: {key}); describe another one in a .json file "
                f"beside it, with the keys {', '.join(asdict(config))}."
            )
    made.load_state_dict(dict(state), assign=True)
    return made.requires_grad_(False).eval()


def adm_sites(config: ADMConfig) -> list[Site]:
    """`in.N`, `mid`, `out.N` as the published code numbers its blocks; `down.L` and `up.L` name the last one of a level."""
    levels, layers = len(config.channel_mult), config.num_res_blocks + 1
    inputs, outputs = levels * layers, levels * layers
    sites = [Site(f"in.{n}", "resnet", f"input_blocks.{n}") for n in range(inputs)]
    sites += [Site(f"down.{i}", "block", f"input_blocks.{min((i + 1) * layers, inputs - 1)}") for i in range(levels)]
    sites += [Site("mid", "block", "middle_block")]
    sites += [Site(f"out.{n}", "resnet", f"output_blocks.{n}") for n in range(outputs)]
    sites += [Site(f"up.{i}", "block", f"output_blocks.{(i + 1) * layers - 1}") for i in range(levels)]
    return sites


class ADMDenoiser:
    """A guided-diffusion checkpoint behind the `Denoiser` protocol (linear betas 1e-4 to 0.02, 1000 steps, epsilon)."""

    family = "adm"

    def __init__(self, unet: ADMUNet, schedule: NoiseSchedule | None = None, *, name: str = "adm"):
        self.unet, self.name = unet, name
        self.presets: Mapping[str, Mapping[str, Any]] = {}
        self.schedule = schedule or NoiseSchedule.from_config({"beta_schedule": "linear"})
        self.multiple = self.minimum = 2 ** (len(unet.config.channel_mult) - 1)
        self._sites: list[Site] | None = None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], config: ADMConfig, name: str = "adm") -> "ADMDenoiser":
        """Raises InputError when the weights do not have the shape that `config` describes."""
        return cls(fitted(ADMUNet, config, state, f"{name} is not an ADM checkpoint"), name=name)

    @property
    def network(self) -> nn.Module:
        return self.unet

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def posterior(self, pixels: Tensor) -> Posterior:
        return Posterior(pixels.to(self.device))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.posterior(pixels).mean

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        classes = self.unet.config.num_classes
        if classes is None:
            if prompts is not None and any(prompt != "" for prompt in prompts):
                raise InputError(f"{self.name} is unconditional; leave the prompt empty.")
            return Condition()
        if prompts is None or not all(isinstance(label, int) and 0 <= label < classes for label in prompts):
            raise InputError(f"{self.name} needs a class number from 0 to {classes - 1} for every picture.")
        return Condition(extra={"labels": torch.tensor(list(prompts), device=self.device)})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        config = self.unet.config
        sides = (height or config.image_size, width or config.image_size)
        if any(side < 1 or side % self.multiple for side in sides):
            raise InputError(f"{self.name} makes pictures whose sides are multiples of {self.multiple} pixels.")
        return (config.in_channels, *sides)

    def output(self, noisy: Tensor, t: float | Tensor, condition: Condition) -> Tensor:
        steps = torch.as_tensor(t, device=noisy.device).expand(noisy.shape[0])
        return self.unet(noisy.to(self.dtype), steps, **condition.expand(noisy.shape[0]).extra).float()

    def predict(self, noisy: Tensor, t: Timestep, condition: Condition) -> Tensor:
        output = self.output(noisy, torch.as_tensor(t), condition)
        return self.schedule.eps(output[:, : noisy.shape[1]], noisy.float(), t)

    def sites(self, sizes: bool = True) -> list[Site]:
        if not sizes:
            return adm_sites(self.unet.config)
        if self._sites is None:
            width, classes = 4 * self.multiple, self.unet.config.num_classes
            with torch.device("meta"):
                skeleton = Skeleton(ADMUNet(self.unet.config), adm_sites(self.unet.config))
                noisy, t = torch.zeros(1, 3, width, width), torch.zeros(1, dtype=torch.long)
                given: dict[str, Any] = {"labels": t} if classes else {}
                self._sites = skeleton.measured(lambda network: network(noisy, t, **given), width)
        return self._sites
