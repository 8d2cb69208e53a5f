"""Segmentation from a handful of labelled pictures: features of any model, and the pixel classifier of ddpm-segmentation.

Baranchuk et al., "Label-Efficient Semantic Segmentation with Diffusion Models", ICLR 2022 (arXiv 2112.03126), section 4.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from denoscope.errors import InputError, MissingError
from denoscope.features import Extractor, FeatureMap, as_extractor, load_extractor
from denoscope.features.recipes import absolute, missing
from denoscope.images import Picture, atomically, read
from denoscope.segmentation.ensemble import PixelEnsemble, classified, fit, uncertainty
from denoscope.segmentation.examples import Example, Examples
from denoscope.segmentation.masks import Classes, Masks
from denoscope.segmentation.pixels import (
    FEWEST,
    IGNORED,
    PixelStore,
    Precision,
    chosen_pixels,
    digest,
    resized_labels,
    without_small,
)

Side = int | tuple[int, int] | None
SIDE, FINEST = 128, 1024  # longer side of label maps that are learned from, and of maps that are predicted
_FORMAT = "denoscope few-shot classifier 1"


def label_size(size: tuple[int, int], side: Side) -> tuple[int, int]:
    """(width, height) of the label map of a picture of (width, height).

    side: both sides (the published protocol: (256, 256)); or the longer side, where the picture's is longer; or None for the
    picture's own size.
    """
    if isinstance(side, tuple):
        return side
    if side is None or side >= max(size):
        return size
    if side < 8:
        raise InputError(f"Label maps need a longer side of at least 8 pixels, not {side}.")
    width, height = (max(1, round(n * side / max(size))) for n in size)
    return width, height


def gather(
    store: PixelStore,
    examples: Iterable[Example],
    features: Callable[[Picture], FeatureMap],
    described: Mapping[str, Any],
    side: Side = SIDE,
    per_class: int | None = None,
    fewest: int = FEWEST,
    seed: int = 0,
) -> int:
    """Write the labelled pixels of examples into a store, one picture after the other; those that it holds are not made again.

    Returns how many pictures it held.

    described: JSON values that decide the features. side: see `label_size`. per_class: at most so many pixels of each class of
    a picture. fewest: a class with fewer pixels in a picture is ignored there (20 as published; 0 for none).
    """
    kept = 0
    for example in examples:
        picture = example.read()
        labels = without_small(resized_labels(example.labels, label_size(picture.size, side)), fewest)
        places = chosen_pixels(labels, per_class, seed)
        key = [dict(described), picture.digest, digest(labels), per_class, seed]
        if len(places) and store.holds(key):
            store.open(key)
            kept += 1
        elif len(places):
            store.add(features(picture), labels, places, key)
    return kept


@dataclass(frozen=True, eq=False)
class FewShot:
    """A trained classifier and the features that it reads.

    extractor: makes the features. recipe: how it was trained, JSON values; "extractor" in it is what that says of itself.
    """

    extractor: Extractor
    ensemble: PixelEnsemble
    classes: Classes
    recipe: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        model: Any,
        examples: Examples,
        *,
        models: int = 10,
        epochs: int = 100,
        side: Side = SIDE,
        pixels: int | None = None,
        fewest: int = FEWEST,
        precision: Precision = "float16",
        seed: int = 0,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        report: Callable[[str, int, int], None] = lambda stage, done, total: None,
        **settings: Any,
    ) -> "FewShot":
        """Train a classifier on examples.

        model: a denoiser, an encoder or an Extractor; settings are those of `features`. models: how many vote. epochs: at most.
        side: of label maps, see `label_size`. pixels: at most so many of each class of a picture (None: all, as published).
        fewest: classes with fewer pixels in a picture are ignored there. precision: of features on disk. folder: where they are
        kept, to be used again by later calls; by default they are removed. device: of the training, "cpu" or "cuda".
        report: called with "features" ("kept" where they were in `folder` already), pictures done and all of them; then with
        "training", batches done and networks left.

        Raises InputError for examples that do not suffice.
        """
        extractor = as_extractor(model, **settings)
        told = FewShot.told(
            extractor, examples, models=models, epochs=epochs, side=side, pixels=pixels, fewest=fewest,
            precision=precision, seed=seed,
        )  # fmt: skip
        own = tempfile.mkdtemp(prefix="denoscope-pixels-") if folder is None else None
        store = PixelStore(Path(own or folder or ""), precision)
        try:
            for done, example in enumerate(examples.examples, 1):
                kept = gather(store, [example], extractor, told["extractor"], side, pixels, fewest, seed)
                report("kept" if kept else "features", done, len(examples))
            lost = sorted(_occurring(examples) - set(store.classes.tolist()))
            if lost:
                warnings.warn(
                    f"{examples.classes.names[lost[0]]} has fewer than {fewest} pixels in every example (whose longer side is "
                    f"{side} here), so it is not learned.",
                    stacklevel=2,
                )
            ensemble = fit(
                store,
                len(examples.classes),
                models,
                epochs,
                seed,
                device,
                lambda step, left: report("training", step, left),
            )
        finally:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)
        return cls(extractor, ensemble, examples.classes, {**told, "labelled_pixels": len(store), "bytes": store.bytes})

    @staticmethod
    def told(extractor: Extractor, examples: Examples, **settings: Any) -> dict[str, Any]:
        """JSON values that decide a classifier, all of them: its recipe says the same when it need not be trained again."""
        named = blake2b(digest_size=8)
        for example in examples.examples:
            named.update(f"{example.read().digest} {digest(example.labels)}".encode())
        own = {"examples": len(examples), "names": list(examples.classes.names), "content": named.hexdigest()}
        return json.loads(json.dumps({**settings, **own, "extractor": extractor.describe()}, default=str))

    def segment(self, picture: Any, finest: int = FINEST) -> Masks:
        """The class of every pixel of a picture (anything that `denoscope.read` takes).

        finest: pictures with a longer side are classified at this one, and the labels enlarged (nearest pixel).
        """
        picture = read(picture)
        labels, doubt = classified(self.ensemble, self.extractor(picture), label_size(picture.size, finest))
        sure = uncertainty(torch.from_numpy(doubt))
        if labels.shape[::-1] != picture.size:
            labels = resized_labels(labels, picture.size)
            doubt = cv2.resize(doubt, picture.size, interpolation=cv2.INTER_LINEAR)
        return Masks(labels, self.classes, doubt, sure, picture, self.recipe)

    def save(self, path: str | Path, model: str | None = None, settings: Mapping[str, Any] | None = None) -> Path:
        """Write the classifier to a .safetensors file.

        model, settings: what `features.load_extractor` makes the extractor of, so that `load` can do without one. Of the files
            and folders that they name the absolute paths are written, so that they are found from any working directory.
        """
        path = Path(path)
        told = absolute({**(settings or {}), "model": model})
        if path.suffix != ".safetensors":
            raise InputError(f"Classifiers are saved as .safetensors, not {path.suffix or 'a file without suffix'}.")
        meta = {
            "format": _FORMAT,
            "classes": json.dumps(self.classes.to_dict()),
            "recipe": json.dumps(self.recipe, default=str),
            "model": json.dumps(told.pop("model")),
            "settings": json.dumps(told, default=str),
        }
        weights = {name: value.contiguous().cpu() for name, value in self.ensemble.weights.items()}
        return atomically(path, lambda beside: save_file(weights, beside, metadata=meta))

    @classmethod
    def load(
        cls,
        path: str | Path,
        extractor: Extractor | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
    ) -> "FewShot":
        """Read what `save` wrote. extractor: the one that it was trained with; by default it is made again.

        Raises MissingError when it or something that it reads is not there, and InputError for other files and for an extractor
        that makes other features.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingError(f"There is no classifier {path}.")
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != _FORMAT:
                    raise InputError(
                        f"{path} holds no few-shot classifier of denoscope; make one with 'segment --examples'."
                    )
                ensemble = PixelEnsemble({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            classes, recipe = Classes.from_dict(json.loads(meta["classes"])), json.loads(meta["recipe"])
            model, settings = json.loads(meta["model"]), json.loads(meta["settings"])
        except InputError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}).") from None
        if extractor is None:
            if model is None:
                raise InputError(f"{path} does not say which model it reads; give its extractor.")
            if gone := missing({**settings, "model": model}):
                raise MissingError(
                    f"{path} reads {gone}, which is not there; put it back, or train the classifier again."
                )
            extractor = load_extractor(model, device, dtype, **settings)
        changed = differences(recipe["extractor"], extractor.describe())
        if changed:
            raise InputError(f"{path} was trained on other features: {changed[0]} differs. Train it again.")
        return cls(extractor, ensemble, classes, recipe)


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ between two descriptions of extractors.

    Files may lie elsewhere, and so may the model, if its weights are the same. The number format may differ, and with it the
    digest of the weights: then the model goes by its name.
    """
    one, two = (placeless(json.loads(json.dumps(dict(given), default=str))) for given in (one, two))
    same = "weights" in one and one.get("dtype") == two.get("dtype")
    may = ("model",) if same else ("dtype", "weights") if one.get("dtype") != two.get("dtype") else ()
    return [name for name in {**one, **two} if name not in may and one.get(name) != two.get(name)]


def placeless(told: Any, files: Mapping[str, str] | None = None) -> Any:
    """A description of an extractor with the contents of files and folders in the place of their paths.

    files: digests by path, as descriptions have them. A model goes by the last part of its name.
    """
    if isinstance(told, Mapping):
        inner = {**(files or {}), **told.get("files", {})}
        found = {name: placeless(value, inner) for name, value in told.items()}
        if "files" in told:
            found["files"] = sorted(told["files"].values())
        model = isinstance(told.get("model"), str) and "image" not in told  # that of a ControlNet has an image
        return {**found, "model": Path(told["model"]).name} if model else found
    if isinstance(told, list):
        return [placeless(one, files) for one in told]
    if isinstance(told, str) and files:
        start = next((start for start in ("@", "caption:") if told.startswith(start)), "")
        return start + files.get(told.removeprefix(start), told.removeprefix(start))
    return told


def _occurring(examples: Examples) -> set[int]:
    return {number for example in examples.examples for number in np.unique(example.labels).tolist()} - {IGNORED}
