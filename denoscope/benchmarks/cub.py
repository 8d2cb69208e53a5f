"""CUB-200-2011 (Wah et al., 2011) by the rules of Neural Congealing (Ofri-Amar et al., arXiv 2302.03956)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.protocol import Item, Record, Row
from denoscope.benchmarks.semantic import Semantic
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, read


@dataclass
class CUB(Semantic):
    """CUB-200-2011: 14 subsets of 25 test pictures, every ordered pair within a subset, mean over the subsets (the row "all").

    By the rules of Neural Congealing, each picture is cut to its box, enlarged by 5 % on each side and then to a square (beyond
    the border the last pixels repeat), and resized to 256 x 256; the threshold is that side. Its subsets were drawn at random
    and published as lists of names: `lists` is a folder of such text files, one a subset. Without it, subsets are drawn here
    (`seed`), so that numbers compare with each other but not with published ones.
    """

    thresholds: tuple[str, ...] = ("img",)
    lists: str = ""
    subsets: int = 14
    pictures: int = 25
    seed: int = 0
    side: int = 256

    name = "cub"
    prompt = "a photo of a bird"

    def picture(self, name: str) -> Picture:
        return cut_square(read(name), self._table[name][0], self.side)

    def exchanged(self, category: str) -> Sequence[tuple[int, int]]:
        return super().exchanged(category) or [(6, 10), (7, 11), (8, 12)]  # eye, leg and wing

    @cached_property
    def _table(self) -> dict[str, tuple[tuple[int, int, int, int], np.ndarray]]:
        """Path of every test picture to its square (left, top, right, bottom) and parts [15, 3] (x, y, visible)."""
        root = next((r for r in (self.root, self.root / "CUB_200_2011") if (r / "images.txt").is_file()), None)
        if root is None:
            raise MissingError(
                f"{self.root} is not in the CUB-200-2011 layout: there is no file {self.root / 'images.txt'}."
            )

        def rows(name: str) -> list[list[str]]:
            if not (root / name).is_file():
                raise MissingError(f"{root} is not in the CUB-200-2011 layout: there is no file {root / name}.")
            return [line.split() for line in (root / name).read_text().splitlines() if line.strip()]

        try:
            test = {row[0] for row in rows("train_test_split.txt") if row[1] == "0" or self.lists}
            parts: dict[str, list[list[float]]] = {}
            for image, _, *values in rows("parts/part_locs.txt"):
                parts.setdefault(image, []).append([float(value) for value in values])
            boxes = {image: [float(value) for value in values] for image, *values in rows("bounding_boxes.txt")}
            return {
                str(root / "images" / name): (square_around(boxes[image]), np.array(parts[image]))
                for image, name in rows("images.txt")
                if image in test
            }
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"The lists in {root} cannot be read ({error!r}).") from None

    def _subsets(self) -> list[list[str]]:
        if not self.lists:
            names = sorted(self._table)
            count = self.subsets * self.pictures
            if len(names) < count:
                raise InputError(f"{self.root} has {len(names)} test pictures; {count} are needed: use fewer subsets.")
            drawn = random.Random(self.seed).sample(names, count)
            return [drawn[i : i + self.pictures] for i in range(0, count, self.pictures)]
        files = sorted(Path(self.lists).glob("*.txt"))
        if not files:
            raise MissingError(f"There are no lists *.txt in {self.lists}.")
        by_name = {Path(path).name: path for path in self._table}
        found = []
        for file in files:
            names = [Path(line.strip()).name for line in file.read_text().splitlines() if line.strip()]
            if missing := [name for name in names if name not in by_name]:
                raise MissingError(f"{file} lists {missing[0]}, which is not in the data set.")
            found.append([by_name[name] for name in names])
        return found

    def pairs(self) -> list[Pair]:
        found = []
        for number, names in enumerate(self._subsets()):
            for one, two in permutations(names, 2):
                (left, a), (right, b) = self._table[one], self._table[two]
                both = (a[:, 2] > 0) & (b[:, 2] > 0)
                source, target = self._moved(a[both, :2], left), self._moved(b[both, :2], right)
                side = float(self.side)
                found.append(
                    Pair(
                        one,
                        two,
                        f"subset {number}",
                        source,
                        target,
                        target_box=(0.0, 0.0, side, side),
                        target_size=(self.side, self.side),
                        key=f"{number:02d}-{Path(one).stem}-{Path(two).stem}",
                        ids=tuple(np.flatnonzero(both).tolist()),
                    )
                )
        return found

    def _moved(self, points: np.ndarray, box: tuple[int, int, int, int]) -> torch.Tensor:
        """Part locations are 1-based."""
        return torch.from_numpy((points - 1 - np.array(box[:2])) * self.side / (box[2] - box[0]))

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        found = super().rows(items, records)
        if len(found) > 1:
            found[0] |= {column: float(np.mean([row[column] for row in found[1:]])) for column in self.columns}
        return found


def square_around(box: Sequence[float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square that CUB protocols cut out for a box (x, y, width, height), 1-based.

    The box grows by 5 % on each side, is rounded (halves up), then its shorter side is made as long as the longer one.
    """
    x, y, w, h = box
    low, high = np.array([x - 1, y - 1]), np.array([x + w - 2, y + h - 2])
    margin = 0.05 * (high - low + 1)
    low, high = (np.floor(v + 0.5).astype(int) for v in (low - margin, high + margin))
    sides = high - low + 1
    longest = int(sides.max())
    left, top = low - np.floor((longest - sides) / 2 + 0.5).astype(int)
    return int(left), int(top), int(left) + longest, int(top) + longest


def cut_square(picture: Picture, box: tuple[int, int, int, int], side: int) -> Picture:
    """A window of the picture (pixels beyond the border repeat the last one), resized to side x side by Lanczos' filter."""
    left, top, right, bottom = box
    array = np.array(picture.image())
    columns = np.arange(left, right).clip(0, picture.width - 1)
    rows = np.arange(top, bottom).clip(0, picture.height - 1)
    window = Image.fromarray(array[rows][:, columns])
    return Picture(read(window.resize((side, side), Image.Resampling.LANCZOS)).pixels, picture.path)
