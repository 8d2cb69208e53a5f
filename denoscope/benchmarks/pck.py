"""Percentage of correct keypoints, in the two flavours that papers mix (SPair-71k, Min et al., arXiv 1908.10543)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from denoscope.images import Points

Threshold = Literal["bbox", "img"]


@dataclass(frozen=True)
class Pair:
    """Two annotated pictures. Boxes are (x1, y1, x2, y2), sizes (width, height), keypoints visible in both pictures."""

    source: str
    target: str
    category: str
    source_points: Points
    target_points: Points
    target_box: tuple[float, float, float, float]
    target_size: tuple[int, int]
    source_box: tuple[float, float, float, float] | None = None
    source_size: tuple[int, int] | None = None

    def threshold(self, kind: Threshold) -> float:
        """Longer side in pixels of the target's box ("bbox") or of the target picture ("img")."""
        if kind == "img":
            return float(max(self.target_size))
        x1, y1, x2, y2 = self.target_box
        return max(x2 - x1, y2 - y1)

    def correct(self, predicted: Points, alpha: float = 0.1, kind: Threshold = "bbox") -> Bool[Tensor, " points"]:
        """|predicted - truth| / threshold <= alpha, inclusive."""
        return (predicted - self.target_points).norm(dim=1) / self.threshold(kind) <= alpha


def pck(correct: list[Bool[Tensor, " _"]]) -> tuple[float, float]:
    """(per image, per point) in percent: mean over pairs of the share right in a pair, and share over all points."""
    per_image = torch.stack([one.double().mean() for one in correct]).mean()
    return 100 * per_image.item(), 100 * torch.cat(correct).double().mean().item()
