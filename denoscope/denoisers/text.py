"""Prompts to `Condition`: one CLIP-like text encoder, embeddings cached."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class TextEncoder:
    """Tokenizer and text encoder of a pipeline; every prompt is padded to the tokenizer's length and encoded once."""

    def __init__(self, tokenizer: Any, encoder: Any):
        self.tokenizer, self.encoder = tokenizer, encoder
        self._cache: dict[str, Tensor] = {}

    @property
    def length(self) -> int:
        return min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)

    def ids(self, prompt: str) -> Tensor:
        """Token ids [1, length]. Warns about words that are cut off or unknown to a word vocabulary."""
        full = self.tokenizer(prompt)["input_ids"]
        ids = self.tokenizer(
            prompt, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        if len(full) > self.length:
            lost = self.tokenizer.decode(full[self.length - 1 : -1])
            warnings.warn(f"The prompt is longer than {self.length} tokens; ignored: {lost!r}.", stacklevel=2)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in full[1:-1]:  # byte-level tokenizers never produce it inside
            vocabulary = self.tokenizer.get_vocab()
            lost = [word for word in re.findall(r"\w+", prompt.lower()) if word not in vocabulary]
            warnings.warn(f"This model's vocabulary does not hold: {', '.join(lost)}.", stacklevel=2)
        return ids

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "batch length width"]:
        """Last hidden states of the text encoder, in its dtype."""
        for prompt in prompts:
            if prompt not in self._cache:
                ids = self.ids(prompt).to(self.encoder.device)
                self._cache[prompt] = self.encoder(ids).last_hidden_state
        return torch.cat([self._cache[prompt] for prompt in prompts])
