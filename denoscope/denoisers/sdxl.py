"""Stable Diffusion XL (Podell et al., arXiv 2307.01952): a U-Net told by two text encoders and by the picture's size."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from denoscope.denoisers.protocol import Condition
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.transformer import asked
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import InputError


class SDXLDenoiser(UNetDenoiser):
    """zeros: whether no prompt at all is told by zeros rather than by the empty prompt, as the base model was trained.

    Unless `time_ids` are in the condition's `extra`, the network is told that the picture has its own size and was not cropped.
    """

    def __init__(
        self,
        unet: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any,
        texts: tuple[TextEncoder, TextEncoder],
        name: str = "stable-diffusion-xl",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        zeros: bool = True,
    ):
        super().__init__(unet, schedule, vae=vae, name=name, presets=presets)
        self.family, self.texts, self.zeros = "stable-diffusion-xl", texts, zeros
        told = unet.config.projection_class_embeddings_input_dim - texts[1].encoder.config.projection_dim
        if told != 6 * unet.config.addition_time_embed_dim:
            raise InputError(
                f"{name} is no base SDXL model (a refiner or a variant); use the base text-to-image model."
            )

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        both = [encoder.encode(asked(self.name, prompts, batch)) for encoder in self.texts]
        tokens, pooled = torch.cat([one.penultimate for one in both], -1), both[1].pooled
        assert pooled is not None
        if prompts is None and self.zeros:
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        return Condition(tokens, {"text_embeds": pooled})

    def _given(self, noisy: Tensor, condition: Condition) -> dict[str, Any]:
        assert condition.tokens is not None
        side = [edge * self.stride for edge in noisy.shape[-2:]]
        ids = condition.extra.get("time_ids", torch.tensor([[*side, 0, 0, *side]], device=noisy.device))
        added = {
            "text_embeds": condition.extra["text_embeds"].to(noisy.device, self.dtype),
            "time_ids": ids.to(noisy.device, self.dtype).expand(noisy.shape[0], -1),
        }
        return {"encoder_hidden_states": condition.tokens.to(noisy.device, self.dtype), "added_cond_kwargs": added}

    def _dummy(self) -> Condition:
        pooled = torch.zeros(1, self.texts[1].encoder.config.projection_dim)
        return Condition(
            torch.zeros(1, self.texts[0].length, self.unet.config.cross_attention_dim), {"text_embeds": pooled}
        )
