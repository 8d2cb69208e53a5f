"""Few-shot segmentation on the sets of ddpm-segmentation, CamVid and ADE20K, and in their layouts.

An item is a run: a choice of training pictures and the seed of the classifiers. Intersections and unions are summed over the
test pictures of a run; the table has the mean and the standard deviation over the runs.

Two conventions of the mean IoU differ:
- "official" (ddpm-segmentation, and the content-shift paper after it): the mean over all classes but the ignored one, where a
  class that is neither in the truth nor predicted counts 0; what is predicted on ignored pixels counts into the unions.
- "standard" (PASCAL VOC, mmsegmentation): ignored pixels do not count at all, nor do classes without a pixel.
"""

import base64
import io
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from denoscope.benchmarks.protocol import Features, Item, Record, Row
from denoscope.benchmarks.segmentation_data import (
    CAMVID,
    CONVENTIONS,
    SETS,
    ade_names,
    apart,
    beside,
    counts,
    mean_iou,
    read_labels,
)
from denoscope.errors import InputError, MissingError, counted
from denoscope.features import FeatureMap
from denoscope.images import Picture, read
from denoscope.images.draw import contact_sheet
from denoscope.segmentation.ensemble import classified, fit, uncertainty
from denoscope.segmentation.examples import Example
from denoscope.segmentation.few_shot import Side, gather, label_size
from denoscope.segmentation.masks import Classes, overlay, with_legend
from denoscope.segmentation.pixels import IGNORED, Labels, PixelStore, resized_labels

_SHOWN = 3  # test pictures of a run whose predictions are kept, to be drawn


@dataclass(frozen=True, eq=False)
class Split:
    """Pairs of picture and mask files. seed: of this run."""

    train: Sequence[tuple[Path, Path]]
    test: Sequence[tuple[Path, Path]]
    seed: int


@dataclass
class FewShotBenchmark(ABC):
    """What the sets share: training on a few pictures, evaluation on others, tables and pictures.

    runs: how many. models, epochs: of the classifier. side: longer side of the label maps that are learned from (0: their own
    size). pixels: at most so many pixels of each class of a training picture are learned from (0: all). precision: of
    features on disk. convention: of the mean IoU. scratch: folder for the pixels of a run; empty for the system's.
    """

    root: Path
    runs: int = 5
    models: int = 10
    epochs: int = 100
    side: int = 128
    pixels: int = 0
    seed: int = 0
    precision: str = "float16"
    convention: str = "standard"
    scratch: str = ""

    name = "few-shot"
    preset = "semantic"
    columns = ("mIoU", "± runs", "accuracy", "mean accuracy", "uncertainty x100")

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise InputError(f"There is no convention {self.convention!r}; choose one of {', '.join(CONVENTIONS)}.")
        if self.runs < 1:
            raise InputError(f"At least 1 run is needed, not {self.runs}.")

    @abstractmethod
    def splits(self) -> list[Split]:
        """Of every run. Raises MissingError saying what was looked for and where."""

    @property
    @abstractmethod
    def classes(self) -> Classes: ...

    @property
    def ignore(self) -> int:
        """The label in the files that is no class."""
        return 255

    @property
    def counted(self) -> Sequence[int]:
        """The classes that count."""
        return range(len(self.classes))

    def truth(self, path: Path) -> Labels:
        """Class numbers of a mask file, IGNORED where there is none."""
        labels = read_labels(path, self.ignore)
        if labels.max() >= len(self.classes):
            raise InputError(f"{path} has label {labels.max()}, but there are {len(self.classes)} classes.")
        return labels

    def learned(self) -> Side:
        """Size of the label maps that are learned from."""
        return self.side or None

    def measured(self) -> Side:
        """Size of the label maps that are compared."""
        return None

    def items(self) -> list[Item]:
        return [Item(f"run-{split.seed}", f"run {split.seed}", split) for split in self.splits()]

    def run(self, item: Item, features: Features) -> Record:
        """Train on the run's pictures, classify the others."""

        def told(picture: Picture) -> FeatureMap:
            return features(picture, "")

        split: Split = item.data
        examples = [Example(picture, self.truth(mask)) for picture, mask in split.train]
        with tempfile.TemporaryDirectory(prefix="denoscope-pixels-", dir=self.scratch or None) as folder:
            store = PixelStore(Path(folder), self.precision)  # pyright: ignore[reportArgumentType]
            gather(store, examples, told, {}, self.learned(), self.pixels or None, seed=split.seed)
            ensemble = fit(store, len(self.classes), self.models, self.epochs, split.seed)
            size = {"training_pixels": len(store), "bytes": store.bytes}

        def predicted(picture: Picture, shape: tuple[int, int]) -> tuple[Labels, float]:
            labels, doubt = classified(ensemble, told(picture), shape)
            return labels, uncertainty(torch.from_numpy(doubt))

        return {**self._evaluated(split, predicted), **size}

    def majority(self, item: Item) -> Record:
        """Every pixel of the class that most training pixels have."""
        split: Split = item.data
        total = sum(
            np.bincount(labels[labels >= 0], minlength=len(self.classes))
            for labels in map(self.truth, dict(split.train).values())
        )
        best = int(np.argmax(total))
        return self._evaluated(split, lambda _, size: (np.full(size[::-1], best, np.int16), 0.0))

    def _evaluated(self, split: Split, predict: Callable[[Picture, tuple[int, int]], tuple[Labels, float]]) -> Record:
        both = np.zeros(len(self.classes), np.int64)
        either, right, known = both.copy(), both.copy(), both.copy()
        each, doubts, shown = [], [], {}
        drawn = {k * len(split.test) // _SHOWN for k in range(_SHOWN)}
        for index, (file, mask) in enumerate(split.test):
            example = Example(file, self.truth(mask))
            picture = example.read()
            size = label_size(picture.size, self.measured())
            truth = resized_labels(example.labels, size)
            labels, doubt = predict(picture, size)
            one, other = counts(labels, truth, len(self.classes), self.convention)
            both, either = both + one, either + other
            right += np.bincount(truth[(truth >= 0) & (labels == truth)], minlength=len(self.classes))
            known += np.bincount(truth[truth >= 0], minlength=len(self.classes))
            each.append(mean_iou(one, other, self.counted, "standard")[0])
            doubts.append(doubt)
            if index in drawn:
                shown[str(index)] = _packed(labels)
        return {
            "intersections": both.tolist(),
            "unions": either.tolist(),
            "right": right.tolist(),
            "pixels": known.tolist(),
            "train": [file.stem for file, _ in split.train],
            "test": [file.stem for file, _ in split.test],
            "mIoU": [float(value) for value in each],
            "uncertainty": [float(value) for value in doubts],
            "masks": shown,
        }

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        """Means over runs, in percent, then the IoU of every class; "± runs" is the standard deviation (n - 1), None of one."""
        counted = list(self.counted)
        found = [mean_iou(r["intersections"], r["unions"], counted, self.convention) for r in records]
        right, known = (np.array([record[key] for record in records], float)[:, counted] for key in ("right", "pixels"))
        accuracy = right.sum(1) / known.sum(1).clip(1)
        recall = [np.mean(r[k > 0] / k[k > 0]) if (k > 0).any() else 0.0 for r, k in zip(right, known, strict=True)]
        values = [
            100 * float(np.mean([mean for mean, _ in found])),
            _spread([100 * mean for mean, _ in found]),
            100 * float(np.mean(accuracy)),
            100 * float(np.mean(recall)),
            100 * float(np.mean([np.mean(record["uncertainty"]) for record in records])),
        ]
        rows: list[Row] = [{"category": "all", "count": len(records), **dict(zip(self.columns, values, strict=True))}]
        for place, k in enumerate(counted):
            own = [100 * ious[place] for _, ious in found if not np.isnan(ious[place])]
            share = right[:, place].sum() / known[:, place].sum() if known[:, place].sum() else None
            rows.append(
                {
                    "category": self.classes.names[k],
                    "count": len(own),
                    "mIoU": float(np.mean(own)) if own else None,
                    "± runs": _spread(own),
                    "accuracy": None if share is None else 100 * float(share),
                }
            )
        return rows

    def score(self, item: Item, record: Record) -> float:
        return mean_iou(record["intersections"], record["unions"], list(self.counted), self.convention)[0]

    def draw(self, item: Item, record: Record) -> Image.Image:
        """Some of the test pictures, their predictions and the truth."""
        split: Split = item.data
        images, titles, occurring = [], [], set()
        for index, packed in record["masks"].items():
            file, mask = split.test[int(index)]
            picture, truth = read(file), self.truth(mask)
            labels = resized_labels(_unpacked(packed), picture.size)
            images += [picture.image(), overlay(picture, labels, self.classes), overlay(picture, truth, self.classes)]
            titles += [file.stem, f"predicted: mIoU {100 * record['mIoU'][int(index)]:.1f}", "truth"]
            occurring |= set(np.unique(labels).tolist()) | set(np.unique(truth).tolist())
        return with_legend(contact_sheet(images, titles, 3, 320), self.classes, sorted(occurring - {IGNORED}))

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        return {"majority class": self.majority}


@dataclass
class FewShot(FewShotBenchmark):
    """A set of ddpm-segmentation: `SET/real/{train,test}/NAME.{png,jpg}` with NAME.npy beside, or the folder SET itself.

    Labels and features are compared at 256 x 256. split: "shuffled" draws as many training pictures as there are from all of
    them for every run (content shift); "fixed" takes the folders as they are, runs differing in their seeds only
    (ddpm-segmentation). set: whose classes it has, by default by the folder's name; other sets: every label occurring.
    """

    side: int = 256
    convention: str = "official"
    split: str = "shuffled"
    set: str = ""

    name = "few-shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("shuffled", "fixed"):
            raise InputError(f'The split is "shuffled" or "fixed", not {self.split!r}.')
        if self.set and self.set not in SETS:
            raise InputError(f"There is no set {self.set!r}; choose one of {', '.join(SETS)}, or leave it out.")
        self._found: dict[str, list[tuple[Path, Path]]] | None = None
        self._own: Classes | None = None

    @property
    def set_name(self) -> str:
        """One of SETS, or empty for a set of one's own."""
        names = [self.set, Path(self.root).resolve().name.lower().replace("-", "_")]
        return next((name for name in names if name in SETS), "")

    @property
    def ignore(self) -> int:
        return SETS[self.set_name].ignore if self.set_name else 255

    @property
    def counted(self) -> Sequence[int]:
        return [k for k in range(len(self.classes)) if k != self.ignore]

    @property
    def classes(self) -> Classes:
        if self.set_name:
            return Classes.of(SETS[self.set_name].names)
        if self._own is None:
            masks = [mask for pairs in self._pairs().values() for _, mask in pairs]
            self._own = Classes.numbered(max(int(read_labels(mask, 255).max()) for mask in masks) + 1)
        return self._own

    def learned(self) -> Side:
        return (self.side, self.side) if self.side else None

    measured = learned

    def _pairs(self) -> dict[str, list[tuple[Path, Path]]]:
        if self._found is None:
            home = next((h for h in (Path(self.root) / "real", Path(self.root)) if (h / "train").is_dir()), None)
            if home is None:
                wanted = Path(self.root) / "real" / "train"
                raise MissingError(
                    f"{self.root} is not in the layout of ddpm-segmentation: there is no folder {wanted}."
                )
            self._found = {part: beside(home / part) for part in ("train", "test")}
        return self._found

    def splits(self) -> list[Split]:
        train, test = self._pairs()["train"], self._pairs()["test"]
        if self.split == "fixed":
            return [Split(train, test, self.seed + run) for run in range(self.runs)]
        both, found = [*train, *test], []
        for run in range(self.runs):
            order = np.random.default_rng(self.seed + run).permutation(len(both))
            shuffled = [both[k] for k in order]
            found.append(Split(shuffled[: len(train)], shuffled[len(train) :], self.seed + run))
        return found


@dataclass
class Shots(FewShotBenchmark):
    """A few pictures of a large training set, others for every run. shots: how many. test: on how many to test, 0 for all."""

    runs: int = 3
    shots: int = 5
    test: int = 0

    @abstractmethod
    def pool(self) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
        """Pictures to draw shots from, and those to test on."""

    def splits(self) -> list[Split]:
        train, test = self.pool()
        if not 1 <= self.shots <= len(train):
            has = counted(len(train), "training picture")
            raise InputError(f"shots={self.shots} is not possible; {self.root} has {has}.")
        found = []
        for run in range(self.runs):
            chosen = np.random.default_rng(self.seed + run).permutation(len(train))[: self.shots]
            shots = [train[k] for k in sorted(chosen)]
            others = [pair for pair in test if pair not in shots]
            if self.test:
                others = [others[k * len(others) // self.test] for k in range(min(self.test, len(others)))]
            if not others:
                raise InputError(f"shots={self.shots} leaves no picture of {self.root} to test on.")
            found.append(Split(shots, others, self.seed + run))
        return found


@dataclass
class CamVid(Shots):
    """CamVid as SegNet has it: `train`, `trainannot`, `val`, `valannot`, `test`, `testannot`; 11 classes, 11 is unlabelled.

    split: "val" or "test", what to test on.
    """

    split: str = "val"

    name = "camvid"

    @property
    def classes(self) -> Classes:
        return Classes.of(CAMVID)

    @property
    def ignore(self) -> int:
        return 11

    def pool(self) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
        root = Path(self.root)
        return apart(root / "train", root / "trainannot"), apart(root / self.split, root / f"{self.split}annot")


@dataclass
class ADE20K(Shots):
    """ADE20K, scene parsing: `images/SPLIT/NAME.jpg`, `annotations/SPLIT/NAME.png`; 150 classes, 0 is other and ignored.

    train, split: the folders to learn from and to test on; when they are the same, what is not learned from is tested on.
    Class k of the table is label k + 1 of the files.
    """

    shots: int = 50
    train: str = "training"
    split: str = "validation"

    name = "ade20k"

    @property
    def classes(self) -> Classes:
        listed = Path(self.root) / "objectInfo150.txt"
        names = ade_names(listed) if listed.is_file() else [f"label {k + 1}" for k in range(150)]
        return Classes.of(names)

    @property
    def ignore(self) -> int:
        return 0

    def truth(self, path: Path) -> Labels:
        labels = read_labels(path, 0)
        if labels.max() > 150:
            raise InputError(f"{path} has label {labels.max()}; ADE20K's scene parsing has 0 to 150.")
        return np.where(labels == IGNORED, IGNORED, labels - 1).astype(np.int16)

    def pool(self) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
        root = Path(self.root)
        train, test = (apart(root / "images" / part, root / "annotations" / part) for part in (self.train, self.split))
        return train, test


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _packed(labels: Labels) -> str:
    out = io.BytesIO()
    Image.fromarray(np.where(labels < 0, 255, labels).astype(np.uint8)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _unpacked(text: str) -> Any:
    values = np.array(Image.open(io.BytesIO(base64.b64decode(text)))).astype(np.int16)
    return np.where(values == 255, IGNORED, values).astype(np.int16)
