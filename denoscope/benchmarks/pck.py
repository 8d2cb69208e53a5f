"""Percentage of correct keypoints, in the flavours that papers mix (SPair-71k, Min et al., arXiv 1908.10543)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from denoscope.images import Points

Threshold = Literal["bbox", "img", "kp", "kp_padded"]
THRESHOLDS: tuple[str, ...] = get_args(Threshold)


@dataclass(frozen=True)
class Pair:
    """Two annotated pictures. Boxes are (x1, y1, x2, y2), sizes (width, height), keypoints visible in both pictures.

    ids: what each keypoint is (its index in the category's list), where the data set says so.
    """

    source: str
    target: str
    category: str
    source_points: Points
    target_points: Points
    target_box: tuple[float, float, float, float]
    target_size: tuple[int, int]
    source_box: tuple[float, float, float, float] | None = None
    source_size: tuple[int, int] | None = None
    key: str = ""
    ids: tuple[int, ...] | None = None

    def threshold(self, kind: Threshold) -> float:
        """Length in pixels that alpha is a share of.

        "bbox", "img": longer side of the target's box or picture. "kp": longer side of the box around the target's keypoints.
        "kp_padded": what the evaluation of CATs (Cho et al., NeurIPS 2021) makes of it: its keypoints are padded with
        (-1, -1), so it is the largest coordinate plus 1. Too lenient; only for comparing with numbers made that way.
        """
        match kind:
            case "img":
                return float(max(self.target_size))
            case "kp" | "kp_padded":
                points = self.target_points
                if kind == "kp_padded":
                    points = torch.cat([points, points.new_full((1, 2), -1)])
                return (points.amax(0) - points.amin(0)).max().item()
        x1, y1, x2, y2 = self.target_box
        return max(x2 - x1, y2 - y1)

    def correct(self, predicted: Points, alpha: float = 0.1, kind: Threshold = "bbox") -> Bool[Tensor, " points"]:
        """|predicted - truth| / threshold <= alpha, inclusive."""
        return (predicted - self.target_points).norm(dim=1) / self.threshold(kind) <= alpha


def pck(correct: list[Bool[Tensor, " _"]]) -> tuple[float, float]:
    """(per image, per point) in percent: mean over pairs of the share right in a pair, and share over all points."""
    per_image = torch.stack([one.double().mean() for one in correct]).mean()
    return 100 * per_image.item(), 100 * torch.cat(correct).double().mean().item()
