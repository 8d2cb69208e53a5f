"""`Frame`: the one place where coordinates are computed.

Points are (x, y) in pixels of the user's own picture; the centre of the top-left pixel is (0, 0), so the picture covers
[-0.5, W - 0.5] x [-0.5, H - 0.5]. Resizing, cropping, padding and strides are all affine per axis:
`q = scale * (p + 0.5) + offset - 0.5`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from denoscope.errors import InputError

Points = Float[Tensor, "points 2"]
PointsLike = Tensor | np.ndarray | Sequence[Any]  # (x, y) pairs as people have them


@dataclass(frozen=True)
class Frame:
    """An invertible map from picture pixels to the pixels or feature cells of a grid.

    picture: (width, height) of the user's picture. grid: (width, height) of the grid that a network sees or makes.
    scale, offset: grid units per picture pixel, and grid units, for x and y.
    """

    picture: tuple[int, int]
    grid: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, size: tuple[int, int]) -> "Frame":
        """The identity on a picture of (width, height)."""
        return cls(size, size)

    def resize(self, size: tuple[int, int]) -> "Frame":
        """Then the grid is resampled to (width, height), cell borders on cell borders (`align_corners=False`).

        A network with a stride is the same thing: its feature cells tile the grid.
        """
        sx, sy = (new / old for new, old in zip(size, self.grid, strict=True))
        scale, offset = (self.scale[0] * sx, self.scale[1] * sy), (self.offset[0] * sx, self.offset[1] * sy)
        return replace(self, grid=size, scale=scale, offset=offset)

    def crop(self, left: int, top: int, width: int, height: int) -> "Frame":
        """Then a window of the grid is cut out; one that reaches outside is padding."""
        return replace(self, grid=(width, height), offset=(self.offset[0] - left, self.offset[1] - top))

    def pad(self, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> "Frame":
        """Then the grid is padded by cells on each side."""
        return self.crop(-left, -top, self.grid[0] + left + right, self.grid[1] + top + bottom)

    def to_grid(self, points: Points) -> Points:
        """Picture pixels to grid coordinates."""
        scale, offset = points.new_tensor(self.scale), points.new_tensor(self.offset)
        return (points + 0.5) * scale + offset - 0.5

    def to_picture(self, points: Points) -> Points:
        """Grid coordinates to picture pixels, the inverse of `to_grid`."""
        scale, offset = points.new_tensor(self.scale), points.new_tensor(self.offset)
        return (points + 0.5 - offset) / scale - 0.5

    def pixels(self) -> tuple[Float[Tensor, " width"], Float[Tensor, " height"]]:
        """Grid coordinates (x of every column, y of every row) of the picture's pixel centres, in float64."""
        axes = (torch.arange(n, dtype=torch.float64) for n in self.picture)
        x, y = ((a + 0.5) * s + o - 0.5 for a, s, o in zip(axes, self.scale, self.offset, strict=True))
        return x, y

    def clamped(self, points: Points) -> Points:
        """Points moved onto the nearest pixel of the picture where they lie outside."""
        return points.clamp(min=0).minimum(points.new_tensor(self.picture) - 1)

    def inside(self, points: PointsLike) -> Points:
        """The points, or InputError naming the first that is not finite or lies outside the picture."""
        points = as_points(points)
        w, h = self.picture
        low, high = points.new_tensor([-0.5, -0.5]), points.new_tensor([w - 0.5, h - 0.5])
        bad = ~((points >= low) & (points <= high)).all(1)  # NaN compares false, so it is caught here
        if bad.any():
            index = int(bad.nonzero()[0])
            x, y = points[index].tolist()
            hint = " (are x and y swapped?)" if 0 <= y < w and 0 <= x < h else ""
            raise InputError(f"Point {index} at ({x:g}, {y:g}) lies outside the picture of {w}x{h} pixels{hint}.")
        return points

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Frame":
        return cls(**{key: tuple(value) for key, value in values.items()})


def as_points(points: PointsLike) -> Points:
    """Any list, array or tensor of (x, y) as float64 `[N, 2]`; InputError when it is empty or not pairs."""
    try:
        tensor = torch.as_tensor(points, dtype=torch.float64).cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"Points must be pairs (x, y): {error}.") from None
    if tensor.numel() == 0:
        raise InputError("There are no points; give at least one (x, y).")
    if tensor.ndim == 1 and tensor.numel() == 2:
        tensor = tensor[None]
    if tensor.ndim != 2 or tensor.shape[1] != 2:
        raise InputError(f"Points must be pairs (x, y), shape [N, 2], not {list(tensor.shape)}.")
    return tensor


def grid_points(size: tuple[int, int], n: int) -> Points:
    """n x n points spread evenly over a picture of (width, height), at whole pixels, row by row."""
    if n < 1:
        raise InputError(f"The grid needs at least 1 point per side, not {n}.")
    if n > max(size):
        raise InputError(f"A grid of {n} x {n} points is finer than the picture of {size[0]}x{size[1]} pixels.")
    x, y = (((torch.arange(n, dtype=torch.float64) + 0.5) * side / n - 0.5).round() for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
