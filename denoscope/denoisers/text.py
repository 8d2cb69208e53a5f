"""Prompts to embeddings: the text encoders of a pipeline (CLIP, T5), embeddings cached."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LONG = 70  # words from which on a prompt is long (Meng et al., arXiv 2410.06719, released code)


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
    chunks: whether long prompts are encoded piece by piece (`long_prompts`) rather than cut off.
    """

    def __init__(self, tokenizer: Any, encoder: Any, length: int | None = None, masked: bool = False):
        self.tokenizer, self.encoder, self.masked = tokenizer, encoder, masked
        self.length = length or min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        self.chunks = False
        self._ragged = length is None  # CLIP's words do not see what follows them, so that padding makes no difference
        self._cache: dict[tuple[str, int], Encoded] = {}

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
    def encode(self, prompts: Sequence[str], chunks: bool | None = None) -> Encoded:
        """Embeddings of prompts, one row each.

        chunks: whether prompts of more than 70 words (between spaces) are split into pieces of `length` tokens, which are
            encoded one by one and concatenated, as the released code of Meng et al. (arXiv 2410.06719) does: one start and one
            end for the whole prompt, positions that start anew in every piece, the last piece as long as it is (T5: padded).
            Other prompts of the same call are padded to the longest, so their embeddings then depend on it. The pooled
            embedding is that of the prompt cut off at `length`. By default `self.chunks`.
        """
        chunks = self.chunks if chunks is None else chunks
        size = max((self._tokens_when_long(prompt) for prompt in prompts), default=0) if chunks else 0
        rows = [self._encoded(prompt, size) for prompt in prompts]

        def joined(name: str) -> Any:
            return None if getattr(rows[0], name) is None else torch.cat([getattr(row, name) for row in rows])

        return Encoded(*(joined(name) for name in ("last", "penultimate", "mask", "pooled")))

    def _tokens_when_long(self, prompt: str) -> int:
        """Tokens of a long prompt (T5: in whole pieces); 0 for one that is not long."""
        if len(prompt.split(" ")) <= LONG:
            return 0
        tokens = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        return tokens if self._ragged else -(-tokens // self.length) * self.length

    def _encoded(self, prompt: str, size: int) -> Encoded:
        """One prompt, cut off, or in pieces that are `size` tokens together."""
        if (prompt, size) not in self._cache:
            self._cache[prompt, size] = self._in_pieces(prompt, size) if size else self._run(self._tokens(prompt))
        return self._cache[prompt, size]

    def _in_pieces(self, prompt: str, size: int) -> Encoded:
        whole = self.tokenizer(
            prompt, padding="max_length", max_length=size, truncation=True, return_tensors="pt", verbose=False
        )
        starts = range(0, size, self.length)
        parts = [
            self._run(type(whole)({name: value[:, i : i + self.length] for name, value in whole.items()}))
            for i in starts
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the prompt is cut off: only for the pooled embedding it is
            pooled = self._encoded(prompt, 0).pooled
        mask = None if parts[0].mask is None else torch.cat([part.mask for part in parts if part.mask is not None], 1)
        last, penultimate = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("last", "penultimate"))
        return Encoded(last, penultimate, mask, pooled)

    def _run(self, tokens: Any) -> Encoded:
        tokens = tokens.to(self.encoder.device)
        given = {"attention_mask": tokens["attention_mask"]} if self.masked else {}
        made = self.encoder(tokens["input_ids"], output_hidden_states=True, **given)
        pooled = made.get("text_embeds", made.get("pooler_output"))
        return Encoded(made.last_hidden_state, made.hidden_states[-2], tokens.get("attention_mask"), pooled)

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "batch length width"]:
        """Last hidden states of the text encoder, in its dtype."""
        return self.encode(prompts).last


@contextmanager
def long_prompts(denoiser: Any, chunks: bool = True) -> Iterator[None]:
    """A context in which a denoiser's text encoders encode long prompts piece by piece, see `TextEncoder.encode`.

    with long_prompts(denoiser):
        condition = denoiser.condition([caption])  # more tokens than usual, if the caption has more than 70 words
    """
    parts = [part for value in vars(denoiser).values() for part in (value if isinstance(value, tuple) else (value,))]
    encoders = [part for part in parts if isinstance(part, TextEncoder)]
    before = [encoder.chunks for encoder in encoders]
    for encoder in encoders:
        encoder.chunks = chunks
    try:
        yield
    finally:
        for encoder, was in zip(encoders, before, strict=True):
            encoder.chunks = was
