"""Content shift: how far a model's features have drifted from the picture, and what a technique does about it.

Meng et al., "Suppress Content Shift: Better Diffusion Features via Off-the-Shelf Generation Techniques", NeurIPS 2024
(arXiv 2410.06719), eq. 1 and 2, with Lap the Laplacian of every channel and the norm over channels:

    diff(FEAT) = sum_ij | |Lap(FEAT_ref)_ij| - |Lap(FEAT)_ij| |        Score = (diff_anchor - diff) / diff_anchor

FEAT_ref are the features of the same picture and site at t = 0, the anchor is one of deliberately stronger shift: Score is 1
for the reference itself, 0 for what has shifted as much as the anchor, and negative beyond. No code of it was released, and the
paper leaves open the stencil and its border, how the reference is conditioned, the anchor, and the noise: `shift` chooses, and
its results say how. Here is the math alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from denoscope.errors import InputError

Values = Float[Tensor, "channels height width"]
Map = Float[Tensor, "_ _ _"]  # likewise, of any size
Structure = Float[Tensor, "_ _"]
ROUNDING = 1e-7  # of the reference's own Laplacian: a smaller anchor is the reference, but for the rounding of float32


def laplacian(values: Values, neighbours: int = 4, padding: str = "replicate") -> Values:
    """The Laplacian of every channel, in float64: [0 1 0; 1 -4 1; 0 1 0], or with 8 neighbours [1 1 1; 1 -8 1; 1 1 1].

    padding: "replicate" (a constant has none at the border either) or "zero".
    """
    check_options(neighbours, padding)
    h, w = values.shape[1:]
    exact = values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)
    padded = F.pad(exact, (1, 1, 1, 1), mode="constant" if padding == "zero" else "replicate")
    around = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1) and (neighbours == 8 or 1 in (y, x))]
    return sum((padded[:, y : y + h, x : x + w] for y, x in around), torch.zeros_like(exact)) - neighbours * exact


def structure(values: Values, neighbours: int = 4, padding: str = "replicate", standardise: bool = False) -> Structure:
    """|Lap|, the norm over channels: what is left of a feature map to be compared. float64.

    standardise: every channel first has mean 0 and standard deviation 1 over the map, so that all weigh alike (channels without
    variance are 0).

    Raises InputError for features that are not finite.
    """
    if not values.isfinite().all():
        raise InputError("The features are not finite; load the model in bfloat16 or float32.")
    if standardise:
        values = values.double() if values.device.type != "mps" else values.cpu().double()
        spread = values.std((1, 2), correction=0, keepdim=True)
        varies = spread > 1e-7 * values.abs().amax((1, 2), keepdim=True)
        values = torch.where(varies, (values - values.mean((1, 2), keepdim=True)) / spread, 0.0)
    return laplacian(values, neighbours, padding).norm(dim=0)


def check_options(neighbours: int, padding: str) -> None:
    if neighbours not in (4, 8):
        raise InputError(f"The Laplacian has 4 or 8 neighbours, not {neighbours}.")
    if padding not in ("replicate", "zero"):
        raise InputError(f'The padding is "replicate" or "zero", not {padding!r}.')


def diff(ref: Map, feat: Map, normalise: bool = False, **options: Any) -> float:
    """Eq. 1. normalise: divided by the sum of |Lap(ref)|, so that sites can be compared. options: of `structure`."""
    one, two = (structure(values, **options) for values in _alike(ref, feat))
    total = difference(one, two)
    return float(normalised([total], [one.sum().item()])[0]) if normalise else total


def score(ref: Map, feat: Map, anchor: Map, **options: Any) -> float:
    """Eq. 2. options: of `structure`.

    Raises InputError where the score is undefined: the anchor is no further from the reference than rounding is.
    """
    one, two = (structure(values, **options) for values in _alike(ref, feat))
    away = difference(one, structure(_alike(ref, anchor)[1], **options))
    defined([away], [one.sum().item()])
    return float(scores([difference(one, two)], [away])[0])


def difference(ref: Structure, feat: Structure) -> float:
    """Eq. 1, of structures."""
    return (ref - feat).abs().sum().item()


def normalised(diffs: Sequence[float], norms: Sequence[float]) -> np.ndarray:
    """Eq. 1 as a share of the reference's own structure, so that sites can be compared. norms: sums of |Lap(ref)|.

    Raises InputError for a reference without structure.
    """
    own = np.asarray(norms)
    if not own.all():
        raise InputError("The reference has no structure (one vector everywhere), so nothing can be divided by it.")
    return np.asarray(diffs) / own


def scores(diffs: Sequence[float], anchors: Sequence[float]) -> np.ndarray:
    """Eq. 2, for every draw of the noise."""
    away = np.asarray(anchors)
    return (away - np.asarray(diffs)) / away


def defined(anchors: Sequence[float], norms: Sequence[float]) -> None:
    """InputError where the score is undefined. norms: sums of |Lap(ref)|."""
    if any(away <= ROUNDING * norm for away, norm in zip(anchors, norms, strict=True)):
        raise InputError(
            "The score is undefined: the anchor has not shifted from the reference (a picture of one colour, or an anchor with "
            "the timestep and prompt of the reference); choose another anchor."
        )


def _alike(ref: Map, feat: Map) -> tuple[Map, Map]:
    if ref.shape != feat.shape:
        raise InputError(
            f"Features of {list(feat.shape)} cannot be compared with a reference of {list(ref.shape)}; read the same site at "
            "the same picture size."
        )
    return ref, feat
