"""Annotated pairs of one's own: a JSON list, a parquet file of keypoints, or a folder in SPair-71k's layout."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from denoscope.benchmarks.keypoints import Keypoints
from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.semantic import Semantic
from denoscope.benchmarks.spair import SPair
from denoscope.correspondence.keypoints import as_point_list
from denoscope.errors import InputError, MissingError
from denoscope.images import Frame, read

# ours, and the names in the annotation file of the DHF harness (Luo et al., "Diffusion Hyperfeatures", arXiv 2305.14334)
_NAMES = {
    "source": ("source", "source_path"),
    "target": ("target", "target_path"),
    "category": ("category", "name"),
    "source_box": ("source_box", "source_bounding_box"),
    "target_box": ("target_box", "target_bounding_box"),
}
_EDGE = 1.0  # pixels outside that are taken for the edge: annotations count from 1, or round
_SPLITS = ("val", "trn", "test")  # of SPair-71k, the first that is there: choosing is no business of a test set


@dataclass
class Pairs(Semantic):
    """A JSON list of pairs: `{"source", "target", "source_points": [[x, y], …], "target_points"}`, and as far as known
    `category`, `source_box` and `target_box` (x1, y1, x2, y2).

    Paths are relative to the file's folder, or to `pictures`. `source_path`, `target_bounding_box` … of the DHF harness are
    read too.
    """

    pictures: str = ""

    name = "pairs"

    def pairs(self) -> list[Pair]:
        if not self.root.is_file():
            raise MissingError(f"There is no file of pairs {self.root}.")
        try:
            values = json.loads(self.root.read_text("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.root} is not a JSON file ({error}).") from None
        if not isinstance(values, list) or not values:
            raise InputError(f"{self.root} should be a JSON list of pairs, with at least one.")
        return [self._pair(number, entry) for number, entry in enumerate(values)]

    def _pair(self, number: int, entry: Any) -> Pair:
        where = f"{self.root}, pair {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where} should be an object with source, target, source_points and target_points.")
        told = {key: next((entry[n] for n in names if entry.get(n) is not None), None) for key, names in _NAMES.items()}
        paths = []
        for role in ("source", "target"):
            named = told[role]
            if not isinstance(named, str):
                raise InputError(f"{where} names no {role} picture.")
            paths.append(Path(self.pictures or self.root.parent) / named)
            if not paths[-1].is_file():
                raise MissingError(f"{where}: there is no picture {paths[-1]}.")
        sizes = [read(path).size for path in paths]
        ends = []
        for role, size in zip(("source", "target"), sizes, strict=True):
            listed = as_point_list(entry.get(f"{role}_points"), f"{where}, {role}_points")
            points = torch.tensor(listed, dtype=torch.float64)
            if not points.isfinite().all():
                raise InputError(f"{where}: its {role}_points are not all finite.")
            frame = Frame.of(size)
            within = frame.clamped(points)
            # those clearly outside are refused, in the words that `match` has for them
            try:
                frame.inside(torch.where((points - within).abs() <= _EDGE, within, points))
            except InputError as error:
                raise InputError(f"{where}, {role}_points: {error}") from None
            ends.append(within if role == "source" else points)
        if len(ends[0]) != len(ends[1]):
            raise InputError(f"{where} has {len(ends[0])} source_points and {len(ends[1])} target_points.")
        boxes = [_box(told[f"{role}_box"], f"{where}, {role}_box") for role in ("source", "target")]
        category = str(told["category"] or "")
        whole = (0.0, 0.0, float(sizes[1][0]), float(sizes[1][1]))
        return Pair(
            str(paths[0]), str(paths[1]), category, ends[0], ends[1], boxes[1] or whole, sizes[1], boxes[0], sizes[0],
            key=f"{number:05d}-{paths[0].stem}-{paths[1].stem}",
        )  # fmt: skip

    @property
    def boxed(self) -> bool:
        """Whether every pair has a box around the target."""
        values = json.loads(self.root.read_text("utf-8-sig"))
        return all(any(entry.get(name) for name in _NAMES["target_box"]) for entry in values)


def _box(given: Any, where: str) -> tuple[float, float, float, float] | None:
    if given is None:
        return None
    numbers = isinstance(given, list) and len(given) == 4 and all(type(v) in (int, float) for v in given)
    if not numbers or not (given[2] > given[0] and given[3] > given[1]):
        raise InputError(f"{where} should be [x1, y1, x2, y2] with x2 > x1 and y2 > y1, not {given!r}.")
    return float(given[0]), float(given[1]), float(given[2]), float(given[3])


def open_pairs(path: str | Path, alpha: float = 0.1, **settings: Any) -> Semantic:
    """The annotated pairs at a path, measured by PCK@alpha of the target's box where boxes are known and else of the picture
    (of the keypoints' box for parquet files).

    path: a JSON list (`Pairs`), a parquet file (`Keypoints`) or a folder in SPair-71k's layout, of which the split val is
    taken, or else trn or test. settings: of those classes.

    Raises MissingError and InputError naming what was looked for.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".parquet":
        return Keypoints(path, alphas=(alpha,), **settings)
    if path.is_dir():
        split = next((split for split in _SPLITS if (path / "PairAnnotation" / split).is_dir()), "val")
        return SPair(path, alphas=(alpha,), thresholds=("bbox",), **{"split": split, **settings})
    pairs = Pairs(path, alphas=(alpha,), **settings)
    pairs.pairs()  # what is wrong with it is said here
    pairs.thresholds = ("bbox",) if pairs.boxed else ("img",)
    return pairs
