"""`Joint`: several extractors as one, as sd-dino and GeoAware-SC join Stable Diffusion and DINOv2; see `fusing`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from denoscope.errors import InputError
from denoscope.features.amalgam import Amalgam
from denoscope.features.extractor import Dift, Extractor
from denoscope.features.fusing import Joined, check_weights
from denoscope.images import Picture


@dataclass(frozen=True, eq=False)
class Joint:
    """Several extractors as one, which is an `Extractor` itself.

    weights: what the unit features of each are multiplied by (1 by default). pca: components that every part is reduced to,
    from both pictures of a pair together; a single map has all channels (see `paired`).
    """

    parts: Sequence[Extractor]
    weights: Sequence[int | float] | None = None
    pca: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("There is nothing to join; give at least one extractor.")
        check_weights(self.weights, len(self.parts))
        if self.pca is not None and self.pca < 1:
            raise InputError(f"A PCA keeps at least 1 component, not {self.pca}.")
        if nested := [part.name for part in self.parts if isinstance(part, Joint)]:
            raise InputError(f"{nested[0]} is joined already; give its parts one by one.")

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def describe(self) -> dict[str, Any]:
        weights = check_weights(self.weights, len(self.parts))
        return {
            "model": self.name,
            "parts": [part.describe() for part in self.parts],
            "weights": list(weights),
            "pca": self.pca,
        }

    @cached_property
    def _told(self) -> list[bool]:
        return [takes_prompts(part) for part in self.parts]

    def __call__(self, picture: Picture, prompt: str | int | None = None) -> Joined:
        """A prompt goes to the parts that take one."""
        maps = [part(picture, prompt if told else None) for part, told in zip(self.parts, self._told, strict=True)]
        return Joined.of(maps, self.weights, self.pca, self.name)


def takes_prompts(extractor: Extractor) -> bool:
    """Whether the extractor's model, or one of those joined, is told in words what a picture shows."""
    if isinstance(extractor, Joint):
        return any(extractor._told)
    if isinstance(extractor, Amalgam):
        return takes_prompts(extractor.base)
    if not isinstance(extractor, Dift):
        return False
    try:
        extractor.denoiser.condition(["a photo"])
    except InputError:
        return False
    return True
