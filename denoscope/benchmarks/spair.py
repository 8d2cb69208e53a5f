"""SPair-71k (Min et al., arXiv 1908.10543) and data sets in its layout."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.semantic import Semantic
from denoscope.correspondence.mirroring import SPAIR_SWAPS
from denoscope.errors import InputError, MissingError


@dataclass
class SPair(Semantic):
    """SPair-71k: `PairAnnotation/SPLIT/*.json`, `JPEGImages/CATEGORY/*.jpg`. categories: empty for all."""

    split: str = "test"
    categories: tuple[str, ...] = ()

    name = "spair"

    def pairs(self) -> list[Pair]:
        found = read_pairs(self.root, self.split)
        known = {pair.category for pair in found}
        if unknown := [category for category in self.categories if category not in known]:
            raise InputError(f"{self.root} has no pairs of {unknown[0]}; it has {', '.join(sorted(known))}.")
        return [pair for pair in found if not self.categories or pair.category in self.categories]

    def exchanged(self, category: str) -> Sequence[tuple[int, int]]:
        return super().exchanged(category) or SPAIR_SWAPS.get(category, ())


def read_pairs(root: str | Path, split: str = "test", categories: list[str] | None = None) -> list[Pair]:
    """All pairs of a split, in the order of `Layout/large/SPLIT.txt`, or of the file names when that is missing.

    Annotation names may have `_` or `%3A` where the original has `:`. The category is what the annotation says.

    Raises MissingError naming what was looked for, InputError for annotations that cannot be read.
    """
    root = Path(root)
    folder = root / "PairAnnotation" / split
    if not folder.is_dir():
        up = next((up for up in root.resolve().parents[:2] if (up / "PairAnnotation" / split).is_dir()), None)
        hint = f" (did you mean {up}?)" if up else "" if root.is_dir() else f" ({root} itself is missing)"
        raise MissingError(f"{root} is not in the SPair-71k layout: there is no folder {folder}{hint}.")
    found = {path.stem.replace("%3A", ":").replace("_", ":"): path for path in sorted(folder.glob("*.json"))}
    layout = root / "Layout" / "large" / f"{split}.txt"
    order = (
        [line.strip() for line in layout.read_text().splitlines() if line.strip()] if layout.is_file() else list(found)
    )
    pairs = []
    for name in order:
        path = found.get(name.replace("_", ":"))
        if path is None:
            raise MissingError(f"{layout} lists {name}, but there is no such file in {folder}.")
        try:
            pairs.append(_read_pair(root, path))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"{path} is not a pair annotation of SPair-71k ({error!r}).") from None
    return [pair for pair in pairs if categories is None or pair.category in categories]


def _read_pair(root: Path, path: Path) -> Pair:
    values = json.loads(path.read_text())
    category = values["category"]
    images = root / "JPEGImages" / category
    return Pair(
        source=str(images / values["src_imname"]),
        target=str(images / values["trg_imname"]),
        category=category,
        source_points=torch.tensor(values["src_kps"], dtype=torch.float64).reshape(-1, 2),
        target_points=torch.tensor(values["trg_kps"], dtype=torch.float64).reshape(-1, 2),
        source_box=tuple(values["src_bndbox"]),
        target_box=tuple(values["trg_bndbox"]),
        source_size=tuple(values["src_imsize"][:2]),
        target_size=tuple(values["trg_imsize"][:2]),
        key=path.stem,
        ids=tuple(map(int, values["kps_ids"])) if "kps_ids" in values else None,
    )
