"""Random pairs from a parquet file of pictures with keypoints."""

import io
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.semantic import Semantic
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, read


@dataclass
class Keypoints(Semantic):
    """Random pairs of a parquet file with the columns `img` (encoded bytes), `kps_xy` and, if there is one, `kps_visible`.

    points: indices of the keypoints to use, empty for all. pairs_drawn: how many. jitter: crop every picture at random (the
    square keeps 62 to 100 % of the side), so that copying the position does not help. label: what the pictures show.
    """

    thresholds: tuple[str, ...] = ("kp", "img")
    pairs_drawn: int = 200
    points: tuple[int, ...] = ()
    jitter: bool = False
    seed: int = 0
    label: str = ""

    name = "keypoints"

    @cached_property
    def _views(self) -> dict[str, Picture]:
        return {}

    def picture(self, name: str) -> Picture:
        return self._views[name]

    def pairs(self) -> list[Pair]:
        try:
            import pyarrow
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingError("Reading parquet files needs pyarrow; pip install 'denoscope[bench]'.") from None
        if not self.root.is_file():
            inside = ", ".join(path.name for path in sorted(self.root.glob("*.parquet"))) if self.root.is_dir() else ""
            hint = f"; the folder holds {inside}" if inside else ""
            raise MissingError(f"There is no parquet file {self.root}{hint}.")
        try:
            rows = pq.read_table(self.root).to_pylist()
        except pyarrow.ArrowException as error:
            raise InputError(f"{self.root} is not a parquet file ({error}).") from None
        if not rows or "img" not in rows[0] or "kps_xy" not in rows[0]:
            raise InputError(
                f"{self.root} needs the columns img and kps_xy; it has {', '.join(rows[0] if rows else [])}."
            )
        rng, found = random.Random(self.seed), []
        for number in range(self.pairs_drawn):
            for _ in range(100):
                chosen = rng.sample(range(len(rows)), 2)
                (one, p, seen), (two, q, also) = (self._view(rows[index], rng) for index in chosen)
                both = seen & also
                if both.sum() >= 3:
                    break
            else:
                raise InputError(f"Pictures of {self.root} rarely have three keypoints in common.")
            names = [f"{number}a", f"{number}b"]
            self._views.update(zip(names, (one, two), strict=True))
            source, target = (torch.from_numpy(v[both]) for v in (p, q))
            box = (*target.amin(0).tolist(), *target.amax(0).tolist())
            ids = tuple(np.flatnonzero(both).tolist())
            category = self.label or self.root.parent.name
            key = f"{number:05d}-{chosen[0]}-{chosen[1]}"
            found.append(Pair(names[0], names[1], category, source, target, box, two.size, key=key, ids=ids))
        return found

    def _view(self, row: dict[str, Any], rng: random.Random) -> tuple[Picture, np.ndarray, np.ndarray]:
        image = Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")
        marks = np.array(row["kps_xy"], dtype=np.float64)
        visible = np.array(row.get("kps_visible") or [True] * len(marks), dtype=bool)
        if self.points:
            marks, visible = marks[list(self.points)], visible[list(self.points)]
        if self.jitter:
            full = min(image.size)
            side = rng.randint(round(0.625 * full), full)
            left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            image = image.crop((left, top, left + side, top + side))
            marks = marks - np.array([left, top])
        visible &= ((marks >= 0) & (marks <= np.array(image.size) - 1)).all(1)
        return read(image), marks, visible
