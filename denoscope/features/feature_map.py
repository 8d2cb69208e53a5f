"""`FeatureMap`: dense features of one picture, where they lie in it, and how they were made."""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denoscope.errors import InputError, MissingError
from denoscope.images import Frame, Picture, PointsLike, atomically, read


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """values: one feature vector per cell. frame: picture pixels to cells. recipe: how to make it again.

    Between cells the map is bilinear, clamped at the border, as `interpolate(align_corners=False)` at picture size would make
    it; that enlarged copy is never built.
    """

    values: Float[Tensor, "channels height width"]
    frame: Frame
    recipe: dict[str, Any] = field(default_factory=dict)
    source: Picture | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or tuple(self.values.shape[:0:-1]) != self.frame.grid:
            raise InputError(f"Feature values {list(self.values.shape)} do not fit a frame of {self.frame.grid} cells.")

    @property
    def picture(self) -> Picture | None:
        """The picture, read again from its path when this map was loaded from a file; None when it is gone."""
        path = self.recipe.get("picture")
        return self.source or (read(path) if path and Path(path).is_file() else None)

    def at(self, points: PointsLike) -> Float[Tensor, "points channels"]:
        """Interpolated features at picture points; InputError for points outside."""
        cells = self.frame.to_grid(self.frame.inside(points)).to(self.values.device, torch.float32)
        (x0, x1, u), (y0, y1, v) = (_corners(cells[:, axis], self.frame.grid[axis]) for axis in (0, 1))
        f = self.values
        top, bottom = f[:, y0, x0] * (1 - u) + f[:, y0, x1] * u, f[:, y1, x0] * (1 - u) + f[:, y1, x1] * u
        return (top * (1 - v) + bottom * v).mT

    def similarity(self, vectors: Float[Tensor, "points channels"]) -> Float[Tensor, "points height width"]:
        """Cosine of each vector with the interpolated feature at every pixel of the picture.

        Interpolation is linear, so dot products are interpolated instead of features, and the squared length of an
        interpolated feature is a quadratic form in its corner weights with ten inner products per cell. Zero-length
        vectors have similarity 0. Memory is points x picture pixels: ask for few points at a time.
        """
        rows, columns, inverse_norm = self._interpolation
        vectors = vectors.to(self.values)
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
        dots = torch.einsum("pc,chw->phw", vectors, self.values)
        return (rows @ dots @ columns.mT).mul_(inverse_norm)

    def squared_distance(self, vectors: Float[Tensor, "points channels"]) -> Float[Tensor, "points height width"]:
        """|v - f|^2 of each vector v and the interpolated feature f at every pixel, by the same identity as `similarity`."""
        rows, columns, inverse_norm = self._interpolation
        vectors = vectors.to(self.values)
        lengths = torch.where(inverse_norm > 0, 1 / inverse_norm, 0)
        dots = torch.einsum("pc,chw->phw", vectors, self.values)
        return (rows @ dots @ columns.mT).mul_(-2).add_(lengths**2).add_((vectors**2).sum(1)[:, None, None])

    @cached_property
    def _interpolation(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bilinear weights of pixel rows [H, h] and columns [W, w], and 1 / |interpolated feature| [H, W]."""
        x, y = (axis.to(self.values.device) for axis in self.frame.pixels())
        (x0, x1, u), (y0, y1, v) = _corners(x, self.frame.grid[0]), _corners(y, self.frame.grid[1])
        f = self.values.float()

        def inner(dy: int, dx: int) -> Tensor:
            """<f[y, x], f[y + dy, x + dx]> per cell, float64; wrapped cells are never indexed with a weight."""
            return torch.einsum("chw,chw->hw", f, f.roll((-dy, -dx), (1, 2))).double()

        def over(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            return gram[rows][:, columns]

        own, right, down, diagonal, anti = inner(0, 0), inner(0, 1), inner(1, 0), inner(1, 1), inner(1, -1)
        u, v = u[None, :], v[:, None]
        # across the columns first: squared length on the upper and lower cell rows, and the product between the two
        weight = 2 * u * (1 - u)
        upper = over(own, y0, x0) * (1 - u) ** 2 + over(own, y0, x1) * u**2 + over(right, y0, x0) * weight
        lower = over(own, y1, x0) * (1 - u) ** 2 + over(own, y1, x1) * u**2 + over(right, y1, x0) * weight
        between = over(down, y0, x0) * (1 - u) ** 2 + over(down, y0, x1) * u**2
        between = between + (over(diagonal, y0, x0) + over(anti, y0, x1)) * (weight / 2)
        squared = upper * (1 - v) ** 2 + lower * v**2 + 2 * between * v * (1 - v)
        inverse = torch.where(squared > 0, squared.clamp_min(1e-60).rsqrt(), 0).to(self.values.dtype)
        rows, columns = (
            self.values.new_zeros(len(w), n).scatter_add_(1, a[:, None], (1 - w)[:, None].to(self.values.dtype))
            .scatter_add_(1, b[:, None], w[:, None].to(self.values.dtype))
            for (a, b, w), n in (((y0, y1, v[:, 0]), self.frame.grid[1]), ((x0, x1, u[0]), self.frame.grid[0]))
        )  # fmt: skip
        return rows, columns, inverse

    def pca(self, size: tuple[int, int] | None = None) -> Any:
        """The three main components as an RGB Pillow image, at picture size or at (width, height)."""
        from denoscope.images.draw import pca_image

        return pca_image(self.values, size=size or self.frame.picture)

    def to(self, device: str | torch.device) -> "FeatureMap":
        return replace(self, values=self.values.to(device))

    def save(self, path: str | Path) -> Path:
        """Write values, frame and recipe to one .safetensors file (beside, then renamed)."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"Features are saved as .safetensors, not {path.suffix or 'a file without suffix'}.")
        meta = {"frame": json.dumps(self.frame.to_dict()), "recipe": json.dumps(self.recipe)}
        values = {"values": self.values.contiguous().cpu()}
        return atomically(path, lambda beside: save_file(values, beside, metadata=meta))

    @classmethod
    def load(cls, path: str | Path) -> "FeatureMap":
        """Read what `save` wrote. Raises MissingError or InputError."""
        if not Path(path).is_file():
            raise MissingError(f"There are no features at {path}.")
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                frame, recipe = Frame.from_dict(json.loads(meta["frame"])), json.loads(meta["recipe"])
                if "joined" in meta:
                    from denoscope.features.fusing import Joined

                    frames = [Frame.from_dict(one) for one in json.loads(meta["joined"])]
                    return Joined.restored([file.get_tensor(f"part.{k}") for k in range(len(frames))], frames, recipe)
                return cls(file.get_tensor("values"), frame, recipe)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} does not hold features saved by denoscope ({error}).") from None


def _corners(cells: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower cell, upper cell and weight of the upper one, clamped at the border."""
    cells = cells.clamp(0, n - 1)
    low = cells.floor().clamp(max=max(n - 2, 0))
    return low.long(), (low + 1).clamp(max=n - 1).long(), cells - low
