"""PF-WILLOW and PF-PASCAL (Ham et al., arXiv 1703.07144) in the layouts and by the rules of CATs (Cho et al., NeurIPS 2021)."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat

from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.semantic import Semantic
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, read

PASCAL = (
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
    ),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass
class PFWillow(Semantic):
    """PF-WILLOW: `test_pairs.csv` (image names, then ten x and ten y of image A and of image B) and `CLASS/*.png`.

    By the rules of CATs both pictures are squeezed to 256 x 256, keypoints of image B are looked for in image A, and errors and
    thresholds ("kp" or "img") are those of image A at that size. side: 0 keeps the pictures' own sizes.
    """

    alphas: tuple[float, ...] = (0.1, 0.05, 0.15)
    thresholds: tuple[str, ...] = ("kp", "img")
    side: int = 256

    name = "pf-willow"
    _file = "test_pairs.csv"

    def picture(self, name: str) -> Picture:
        picture = read(name)
        return squeezed(picture, self.side) if self.side else picture

    def pairs(self) -> list[Pair]:
        base, rows = self._rows()
        return [self._pair(base, line, row) for line, row in enumerate(rows, 2)]

    def _rows(self) -> tuple[Path, list[list[str]]]:
        tried = [self.root / self._file, *sorted(self.root.glob(f"*/{self._file}"))]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise MissingError(f"{self.root} is not in the {self.name} layout: there is no file {tried[0]}.")
        rows = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
        return path.parent, rows[1:]

    def _pair(self, base: Path, line: int, row: list[str]) -> Pair:
        try:
            names = [self._image(base, name) for name in row[:2]]
            a, b = np.array(row[2:42], dtype=np.float64).reshape(2, 2, 10).transpose(0, 2, 1)
        except (ValueError, IndexError):
            raise InputError(f"{base / self._file}, line {line}: two images and 40 numbers are needed.") from None
        category = Path(row[0]).parent.name
        return self._scaled(names, (a, b), category, f"{line - 2:06d}")

    def _image(self, base: Path, name: str) -> Path:
        """The file of an image: names in the lists start with a folder of the data set that may have been renamed."""
        parts = Path(name).parts
        for start in range(len(parts)):
            if (path := base.joinpath(*parts[start:])).is_file():
                return path
        raise MissingError(f"{base / self._file} lists {name}, but there is no such file below {base}.")

    def _scaled(
        self,
        names: Sequence[Path],
        points: Sequence[np.ndarray],
        category: str,
        key: str,
        boxes: Sequence[Any] | None = None,
    ) -> Pair:
        """Source and target change places: keypoints of image B are looked for in image A."""
        sizes = [size_of(name) for name in names]
        sides = [(self.side, self.side) if self.side else size for size in sizes]
        scale = [np.array(side) / size for side, size in zip(sides, sizes, strict=True)]
        a, b = (torch.from_numpy(one * factor) for one, factor in zip(points, scale, strict=True))
        box = (
            tuple(np.tile(scale[0], 2) * boxes[0]) if boxes is not None else (*a.amin(0).tolist(), *a.amax(0).tolist())
        )
        return Pair(str(names[1]), str(names[0]), category, b, a, box, sides[0], source_size=sides[1], key=key)


@dataclass
class PFPascal(PFWillow):
    """PF-PASCAL: `SPLIT_pairs.csv` (two images, class number), `JPEGImages/*.jpg`, `Annotations/CLASS/*.mat` (`kps`, `bbox`).

    The rules are those of PF-WILLOW, with the object's box ("bbox") beside the picture ("img", the published threshold).
    """

    thresholds: tuple[str, ...] = ("img", "bbox")
    split: str = "test"

    name = "pf-pascal"

    @property
    def _file(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.split}_pairs.csv"

    def _pair(self, base: Path, line: int, row: list[str]) -> Pair:
        names = [self._image(base, name) for name in row[:2]]
        marks, boxes, folder = [], [], ""
        for name in names:
            found = sorted((base / "Annotations").glob(f"*/{name.stem}.mat"))
            try:  # an image can show several classes: the list says which is meant
                folder = PASCAL[int(row[2]) - 1]
                path = next((path for path in found if path.parent.name == folder), None)
                if path is None:
                    raise MissingError(f"There is no annotation {base / 'Annotations' / folder / name.stem}.mat.")
                values = loadmat(path)
                marks.append(np.array(values["kps"], dtype=np.float64).reshape(-1, 2))
                boxes.append(np.array(values["bbox"], dtype=np.float64).reshape(-1)[:4])
            except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
                raise InputError(f"The annotation of {name} cannot be read ({error!r}).") from None
        known = ~(np.isnan(marks[0]).any(1) | np.isnan(marks[1]).any(1))
        return self._scaled(names, [mark[known] for mark in marks], folder, f"{line - 2:06d}", boxes)


@cache
def size_of(path: Path) -> tuple[int, int]:
    return read(path).size


def squeezed(picture: Picture, side: int) -> Picture:
    """The whole picture as a square, its aspect not kept."""
    return Picture((picture.resized((side, side)) + 1) / 2, picture.path)
