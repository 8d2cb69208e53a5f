"""What settings of features are tuned for: annotated pairs, labelled pictures, or pictures without a word about them."""

import random
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from denoscope.benchmarks.pck import Pair, Threshold
from denoscope.benchmarks.protocol import Item, Record
from denoscope.benchmarks.running import fingerprint, options_of, spread
from denoscope.benchmarks.semantic import Semantic
from denoscope.correspondence import transfer
from denoscope.errors import InputError
from denoscope.features import FeatureMap
from denoscope.features.content_shift import score as content_shift_score
from denoscope.images import Frame, Picture, grid_points, read
from denoscope.segmentation import Examples
from denoscope.segmentation.pixels import IGNORED, chosen_pixels, interpolated, resized_labels, without_small

Labels = Int[np.ndarray, "height width"]
Maps = Callable[[Picture], FeatureMap]
Members = Callable[[Picture], list[FeatureMap]]  # of the ensemble, one by one
OWN, REFERENCE, ANCHOR = "own", "reference", "anchor"
_FITS = 512  # classifiers kept; those of one fold serve all of its pictures


@runtime_checkable
class Task(Protocol):
    """metric: what a score is, in percent. weak: whether it only stands in for what is wanted.

    companions: settings that the first picture of every item is read with besides those compared.
    """

    metric: str
    weak: bool

    def describe(self) -> dict[str, Any]:
        """JSON values that decide the scores, together with the features."""
        ...

    @property
    def units(self) -> int:
        """How many pairs or pictures there are to choose from."""
        ...

    def items(self, chosen: Sequence[int]) -> list[Item]:
        """What is scored when only these units are used; each of its keys names a score for good."""
        ...

    def names(self, item: Item) -> list[Hashable]:
        """What names the pictures of an item, in the order of `pictures`: equal names, equal pictures."""
        ...

    def pictures(self, item: Item) -> list[Picture]:
        """All whose features scoring the item takes; companions are read of the first."""
        ...

    def evaluate(self, item: Item, features: Maps, companions: Mapping[str, Members]) -> Record:
        """{"score": percent} and whatever else `value` needs.

        companions: by name, as this task asks for them, and "own", the members of `features`; none where it asks for none.
        """
        ...

    def companions(self, techniques: int) -> Mapping[str, Mapping[str, Any]]:
        """Settings to be read besides, of the first picture of every item, when so many techniques are compared."""
        ...

    def value(self, record: Record, plain: Record | None) -> float:
        """What is compared. plain: of the same item, timestep and site without a technique."""
        ...


class _Labelled:
    weak = False

    def companions(self, techniques: int) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def value(self, record: Record, plain: Record | None) -> float:
        return record["score"]


class PairsTask(_Labelled):
    """PCK at the first alpha and threshold of a data set of annotated pairs, mean over pairs.

    limit: at most so many, spread evenly over the data set.
    """

    def __init__(self, pairs: Semantic, limit: int | None = None):
        self.data = pairs
        self._items = spread(pairs.items(), limit)
        if not self._items:
            raise InputError(f"{pairs.root} holds no pairs.")
        self.alpha, self.kind = pairs.alphas[0], pairs.thresholds[0]
        self.metric = f"PCK@{self.alpha:g} ({self.kind})"

    def describe(self) -> dict[str, Any]:
        return {"task": "pairs", "data": self.data.name, **options_of(self.data)}

    @property
    def units(self) -> int:
        return len(self._items)

    def items(self, chosen: Sequence[int]) -> list[Item]:
        return [self._items[i] for i in chosen]

    def names(self, item: Item) -> list[Hashable]:
        return [item.data.source, item.data.target]

    def pictures(self, item: Item) -> list[Picture]:
        return [self.data.picture(item.data.source), self.data.picture(item.data.target)]

    def evaluate(self, item: Item, features: Maps, companions: Mapping[str, Members]) -> Record:
        pair: Pair = item.data
        record = self.data.run(item, lambda picture, _: features(picture))
        kind: Threshold = self.kind  # pyright: ignore[reportAssignmentType]
        right = pair.correct(torch.tensor(record["points"], dtype=torch.float64), self.alpha, kind)
        return {"score": 100 * right.double().mean().item()}


class MasksTask(_Labelled):
    """Mean IoU of a linear classifier of pixels, on labelled pictures that it was not trained on.

    examples: pictures and their class numbers, [H, W], -1 where there is none. Of the pictures used, every `folds`-th is left
    out in turn, and each is scored by the classifier trained on the rest: the mean IoU over the classes that it shows.
    The classifier is ridge regression onto the classes, all of which weigh alike, from at most `per_class` pixels of each
    class in a picture: thousands of times quicker than networks trained on pixels (`denoscope segment`), and enough to tell
    good features from bad ones. side: labels are shrunk to at most this many pixels.
    """

    metric = "mIoU"

    def __init__(
        self, examples: Examples, folds: int = 4, per_class: int = 50, side: int = 256, ridge: int | float = 1e-2
    ):
        if len(examples) < 2:
            raise InputError(
                "Leaving pictures out takes at least 2 labelled pictures; give more, or tune without masks."
            )
        if folds < 2 or per_class < 1 or side < 8 or not ridge > 0:
            raise InputError("Folds need to be 2 or more, pixels per class 1 or more, side 8 or more, ridge positive.")
        self.folds, self.per_class, self.side, self.ridge = folds, per_class, side, ridge
        self.examples: list[tuple[Picture, Labels]] = []
        for example in examples.examples:
            picture = example.read()
            scale = min(1.0, side / max(picture.size))
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            self.examples.append((picture, without_small(resized_labels(example.labels, size))))
        known = sorted({int(c) for _, labels in self.examples for c in np.unique(labels) if c != IGNORED})
        if len(known) < 2:
            raise InputError("The masks need at least two classes between them.")
        self.classes = known
        self._fits: dict[Any, Any] = {}  # by the identity of the features, which weak references vouch for

    def describe(self) -> dict[str, Any]:
        made = {"folds": self.folds, "per_class": self.per_class, "side": self.side, "ridge": self.ridge}
        return {"task": "masks", **made, "classes": self.classes}

    @property
    def units(self) -> int:
        return len(self.examples)

    def items(self, chosen: Sequence[int]) -> list[Item]:
        folds = min(self.folds, len(chosen))
        found = []
        for place, index in enumerate(chosen if len(chosen) > 1 else ()):
            train = tuple(one for other, one in enumerate(chosen) if other % folds != place % folds)
            name = fingerprint([self._digest(one) for one in train])
            found.append(Item(f"{self._digest(index):016x}-{name}", "", (index, train)))
        return found

    def _digest(self, index: int) -> int:
        picture, labels = self.examples[index]
        return picture.digest ^ int(fingerprint([labels.shape, labels.tobytes().hex()]), 16) >> 1

    def names(self, item: Item) -> list[Hashable]:
        index, train = item.data
        return [index, *train]

    def pictures(self, item: Item) -> list[Picture]:
        index, train = item.data
        return [self.examples[i][0] for i in (index, *train)]

    def evaluate(self, item: Item, features: Maps, companions: Mapping[str, Members]) -> Record:
        index, train = item.data
        weights, mean = self._fit(train, features)
        picture, labels = self.examples[index]
        fm = features(picture)
        cells = (fm.values.flatten(1).mT.double() - mean) @ weights[:-1] + weights[-1]
        size = labels.shape[1], labels.shape[0]
        pixels = interpolated(cells.float(), fm.frame, size, torch.arange(labels.size))
        predicted = np.asarray(self.classes)[pixels.argmax(1).numpy()]
        truth = labels.ravel()
        counted = truth != IGNORED
        ious = []
        for number in np.unique(truth[counted]):
            told, true = predicted[counted] == number, truth[counted] == number
            ious.append((told & true).sum() / (told | true).sum())
        return {"score": 100 * float(np.mean(ious)) if ious else 0.0}

    def _fit(self, train: tuple[int, ...], features: Maps) -> tuple[Tensor, Tensor]:
        maps = [features(self.examples[i][0]) for i in train]
        key = tuple(id(fm.values) for fm in maps)
        known, fit = self._fits.get(key, ((), None))
        if fit is None or any(ref() is not fm.values for ref, fm in zip(known, maps, strict=True)):
            fit = self._solve(train, maps)
            if len(self._fits) >= _FITS:
                self._fits.pop(next(iter(self._fits)))
            self._fits[key] = [weakref.ref(fm.values) for fm in maps], fit
        return fit

    def _solve(self, train: tuple[int, ...], maps: Sequence[FeatureMap]) -> tuple[Tensor, Tensor]:
        xs, ys = [], []
        for i, fm in zip(train, maps, strict=True):
            labels = self.examples[i][1]
            places = chosen_pixels(labels, self.per_class, seed=i)
            size = labels.shape[1], labels.shape[0]
            cells = fm.values.flatten(1).mT.float().contiguous()
            xs.append(interpolated(cells, fm.frame, size, torch.from_numpy(places)).double())
            ys.append(torch.from_numpy(np.searchsorted(self.classes, labels.ravel()[places])))
        return ridge(torch.cat(xs), torch.cat(ys), len(self.classes), self.ridge)


def ridge(
    x: Float[Tensor, "pixels channels"], y: Int[Tensor, " pixels"], classes: int, strength: float
) -> tuple[Float[Tensor, "channels_and_bias classes"], Float[Tensor, " channels"]]:
    """Weights (the bias last) and the mean to subtract of a regression onto one-hot classes that all weigh alike.

    strength: of the penalty, as a share of the mean variance of a channel.
    """
    target = F.one_hot(y, classes).to(x)
    share = (1 / target.sum(0).clamp_min(1))[y]
    share = share / share.sum()
    mean, bias = share @ x, share @ target
    root = share.sqrt()[:, None]
    x, target = (x - mean) * root, (target - bias) * root
    penalty = strength * x.square().sum() / x.shape[1] + 1e-12
    if len(x) < x.shape[1]:  # the dual, whose matrix is the smaller one
        weights = x.mT @ torch.linalg.solve(x @ x.mT + penalty * torch.eye(len(x)).to(x), target)
    else:
        weights = torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[1]).to(x), x.mT @ target)
    return torch.cat([weights, bias[None]]), mean


class UnlabelledTask:
    """Cycle consistency by way of another picture and back into a cut-out, and content shift. A stand-in, for want of labels.

    Points of a picture A (a grid of `points` x `points`) go to their matches in another picture B, and from there to their
    matches in a cut-out of A (`share` of its sides, at a corner): the share of points that come back to within 0.1 of A's
    longer side from where they set out. Were they matched back into A itself, features that know nothing but the position
    would be perfectly consistent; in the cut-out all positions but those at the corner have moved, and they are lost. What
    remains is that colour and texture can be consistent too, so this favours what looks alike over what means the same.

    Where techniques are compared, the change of the content-shift score against the plain features of the same timestep and
    site is added, `shift_weight` percent for a score of 1: the score tells techniques apart, and says nothing across timesteps
    and sites (its reference is t = 0, which would always win). It is computed for each draw of the noise, then averaged.
    """

    weak = True

    def __init__(
        self,
        pictures: Sequence[str | Path | Picture],
        points: int = 12,
        share: float = 0.6,
        alpha: float = 0.1,
        shift_weight: float = 50.0,
        seed: int = 0,
    ):
        if len(pictures) < 2:
            raise InputError("Tuning without labels takes at least 2 pictures, of things of one kind; give more.")
        if points < 2 or not 0.3 <= share < 1 or not 0 < alpha < 1 or shift_weight < 0:
            raise InputError(
                "Points must be 2 or more, share from 0.3 to below 1, alpha between 0 and 1, weights from 0."
            )
        self.points, self.share, self.alpha, self.shift_weight, self.seed = points, share, alpha, shift_weight, seed
        self._sources = list(pictures)
        self._seen: dict[int, Picture] = {}
        self.metric = f"cycle consistency@{alpha:g}"

    def describe(self) -> dict[str, Any]:
        made = {"points": self.points, "share": self.share, "alpha": self.alpha, "seed": self.seed}
        return {"task": "unlabelled", **made}

    @property
    def units(self) -> int:
        return len(self._sources)

    def items(self, chosen: Sequence[int]) -> list[Item]:
        """One for each picture, with the next one as its partner; so their number and pictures grow alike."""
        found = []
        for place, index in enumerate(chosen if len(chosen) > 1 else ()):
            other = chosen[(place + 1) % len(chosen)]
            found.append(
                Item(f"{self._picture(index).digest:016x}-{self._picture(other).digest:016x}", "", (index, other))
            )
        return found

    def _picture(self, index: int) -> Picture:
        if index not in self._seen:
            if len(self._seen) > 64:
                self._seen.pop(next(iter(self._seen)))
            self._seen[index] = read(self._sources[index])
        return self._seen[index]

    def _frame(self, picture: Picture) -> Frame:
        rng = random.Random(f"{self.seed}/{picture.digest}")
        cut = [max(1, round(side * self.share)) for side in picture.size]
        left, top = (rng.choice((0, side - own)) for side, own in zip(picture.size, cut, strict=True))
        return Frame.of(picture.size).crop(left, top, cut[0], cut[1])

    def _cut_out(self, picture: Picture) -> Picture:
        frame = self._frame(picture)
        left, top = (round(-offset) for offset in frame.offset)
        pixels = picture.pixels[:, top : top + frame.grid[1], left : left + frame.grid[0]].contiguous()
        return Picture(pixels, picture.path)  # with the caption of the whole, where there is one

    def names(self, item: Item) -> list[Hashable]:
        one, other = item.data
        return [one, other, f"cut-out of {one}"]

    def pictures(self, item: Item) -> list[Picture]:
        one, other = (self._picture(index) for index in item.data)
        return [one, other, self._cut_out(one)]

    def evaluate(self, item: Item, features: Maps, companions: Mapping[str, Members]) -> Record:
        one, other, cut = self.pictures(item)
        frame = self._frame(one)
        inside = frame.to_picture(grid_points(frame.grid, min(self.points, *frame.grid)))
        start = frame.to_picture(frame.to_grid(inside))
        found = transfer(features(one), features(other), start).points
        back = frame.to_picture(transfer(features(other), features(cut), found).points)
        error = (back - start).norm(dim=1) / max(one.size)
        record: Record = {"score": 100 * (error <= self.alpha).double().mean().item()}
        if companions:
            draws = zip(*(companions[name](one) for name in (REFERENCE, OWN, ANCHOR)), strict=True)
            try:
                record["shift"] = float(np.mean([content_shift_score(*(fm.values for fm in maps)) for maps in draws]))
            except InputError:  # undefined: a picture of one colour
                record["shift"] = None
        return record

    def companions(self, techniques: int) -> Mapping[str, Mapping[str, Any]]:
        if techniques < 2 or not self.shift_weight:
            return {}
        once = {"denoise_from": None, "second_t": None}  # the anchor is read there and nowhere else
        return {REFERENCE: {"t": 0}, ANCHOR: {"t": 500, "prompt": "", **once}}

    def value(self, record: Record, plain: Record | None) -> float:
        own, other = (one.get("shift") for one in (record, plain or record))
        return record["score"] + (0 if own is None or other is None else self.shift_weight * (own - other))
