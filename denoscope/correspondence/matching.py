"""Point transfer and mutual nearest neighbours on feature maps (DIFT, arXiv 2306.03881, sections 5.1 and 5.2)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denoscope.correspondence.matches import Matches
from denoscope.correspondence.mirroring import RegionLike, align_flip, mirror, unmirrored
from denoscope.errors import InputError
from denoscope.features import FeatureMap, as_extractor, paired
from denoscope.features.sets import check_words, worded
from denoscope.images import Frame, Points, PointsLike, read

TIE = 1e-6  # cosines this close to the best are ties, broken by row-major order; float noise must not decide
_SCORES_AT_ONCE = 1 << 24  # cosines held at a time (64 MiB)
_COMPARED = ("model", "t", "site")


def transfer(
    source: FeatureMap,
    target: FeatureMap,
    points: PointsLike,
    soft_window: float = 0.0,
    temperature: float = 0.02,
    cycle: bool = False,
    force: bool = False,
) -> Matches:
    """For every source point the target pixel with the most similar feature.

    points: (x, y) in pixels of the source picture. The score is the cosine between the interpolated features; the best pixel
    of the whole target picture wins, the first in row-major order among those within 1e-6 of the best.
    soft_window: when positive, the softmax-weighted mean position (`temperature`) within this many feature cells of the best
        pixel replaces it (soft-argmax, as in GeoAware-SC, arXiv 2311.17034).
    cycle: also transfer every match back and report its distance in pixels from the point it started from.
    force: compare maps made with different models, timesteps, sites or (attention features) prompts anyway.

    Joint features with a PCA are reduced together first (see `features.paired`).

    Raises InputError for points outside the picture and for maps that cannot be compared.
    """
    comparable(source, target, force)
    source, target = paired(source, target)
    if not (0 <= soft_window < float("inf") and temperature > 0):
        raise InputError("The soft-argmax window must be 0 or more feature cells, and its temperature positive.")
    points = source.frame.inside(points)
    vectors = source.at(points)
    if zero := int((vectors.norm(dim=1) == 0).sum()):
        warnings.warn(f"{zero} of {len(points)} features have zero length; their similarity is 0.", stacklevel=2)
    found, scores = _best(target, vectors, soft_window, temperature)
    back = None
    if cycle:
        returned, _ = _best(source, target.at(found), soft_window, temperature)
        back = (returned - points).norm(dim=1)
    return Matches(points, found, scores, back, {**target.recipe, "soft_window": soft_window}, source, target)


def _best(
    target: FeatureMap, vectors: Float[Tensor, "points channels"], soft_window: float, temperature: float
) -> tuple[Points, Float[Tensor, " points"]]:
    w, h = target.frame.picture
    found, scores = [], []
    for some in vectors.split(max(1, _SCORES_AT_ONCE // (w * h))):
        similarity = target.similarity(some)
        flat = similarity.flatten(1)
        best = flat.amax(1)
        index = (flat >= best[:, None] - TIE).to(torch.uint8).argmax(1)
        where = torch.stack([index % w, index // w], 1).double().cpu()
        if soft_window > 0:
            where = _soft_argmax(similarity, where, target, soft_window, temperature)
        found.append(where)
        scores.append(best.cpu())
    return torch.cat(found), torch.cat(scores)


def _soft_argmax(
    similarity: Float[Tensor, "points height width"], best: Points, target: FeatureMap, cells: float, temperature: float
) -> Points:
    """Softmax-weighted mean position in a window of +-`cells` feature cells around each best pixel."""
    h, w = similarity.shape[1:]
    rx, ry = (max(1, round(cells / scale)) for scale in target.frame.scale)
    means = []
    for plane, (x, y) in zip(similarity, best.long().tolist(), strict=True):
        left, top, right, bottom = max(0, x - rx), max(0, y - ry), min(w, x + rx + 1), min(h, y + ry + 1)
        weights = (plane[top:bottom, left:right].double().cpu() / temperature).flatten().softmax(0)
        weights = weights.view(bottom - top, right - left)
        ys, xs = torch.arange(top, bottom).double(), torch.arange(left, right).double()
        means.append(torch.stack([(weights.sum(0) * xs).sum(), (weights.sum(1) * ys).sum()]))
    return torch.stack(means)


def comparable(source: FeatureMap, target: FeatureMap, force: bool = False) -> None:
    """InputError unless both maps have the same channels and, but for `force`, were made in the same way."""
    if source.values.shape[0] != target.values.shape[0]:
        raise InputError(
            f"The maps have {source.values.shape[0]} and {target.values.shape[0]} channels; make both alike."
        )
    for key in () if force else _COMPARED:
        one, other = source.recipe.get(key), target.recipe.get(key)
        if one != other:
            raise InputError(
                f"The maps were made with different {key} ({one} and {other}); pass force=True if it is meant."
            )
    for (name, one), (_, other) in () if force else zip(worded(source.recipe), worded(target.recipe), strict=False):
        check_words([name], (one, other), "make both maps with one prompt")


def transfer_aligned(
    source: FeatureMap,
    turned: FeatureMap,
    target: FeatureMap,
    points: PointsLike,
    region: RegionLike | None = None,
    partners: Sequence[int] | None = None,
    **options: Any,
) -> Matches:
    """`transfer` from the better of a picture's features and its mirror image's, as GeoAware-SC aligns poses at test time.

    turned: features of the mirror image, laid back over the picture (`unmirrored(extract(mirror(picture)), picture)`).
    region: where the object lies in the source, see `align_flip`. `options` are those of `transfer`.
    partners: for annotated keypoints, which of the points is each one's counterpart on the other side (`counterparts`): in the
        mirror image the left eye is where the picture has its right one. -1 takes the picture itself for that point.
    `recipe["mirrored"]` says which it was.
    """
    aligned = align_flip(source, turned, target, region)
    if not aligned.mirrored or partners is None:
        made = transfer(aligned.source, target, points, **options)
        return replace(made, recipe={**made.recipe, "mirrored": aligned.mirrored})
    asked = source.frame.inside(points)
    index = torch.tensor(list(partners))
    if len(index) != len(asked) or not bool(((index >= -1) & (index < len(asked))).all()):
        raise InputError(f"{len(asked)} points need as many partners, each from -1 to {len(asked) - 1}.")
    own = transfer(source, target, asked, **options)
    other = transfer(turned, target, asked[index.clamp_min(0)], **options)
    lone = index < 0

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(lone if a.ndim == 1 else lone[:, None], a, b)

    return replace(
        other,
        source_points=asked,
        points=chosen(own.points, other.points),
        scores=chosen(own.scores, other.scores),
        cycle=None if own.cycle is None or other.cycle is None else chosen(own.cycle, other.cycle),
        recipe={**other.recipe, "mirrored": True},
    )


def match(
    model: Any,
    source: Any,
    target: Any,
    points: PointsLike,
    *,
    soft_window: float = 0.0,
    temperature: float = 0.02,
    cycle: bool = False,
    flip: bool = False,
    region: RegionLike | None = None,
    **options: Any,
) -> Any:
    """`features` of both pictures and `transfer` in one call; a list of targets gives a list of Matches.

    model: a Denoiser, an Encoder, or any Extractor. `options` are those of `denoscope.features`. The source's features are made
    once.
    flip: also try the mirror image of the source, and take for each target the one that is more like it (see `align_flip`);
        `Matches.recipe["mirrored"]` says which. region: where the object lies in the source, a mask [height, width] or a box
        (x1, y1, x2, y2), for that choice; by default everywhere.
    """
    if region is not None and not flip:
        raise InputError("A region is only for the choice that flip makes; ask for flip too.")
    extract = as_extractor(model, **options)
    source, many = read(source), isinstance(target, list | tuple)
    targets = [read(one) for one in (target if many else [target])]
    Frame.of(source.size).inside(points)  # before the expensive part
    first = extract(source)
    turned = unmirrored(extract(mirror(source)), source) if flip else None

    def to(one: FeatureMap) -> Matches:
        if turned is None:
            return transfer(first, one, points, soft_window, temperature, cycle)
        options = {"soft_window": soft_window, "temperature": temperature, "cycle": cycle}
        return transfer_aligned(first, turned, one, points, region, **options)

    found = [to(extract(one)) for one in targets]
    return found if many else found[0]


class Mutual(NamedTuple):
    """Rows of A and B that are each other's nearest neighbour, and their similarity."""

    a: Int[Tensor, " matches"]
    b: Int[Tensor, " matches"]
    scores: Float[Tensor, " matches"]


def mutual_nearest(
    a: Float[Tensor, "n channels"],
    b: Float[Tensor, "m channels"],
    metric: str = "cosine",
    chunk: int = 4096,
) -> Mutual:
    """Mutual nearest neighbours of two sets of descriptors, `chunk` rows of the score matrix at a time.

    metric: "cosine" (`S = a b^T` of unit vectors) or "l2" (`S = -|a - b|^2`). A row keeps its first best partner.
    """
    if metric not in ("cosine", "l2"):
        raise InputError(f"Unknown metric {metric!r}; use 'cosine' or 'l2'.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise InputError(
            f"Descriptors must be [N, C] and [M, C], not empty; these are {list(a.shape)} and {list(b.shape)}."
        )
    if metric == "cosine":
        a, b = torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)
    forward, best = [], a.new_full((len(b),), -torch.inf)
    backward = torch.zeros(len(b), dtype=torch.long, device=a.device)
    scores = []
    for start in range(0, len(a), chunk):
        rows = a[start : start + chunk]
        s = rows @ b.mT
        if metric == "l2":
            s = 2 * s - (rows**2).sum(1)[:, None] - (b**2).sum(1)
        value, index = s.max(1)
        forward.append(index)
        scores.append(value)
        value, index = s.max(0)
        better = value > best
        best, backward = torch.where(better, value, best), torch.where(better, index + start, backward)
    nn12 = torch.cat(forward)
    keep: Bool[Tensor, " n"] = backward[nn12] == torch.arange(len(a), device=a.device)
    return Mutual(keep.nonzero()[:, 0], nn12[keep], torch.cat(scores)[keep])
