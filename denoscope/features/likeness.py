"""How like two pictures are: PSNR, SSIM and the F1 of edges; and what the intervals of their changes say together."""

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Pixels = Float[Tensor, "3 height width"]
MARGINS = {"psnr": 0.1, "ssim": 0.005, "edge_f1": 0.01}  # dB, and shares: what is smaller counts as no change
_MOST = 100.0  # dB, of two images that are equal
VERDICTS = ("helps", "no effect", "hurts", "undecided")
FEWEST = 6  # pictures: intervals from fewer say nothing of others (tests/test_gate.py: of one picture, half are wrong)


def psnr(one: Pixels, two: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1]; equal images have 100."""
    error = (one.double() - two.double()).square().mean().item()
    return _MOST if error < 10 ** (-_MOST / 10) else -10 * float(np.log10(error))


def ssim(one: Pixels, two: Pixels) -> float:
    """Structural similarity (Wang et al., 2004) of pixels in [0, 1], Gaussian window of 11 pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(one.double()[None], two.double()[None], data_range=1.0))  # pyright: ignore


def edge_f1(one: Pixels, two: Pixels, low: int | float = 100, high: int | float = 200, tolerance: int = 1) -> float:
    """F1 of the Canny edges of two images: an edge pixel counts where the other image has one at most `tolerance` pixels away.

    Two images without edges have 1, one of them without edges 0.
    """
    a, b = (edges(pixels, low, high) for pixels in (one, two))
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    near = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    around_a, around_b = (cv2.dilate(found.numpy().astype(np.uint8), near) > 0 for found in (a, b))
    precision, recall = around_a[b.numpy()].mean(), around_b[a.numpy()].mean()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def edges(pixels: Pixels, low: int | float = 100, high: int | float = 200) -> Bool[Tensor, "height width"]:
    """Canny edges of pixels in [0, 1], with thresholds of 0..255 as the published code has them."""
    image = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    return torch.from_numpy(cv2.Canny(image, low, high) > 0)


MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {"psnr": psnr, "ssim": ssim, "edge_f1": edge_f1}


def verdict(
    changes: Mapping[str, tuple[float, float] | None],
    margins: Mapping[str, int | float] | None = None,
    pictures: int = FEWEST,
) -> str:
    """What intervals of the change of each measure, over so many pictures, say together.

    An interval within the margins around 0 is no change. "no effect": all of them are that. "helps": at least two others lie
    above 0 and none below. "hurts": at least two lie below 0 and none above. Anything else, anything without an interval, and
    anything from fewer than `FEWEST` pictures, is "undecided".
    """
    margins = {**MARGINS, **(margins or {})}
    if pictures < FEWEST:
        return "undecided"
    signs = []
    for name, span in changes.items():
        if span is None:
            return "undecided"
        small = -margins[name] <= span[0] and span[1] <= margins[name]
        signs.append("none" if small else "up" if span[0] > 0 else "down" if span[1] < 0 else "open")
    if set(signs) == {"none"}:
        return "no effect"
    up, down = signs.count("up"), signs.count("down")
    return "helps" if up >= 2 and not down else "hurts" if down >= 2 and not up else "undecided"
