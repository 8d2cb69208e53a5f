"""Tracking: object masks, points or boxes of the first frame of a video carried through all of it.

Label propagation (see `propagation`) on the features of every frame, which are made as the frames come and dropped when no
later frame needs them: memory does not grow with the length of the video.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from denoscope.correspondence.labels import (
    box_labels,
    hard_mask,
    joint_cells,
    joint_maps,
    mask_maps,
    network_size,
    read_mask_labels,
    write_mask,
)
from denoscope.correspondence.propagation import propagate_labels
from denoscope.denoisers.protocol import Denoiser
from denoscope.encoders.protocol import Encoder
from denoscope.errors import InputError
from denoscope.features import Extractor, FeatureMap, as_extractor
from denoscope.images import Frame, Picture, Points, PointsLike, save_result
from denoscope.images.video import Frames

Mask = UInt8[np.ndarray, "height width"]

# published (DIFT's README); other models listen to as many and as strictly as Stable Diffusion unless they say so
DEFAULTS: dict[str, Any] = {"context": 28, "radius": 15, "topk": 15, "temperature": 0.2}
PROPAGATION: dict[str, dict[str, Any]] = {"adm": {"topk": 10, "temperature": 0.1}}


def propagation_settings(extractor: Any) -> dict[str, Any]:
    """Context, radius, topk and temperature of `propagate_labels` that suit an extractor: the published ones of its model's
    family, or what the model's own temporal preset says under "propagation"."""
    model = getattr(extractor, "denoiser", None) or getattr(extractor, "encoder", None)
    if model is None:
        return dict(DEFAULTS)
    own = model.presets.get("temporal", {}).get("propagation", {})
    return {**DEFAULTS, **PROPAGATION.get(model.family, {}), **own}


@dataclass(frozen=True, eq=False)
class Tracked:
    """One frame of a tracked video.

    kind: "mask", "points" or "boxes", what was tracked. name: of the frame. mask: object numbers (masks and boxes).
    points: (x, y) in pixels of the frame, NaN where lost. objects: numbers of the objects (points count from 0).
    scores: of each object in [0, 1], how much of the propagated label comes from the object: for points at the best cell, for
    masks and boxes the mean over the object's pixels; 1 in the first frame, 0 where lost.
    """

    index: int
    name: str
    kind: str
    picture: Picture = field(repr=False)
    objects: list[int]
    scores: list[float]
    mask: Mask | None = field(default=None, repr=False)
    points: Points | None = None
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One dict of JSON values per object: object, score and x, y (points) or area, x, y (centre), box (else).

        Boxes are [x1, y1, x2, y2], the first and last columns and rows of pixels of the object; what is lost has None.
        """
        found = []
        for place, (number, score) in enumerate(zip(self.objects, self.scores, strict=True)):
            row: dict[str, Any] = {"object": number, "score": round(score, 4)}
            if self.points is not None:
                x, y = self.points[place].tolist()
                row |= {"x": None, "y": None} if np.isnan(x) else {"x": round(x, 2), "y": round(y, 2)}
            elif self.mask is not None:
                ys, xs = np.nonzero(self.mask == number)
                row["area"] = len(xs)
                row |= {"x": None, "y": None, "box": None}
                if len(xs):
                    row |= {"x": round(float(xs.mean()), 2), "y": round(float(ys.mean()), 2)}
                    row["box"] = [int(v) for v in (xs.min(), ys.min(), xs.max(), ys.max())]
            found.append(row)
        return found

    def draw(self, tail: Sequence[Points] = ()) -> Image.Image:
        """The frame with its masks tinted, its boxes framed or its points marked, in one colour per object.

        tail: the points of the frames before, oldest first, to draw where the points come from.
        """
        from denoscope.images.draw import mask_overlay
        from denoscope.images.draw_tracks import draw_boxes, draw_points

        if self.points is not None:
            return draw_points(self.picture, self.points, tail)
        assert self.mask is not None
        if self.kind == "boxes":
            boxes = {row["object"]: row["box"] for row in self.rows() if row["box"]}
            return draw_boxes(self.picture, list(boxes.values()), list(boxes))
        return mask_overlay(self.picture, torch.from_numpy(self.mask.astype(np.int64)))

    def save(self, path: str | Path) -> Path:
        """Write the object numbers as an indexed .png with the palette of DAVIS (masks and boxes)."""
        if self.mask is None:
            raise InputError("Points have no mask to save; use `rows`, or `Tracks` for all frames.")
        if Path(path).suffix.lower() != ".png":
            raise InputError(f"Masks are saved as .png, not {Path(path).suffix or 'a file without suffix'}.")
        return write_mask(self.mask, path)


def track(
    model: Any,
    video: Any,
    *,
    mask: Any = None,
    points: PointsLike | None = None,
    boxes: Any = None,
    context: int | None = None,
    radius: int | None = None,
    topk: int | None = None,
    temperature: int | float | None = None,
    **options: Any,
) -> Iterator[Tracked]:
    """Carry what is marked in the first frame of a video through all of it, frame by frame as they are asked for.

    model: a Denoiser or Encoder, whose "temporal" preset is the default, or any Extractor. video: a folder of frames, a
    video file, an animated image, or a list of pictures (`Frames`). Give one of

    mask: object numbers of the first frame, an image or array as `read_mask_labels` takes it.
    points: (x, y) pixels of the first frame.
    boxes: (x1, y1, x2, y2) pixels of the first frame, both corners included, see `box_labels`.

    context, radius, topk, temperature: of `propagate_labels`, by default `propagation_settings` of the model. `options` are
    those of `denoscope.features`. The first frame comes back as it was given.

    Points follow the protocol of JHMDB: a small Gaussian on the nearest cell, and the weighted mean of the 3 best cells;
    the part of a cell by which a point lies beside its cell's centre is kept in all frames.

    Raises InputError for labels that do not fit the first frame, and what `Frames` and `features` raise.
    """
    given = {"mask": mask, "points": points, "boxes": boxes}
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise InputError("Say what to track: one of mask, points or boxes of the first frame.")
    if isinstance(model, Denoiser | Encoder) and options.get("preset") is None:
        options["preset"] = "temporal"
    extract = as_extractor(model, **options)
    own = {"context": context, "radius": radius, "topk": topk, "temperature": temperature}
    settings = propagation_settings(extract) | {key: value for key, value in own.items() if value is not None}
    propagate_labels([], torch.zeros(1, 1, 1), **settings)  # wrong settings are told before any work
    frames = Frames(video)
    labels = first_labels(kinds[0], given[kinds[0]], frames.size)
    return _tracked(extract, frames, kinds[0], labels, settings)


def first_labels(kind: str, given: Any, size: tuple[int, int]) -> Any:
    """A mask as large as the frame, or points inside it."""
    if kind == "points":
        return Frame.of(size).inside(given)
    if kind == "boxes":
        return box_labels(given, size)
    labels = read_mask_labels(given)
    if labels.shape[::-1] != size:
        found = "x".join(map(str, labels.shape[::-1]))
        raise InputError(f"The mask is {found} but the first frame {size[0]}x{size[1]}; they must be of one size.")
    return labels


def _tracked(extract: Extractor, frames: Frames, kind: str, given: Any, settings: dict[str, Any]) -> Iterator[Tracked]:
    pictures = iter(frames)
    now = next(pictures)
    start = extract(now)
    beside, numbers = torch.zeros(0, 2), [0]
    if kind == "points":
        cells = start.frame.to_grid(given)
        maps, objects = joint_maps(cells, start.frame.grid), list(range(len(given)))
        beside = cells - joint_cells(maps).double()
    else:
        maps, numbers = mask_maps(given, start.frame.grid)
        objects = sorted(set(np.unique(given).tolist()) - {0})
        if small := [number for number in objects if not maps[numbers.index(number)].any()]:
            warnings.warn(
                f"Object {small[0]} is smaller than the distance of two features and is lost at once; use a larger size.",
                stacklevel=2,
            )

    def values() -> Iterator[Tensor]:
        nonlocal now
        yield start.values
        for now in pictures:
            yield extract(now).values

    recipe = {**start.recipe, "picture": None, "propagation": settings}
    for index, soft in enumerate(propagate_labels(values(), maps, **settings)):
        common = {"index": index, "name": frames.name(index), "kind": kind, "picture": now, "recipe": recipe}
        if kind == "points":
            found, scores = given, [1.0] * len(objects)
            if index:
                scores = soft[1:].amax((1, 2)).tolist()
                found = _positions(soft, beside, start)
            yield Tracked(**common, objects=objects, scores=scores, points=found)
            continue
        hard = hard_mask(soft, numbers, network_size(start), now.size) if index else given
        scores = _sureness(soft, numbers, hard, objects) if index else [1.0] * len(objects)
        yield Tracked(**common, objects=objects, scores=scores, mask=hard)


def _positions(soft: Tensor, beside: Points, fm: FeatureMap) -> Points:
    cells = joint_cells(soft).double().cpu()
    points = fm.frame.to_picture(cells + beside)
    width, height = fm.frame.picture
    points = points.clamp(points.new_tensor([0, 0]), points.new_tensor([width - 1, height - 1]))
    return torch.where((cells < 0).any(1, keepdim=True), torch.nan, points)


def _sureness(soft: Tensor, numbers: list[int], hard: Mask, objects: list[int]) -> list[float]:
    """Mean soft label over every object's pixels."""
    height, width = soft.shape[1:]
    rows, columns = (torch.arange(n) * cells // n for n, cells in zip(hard.shape, (height, width), strict=True))
    scores = []
    for number in objects:
        inside = torch.from_numpy(hard == number)
        plane = soft[numbers.index(number)].cpu()[rows][:, columns]
        scores.append(plane[inside].mean().item() if inside.any() else 0.0)
    return scores


@dataclass(frozen=True, eq=False)
class Tracks:
    """What was tracked, of all frames: numbers without pictures.

    kind: "mask", "points" or "boxes". frames: for every frame its name and the rows of `Tracked`. size: (width, height).
    recipe: how the features were made, and the settings of the propagation. first: the first frame.
    """

    kind: str
    frames: list[dict[str, Any]]
    size: tuple[int, int]
    recipe: dict[str, Any]
    first: Picture | None = field(default=None, repr=False)

    @classmethod
    def collect(cls, tracked: Iterable[Tracked]) -> "Tracks":
        """From the frames that `track` gives, which are not kept."""
        kind, frames, recipe, first = "", [], {}, None
        for one in tracked:
            if first is None:
                first, kind, recipe = one.picture, one.kind, one.recipe
            frames.append({"frame": one.index, "name": one.name, "objects": one.rows()})
        if first is None:
            raise InputError("There are no frames to collect.")
        return cls(kind, frames, first.size, recipe, first)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def points(self) -> Float[Tensor, "frames objects 2"]:
        """(x, y) of every point, or of every object's centre; NaN where lost."""
        rows = [[(row["x"], row["y"]) for row in one["objects"]] for one in self.frames]
        return torch.tensor([[[np.nan if v is None else v for v in xy] for xy in row] for row in rows]).double()

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per frame and object."""
        found = []
        for one in self.frames:
            for row in one["objects"]:
                flat = {"frame": one["frame"], "name": one["name"], **row}
                if "box" in flat:
                    flat |= dict(zip(("x1", "y1", "x2", "y2"), flat.pop("box") or [None] * 4, strict=True))
                found.append(flat)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": list(self.size), "recipe": self.recipe, "frames": self.frames}

    def draw(self) -> Image.Image:
        """The first frame with the path of every point or object's centre over it."""
        from denoscope.images.draw_tracks import draw_paths

        if self.first is None:
            raise InputError("The first frame behind these tracks is gone, so they cannot be drawn.")
        return draw_paths(self.first, self.points)

    def save(self, path: str | Path) -> Path:
        """Write by suffix: .json (everything), .csv (a row per frame and object), .npz (arrays) or an image of the paths."""

        def arrays() -> dict[str, Any]:
            scores = [[row["score"] for row in one["objects"]] for one in self.frames]
            return {"points": self.points, "scores": scores, "recipe": json.dumps(self.recipe)}

        return save_result(path, "Tracks", self.to_dict, arrays, self.draw, lambda: (list(self.rows()[0]), self.rows()))
