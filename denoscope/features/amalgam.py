"""`Amalgam`: the features of one model under several techniques as one; see `amalgamation` for the ways to do it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from denoscope.errors import InputError
from denoscope.features.amalgamation import Assigners, aggregate, amalgamate, parse_how, read_assigners
from denoscope.features.dift import feature_sets
from denoscope.features.extractor import Dift
from denoscope.features.feature_map import FeatureMap
from denoscope.features.recipe import Recipe, varied
from denoscope.features.sets import attends_words, expand
from denoscope.images import Picture

ATTENTION = "attention"  # the technique of this name makes the map that is put beside the amalgam
_SHARED = ("model", "weights", "dtype")  # by all techniques


@dataclass(frozen=True, eq=False)
class Amalgam:
    """A model read under several techniques in shared forward passes, and their maps made one; an `Extractor` itself.

    base: the model and the settings that the techniques change. techniques: settings of `features` by name; that of the name
    "attention", if there is one, makes the map that is put beside the others' amalgam. how: "mean", "concat", "standard",
    "pca:N", a file of trained assigners, or the assigners.

    Raises InputError for techniques that the model cannot take, naming them, and MissingError for a file that is not there.
    """

    base: Dift
    techniques: Mapping[str, Mapping[str, Any]]
    how: "str | Path | Assigners" = "mean"

    def __post_init__(self) -> None:
        if not set(self.techniques) - {ATTENTION}:
            raise InputError("There is nothing to amalgamate; name at least one technique beside the attention.")
        found = self.recipes(self.base.recipe)  # what is wrong is said here
        if self.rule == "mean" or isinstance(self.rule, Assigners):
            self._check_words([one for name, one in found.items() if name != ATTENTION])

    def _check_words(self, found: Sequence[Recipe]) -> None:
        words = [name for one in found for name in attends_words(expand(self.base.denoiser, one.site))]
        if words and len({one.prompt for one in found}) > 1:
            raise InputError(
                f"The channels of {words[0]} are the words of the prompt, so they have no mean under several prompts; give all "
                f"techniques one prompt, or read it under a technique of its own, named {ATTENTION}."
            )

    @cached_property
    def rule(self) -> "str | Assigners":
        """The way of amalgamating, assigners read and on the model's device."""
        if isinstance(self.how, str) and not self.how.endswith((".safetensors", ".pt", ".pth")):
            parse_how(self.how)
            return self.how
        assigners = self.how if isinstance(self.how, Assigners) else read_assigners(self.how)
        return assigners.to(self.base.denoiser.device)

    @property
    def name(self) -> str:
        if isinstance(self.rule, str):
            return f"{self.base.name}@{self.rule.replace(':', '')}"
        return f"{self.base.name}@{'learned' if isinstance(self.how, Assigners) else Path(self.how).stem}"

    def recipes(self, base: Recipe) -> dict[str, Recipe]:
        """What is read, by technique. Raises InputError for settings that the model cannot take."""
        found = {}
        for name, technique in self.techniques.items():
            try:
                found[name] = varied(self.base.denoiser, base, technique)
            except InputError as error:
                raise InputError(f"Technique {name!r}: {error}") from None
        return found

    def describe(self) -> dict[str, Any]:
        told = self.rule.describe() if isinstance(self.rule, Assigners) else self.rule
        own = self.base.describe()
        each = {name: replace(self.base, recipe=one).describe() for name, one in self.recipes(self.base.recipe).items()}
        techniques = {name: {k: v for k, v in one.items() if k not in _SHARED} for name, one in each.items()}
        return {**own, "amalgam": told, "techniques": techniques}

    def members(self, picture: Picture, prompt: str | int | None = None) -> dict[str, FeatureMap]:
        """The map of each technique by itself, from the same passes. prompt: for the techniques that name none."""
        base = self.base.recipe if prompt is None else replace(self.base.recipe, prompt=prompt)
        noise, seed, chunk = self.base.noise, self.base.seed, self.base.chunk
        found = feature_sets(self.base.denoiser, picture, self.recipes(base), noise=noise, seed=seed, chunk=chunk)
        return {name: aggregate(list(maps.values())) for name, maps in found.items()}

    def __call__(self, picture: Picture, prompt: str | int | None = None) -> FeatureMap:
        found = self.members(picture, prompt)
        attention = found.pop(ATTENTION, None)
        made = amalgamate(list(found.values()), self.rule, attention)
        return replace(made, recipe={**made.recipe, "techniques": list(found)})
