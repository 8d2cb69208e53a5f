"""Point transfer and mutual nearest neighbours on feature maps (DIFT, arXiv 2306.03881, sections 5.1 and 5.2)."""

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denoscope.correspondence.matches import Matches
from denoscope.errors import InputError
from denoscope.features import FeatureMap, as_extractor
from denoscope.images import Points, PointsLike, read

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
    force: compare maps made with different models, timesteps or sites anyway.

    Raises InputError for points outside the picture and for maps that cannot be compared.
    """
    _comparable(source, target, force)
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


def _comparable(source: FeatureMap, target: FeatureMap, force: bool) -> None:
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


def match(
    model: Any,
    source: Any,
    target: Any,
    points: PointsLike,
    *,
    soft_window: float = 0.0,
    temperature: float = 0.02,
    cycle: bool = False,
    **options: Any,
) -> Any:
    """`features` of both pictures and `transfer` in one call; a list of targets gives a list of Matches.

    model: a Denoiser, or any Extractor. `options` are those of `denoscope.features`. The source's features are made once.
    """
    extract = as_extractor(model, **options)
    source, many = read(source), isinstance(target, list | tuple)
    targets = [read(one) for one in (target if many else [target])]
    first = extract(source)
    first.frame.inside(points)  # before the expensive part for the targets
    found = [transfer(first, extract(one), points, soft_window, temperature, cycle) for one in targets]
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
