"""Pictures whose correspondences are known, and features that can tell their pixels apart without a network."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.nn import functional as F

import denoscope as ds
from denoscope.images import Frame


def textured(seed: int, width: int, height: int) -> ds.Picture:
    """Coloured noise at several scales: no place looks like another."""
    rng = np.random.default_rng(seed)
    image = sum(cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), s) * s for s in (1.5, 3, 6))
    image = (image - image.min()) / (image.max() - image.min())
    return ds.read((image * 255).round().astype(np.uint8))


def homography_pair(seed: int, size: tuple[int, int], strength: float = 0.08):
    """A picture, the same under a mild homography, and that homography."""
    w, h = size
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]], np.float32)
    moved = (corners + rng.uniform(-strength, strength, (4, 2)) * size).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(corners, moved)
    one = textured(seed, w, h)
    image = cv2.warpPerspective(np.array(one.image()), matrix, size, borderMode=cv2.BORDER_REFLECT)
    return one, ds.read(image), matrix


@dataclass(frozen=True)
class Patches:
    """An extractor: the colours in a window of `reach` cells around every cell of `stride` pixels, without their mean."""

    stride: int = 2
    reach: int = 2

    @property
    def name(self) -> str:
        return "patches"

    def describe(self):
        return {"model": self.name, "stride": self.stride, "reach": self.reach}

    def __call__(self, picture, prompt=None):
        grid = tuple(max(1, side // self.stride) for side in picture.size)
        small = picture.resized(grid)[None]
        side = 2 * self.reach + 1
        values = F.unfold(F.pad(small, [self.reach] * 4, mode="replicate"), side)[0].unflatten(1, grid[::-1])
        values = values - values.mean(0)
        frame = Frame.of(picture.size).resize(grid)
        return ds.FeatureMap(torch.nan_to_num(values), frame, self.describe(), picture)
