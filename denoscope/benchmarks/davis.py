"""DAVIS-2017, semi-supervised: carry the masks of the first frame through the video; region J and boundary F.

Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation", arXiv 1704.00675. The numbers are those of the
official evaluation (davisvideochallenge/davis2017-evaluation): objects are the labels of the first annotation, void (255) is
background, the first and the last frame do not count, and every object weighs the same.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from denoscope.benchmarks.protocol import Features, Item, Record, Row
from denoscope.correspondence.labels import hard_mask, mask_maps, network_size, write_mask
from denoscope.correspondence.propagation import propagate_labels
from denoscope.correspondence.tracking import propagation_settings
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, read
from denoscope.images.draw import contact_sheet, mask_overlay
from denoscope.images.picture import IMAGE_SUFFIXES

Mask = UInt8[np.ndarray, "height width"]
Region = Bool[np.ndarray, "height width"]
VOID = 255
BOUNDARY = 0.008  # of the picture's diagonal: how far apart boundaries may lie and still meet


def region_similarity(predicted: Region, truth: Region) -> float:
    """J, the area of the intersection over that of the union; 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary_accuracy(predicted: Region, truth: Region, bound: float = BOUNDARY) -> float:
    """F, the harmonic mean of precision and recall of the boundaries, which meet within `bound` picture diagonals."""
    radius = math.ceil(bound * math.hypot(*truth.shape))
    one, two = boundary(predicted), boundary(truth)
    n_one, n_two = int(one.sum()), int(two.sum())
    if not n_one or not n_two:
        return float(n_one == n_two)  # one without the other has precision or recall 0
    precision = np.count_nonzero(one & _grown(two, radius)) / n_one
    recall = np.count_nonzero(two & _grown(one, radius)) / n_two
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(region: Region) -> Region:
    """Pixels that differ from their right, lower or lower right neighbour (in the last row and column only along it)."""
    edges = np.zeros_like(region)
    edges[:, :-1] |= region[:, :-1] ^ region[:, 1:]
    edges[:-1] |= region[:-1] ^ region[1:]
    edges[:-1, :-1] |= region[:-1, :-1] ^ region[1:, 1:]
    return edges


def _grown(region: Region, radius: int) -> Region:
    return cv2.dilate(region.astype(np.uint8), _disk(radius)).astype(bool)


@lru_cache
def _disk(radius: int) -> Mask:
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares <= radius**2).astype(np.uint8)


def statistics(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, recall (share of frames above 0.5) and decay (mean of the first quarter less that of the last) of one object.

    The quarters share their end frames, as in the official code, which however goes wrong past 256 frames.
    """
    array = np.asarray(values, dtype=np.float64)
    ends = (np.round(np.linspace(1, len(array), 5) + 1e-10) - 1).astype(int)
    decay = array[ends[0] : ends[1] + 1].mean() - array[ends[3] : ends[4] + 1].mean()
    return float(array.mean()), float((array > 0.5).mean()), float(decay)


@dataclass(frozen=True)
class Video:
    """frames, truths: one picture and one annotation per frame, in order."""

    frames: list[Path]
    truths: list[Path]


@dataclass
class DAVIS:
    """The sequences of ImageSets/2017/SPLIT.txt, in a root with JPEGImages and Annotations.

    sequences: only these. context, radius: of the propagation; topk, temperature: 0 takes the model's own
    (`propagation_settings`). results: a folder to write the predicted masks into, in the official layout,
    one folder for each method.
    """

    root: Path
    split: str = "val"
    sequences: tuple[str, ...] = ()
    resolution: str = "480p"
    context: int = 28
    radius: int = 15
    topk: int = 0
    temperature: float = 0.0
    results: str = ""

    name = "davis"
    preset = "temporal"
    columns = ("J&F", "J mean", "J recall", "J decay", "F mean", "F recall", "F decay")

    def __post_init__(self) -> None:
        self.root = Path(self.root).expanduser()

    def items(self) -> list[Item]:
        listed = self.root / "ImageSets" / "2017" / f"{self.split}.txt"
        for needed in (listed, *(self.root / part / self.resolution for part in ("JPEGImages", "Annotations"))):
            if not needed.exists():
                hint = " (did you mean the folder DAVIS in it?)" if (self.root / "DAVIS").is_dir() else ""
                up = next((up for up in self.root.resolve().parents[:3] if (up / "ImageSets").is_dir()), None)
                hint = (
                    f" (did you mean {up}?)"
                    if up
                    else hint
                    if self.root.is_dir()
                    else f" ({self.root} itself is missing)"
                )
                raise MissingError(f"{self.root} is not in the DAVIS-2017 layout: there is no {needed}{hint}.")
        names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        if unknown := [name for name in self.sequences if name not in names]:
            raise InputError(f"{listed} does not list {unknown[0]!r}.")
        return [Item(name, name, self._video(name)) for name in names if not self.sequences or name in self.sequences]

    def _video(self, name: str) -> Video:
        folder = self.root / "JPEGImages" / self.resolution / name
        frames = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(frames) < 3:
            raise MissingError(f"The sequence {name} needs 3 frames or more; {folder} holds {len(frames)}.")
        truths = [self.root / "Annotations" / self.resolution / name / f"{frame.stem}.png" for frame in frames]
        if missing := [path for path in truths if not path.is_file()]:
            raise MissingError(f"Frame {missing[0].stem} of {name} has no annotation: there is no {missing[0]}.")
        return Video(frames, truths)

    def run(self, item: Item, features: Features) -> Record:
        settings = propagation_settings(getattr(features, "extractor", None))
        settings |= {"context": self.context, "radius": self.radius}
        settings |= {key: getattr(self, key) for key in ("topk", "temperature") if getattr(self, key)}
        name = getattr(getattr(features, "extractor", None), "name", "features")
        return self._measured(item, propagated_masks(item.data, features, settings), Path(name).name)

    def copied(self, item: Item) -> Record:
        """Baseline: the first mask, everywhere."""
        first = read_annotation(item.data.truths[0])
        return self._measured(item, (first for _ in item.data.frames), "first_mask")

    def flowed(self, item: Item) -> Record:
        """Baseline: the first mask, moved from frame to frame by dense optical flow."""
        return self._measured(item, flowed_masks(item.data), "optical_flow")

    def read_results(self, folder: str | Path) -> Callable[[Item], Record]:
        """A function that measures masks written before: FOLDER/SEQUENCE/FRAME.png, indexed.

        Raises MissingError for masks that are not there, InputError for masks of another size, in colours, or with a label
        that the first annotation does not have room for, as the official evaluation does.
        """

        def measured(item: Item) -> Record:
            paths = [Path(folder).expanduser() / item.key / f"{frame.stem}.png" for frame in item.data.frames]
            # as official, what is not measured need not be there
            skipped = {paths[i] for i in (0, -1) if not paths[i].is_file()}
            first = read_annotation(item.data.truths[0])
            return self._measured(item, (first * 0 if path in skipped else read_annotation(path) for path in paths))

        return measured

    def _measured(self, item: Item, masks: Iterable[Mask], method: str | None = None) -> Record:
        """J and F of every object and frame but the first and the last, and a few masks for pictures.

        method: whose masks they are, for the folder of results; None for those that are there already.
        """
        video: Video = item.data
        first = read_annotation(video.truths[0])
        objects = list(range(1, int(first.max()) + 1))
        if not objects:
            raise InputError(f"{video.truths[0]} shows no object; the first annotation of a sequence must.")
        last = len(video.frames) - 1
        found: dict[str, list[list[float]]] = {"J": [[] for _ in objects], "F": [[] for _ in objects]}
        shown = {}
        for index, (frame, truth_path, mask) in enumerate(zip(video.frames, video.truths, masks, strict=True)):
            if self.results and method:
                write_mask(mask, Path(self.results) / method / item.key / f"{frame.stem}.png")
            if index in (last // 2, last):
                shown[frame.stem] = _packed(mask)
            if index in (0, last):
                continue
            truth = read_annotation(truth_path)
            if mask.shape != truth.shape:
                sizes = ["x".join(map(str, one.shape[::-1])) for one in (mask, truth)]
                raise InputError(
                    f"Frame {frame.stem} of {item.key}: the mask is {sizes[0]}, its annotation {sizes[1]}."
                )
            if mask.max() > len(objects):
                raise InputError(
                    f"Frame {frame.stem} of {item.key} has a label {mask.max()}, but the first annotation "
                    f"only {len(objects)} objects."
                )
            for number, j, f in zip(objects, found["J"], found["F"], strict=True):
                j.append(region_similarity(mask == number, truth == number))
                f.append(boundary_accuracy(mask == number, truth == number))
        return {"frames": [frame.stem for frame in video.frames[1:-1]], "objects": objects, **found, "masks": shown}

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        """Means over objects, in percent; "count" is the number of objects."""
        chosen = [("all", list(records))]
        if len(records) > 1:
            chosen += [(item.category, [record]) for item, record in zip(items, records, strict=True)]
        rows = []
        for category, some in chosen:
            j, f = (np.array([statistics(one) for r in some for one in r[key]]).mean(0) * 100 for key in "JF")
            values = [(j[0] + f[0]) / 2, *j, *f]
            count = sum(len(record["objects"]) for record in some)
            rows.append(
                {"category": category, "count": count, **dict(zip(self.columns, map(float, values), strict=True))}
            )
        return rows

    def score(self, item: Item, record: Record) -> float:
        return float(np.mean([record["J"], record["F"]]))

    def draw(self, item: Item, record: Record) -> Image.Image:
        """The first frame with its mask, then a middle and the last frame: prediction tinted, truth outlined in white."""
        video: Video = item.data
        places = {frame.stem: i for i, frame in enumerate(video.frames)}
        images = [mask_overlay(read(video.frames[0]), _tensor(read_annotation(video.truths[0])))]
        titles = [f"{item.key}, first frame"]
        for stem, packed in record["masks"].items():
            frame, truth = read(video.frames[places[stem]]), read_annotation(video.truths[places[stem]])
            image = np.array(mask_overlay(frame, _tensor(_unpacked(packed))))
            image[outline(truth)] = 255
            images.append(Image.fromarray(image))
            at = record["frames"].index(stem) if stem in record["frames"] else None
            means = [np.mean([values[at] for values in record[key]]) * 100 for key in "JF"] if at is not None else []
            titles.append(f"frame {stem}" + (f": J {means[0]:.1f}, F {means[1]:.1f}" if means else ""))
        return contact_sheet(images, titles, columns=3, side=426)

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        return {"first mask": self.copied, "optical flow": self.flowed}


def propagated_masks(video: Video, features: Features, settings: Mapping[str, Any]) -> Iterator[Mask]:
    """Masks of every frame by label propagation; the first is the annotation."""
    first = read_annotation(video.truths[0])
    yield first
    picture = read(video.frames[0])
    start = features(picture, "")
    maps, numbers = mask_maps(first, start.frame.grid)

    def values() -> Iterator[Any]:
        yield start.values
        for frame in video.frames[1:]:
            yield features(read(frame), "").values

    softs = propagate_labels(values(), maps, **settings)
    next(softs)
    for soft in softs:
        yield hard_mask(soft, numbers, network_size(start), picture.size)


def flowed_masks(video: Video) -> Iterator[Mask]:
    """The first mask carried on by DIS optical flow from each frame back to the one before it, object by object."""
    mask = read_annotation(video.truths[0])
    yield mask
    flow, before = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM), _grey(read(video.frames[0]))
    numbers = np.unique(np.append(mask, 0))
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32)
    for frame in video.frames[1:]:
        now = _grey(read(frame))
        back = flow.calc(now, before, np.zeros((*now.shape, 2), np.float32))
        moved = [
            cv2.remap((mask == number).astype(np.float32), x + back[..., 0], y + back[..., 1], cv2.INTER_LINEAR)
            for number in numbers
        ]
        moved[0] = np.maximum(moved[0], 1e-6)  # what comes from outside the picture is background
        mask = numbers[np.argmax(moved, 0)].astype(np.uint8)
        before = now
        yield mask


def read_annotation(path: Path) -> Mask:
    """Object numbers of an annotation or result; void becomes background."""
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.array(image)
    except FileNotFoundError:
        raise MissingError(f"There is no mask {path}.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).") from None
    if mode not in ("P", "L", "1"):
        raise InputError(f"{path} is a picture in {mode}; masks are indexed PNGs whose pixels are object numbers.")
    return np.where(labels == VOID, 0, labels).astype(np.uint8)


def outline(labels: Mask, thickness: int = 2) -> Region:
    """Pixels on the boundaries of any object."""
    edges = np.zeros(labels.shape, bool)
    for number in np.unique(labels[labels > 0]):
        edges |= boundary(labels == number)
    return cv2.dilate(edges.astype(np.uint8), np.ones((thickness, thickness), np.uint8)).astype(bool)


def _grey(picture: Picture) -> Mask:
    return np.array(picture.image().convert("L"))


def _tensor(labels: Mask) -> Any:
    import torch

    return torch.from_numpy(labels.astype(np.int64))


def _packed(labels: Mask) -> str:
    out = io.BytesIO()
    Image.fromarray(labels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _unpacked(text: str) -> Mask:
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))
