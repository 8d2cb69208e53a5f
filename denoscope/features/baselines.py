"""Features that know nothing: colour patches, SIFT and the position itself. What a model's features must beat.

They are `Extractor`s without a network, so every verb and every benchmark takes them where it takes a model. A picture
without structure (one colour) has features of zero length, whose similarity is 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from denoscope.errors import InputError
from denoscope.features.dift import Size, resolve_size
from denoscope.features.feature_map import FeatureMap
from denoscope.features.presets import NAMES
from denoscope.images import Frame, Picture

Grid = tuple[int, int]  # (width, height) in cells
_FINEST, _COARSEST = 512, 64  # cells of a map of positions: of its longer side at most, of each at least


def rgb(picture: Picture, size: tuple[int, int], grid: Grid) -> Float[Tensor, "147 height width"]:
    """7 x 7 patches of the picture shrunk to one pixel per cell, without their mean."""
    small = picture.resized(grid)
    patches = F.unfold(F.pad(small[None], (3, 3, 3, 3), mode="replicate"), 7)[0]
    patches = patches - patches.mean(0)
    flat = patches.abs().amax(0) < 1e-6  # what rounding leaves of one colour
    return patches.masked_fill(flat, 0).unflatten(1, (grid[1], grid[0]))


def sift(
    picture: Picture, size: tuple[int, int], grid: Grid, diameter: float = 40.0
) -> Float[Tensor, "128 height width"]:
    """Upright SIFT descriptors (Lowe, IJCV 2004; OpenCV's) of keypoints of `diameter` pixels at the middle of every cell."""
    image = np.array(picture.image().resize(size)) if size != picture.size else np.array(picture.image())
    centres = ((np.arange(cells) + 0.5) * side / cells - 0.5 for side, cells in zip(size, grid, strict=True))
    xs, ys = (axis.tolist() for axis in centres)
    points = [cv2.KeyPoint(x, y, diameter, 0.0) for y in ys for x in xs]
    _, found = cv2.SIFT.create().compute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), points)
    return torch.from_numpy(np.asarray(found, np.float32)).mT.unflatten(1, (grid[1], grid[0])).contiguous()


def position(picture: Picture, size: tuple[int, int], grid: Grid) -> Float[Tensor, "12 height width"]:
    """Cosine and sine of the relative position: a quarter of a turn across the picture, a whole turn, and four.

    The cosine of two of them is highest at the same relative place: slow turns make that unique, fast ones sharp.
    """
    planes = []
    for axis, cells in enumerate(grid):
        where = (torch.arange(cells) + 0.5) / cells
        for turns in (0.25, 1.0, 4.0):
            angle = 2 * torch.pi * turns * where
            planes += [
                (line if axis == 0 else line[:, None]).expand(grid[1], grid[0]) for line in (angle.cos(), angle.sin())
            ]
    return torch.stack(planes)


_KINDS: dict[str, Callable[[Picture, tuple[int, int], Grid], Tensor]] = {
    "rgb": rgb,
    "sift": sift,
    "sift-fine": partial(sift, diameter=16.0),
    "position": position,
}
_PRESETS: Mapping[str, tuple[Size, int]] = {
    "semantic": ("256", 8),
    "geometric": ("long640", 4),
    "temporal": ("short480", 8),
}


@dataclass(frozen=True)
class Baseline:
    """One of `rgb`, `sift` (keypoints of 40 pixels), `sift-fine` (16 pixels) and `position`.

    preset: size and stride that suit a task. size: pixels that the picture is resized to, see `resolve_size`. stride: pixels
    of the resized picture per cell. Positions need no pixels: unless a stride is given they have one cell per pixel of the
    picture (from 64 to 512 along a side), so that they are exact.
    """

    name: str
    preset: str | None = None
    size: Size | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise InputError(f"There is no baseline {self.name!r}; choose one of {', '.join(_KINDS)}.")
        if self.preset is not None and self.preset not in _PRESETS:
            raise InputError(f"There is no preset {self.preset!r} for {self.name}; choose one of {', '.join(NAMES)}.")
        if self.stride is not None and self.stride < 1:
            raise InputError(f"The stride of {self.name} is {self.stride}; it must be at least 1 pixel.")

    def describe(self) -> dict[str, Any]:
        size, stride = self._settings
        return {
            "model": self.name,
            "size": size if isinstance(size, str | int | None) else list(size),
            "stride": stride,
        }

    @property
    def _settings(self) -> tuple[Size | None, int | None]:
        size, stride = _PRESETS[self.preset or "semantic"]
        if self.name == "position" and self.stride is None:
            return None, None
        return size if self.size is None else self.size, self.stride or stride

    def __call__(self, picture: Picture, prompt: str | int | None = None) -> FeatureMap:
        """Features of a picture; there is no use for a prompt."""
        rule, stride = self._settings
        if rule is None or stride is None:
            shrunk = min(1.0, _FINEST / max(picture.size))
            size = grid = tuple(max(_COARSEST, round(side * shrunk)) for side in picture.size)
        else:
            size = resolve_size(rule, picture.size)
            grid = tuple(-(-side // stride) for side in size)
        grid = grid[0], grid[1]
        values = _KINDS[self.name](picture, (size[0], size[1]), grid)
        made = {**self.describe(), "size": list(size), "picture": str(picture.path) if picture.path else None}
        return FeatureMap(values, Frame.of(picture.size).resize(grid), made, picture)


BASELINES: dict[str, Callable[..., Baseline]] = {name: partial(Baseline, name) for name in _KINDS}
