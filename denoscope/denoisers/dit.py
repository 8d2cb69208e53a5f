"""DiT (Peebles and Xie, arXiv 2212.09748) and PixArt (Chen et al., arXiv 2310.00426; Sigma: 2403.04692)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from denoscope.denoisers.protocol import Condition
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.transformer import TransformerDenoiser, asked
from denoscope.errors import InputError


class DiTDenoiser(TransformerDenoiser):
    """Class-conditional; the class after the last stands for any. names: class numbers by name, as the pipeline lists them.

    Its output layer makes squares only: other pictures can be read at every site, but their noise cannot be predicted.
    """

    family = "dit"

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any,
        name: str = "",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        names: Mapping[str, int] | None = None,
    ):
        super().__init__(network, schedule, vae=vae, name=name, presets=presets)
        self.names = {key.lower(): number for key, number in (names or {}).items()}

    @property
    def classes(self) -> int:
        return self._network.config.num_embeds_ada_norm

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        """prompts: class numbers (also as text) or names; "" and None are any class."""
        labels = [self.classes] * batch if prompts is None else [self._label(one) for one in prompts]
        return Condition(extra={"class_labels": torch.tensor(labels, device=self.device)})

    def _label(self, asked: str | int) -> int:
        if asked == "":
            return self.classes
        if isinstance(asked, str):
            text = asked.strip().lower()
            number = int(text) if text.isdecimal() else self.names.get(text, -1)
        else:
            number = asked
        if isinstance(number, bool) or not 0 <= number < self.classes:
            known = " or names as its model_index.json lists them" if self.names else ""
            raise InputError(f"{self.name} takes class numbers from 0 to {self.classes - 1}{known}, not {asked!r}.")
        return number

    def output(self, noisy: Tensor, t: float | Tensor, condition: Condition) -> Tensor:
        square = noisy.shape[-1] == noisy.shape[-2]
        try:
            output = super().output(noisy, t, condition)
        except RuntimeError:
            if square:
                raise
            output = None
        if not square or output is None:
            side = max(noisy.shape[-2:]) * self.stride
            raise InputError(
                f"{self.name} predicts the noise of squares only, which sampling, image-to-image and denoise_from take; give a "
                f"square size, such as {side} (of other sizes, sites alone can be read)."
            )
        return output

    def _arguments(self, noisy: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        return {
            "hidden_states": noisy,
            "timestep": t,
            "class_labels": condition.extra["class_labels"].to(noisy.device),
        }

    def _dummy(self) -> Condition:
        return Condition(extra={"class_labels": torch.zeros(1, dtype=torch.long)})

    def _modulation(self, block: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        blocks, dtype = self._network.transformer_blocks, self.dtype
        last = block + 1 == len(blocks)
        norm = blocks[0 if last else block + 1].norm1
        embedding = F.silu(norm.emb(given["timestep"], given["class_labels"], hidden_dtype=dtype))
        shift, scale = (self._network.proj_out_1(embedding) if last else norm.linear(embedding)).chunk(
            2 if last else 6, 1
        )[:2]
        return shift, scale


class PixArtDenoiser(TransformerDenoiser):
    """Told by T5 through cross-attention, and at 1024 pixels of the alpha model also by the picture's size and aspect."""

    family = "pixart"

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        *,
        vae: Any,
        text: TextEncoder,
        name: str = "",
        presets: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__(network, schedule, vae=vae, name=name, presets=presets)
        self.text = text

    def condition(self, prompts: Sequence[str] | Sequence[int] | None, batch: int = 1) -> Condition:
        """Prompts are made lower-case, as in the pipelines (whose cleaning of web captions is left to the caller)."""
        encoded = self.text.encode([prompt.lower().strip() for prompt in asked(self.name, prompts, batch)])
        assert encoded.mask is not None
        return Condition(encoded.last, {"encoder_attention_mask": encoded.mask})

    def _arguments(self, noisy: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        assert condition.tokens is not None
        given: dict[str, Any] = {
            "hidden_states": noisy,
            "timestep": t,
            "encoder_hidden_states": condition.tokens.to(noisy),
            "encoder_attention_mask": condition.extra["encoder_attention_mask"].to(noisy.device),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        if self._network.use_additional_conditions:
            batch, (h, w) = noisy.shape[0], noisy.shape[-2:]
            size = torch.tensor([[h * self.stride, w * self.stride]], dtype=noisy.dtype, device=noisy.device)
            aspect = torch.tensor([[h / w]], dtype=noisy.dtype, device=noisy.device)
            given["added_cond_kwargs"] = {"resolution": size.repeat(batch, 1), "aspect_ratio": aspect.repeat(batch, 1)}
        return given

    def _dummy(self) -> Condition:
        mask = torch.ones(1, self.text.length, dtype=torch.long)
        return Condition(torch.zeros(1, self.text.length, self.text.width), {"encoder_attention_mask": mask})

    def _modulation(self, block: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        network = self._network
        table, embedding = network.adaln_single(
            given["timestep"], given["added_cond_kwargs"], batch_size=1, hidden_dtype=self.dtype
        )
        if block + 1 == len(network.transformer_blocks):
            shift, scale = network.scale_shift_table + embedding
        else:
            shift, scale = (network.transformer_blocks[block + 1].scale_shift_table + table.view(6, -1))[:2]
        return shift, scale
