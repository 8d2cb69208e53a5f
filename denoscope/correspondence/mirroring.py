"""Flip alignment: of a picture and its mirror image, the one that is more like another picture.

Zhang et al., "Telling Left from Right" (GeoAware-SC, CVPR 2024, arXiv 2311.17034), "adaptive pose alignment" at test time:
features tell the left side of an object from its right one badly, so a source that looks the other way is mirrored first. The
one that is nearer (mean distance of every feature of its object to the nearest target feature) wins.

Only features are mirrored, never coordinates: the features of the mirror image are laid back over the picture, so that points
stay those of the picture as the user has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from denoscope.errors import InputError
from denoscope.features import FeatureMap, paired
from denoscope.images import Picture

RegionLike = Tensor | np.ndarray | Sequence[Any]  # a mask [height, width], or a box (x1, y1, x2, y2)
_PRODUCTS_AT_ONCE = 1 << 22  # 16 MiB, which stay in the cache


def mirror(picture: Picture) -> Picture:
    """The picture with left and right exchanged: its point x is W - 1 - x of the picture. It has no path."""
    return Picture(picture.pixels.flip(2))


def unmirrored(features: FeatureMap, picture: Picture | None = None) -> FeatureMap:
    """Features of a mirror image, laid over the picture itself: at (x, y) what the mirror image has at (W - 1 - x, y).

    picture: the one that is not mirrored. Joint features keep their parts.
    """
    frame, width = features.frame, features.frame.picture[0]
    offset = features.frame.grid[0] - frame.scale[0] * width - frame.offset[0]
    changed: dict[str, Any] = {
        "values": features.values.flip(2),
        "frame": replace(frame, offset=(offset, frame.offset[1])),
        "recipe": {**features.recipe, "picture": str(picture.path) if picture is not None and picture.path else None},
        "source": picture,
    }
    if parts := getattr(features, "parts", ()):
        changed["parts"] = tuple(unmirrored(part, picture) for part in parts)
    return replace(features, **changed)


def instance_distance(source: FeatureMap, target: FeatureMap, region: RegionLike | None = None) -> float:
    """Mean over the source's cells in `region` of the Euclidean distance from a unit feature to the nearest of the target.

    region: where the object lies in the source picture, a mask or a box; by default everywhere. Raises InputError for a region
    that does not fit.
    """
    chosen = source.values.flatten(1).mT[cells_within(source, region).flatten().to(source.values.device)]
    a = torch.nn.functional.normalize(chosen.float(), dim=1)
    b = torch.nn.functional.normalize(target.values.to(a.device).float(), dim=0).flatten(1)
    # |a - b|^2 = 2 - 2 a.b for unit vectors; a vector of no length is at distance 1 from all others, as |0 - b|
    own, other = (a != 0).any(1).float(), (b != 0).any(0).float()
    rows = max(1, _PRODUCTS_AT_ONCE // b.shape[1])
    nearest = [
        (length[:, None] + other - 2 * some @ b).amin(1).clamp_min(0).sqrt()
        for some, length in zip(a.split(rows), own.split(rows), strict=True)
    ]
    return torch.cat(nearest).mean().item()


def cells_within(features: FeatureMap, region: RegionLike | None) -> Bool[Tensor, "height width"]:
    """Which cells have their centre in a mask [height, width] or box (x1, y1, x2, y2) of the picture, at least the one that is
    nearest to its middle."""
    (gw, gh), (w, h) = features.frame.grid, features.frame.picture
    if region is None:
        return torch.ones(gh, gw, dtype=torch.bool)
    try:
        given = torch.as_tensor(np.asarray(region))
    except (TypeError, ValueError):
        given = torch.empty(0, dtype=torch.bool)
    x, y = torch.meshgrid(torch.arange(gw).double(), torch.arange(gh).double(), indexing="xy")
    centres = features.frame.to_picture(torch.stack([x, y], -1).reshape(-1, 2))
    if given.shape == (4,):
        x1, y1, x2, y2 = given.double().tolist()
        if not (x1 <= x2 and y1 <= y2 and x2 >= -0.5 and y2 >= -0.5 and x1 <= w - 0.5 and y1 <= h - 0.5):
            raise InputError(f"The box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) does not lie in the picture of {w}x{h} pixels.")
        low, high = centres.new_tensor([x1, y1]), centres.new_tensor([x2, y2])
        inside = ((centres >= low) & (centres <= high)).all(1)
        middle = (low + high) / 2
    elif given.shape == (h, w):
        mask = given > 0
        if not mask.any():
            raise InputError("The region is empty; mark where the object lies.")
        at = centres.round().long()
        seen = ((at >= 0) & (at < at.new_tensor([w, h]))).all(1)
        inside = seen & mask[at[:, 1].clamp(0, h - 1), at[:, 0].clamp(0, w - 1)]
        middle = mask.nonzero().double().mean(0).flip(0)
    else:
        raise InputError(
            f"A region is a mask of {h}x{w} (height x width) or a box (x1, y1, x2, y2), not {list(given.shape)}."
        )
    if not inside.any():
        inside[(centres - middle).norm(dim=1).argmin()] = True
    return inside.view(gh, gw)


class Aligned(NamedTuple):
    """source: the better map. mirrored: whether that is the mirror image's. distance, mirrored_distance: of both."""

    source: FeatureMap
    mirrored: bool
    distance: float
    mirrored_distance: float


def align_flip(source: FeatureMap, turned: FeatureMap, target: FeatureMap, region: RegionLike | None = None) -> Aligned:
    """Of a picture's features and its mirror image's, those with the smaller `instance_distance` to the target's.

    turned: the features of the mirror image laid back over the picture: `unmirrored(extract(mirror(picture)), picture)`.
    region: where the object lies in the source picture. Equal distances leave the picture as it is.
    """
    plain, other = (instance_distance(*paired(one, target), region) for one in (source, turned))
    return Aligned(turned if other < plain else source, other < plain, plain, other)


def counterparts(ids: Sequence[int], swaps: Sequence[tuple[int, int]]) -> list[int]:
    """For each of the keypoints `ids` (their kinds), the index in `ids` of what it is in a mirror image.

    swaps: pairs of kinds that a mirror exchanges (left and right eye). Others are themselves. -1 where the counterpart is not
    among `ids`: that point cannot be looked for in the mirror image, and is left to the picture itself.
    """
    other = {**dict(swaps), **{b: a for a, b in swaps}}
    place = {kind: index for index, kind in enumerate(ids)}
    return [place.get(other.get(kind, kind), -1) for kind in ids]


def _pairs(*first: int, by: int = 1) -> tuple[tuple[int, int], ...]:
    return tuple((one, one + by) for one in first)


_LEGS = _pairs(9, 11)
_WHEELS = _pairs(10, 11, 12, 13, 14, 15, by=10)  # and fenders, all of one side and then all of the other
# left and right keypoints of SPair-71k (`kps_ids`), by category
SPAIR_SWAPS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "aeroplane": _pairs(*range(4, 22, 2)),
    "bicycle": _pairs(2, 6, 9),
    "bird": _pairs(1, 4, 7, 10, 12, 14),
    "boat": _pairs(*range(1, 13, 2)),
    "bottle": _pairs(*range(0, 10, 2)),
    "bus": (*_pairs(0, 2, 5, 16, 18, 26, 28), *_WHEELS),
    "car": (*_pairs(0, 2, 6, 16, 18, 26, 28), *_WHEELS),
    "cat": (*_pairs(0, 2, 4, 6), *_LEGS),
    "chair": _pairs(*range(0, 14, 2)),
    "cow": (*_pairs(0, 2, 4, 6), *_LEGS, *_pairs(15, 17, 19)),
    "dog": (*_pairs(0, 2, 4), *_LEGS),
    "horse": (*_pairs(0, 2, 4, 6), *_pairs(10, 12, 16, 18)),
    "motorbike": _pairs(0, 2),
    "person": (*_pairs(0, 2), *_pairs(*range(8, 20, 2))),
    "pottedplant": ((0, 2), (4, 5), (6, 8)),
    "sheep": (*_pairs(0, 2, 4, 6), *_LEGS, *_pairs(15, 17, 19)),
    "train": _pairs(*range(0, 18, 2)),
    "tvmonitor": ((0, 2), (4, 6), (3, 7), (8, 10), (12, 14), (11, 15)),
}
