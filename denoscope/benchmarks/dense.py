"""Dense ground truth: optical flow and stereo disparity, sampled on a grid.

`find_pairs` says which layouts are read: TSS (Taniai et al., CVPR 2016), KITTI (Menze and Geiger, CVPR 2015), and one folder
for each pair, as the Middlebury sets are usually kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from denoscope.benchmarks.protocol import Features, Item, Record, Row
from denoscope.benchmarks.truth import DensePair, find_pairs
from denoscope.correspondence import transfer
from denoscope.errors import InputError
from denoscope.images import Frame, Picture, Points
from denoscope.images.draw import contact_sheet, heat_overlay
from denoscope.images.geometry import flow_colours

PIXELS = (5, 3, 1)


@dataclass
class Dense:
    """Points of one picture found in another, against optical flow or disparity that is known everywhere.

    points: at most so many of the pixels with known truth are asked for in each pair, on a regular grid that is as fine as that
        allows. Pixels whose truth leaves the other picture are left out, since a match cannot be there.
    soft: soft-argmax window in feature cells, 0 for the best pixel.

    AEPE: mean distance in pixels of the source; pck@P: share within P pixels; pck@0.05: share within 0.05 of the longer side
    of the source, the threshold of TSS. All are means over pairs of what they are in each.
    """

    root: Path
    points: int = 1000
    soft: float = 0.0
    alpha: float = 0.05

    name = "dense"
    preset = "geometric"
    prompt = ""

    def __post_init__(self) -> None:
        self.root = Path(self.root).expanduser()
        if self.points < 1 or not 0 <= self.soft < math.inf or not 0 < self.alpha <= 1:
            raise InputError("Dense evaluation needs at least 1 point a pair, a window of 0 or more, alpha in (0, 1].")

    @property
    def columns(self) -> list[str]:
        return [*(f"pck@{p}px" for p in PIXELS), f"pck@{self.alpha:g}", "AEPE", "points"]

    def items(self) -> list[Item]:
        return [Item(pair.key, pair.category, pair) for pair in find_pairs(self.root)]

    def _asked(self, pair: DensePair, source: Picture, target: Picture) -> tuple[Points, Points]:
        """The points to look for, and where they are in the target."""
        flow = pair.flow()
        if flow.shape[1::-1] != source.size:
            raise InputError(f"{pair.truth} is {flow.shape[1]}x{flow.shape[0]} but {pair.source} is not as large.")
        h, w = flow.shape[:2]
        there = flow + np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1)
        with np.errstate(invalid="ignore"):
            inside = ((there >= -0.5) & (there <= np.array(target.size) - 0.5)).all(-1)
        known = inside & pair.known(flow.shape[:2])
        if not known.any():
            raise InputError(f"{pair.truth} says of no pixel where it is in {pair.target}.")
        step = max(1, math.isqrt(int(known.sum()) // self.points))
        while known[step // 2 :: step, step // 2 :: step].sum() > self.points:
            step += 1
        grid = np.zeros_like(known)
        grid[step // 2 :: step, step // 2 :: step] = True
        chosen = grid & known if (grid & known).any() else _only_first(known)
        y, x = chosen.nonzero()
        return torch.from_numpy(np.stack([x, y], 1).astype(np.float64)), torch.from_numpy(
            there[y, x].astype(np.float64)
        )

    def run(self, item: Item, features: Features) -> Record:
        source, target = item.data.pictures()
        points, truth = self._asked(item.data, source, target)
        found = transfer(features(source, ""), features(target, ""), points, self.soft)
        return _record(source, points, truth, found.points)

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        found = []
        categories = sorted({item.category for item in items})
        for category in (None, *categories) if len(categories) > 1 else (None,):
            chosen = [r for item, r in zip(items, records, strict=True) if category in (None, item.category)]
            errors = [(_errors(r), self.alpha * max(r["size"])) for r in chosen]
            row: Row = {"category": category or "all", "count": len(chosen)}
            row[f"pck@{self.alpha:g}"] = float(np.mean([100 * (e <= limit).mean() for e, limit in errors]))
            row["AEPE"] = float(np.mean([e.mean() for e, _ in errors]))
            row |= {f"pck@{p}px": float(np.mean([100 * (e <= p).mean() for e, _ in errors])) for p in PIXELS}
            found.append({**row, "points": float(np.mean([len(e) for e, _ in errors]))})
        return found

    def score(self, item: Item, record: Record) -> float:
        """Minus the mean error relative to the longer side."""
        return -float(_errors(record).mean()) / max(record["size"])

    def draw(self, item: Item, record: Record) -> Image.Image:
        """Both pictures, the true and the predicted motion in the same colours, and the error (dark: none, yellow: most)."""
        source, target = item.data.pictures()
        points = np.array(record["points"])
        flows = [np.array(record[key]) - points for key in ("truth", "predicted")]
        longest = max(1e-6, float(np.percentile(np.linalg.norm(flows[0], axis=1), 99)))
        error = _errors(record)
        limit = max(PIXELS[0], self.alpha * max(record["size"]))
        true, predicted = (_spread(points, flow_colours(flow, longest), source.size) for flow in flows)
        worst = _spread(points, (error / limit).clip(0, 1)[:, None], source.size)[..., 0]
        worst[0, 0], worst[-1, -1] = 0, 1  # `heat_overlay` scales from least to most
        heat = heat_overlay(source, torch.from_numpy(worst).float(), 0.75)
        panels = [source.image(), target.image(), heat, Image.fromarray(true), Image.fromarray(predicted)]
        labels = ["source", "target", f"error, 0 to {limit:.0f} px: mean {error.mean():.1f} px"]
        return contact_sheet(panels, [*labels, "true motion", "predicted motion"], columns=3, side=420)

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        """No motion (the same place relative to the picture), and DIS optical flow (Kroeger et al., arXiv 1603.03590)."""
        return {"no motion": lambda item: self._moved(item, _still), "dis-flow": lambda item: self._moved(item, _dis)}

    def _moved(self, item: Item, motion: Callable[[Picture, Picture, Points], Points]) -> Record:
        source, target = item.data.pictures()
        points, truth = self._asked(item.data, source, target)
        return _record(source, points, truth, motion(source, target, points))


def _only_first(known: np.ndarray) -> np.ndarray:
    first = np.zeros_like(known)
    first.flat[known.argmax()] = True
    return first


def _record(source: Picture, points: Points, truth: Points, predicted: Points) -> Record:
    def rounded(values: Points) -> list[list[float]]:
        return [[round(x, 3), round(y, 3)] for x, y in values.tolist()]

    made = {"points": rounded(points), "truth": rounded(truth), "predicted": rounded(predicted)}
    return {**made, "size": list(source.size)}


def _errors(record: Record) -> Float[np.ndarray, " points"]:
    return np.linalg.norm(np.array(record["predicted"]) - np.array(record["truth"]), axis=1)


def _still(source: Picture, target: Picture, points: Points) -> Points:
    return Frame.of(source.size).resize(target.size).to_grid(points)


def _dis(source: Picture, target: Picture, points: Points) -> Points:
    """The target is shrunk or enlarged to the source's size first, as the method needs equal sizes."""
    images = [np.array(source.image()), np.array(target.image().resize(source.size))]
    one, two = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images)
    moved = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(
        one, two, np.zeros((*one.shape, 2), np.float32)
    )
    at = points.round().long()
    found = points + torch.from_numpy(moved)[at[:, 1], at[:, 0]].double()
    return Frame.of(source.size).resize(target.size).to_grid(found)


def _spread(points: np.ndarray, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, channels]: every pixel within half a grid step of a point has its value; elsewhere zeros (black)."""
    xs, ys = np.unique(points[:, 0]), np.unique(points[:, 1])
    gaps = np.concatenate([np.diff(xs), np.diff(ys)])
    half = int(gaps.min()) // 2 if len(gaps) else 2
    canvas = np.zeros((size[1], size[0], values.shape[1]), values.dtype)
    for (x, y), value in zip(points.astype(int), values, strict=True):
        canvas[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = value
    return canvas
