"""Semantic correspondence: keypoints carried from one picture to another of the same kind, measured by PCK."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from denoscope.benchmarks.pck import THRESHOLDS, Pair, Threshold, pck
from denoscope.benchmarks.protocol import Features, Item, Record, Row
from denoscope.correspondence import transfer
from denoscope.correspondence.matching import transfer_aligned
from denoscope.correspondence.mirroring import counterparts, mirror, unmirrored
from denoscope.errors import InputError
from denoscope.features import FeatureMap
from denoscope.images import Frame, Picture, Points, as_points, read
from denoscope.images.draw import draw_matches


@dataclass
class Semantic:
    """PCK over annotated pairs. Which pairs, and how their pictures are cut out, is what the data sets differ in.

    alphas: shares of the threshold, the headline first. thresholds: kinds of `Pair.threshold`, the headline first.
    soft: soft-argmax window in feature cells, 0 for the best pixel. flip: match from the source's mirror image where that is
    more like the target inside the source's box (`transfer_aligned`); keypoints of the left and right then change places.
    swaps: which ones do, "LEFT-RIGHT" by their ids; by default what the data set says of its own.
    square: compare as squares of so many pixels, at rounded points, as the DHF harness does with 512 (`transfer_square`).
    """

    root: Path
    alphas: tuple[float, ...] = (0.1, 0.05, 0.01)
    thresholds: tuple[str, ...] = ("bbox", "img")
    soft: float = 0.0
    flip: bool = False
    swaps: tuple[str, ...] = ()
    square: int = 0

    name = "semantic"
    preset = "semantic"
    prompt = "a photo of a {category}"

    def __post_init__(self) -> None:
        self.root = Path(self.root).expanduser()
        if unknown := sorted(set(self.thresholds) - set(THRESHOLDS)):
            raise InputError(f"There is no threshold {unknown[0]!r}; choose from {', '.join(THRESHOLDS)}.")
        if not self.alphas or not self.thresholds or not all(0 < alpha <= 1 for alpha in self.alphas):
            raise InputError("PCK needs at least one alpha in (0, 1] and one threshold.")
        if self.square < 0 or (self.square and (self.flip or self.soft)):
            raise InputError("square is a side in pixels, and goes neither with flip nor with soft; 0 leaves it out.")
        if wrong := [swap for swap in self.swaps if not re.fullmatch(r"\d+-\d+", swap)]:
            raise InputError(f"The swap {wrong[0]!r} is not understood; write the ids of two keypoints, LEFT-RIGHT.")

    @property
    def columns(self) -> list[str]:
        made = [f"{kind}@{alpha:g}" for kind in self.thresholds for alpha in self.alphas]
        return [name + flavour for name in made for flavour in ("", " point")]

    def pairs(self) -> list[Pair]:
        raise InputError("Choose a data set.")

    def picture(self, name: str) -> Picture:
        """The picture that a pair names as its source or target."""
        return read(name)

    def exchanged(self, category: str) -> Sequence[tuple[int, int]]:
        """Pairs of keypoint ids that a mirror exchanges."""
        return [(int(a), int(b)) for a, b in (swap.split("-") for swap in self.swaps)]

    def items(self) -> list[Item]:
        return [
            Item(pair.key or f"{i:06d}", pair.category, pair)
            for i, pair in enumerate(self.pairs())
            if len(pair.source_points)
        ]

    def run(self, item: Item, features: Features) -> Record:
        pair: Pair = item.data
        source, target = (features(self.picture(name), item.category) for name in (pair.source, pair.target))
        if self.square:
            return {"points": transfer_square(source, target, pair.source_points, self.square).tolist()}
        points = source.frame.clamped(pair.source_points)
        if not self.flip:
            return {"points": transfer(source, target, points, self.soft).points.tolist()}
        plain = self.picture(pair.source)
        turned = unmirrored(features(mirror(plain), item.category), plain)
        partners = None if pair.ids is None else counterparts(pair.ids, self.exchanged(item.category))
        found = transfer_aligned(source, turned, target, points, pair.source_box, partners, soft_window=self.soft)
        return {"points": found.points.tolist(), "mirrored": found.recipe["mirrored"]}

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        categories = {item.category for item in items}
        found = []
        for category in [None, *sorted(categories - {""})] if len(categories) > 1 else [None]:
            chosen = [(i, r) for i, r in zip(items, records, strict=True) if category in (None, i.category)]
            row: Row = {"category": category or "all", "count": len(chosen)}
            for kind in self.thresholds:
                for alpha in self.alphas:
                    per_image, per_point = pck([self._correct(item, record, alpha, kind) for item, record in chosen])
                    row[f"{kind}@{alpha:g}"], row[f"{kind}@{alpha:g} point"] = per_image, per_point
            found.append(row)
        return found

    def _correct(self, item: Item, record: Record, alpha: float, kind: str) -> torch.Tensor:
        return item.data.correct(as_points(record["points"]), alpha, cast(Threshold, kind))

    def score(self, item: Item, record: Record) -> float:
        """The share right and, among equals, the mean error relative to the threshold."""
        pair: Pair = item.data
        kind, alpha = cast(Threshold, self.thresholds[0]), self.alphas[0]
        errors = (as_points(record["points"]) - pair.target_points).norm(dim=1).mean().item() / pair.threshold(kind)
        return self._correct(item, record, alpha, kind).double().mean().item() - 1e-3 * min(errors, 1.0)

    def draw(self, item: Item, record: Record) -> Image.Image:
        """The source, the target with the true points, and the target with those found."""
        pair: Pair = item.data
        right = self._correct(item, record, self.alphas[0], self.thresholds[0])
        source, target = self.picture(pair.source), self.picture(pair.target)
        truth, found = (Picture(target.pixels, Path(name)) for name in ("truth", "found"))
        every = pair.source_points, pair.target_points, as_points(record["points"])
        on = [Frame.of(p.size).clamped(points) for p, points in zip((source, target, target), every, strict=True)]
        title = f"{item.key}: {int(right.sum())} of {len(right)} right"
        return draw_matches(source, [truth, found], on[0], on[1:], correct=[right | True, right], title=title)

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        return {}


def transfer_square(source: FeatureMap, target: FeatureMap, points: Points, side: int = 512) -> Points:
    """Point transfer by the harness of Diffusion Hyperfeatures (Luo et al., NeurIPS 2023, arXiv 2305.14334).

    Both maps are enlarged (bilinear) to side x side whatever the shape of the pictures; points are scaled by side / size,
    without regard to half pixels, clipped and rounded; the best pixel is scaled back. Points and what is returned are in
    pixels of the pictures. For comparing with numbers made that way; `transfer` is exact.

    Raises InputError for maps that do not cover the whole picture.
    """
    for fm in (source, target):
        if not _covers(fm):
            raise InputError("Only maps that cover the whole picture can be compared as squares.")
    one, two = (replace(fm, frame=Frame.of((side, side)).resize(fm.frame.grid)) for fm in (source, target))
    asked = (points * (side / points.new_tensor(source.frame.picture))).clamp(0, side - 1).round()
    return transfer(one, two, asked).points * (points.new_tensor(target.frame.picture) / side)


def _covers(fm: FeatureMap) -> bool:
    corners = torch.tensor([(0, 0), fm.frame.picture], dtype=torch.float64) - 0.5
    return torch.allclose(
        fm.frame.to_grid(corners), torch.tensor([(0, 0), fm.frame.grid], dtype=torch.float64) - 0.5, atol=1e-6
    )
