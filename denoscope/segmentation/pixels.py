"""Features of labelled pixels, kept on disk and read through memory maps: never all of them are in memory.

ddpm-segmentation (Baranchuk et al., "Label-Efficient Semantic Segmentation with Diffusion Models", ICLR 2022, arXiv
2112.03126) enlarges every feature map to the picture and holds all pixels in memory. Here features stay at their own
resolution until a few thousand pixels of one picture are interpolated and written.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn import functional as F

from denoscope.errors import InputError
from denoscope.features import FeatureMap
from denoscope.images import Frame, atomically

Labels = Int[np.ndarray, "height width"]
Precision = Literal["float16", "float32"]
IGNORED = -1
FEWEST = 20  # pixels of a class in a training picture; fewer are taken for slips of the annotator and ignored
_VALUES_AT_ONCE = 1 << 22  # interpolated feature values held at a time


def resized_labels(labels: Labels, size: tuple[int, int]) -> Int[np.ndarray, "rows columns"]:
    """Labels at (width, height) by the nearest pixel, as OpenCV takes it and ddpm-segmentation has it."""
    if labels.shape[::-1] == size:
        return labels
    return cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST).astype(labels.dtype)


def without_small(labels: Labels, fewest: int = FEWEST) -> Labels:
    """Classes with 1 to `fewest` - 1 pixels in the picture become IGNORED."""
    numbers, counts = np.unique(labels, return_counts=True)
    return np.where(np.isin(labels, numbers[counts < fewest]), IGNORED, labels)


def chosen_pixels(labels: Labels, per_class: int | None = None, seed: int = 0) -> Int[np.ndarray, " pixels"]:
    """Row-major places of the labelled pixels; with `per_class`, at most so many of each class, drawn by the seed."""
    flat = labels.ravel()
    if per_class is None:
        return np.flatnonzero(flat != IGNORED)
    if per_class < 1:
        raise InputError(f"At least 1 pixel of each class is needed, not {per_class}.")
    kept = []
    for number in np.unique(flat[flat != IGNORED]):
        places = np.flatnonzero(flat == number)
        if len(places) > per_class:
            places = np.random.default_rng([seed, int(number)]).choice(places, per_class, replace=False)
        kept.append(places)
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def interpolated(
    cells: Float[Tensor, "cells channels"], frame: Frame, size: tuple[int, int], places: Integer[Tensor, " pixels"]
) -> Float[Tensor, "pixels channels"]:
    """Values at pixels (row-major places) of the picture at (width, height), bilinear between the cells of a frame.

    cells: row-major, float32. Clamped at the border, as `interpolate(align_corners=False)` from cells to pixels is.
    """
    width, (columns, rows) = size[0], frame.grid
    points = torch.stack([places % width, places // width], 1).double()
    x, y = frame.to_grid(Frame.of(frame.picture).resize(size).to_picture(points)).unbind(1)
    x, y = x.clamp(0, columns - 1), y.clamp(0, rows - 1)
    left, top = x.floor().clamp(max=max(columns - 2, 0)), y.floor().clamp(max=max(rows - 2, 0))
    u, v = (x - left).float(), (y - top).float()
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=columns - 1), (top + 1).clamp(max=rows - 1)
    upper, lower = top * columns, bottom * columns
    corners = torch.stack([upper + left, upper + right, lower + left, lower + right], 1)
    weights = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v], 1)
    corners, weights = corners.to(cells.device), weights.to(cells.device)
    # a weighted sum of four rows each: the one fused kernel that PyTorch has for it
    return F.embedding_bag(corners, cells, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True, eq=False)
class PixelStore:
    """Pixels of several pictures, each with a feature vector and a class, in files of `folder`.

    A picture has two files, KEY.npy (features, [pixels, channels]) and KEY.labels.npy, where KEY names everything that decides
    them; they are written beside and renamed, so whatever is there is whole and need not be made again.
    """

    folder: Path
    precision: Precision = "float16"
    _features: list[np.ndarray] = field(default_factory=list)
    _labels: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.precision not in ("float16", "float32"):
            raise InputError(f"Pixels are kept in float16 or float32, not {self.precision!r}.")

    def __len__(self) -> int:
        return sum(map(len, self._labels))

    @property
    def channels(self) -> int:
        return self._features[0].shape[1] if self._features else 0

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(one.nbytes for one in (*self._features, *self._labels))

    @property
    def classes(self) -> Int[np.ndarray, " classes"]:
        """Those that occur, in order."""
        found = [np.unique(one) for one in self._labels]
        return np.unique(np.concatenate(found)).astype(np.int64) if found else np.zeros(0, np.int64)

    def holds(self, key: Any) -> bool:
        """Whether the picture of that key is on disk already."""
        return all(path.is_file() for path in self._paths(key))

    def add(self, fm: FeatureMap, labels: Labels, places: Int[np.ndarray, " pixels"], key: Any) -> None:
        """Write the features at `places` (row-major) of a label map, which covers the whole picture at any resolution.

        key: JSON values that name the features, the labels and the choice. Without places, nothing is written. Raises
        InputError when features are not finite, do not fit into the precision, or have other channels than those before.
        """
        if not len(places):
            return
        if not self.holds(key):
            values, classes = fm.values, labels.ravel()[places].astype(np.int16)
            cells = values.flatten(1).mT.float().cpu().contiguous()
            size, chunk = labels.shape[::-1], max(1, _VALUES_AT_ONCE // values.shape[0])

            def features(path: Path) -> None:
                out = np.lib.format.open_memmap(path, "w+", self.precision, (len(places), values.shape[0]))
                for start in range(0, len(places), chunk):
                    some = torch.from_numpy(places[start : start + chunk])
                    part = interpolated(cells, fm.frame, size, some)
                    if not part.isfinite().all():
                        raise InputError("The features are not finite; load the model in bfloat16 or float32.")
                    if self.precision == "float16" and part.abs().max() > np.finfo(np.float16).max:
                        raise InputError("These features are too large for float16; keep the pixels in float32.")
                    out[start : start + chunk] = part.numpy()
                out.flush()

            first, second = self._paths(key)
            atomically(second, lambda path: np.save(path, classes))
            atomically(first, features)
        self.open(key)

    def open(self, key: Any) -> None:
        """Add a picture that is on disk already. Raises InputError when its files are damaged."""
        paths = self._paths(key)
        try:
            features, labels = (np.load(path, mmap_mode="r") for path in paths)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{paths[0]} is damaged ({error}); remove it.") from None
        if features.ndim != 2 or labels.shape != features.shape[:1] or features.dtype != self.precision:
            raise InputError(f"{paths[0]} is damaged; remove it.")
        if self._features and features.shape[1] != self.channels:
            raise InputError(
                f"All pictures need features of as many channels, but here are {self.channels} and {features.shape[1]}."
            )
        self._features.append(features)
        self._labels.append(labels)

    def take(self, rows: Integer[Tensor, "*batch"]) -> tuple[Float[Tensor, "*batch channels"], Int[Tensor, "*batch"]]:
        """Features (float32) and classes of the pixels at these places; only they are read."""
        flat = rows.flatten().numpy()
        ends = np.cumsum([len(one) for one in self._labels])
        order = np.argsort(flat)
        of = np.searchsorted(ends, flat[order], side="right")
        bounds = np.searchsorted(of, np.arange(len(ends) + 1))
        features, labels = np.empty((len(flat), self.channels), self.precision), np.empty(len(flat), np.int64)
        for k in np.unique(of):
            some = order[bounds[k] : bounds[k + 1]]
            local = flat[some] - (ends[k] - len(self._labels[k]))
            features[some], labels[some] = self._features[k][local], self._labels[k][local]
        return (
            torch.from_numpy(features).float().reshape(*rows.shape, self.channels),
            torch.from_numpy(labels).reshape(rows.shape),
        )

    def _paths(self, key: Any) -> tuple[Path, Path]:
        text = json.dumps([key, self.precision], sort_keys=True, default=str)
        name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return self.folder / f"{name}.npy", self.folder / f"{name}.labels.npy"


def digest(labels: np.ndarray) -> str:
    """16 hexadecimal digits that name a label map."""
    values = np.ascontiguousarray(labels.astype("<i4"))
    return hashlib.blake2b(f"{values.shape}".encode() + values.tobytes(), digest_size=8).hexdigest()
