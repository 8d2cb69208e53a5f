"""Features of dense networks that are no diffusion models: one forward pass, one activation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from denoscope.encoders.protocol import Encoder
from denoscope.errors import InputError
from denoscope.features.dift import Size, resolve_size
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import concatenate
from denoscope.features.presets import NAMES
from denoscope.features.weights import versions, weights_digest
from denoscope.images import Frame, Picture
from denoscope.images.picture import Resample
from denoscope.sites import Watch


@dataclass(frozen=True)
class EncoderRecipe:
    """What to read: site, picture size and filter, all decided."""

    site: str
    size: Size
    preset: str | None = None
    resample: Resample = "bicubic"


def encoder_recipe(
    encoder: Encoder,
    preset: str | None = None,
    site: str | None = None,
    size: Size | None = None,
    resample: Resample | None = None,
    **others: Any,
) -> EncoderRecipe:
    """The encoder's preset ("semantic" unless said) with whatever is given put in its place.

    Raises InputError for unknown presets and sites, for sites that are no maps of features, and for what only denoisers have
    (t, ensemble, prompt, noise …).
    """
    if given := [name for name, value in others.items() if value is not None]:
        raise InputError(f"{encoder.name} is an encoder, which has no use for {given[0]}; leave it out.")
    name = preset or "semantic"
    if name not in encoder.presets:
        raise InputError(
            f"There is no preset {name!r} for {encoder.name}; choose one of {', '.join(encoder.presets or NAMES)}."
        )
    chosen = {"site": site, "size": size, "resample": resample}
    own = {key: value for key, value in encoder.presets[name].items() if key in chosen}
    settings = {**own, **{key: value for key, value in chosen.items() if value is not None}}
    if site is not None:
        _features_at(encoder, [site])
    return EncoderRecipe(**settings, preset=name)


def _features_at(encoder: Encoder, sites: Sequence[str]) -> None:
    """InputError unless features can be read at the sites."""
    Watch(encoder, sites)  # names them if they are unknown
    if maps := [one.name for one in encoder.sites(sizes=False) if one.kind == "map" and one.name in sites]:
        raise InputError(f"{maps[0]} is no map of features; choose a block, query, key, value, feed_forward or out.")


@dataclass(frozen=True, eq=False)
class EncoderFeatures:
    """Features of an encoder at a recipe, an `Extractor`. An encoder is told no prompt; one that is given is not used."""

    encoder: Encoder
    recipe: EncoderRecipe

    @property
    def name(self) -> str:
        return self.encoder.name

    def describe(self) -> dict[str, Any]:
        dtype = str(self.encoder.dtype).removeprefix("torch.")
        weights = weights_digest(self.encoder.network)
        return {"model": self.name, "weights": weights, "dtype": dtype, **asdict(self.recipe)}

    def __call__(self, picture: Picture, prompt: str | int | None = None) -> FeatureMap:
        return self.at([self.recipe.site], picture)[self.recipe.site]

    def at(self, sites: Sequence[str], picture: Picture, prompt: str | int | None = None) -> dict[str, FeatureMap]:
        """Several sites from the same forward pass."""
        recipe, encoder = self.recipe, self.encoder
        if isinstance(recipe.size, str) and "+" in recipe.size:
            several = [
                EncoderFeatures(encoder, replace(recipe, size=size)).at(sites, picture)
                for size in recipe.size.split("+")
            ]
            return {site: concatenate([part[site] for part in several]) for site in sites}
        _features_at(encoder, sites)
        size = resolve_size(recipe.size, picture.size, encoder.multiple, encoder.minimum)
        with torch.no_grad(), Watch(encoder, sites) as seen:
            encoder.forward(picture.resized(size, recipe.resample)[None])
        return {site: self._map(site, seen[site][0].float(), size, picture) for site in sites}

    def _map(self, site: str, values: torch.Tensor, size: tuple[int, int], picture: Picture) -> FeatureMap:
        if self.encoder.canvas is not None:  # the picture is the upper left part, and its sides are whole cells
            stride = self.encoder.canvas / values.shape[-1]
            values = values[:, : round(size[1] / stride), : round(size[0] / stride)].contiguous()
        if not values.isfinite().all():
            raise InputError(
                f"The features are not finite in {self.encoder.dtype}; load the model in bfloat16 or float32."
            )
        made = {
            **self.describe(),
            "site": site,
            "size": list(size),
            "picture": str(picture.path) if picture.path else None,
            "versions": dict(versions()),
        }
        frame = Frame.of(picture.size).resize(size).resize((values.shape[2], values.shape[1]))
        return FeatureMap(values, frame, made, picture)
