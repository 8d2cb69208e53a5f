"""Label propagation: soft labels of the first frame of a video carried through it by the similarity of features.

The temporal protocol of DIFT (Tang et al., NeurIPS 2023, arXiv 2306.03881, section 5.3), which is DINO's (Caron et al., arXiv
2104.14294) with other numbers. Per target cell, over all cells of the context frames inside a square window:

    a = exp(cos(f_source, f_target) / temperature), all but the k largest set to 0, divided by their sum
    label = sum of a * label of the source

The published code multiplies every target cell with every cell of every context frame, then multiplies by the window, and
holds three copies of that matrix. Here a block of target cells meets the cells inside its window alone, one context frame at
a time; only the best of all frames at each place is searched for the k largest, since no other place can hold them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denoscope.errors import InputError

Labels = Float[Tensor, "classes height width"]


def propagate_labels(
    features: Iterable[Tensor],
    first: Labels,
    *,
    context: int = 28,
    radius: int = 15,
    topk: int = 15,
    temperature: int | float = 0.2,
    chunk: int | None = None,
) -> Iterator[Labels]:
    """Soft labels of every frame, the given ones of the first frame included, one at a time as the features come.

    features: [channels, height, width] of every frame, taken one by one; of the past only what the context needs is kept.
    first: soft (or one-hot) labels of the first frame's cells.
    context: how many of the last predicted frames are sources, besides the first frame.
    radius: of the square window in feature cells; 0 for the whole frame.
    topk: how many sources a target cell listens to; sources tied with the last of them stay. Where the window holds fewer,
        all are kept.
    chunk: side in cells of the blocks of target cells that are computed at once; the result does not depend on it.

    Columns of the affinity sum to 1: soft labels that sum to 1 per cell go on doing so.

    Raises InputError for settings that make no sense, and for features that are not finite or change their shape.
    """
    if context < 0 or radius < 0:
        raise InputError(f"Context frames and radius must be 0 or more, not {context} and {radius}.")
    if topk < 1 or not 0 < temperature < float("inf"):
        raise InputError(f"topk must be at least 1 and the temperature positive, not {topk} and {temperature}.")
    if chunk is not None and chunk < 1:
        raise InputError(f"Blocks of target cells need a side of at least 1 cell, not {chunk}.")
    if first.ndim != 3 or not len(first) or not first.isfinite().all():
        raise InputError(f"The first labels must be [classes, height, width], finite, not {list(first.shape)}.")
    return _propagated(features, first, context, radius, topk, float(temperature), chunk)


def _propagated(
    features: Iterable[Tensor],
    first: Labels,
    context: int,
    radius: int,
    topk: int,
    temperature: float,
    chunk: int | None,
) -> Iterator[Labels]:
    start: tuple[Tensor, Tensor] | None = None
    queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    for number, values in enumerate(features):
        if values.ndim != 3 or values.shape[1:] != first.shape[1:]:
            raise InputError(
                f"Frame {number} has features {list(values.shape)} but the first labels are {list(first.shape)}; "
                "all frames and the labels need the same cells."
            )
        if start and values.shape[0] != start[0].shape[2]:
            raise InputError(f"Frame {number} has {values.shape[0]} channels but the first {start[0].shape[2]}.")
        if not values.isfinite().all():
            raise InputError(f"The features of frame {number} are not finite; compute them in float32 or bfloat16.")
        target = torch.nn.functional.normalize(values.float(), dim=0).permute(1, 2, 0).contiguous()
        if start is None:
            start = target, first.to(target)
            yield start[1]
            continue
        known = [start, *queue]
        block = chunk or (16 if target.is_cuda else 8)
        labels = torch.stack([label for _, label in known])
        soft = _step(target, [source for source, _ in known], labels, radius, topk, temperature, block)
        queue.append((target, soft))
        yield soft


def _step(
    target: Float[Tensor, "height width channels"],
    sources: Sequence[Float[Tensor, "height width channels"]],
    labels: Float[Tensor, "context classes height width"],
    radius: int,
    topk: int,
    temperature: float,
    block: int,
) -> Labels:
    """Labels of one frame from its unit features, and those and the labels of its context."""
    height, width, _ = target.shape
    reach = radius or max(height, width)
    soft = labels.new_empty(labels.shape[1:])
    ys, xs = (torch.arange(n, device=target.device) for n in (height, width))
    for y in range(0, height, block):
        for x in range(0, width, block):
            rows, columns = slice(y, min(height, y + block)), slice(x, min(width, x + block))
            top, left = max(0, y - reach), max(0, x - reach)
            around = slice(top, rows.stop + reach), slice(left, columns.stop + reach)
            queries = target[rows, columns].flatten(0, 1).mT
            near_y = (ys[around[0], None] - ys[rows]).abs() <= reach
            near_x = (xs[around[1], None] - xs[columns]).abs() <= reach
            inside = (near_y[:, None, :, None] & near_x[None, :, None, :]).flatten(2).flatten(0, 1)
            cosines = queries.new_empty(len(sources), *inside.shape)
            for source, out in zip(sources, cosines, strict=True):
                torch.mm(source[around].flatten(0, 1), queries, out=out)
            given = labels[:, :, around[0], around[1]].flatten(2)
            found = _weighted(cosines, inside, given, topk, temperature)
            soft[:, rows, columns] = found.view(len(soft), rows.stop - y, columns.stop - x)
    return soft


def _weighted(
    cosines: Float[Tensor, "context places cells"],
    inside: Bool[Tensor, "places cells"],
    labels: Float[Tensor, "context classes places"],
    topk: int,
    temperature: float,
) -> Float[Tensor, "classes cells"]:
    """Labels of target cells: `places` are cells of each context frame, of which those `inside` its window count."""
    best = cosines.amax(0).masked_fill_(~inside, -torch.inf).mT.contiguous()
    # the k largest values lie at the k places with the largest best value, or at places tied with the last of these
    kept = best.topk(min(topk, best.shape[1])).values[:, -1:]
    most = int(((best >= kept) & (best > -torch.inf)).sum(1).max())
    at = best.topk(most)
    index = at.indices.mT
    values = cosines.gather(1, index.expand(len(cosines), -1, -1)).masked_fill_(at.values.mT == -torch.inf, -torch.inf)
    flat = values.flatten(0, 1)
    threshold = flat.topk(min(topk, len(flat)), dim=0).values[-1]
    weights = flat.masked_fill_(flat < threshold, -torch.inf).div_(temperature).softmax(0).view_as(values)
    there = labels[:, :, index.flatten()].unflatten(2, index.shape)
    return torch.einsum("npc,nkpc->kc", weights, there)
