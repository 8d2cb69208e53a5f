"""Prompts to embeddings: the text encoders of a pipeline (CLIP, T5), embeddings cached."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encoder made of prompts, in its dtype. mask: 1 for words, 0 for padding. pooled: CLIP's, projected if it is."""

    last: Float[Tensor, "batch length width"]
    penultimate: Float[Tensor, "batch length width"]
    mask: Int[Tensor, "batch length"] | None = None
    pooled: Float[Tensor, "batch pooled"] | None = None


class TextEncoder:
    """Tokenizer and text encoder of a pipeline; every prompt is padded to `length` tokens and encoded once.

    length: by default the tokenizer's (CLIP); T5 has none of its own. masked: whether the encoder ignores the padding.
    """

    def __init__(self, tokenizer: Any, encoder: Any, length: int | None = None, masked: bool = False):
        self.tokenizer, self.encoder, self.masked = tokenizer, encoder, masked
        self.length = length or min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        self._cache: dict[str, Encoded] = {}

    @property
    def width(self) -> int:
        """Channels of the embeddings of words."""
        return self.encoder.config.hidden_size

    def ids(self, prompt: str) -> Int[Tensor, "1 length"]:
        """Token ids."""
        return self._tokens(prompt).input_ids

    def _tokens(self, prompt: str) -> Any:
        """`input_ids` and `attention_mask`, [1, length]. Warns about words that are cut off or unknown to the vocabulary."""
        full = self.tokenizer(prompt)["input_ids"]
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        if len(full) > self.length:
            lost = self.tokenizer.decode(full[self.length - 1 : -1])
            warnings.warn(f"The prompt is longer than {self.length} tokens; ignored: {lost!r}.", stacklevel=3)
        unknown = self.tokenizer.unk_token_id  # byte-level tokenizers never produce it

        def foreign(text: str) -> bool:
            return unknown in self.tokenizer(text, add_special_tokens=False)["input_ids"]

        if unknown is not None and foreign(prompt):
            lost = [word for word in re.findall(r"\w+", prompt.lower()) if foreign(word)]
            warnings.warn(f"This model's vocabulary does not hold: {', '.join(lost)}.", stacklevel=3)
        return tokens

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        for prompt in prompts:
            if prompt not in self._cache:
                tokens = self._tokens(prompt).to(self.encoder.device)
                given = {"attention_mask": tokens["attention_mask"]} if self.masked else {}
                made = self.encoder(tokens.input_ids, output_hidden_states=True, **given)
                pooled = made.get("text_embeds", made.get("pooler_output"))
                self._cache[prompt] = Encoded(
                    made.last_hidden_state, made.hidden_states[-2], tokens.get("attention_mask"), pooled
                )
        rows = [self._cache[prompt] for prompt in prompts]

        def joined(name: str) -> Any:
            return None if getattr(rows[0], name) is None else torch.cat([getattr(row, name) for row in rows])

        return Encoded(*(joined(name) for name in ("last", "penultimate", "mask", "pooled")))

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "batch length width"]:
        """Last hidden states of the text encoder, in its dtype."""
        return self.encode(prompts).last
