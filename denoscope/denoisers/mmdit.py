"""Transformers that attend to image and prompt together: Stable Diffusion 3 (Esser et al., arXiv 2403.03206) and FLUX.1."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.denoisers.protocol import Condition
from denoscope.denoisers.residuals import of_rows, per_block, summed
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.transformer import TransformerDenoiser, asked
from denoscope.errors import InputError

SD3_T5_LENGTH = 256
FLUX_T5_LENGTH = 512


class JointDenoiser(TransformerDenoiser):
    """What SD3 and Flux share: pooled CLIP embeddings beside the prompt's tokens; AdaLN layers that own their projection."""

    _final = "norm_out"

    def timing(self, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """The shift of the noise levels for pictures of this size, where the scheduler leaves it to the pipeline."""
        config = self.schedule.config
        if not config.get("use_dynamic_shifting"):
            return {}
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        tokens = shape[-2] * shape[-1] // self.patch**2
        return {"mu": low + (high - low) * (tokens - few) / (many - few)}

    def _blocks(self) -> list[Any]:
        return [block for path in self.LISTS for block in self.network.get_submodule(path).children()]

    @abstractmethod
    def _embedding(self, given: dict[str, Any]) -> Tensor:
        """The network's embedding of timestep and condition."""

    def _modulation(self, block: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        blocks, embedding = self._blocks(), F.silu(self._embedding(given))
        if block + 1 == len(blocks):
            final: Any = self.network.get_submodule(self._final)
            scale, shift = final.linear(embedding).chunk(2, 1)
        else:
            reader = blocks[block + 1]
            norm = reader.norm1 if hasattr(reader, "norm1") else reader.norm
            shift, scale = norm.linear(embedding).split(embedding.shape[1], 1)[:2]
        return shift, scale


class SD3Denoiser(JointDenoiser):
    """Two CLIP encoders and T5, which may be missing (its tokens are then zeros, as in the pipeline)."""

    family = "stable-diffusion-3"

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any,
        clip: tuple[TextEncoder, TextEncoder],
        t5: TextEncoder | None = None,
        name: str = "",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__(network, schedule, vae=vae, name=name, presets=presets)
        self.clip, self.t5 = clip, t5

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        texts = asked(self.name, prompts, batch)
        both = [encoder.encode(texts) for encoder in self.clip]
        words = torch.cat([one.penultimate for one in both], -1)
        width = self._network.config.joint_attention_dim
        t5 = words.new_zeros(len(texts), SD3_T5_LENGTH, width) if self.t5 is None else self.t5(texts).to(words)
        tokens = torch.cat([F.pad(words, (0, width - words.shape[-1])), t5], 1)
        return Condition(tokens, {"pooled_projections": torch.cat([_pooled(one.pooled) for one in both], -1)})

    def _arguments(self, noisy: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        assert condition.tokens is not None
        limit = self._network.config.pos_embed_max_size * self.patch
        if max(noisy.shape[-2:]) > limit:
            side = limit * self.stride
            raise InputError(
                f"{self.name} knows the places of pictures up to {side} pixels a side; use a smaller size."
            )
        return {
            "hidden_states": noisy,
            "timestep": t,
            "encoder_hidden_states": condition.tokens.to(noisy),
            "pooled_projections": condition.extra["pooled_projections"].to(noisy),
        }

    def _added(self, given: dict[str, Any], condition: Condition) -> dict[str, Any]:
        blocks, batch = len(self._network.transformer_blocks), given["hidden_states"].shape[0]

        def run(network: Any, image: Tensor, rows: Any) -> list[Tensor | None]:
            told = of_rows(given, rows, batch)
            if network.config.force_zeros_for_pooled_projection:
                told["pooled_projections"] = torch.zeros_like(told["pooled_projections"])
            if network.config.joint_attention_dim is None:  # the large ones of SD3.5 do not read the prompt
                told["encoder_hidden_states"] = None
            made = network(controlnet_cond=image, return_dict=False, **told)[0]
            return per_block(made, [int(i / (blocks / len(made))) for i in range(blocks)])

        found = summed(condition.controls, run)
        return {} if found is None else {"block_controlnet_hidden_states": found}

    def _dummy(self) -> Condition:
        config = self._network.config
        tokens = torch.zeros(1, self.clip[0].length + SD3_T5_LENGTH, config.joint_attention_dim)
        return Condition(tokens, {"pooled_projections": torch.zeros(1, config.pooled_projection_dim)})

    def _embedding(self, given: dict[str, Any]) -> Tensor:
        return self._network.time_text_embed(given["timestep"], given["pooled_projections"])


class Packed(nn.Module):
    """Flux on latents that are maps: 2x2 cells become a token, as the pipeline packs them, and come back as cells."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False, **given: Any
    ) -> Any:
        size = [side // 2 for side in hidden_states.shape[-2:]]
        output = self.transformer(
            hidden_states=folded(hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            **places(hidden_states, encoder_hidden_states),
            return_dict=False,
            **given,
        )[0]
        return (F.pixel_shuffle(output.mT.unflatten(2, size), 2),)


def folded(latents: Tensor) -> Tensor:
    """[batch, tokens, 4 channels]: channel, then row and column inside the patch."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def places(latents: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """Where the tokens are: rows and columns of the image's; those of the prompt are nowhere."""
    height, width = (side // 2 for side in latents.shape[-2:])
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    ids = F.pad(cells, (1, 0)).to(latents)
    return {"img_ids": ids, "txt_ids": ids.new_zeros(prompt.shape[1], 3)}


class FluxDenoiser(JointDenoiser):
    """CLIP's pooled embedding and T5; `guidance` is what FLUX.1-dev is told of its distilled guidance (others are not)."""

    family = "flux"
    LISTS = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
    GRID = ""
    _final = "transformer.norm_out"

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any,
        clip: TextEncoder,
        t5: TextEncoder,
        guidance: float = 3.5,
        name: str = "",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__(network, schedule, vae=vae, name=name, presets=presets)
        self.clip, self.t5, self.guidance = clip, t5, guidance
        self._packed = Packed(network)

    @property
    def network(self) -> nn.Module:
        return self._packed

    @property
    def patch(self) -> int:
        return 2

    def _channels(self) -> int:
        return self._network.config.in_channels // 4

    def _own_side(self) -> int:
        return 128

    def timing(self, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """Noise levels evenly spaced from 1 to 1 / steps, before the shift."""
        return {"sigmas": [1 - i / steps for i in range(steps)], **super().timing(steps, shape)}

    def _skeleton(self) -> nn.Module:
        return Packed(FluxTransformer2DModel.from_config(dict(self._network.config)))

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        texts = asked(self.name, prompts, batch)
        extra = {"pooled_projections": _pooled(self.clip.encode(texts).pooled)}
        if self._network.config.guidance_embeds:
            extra["guidance"] = torch.full((len(texts),), self.guidance, device=self.device)
        return Condition(self.t5(texts), extra)

    def _arguments(self, noisy: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        assert condition.tokens is not None
        given = {
            "hidden_states": noisy,
            "timestep": t.to(noisy.dtype) / 1000,
            "encoder_hidden_states": condition.tokens.to(noisy),
            "pooled_projections": condition.extra["pooled_projections"].to(noisy),
        }
        if "guidance" in condition.extra:
            given["guidance"] = condition.extra["guidance"].to(noisy.device)
        return given

    def _added(self, given: dict[str, Any], condition: Condition) -> dict[str, Any]:
        network, batch = self._network, given["hidden_states"].shape[0]
        kinds = len(network.transformer_blocks), len(network.single_transformer_blocks)
        dealt = {**given, "hidden_states": folded(given["hidden_states"])}
        where = places(given["hidden_states"], given["encoder_hidden_states"])

        def run(control: Any, image: Tensor, rows: Any) -> list[Tensor | None]:
            told = of_rows(dealt, rows, batch)
            if not control.config.guidance_embeds:
                told.pop("guidance", None)
            elif "guidance" not in told:
                told["guidance"] = torch.full((len(image),), self.guidance, device=image.device)
            hinted = control.input_hint_block is not None  # those of XLabs look at pixels, and repeat their residuals
            made = control(controlnet_cond=image if hinted else folded(image), return_dict=False, **told, **where)
            found: list[Tensor | None] = []
            for residuals, blocks, repeat in zip(made, kinds, (hinted, False), strict=True):
                k = len(residuals or (None,))
                found += per_block(residuals, [i % k if repeat else i // -(-blocks // k) for i in range(blocks)])
            return found

        found = summed(condition.controls, run)
        if found is None:
            return {}
        double, single = found[: kinds[0]], found[kinds[0] :]
        names = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return {name: residuals for name, residuals in names.items() if residuals and residuals[0] is not None}

    def _dummy(self) -> Condition:
        config = self._network.config
        extra = {"pooled_projections": torch.zeros(1, config.pooled_projection_dim)}
        if config.guidance_embeds:
            extra["guidance"] = torch.zeros(1)
        return Condition(torch.zeros(1, self.t5.length, config.joint_attention_dim), extra)

    def _embedding(self, given: dict[str, Any]) -> Tensor:
        told = [given["timestep"] * 1000]
        if "guidance" in given:
            told.append(given["guidance"].to(self.dtype) * 1000)
        return self._network.time_text_embed(*told, given["pooled_projections"])


def _pooled(found: Tensor | None) -> Tensor:
    if found is None:
        raise InputError("The CLIP text encoder of this pipeline gives no pooled embedding; load the whole pipeline.")
    return found
