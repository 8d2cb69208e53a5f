"""What benchmarks of segmentation read and measure: class names of published sets, files of labels, and the mean IoU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from denoscope.errors import InputError, MissingError
from denoscope.images.picture import IMAGE_SUFFIXES, _opened
from denoscope.segmentation.examples import as_labels
from denoscope.segmentation.pixels import IGNORED, Labels

CONVENTIONS = ("official", "standard")
Counts = Int[np.ndarray, " classes"]


@dataclass(frozen=True)
class LabelScarce:
    """names: of all labels, in order. ignore: the label that does not count; 255 for none."""

    names: tuple[str, ...]
    ignore: int = 255


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


CAMVID = _split("sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist")

_BEDROOM = """background, bed, bed footboard, bed headboard, bed side rail, carpet, ceiling, chandelier or fan blade, curtain,
cushion, floor, table, table top, picture or mirror, pillow, lamp column, lamp shade, wall, window, curtain rod, window frame,
chair, picture or mirror frame, plinth, door or door frame, pouf, wardrobe, plant, table staff"""
_HORSE = """background, person, back, barrel, bridle, chest, ear, eye, forelock, head, hoof, leg, mane, muzzle, neck, nostril,
tail, thigh, saddle, shoulder, leg protection"""
_CAT = "background, back, belly, chest, leg, paw, head, ear, eye, mouth, tongue, nose, tail, whiskers, neck"
_CELEBA = """background, cloth, right ear, eyeglasses, hair, hat, left brow, left ear, left eye, lower lip, mouth, neck,
necklace, nose, right brow, right ear ring, right eye, skin, upper lip"""
_FFHQ = """background, head, cheek, chin, ear, ear helix, ear lobule, eye bottom lid, eyelashes, iris, pupil, sclera, tear duct,
eye top lid, eyebrow, forehead, frown, hair, sideburns, jaw, moustache, inferior lip, oral commissure, superior lip, teeth,
neck, nose, ala of nose, nose bridge, nose tip, nostril, philtrum, temple, wrinkles"""
_ADE_BEDROOM = """wall, bed, floor, table, lamp, ceiling, painting, windowpane, pillow, curtain, cushion, door, chair, cabinet,
chest, mirror, rug, armchair, book, sconce, plant, wardrobe, clock, light, flower, vase, fan, box, shelf, television"""

# ddpm-segmentation counts 29 labels in Bedroom-28 and leaves the background out; so do we (the content-shift code counts 28
# with none left out, for which the label "table staff" is out of range)
SETS = {
    "bedroom_28": LabelScarce(_split(_BEDROOM), 0),
    "horse_21": LabelScarce(_split(_HORSE)),
    "cat_15": LabelScarce(_split(_CAT)),
    "celeba_19": LabelScarce(_split(_CELEBA)),
    "ffhq_34": LabelScarce(_split(_FFHQ)),
    "ade_bedroom_30": LabelScarce(_split(_ADE_BEDROOM)),
}


def counts(
    predicted: Labels, truth: Int[np.ndarray, "rows columns"], classes: int, convention: str = "official"
) -> tuple[Counts, Counts]:
    """Pixels in the intersection and in the union of prediction and truth, for every class. IGNORED is no class."""
    if predicted.shape != truth.shape:
        raise InputError(f"A prediction is {list(predicted.shape)} but the truth {list(truth.shape)}.")
    if convention not in CONVENTIONS:
        raise InputError(f"There is no convention {convention!r}; choose one of {', '.join(CONVENTIONS)}.")
    known = truth != IGNORED
    predicted = predicted if convention == "official" else np.where(known, predicted, IGNORED)
    both = np.bincount(truth[known & (predicted == truth)], minlength=classes)
    own = np.bincount(truth[known], minlength=classes) + np.bincount(predicted[predicted >= 0], minlength=classes)
    return both, own - both


def mean_iou(
    intersections: Sequence[int] | Counts,
    unions: Sequence[int] | Counts,
    counted: Sequence[int],
    convention: str = "official",
) -> tuple[float, list[float]]:
    """The mean over the counted classes, and the IoU of each (NaN where "standard" leaves a class out), 0..1."""
    both, either = np.asarray(intersections, float)[list(counted)], np.asarray(unions, float)[list(counted)]
    if convention == "official":
        found = both / (either + 1e-8)
        return float(found.mean()), found.tolist()
    found = np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
    return (float(np.nanmean(found)) if (either > 0).any() else 0.0), found.tolist()


def read_labels(path: Path, ignore: int) -> Labels:
    """Class numbers of a .npy array or of an indexed or grey picture, IGNORED where they are `ignore`."""
    if not path.is_file():
        raise MissingError(f"There is no mask {path}.")
    if path.suffix == ".npy":
        try:
            values = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is no array that can be read ({error}).") from None
    else:
        with _opened(path) as image:
            if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
                raise InputError(f"{path} is a picture in {image.mode}; masks hold class numbers, indexed or grey.")
            values = np.array(image)
    return as_labels(values, str(path), ignore)


def beside(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures of a folder and the .npy masks beside them."""
    if not folder.is_dir():
        raise MissingError(f"There is no folder {folder}.")
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    found = [(path, path.with_suffix(".npy")) for path in pictures]
    return _complete(found, folder)


def apart(folder: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Pictures of a folder and the PNG masks of the same names in another."""
    for needed in (folder, masks):
        if not needed.is_dir():
            raise MissingError(f"There is no folder {needed}.")
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    return _complete([(path, masks / f"{path.stem}.png") for path in pictures], folder)


def _complete(pairs: list[tuple[Path, Path]], folder: Path) -> list[tuple[Path, Path]]:
    if not pairs:
        raise MissingError(f"There are no pictures in {folder}.")
    if lacking := [(picture, mask) for picture, mask in pairs if not mask.is_file()]:
        raise MissingError(f"{lacking[0][0]} has no mask {lacking[0][1]}.")
    return pairs


def ade_names(path: Path) -> list[str]:
    """The first name of each of the 150 classes, from the table that comes with the data."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:151]]
    names = [cells[-1].split(",")[0].strip() for cells in lines]
    if len(names) != 150 or not all(names):
        raise InputError(f"{path} does not list 150 classes.")
    return names
