"""Annotated pairs to learn from, to choose by and to measure on, kept apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from denoscope.benchmarks.keypoints import Keypoints
from denoscope.benchmarks.pairs import open_pairs
from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.protocol import Item
from denoscope.benchmarks.running import spread
from denoscope.benchmarks.semantic import Semantic
from denoscope.errors import InputError, counted


def split_pairs(items: Sequence[Item], share: float = 0.3, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """(training, validation) pairs with no photo in common: pairs are drawn until their photos are that share of all, and held
    out with all pairs between them; pairs of a photo held out and one that is not are dropped.

    Raises InputError when no pair is left to train on.
    """
    photos = {photo for item in items for photo in _photos(item.data)}
    held: set[str] = set()
    for i in np.random.default_rng(seed).permutation(len(items)):
        if len(held) < share * len(photos):
            held |= set(_photos(items[i].data))
    inside = [sum(photo in held for photo in _photos(item.data)) for item in items]
    train, validation = ([item for item, n in zip(items, inside, strict=True) if n == whole] for whole in (0, 2))
    if not train or not validation:
        raise InputError(
            f"{counted(len(items), 'pair')} of {counted(len(photos), 'photo')} cannot be divided so that "
            "training and validation share no photo; give validation pairs of their own."
        )
    return train, validation


def read_training_pairs(
    pairs: str | Path,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    official: bool = False,
) -> tuple[Semantic, list[Item], list[Item], list[Item]]:
    """(data, training, validation and test items) of the files or folders that `open_pairs` takes.

    Of a folder in SPair-71k's layout its splits trn, val and test are taken. Without validation, that is its val if pairs is
    such a folder, and else photos are held out (`split_pairs`). images: folder that the paths of JSON lists start from. limit:
    of each list, spread evenly. official: measured in squares of 512 pixels (`Semantic.square`), by both PCKs as published.

    Raises MissingError and InputError naming what was looked for; parquet files go with no other list.
    """
    square = 512 if official else 0

    def opened(path: str | Path, split: str) -> Semantic:
        told: dict[str, Any] = {"square": square}
        if Path(path).is_dir():
            told["split"] = split
        elif images is not None and Path(path).suffix.lower() != ".parquet":
            told["pictures"] = str(images)
        return open_pairs(path, **told)

    data = opened(pairs, "trn")
    if isinstance(data, Keypoints) and (validation or test):
        raise InputError(f"{pairs} draws its own pairs of its own photos; leave out validation and test.")
    if official:
        data.thresholds = ("img", "bbox")
    items = spread(data.items(), limit)
    if validation is None and Path(pairs).is_dir():
        validation = pairs
    others = [
        spread(opened(path, split).items(), limit) if path is not None else []
        for path, split in ((validation, "val"), (test, "test"))
    ]
    if validation is None:
        items, others[0] = split_pairs(items, seed=seed)
    return data, items, others[0], others[1]


def _photos(pair: Pair) -> tuple[str, str]:
    """What names the two photos; views of one photo (`Keypoints`) have their photo in the key only."""
    if Path(pair.source).is_file():
        return pair.source, pair.target
    *_, one, two = pair.key.split("-")
    return one, two
