"""Several feature maps of one picture as one.

sd-dino (Zhang et al., "A Tale of Two Features", NeurIPS 2023, arXiv 2305.15347) and GeoAware-SC (arXiv 2311.17034) join layers
of Stable Diffusion, each reduced by a PCA of both pictures, with DINOv2: of unit length, weighted, one beside the other. (They
scale the layers of Stable Diffusion to unit length together; here every part is by itself.)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from denoscope.errors import InputError
from denoscope.features.feature_map import FeatureMap
from denoscope.images import Frame, atomically


def concatenate(maps: Sequence[FeatureMap], weights: Sequence[int | float] | None = None) -> FeatureMap:
    """Maps of one picture, each of unit length in every cell, enlarged (bilinear) to the finest grid and concatenated.

    weights: what each is multiplied by; by default 1. Where interpolation does not matter, the cosine between two such
    features is the mean of the cosines of their parts, weighted by the squares of the weights. The recipe lists the parts'
    sizes.

    Raises InputError for maps of different pictures, or that do not cover the whole picture, and for weights that do not fit.
    """
    if len({fm.frame.picture for fm in maps}) != 1:
        raise InputError("Only maps of one picture can be joined.")
    factors = check_weights(weights, len(maps))
    finest = max(maps, key=lambda fm: fm.values.shape[1] * fm.values.shape[2])
    w, h = finest.frame.picture
    corners = torch.tensor([[0, 0], [w, h]], dtype=torch.float64) - 0.5
    for fm in maps:
        whole = torch.tensor([(0, 0), fm.frame.grid], dtype=torch.float64) - 0.5
        if not torch.allclose(fm.frame.to_grid(corners), whole, atol=1e-6):
            raise InputError("Only maps that cover the whole picture can be joined.")
    size = finest.values.shape[1:]
    parts = [
        F.interpolate(F.normalize(fm.values, dim=0)[None], size, mode="bilinear", align_corners=False)[0] for fm in maps
    ]
    return replace(
        finest,
        values=torch.cat([F.normalize(part, dim=0).to(parts[0]) * w for part, w in zip(parts, factors, strict=True)]),
        recipe={**finest.recipe, "size": [fm.recipe.get("size") for fm in maps]},
    )


def check_weights(weights: Sequence[int | float] | None, count: int) -> tuple[float, ...]:
    """One weight a part; InputError unless they are so many, finite, not negative and not all 0."""
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise InputError(f"{count} parts need {count} weights, not {len(weights)}.")
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise InputError(f"Weights must be finite, not negative and not all 0, unlike {list(weights)}.")
    return tuple(map(float, weights))


@dataclass(frozen=True, eq=False)
class Joined(FeatureMap):
    """A map made of several. parts: as they were. weights, components (its `pca`): see `features.joint.Joint`.

    With components, two such maps are reduced together before they are compared (`paired`); until then the values are whole.
    """

    parts: tuple[FeatureMap, ...] = ()
    weights: tuple[float, ...] = ()
    components: int | None = None

    @classmethod
    def of(
        cls,
        parts: Sequence[FeatureMap],
        weights: Sequence[int | float] | None = None,
        components: int | None = None,
        name: str | None = None,
    ) -> "Joined":
        whole = concatenate(parts, weights)
        recipe = {
            "model": name or "+".join(str(part.recipe.get("model")) for part in parts),
            "site": [part.recipe.get("site") for part in parts],
            "t": [part.recipe.get("t") for part in parts],
            "size": whole.recipe["size"],
            "weights": list(check_weights(weights, len(parts))),
            "pca": components,
            "picture": parts[0].recipe.get("picture"),
            "parts": [part.recipe for part in parts],
        }
        return cls(
            whole.values,
            whole.frame,
            recipe,
            parts[0].source,
            tuple(parts),
            check_weights(weights, len(parts)),
            components,
        )

    def save(self, path: str | Path) -> Path:
        """Write the parts, from which `FeatureMap.load` makes the whole again."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"Features are saved as .safetensors, not {path.suffix or 'a file without suffix'}.")
        meta = {"frame": json.dumps(self.frame.to_dict()), "recipe": json.dumps(self.recipe)}
        meta["joined"] = json.dumps([part.frame.to_dict() for part in self.parts])
        values = {f"part.{k}": part.values.contiguous().cpu() for k, part in enumerate(self.parts)}
        return atomically(path, lambda beside: save_file(values, beside, metadata=meta))

    @classmethod
    def restored(cls, values: Sequence[torch.Tensor], frames: Sequence[Frame], recipe: dict[str, Any]) -> "Joined":
        parts = [FeatureMap(*one) for one in zip(values, frames, recipe["parts"], strict=True)]
        return replace(cls.of(parts, recipe["weights"], recipe["pca"]), recipe=recipe)


def reduce_together(maps: Sequence[Joined], dims: int) -> list[FeatureMap]:
    """Every part of joined maps reduced to the main `dims` components of the cells of all maps together, and joined again.

    The components are those of the raw features, centred, as sd-dino has them (which finds them by a randomised method; here
    they are exact). Parts with fewer channels, or cells, keep as many.

    Raises InputError unless the maps have the same parts.
    """
    if dims < 1:
        raise InputError(f"A PCA keeps at least 1 component, not {dims}.")
    channels = {tuple(part.values.shape[0] for part in fm.parts) for fm in maps}
    if len(channels) != 1 or not channels.copy().pop():
        raise InputError("Only joint features of the same parts can be reduced together.")
    reduced: list[list[FeatureMap]] = [[] for _ in maps]
    for parts in zip(*(fm.parts for fm in maps), strict=True):
        exact = torch.float32 if parts[0].values.device.type == "mps" else torch.float64
        cells = torch.cat([part.values.flatten(1).mT.to(exact) for part in parts])
        cells = cells - cells.mean(0)
        scores = _scores(cells, dims).to(parts[0].values.dtype)
        for k, (part, some) in enumerate(
            zip(parts, scores.split([part.values[0].numel() for part in parts]), strict=True)
        ):
            reduced[k].append(replace(part, values=some.mT.unflatten(1, part.values.shape[1:]).contiguous()))
    return [
        replace(concatenate(parts, fm.weights), recipe=fm.recipe, source=fm.source)
        for parts, fm in zip(reduced, maps, strict=True)
    ]


def _scores(cells: torch.Tensor, dims: int) -> torch.Tensor:
    """[cells, dims] main components of centred cells, by the smaller of their two products: channels can be ten thousands."""
    if cells.shape[0] >= cells.shape[1]:
        _, vectors = torch.linalg.eigh(cells.mT @ cells)  # ascending
        return cells @ vectors.flip(1)[:, :dims]
    squares, vectors = torch.linalg.eigh(cells @ cells.mT)
    return (vectors * squares.clamp_min(0).sqrt()).flip(1)[:, :dims]


def paired(one: FeatureMap, two: FeatureMap) -> tuple[FeatureMap, FeatureMap]:
    """Two maps as they are compared with each other: joint ones with a PCA are reduced together, others are as they were."""
    if isinstance(one, Joined) and isinstance(two, Joined) and one.components is not None:
        first, second = reduce_together([one, two], one.components)
        return first, second
    return one, two
