"""Pictures with masks beside them, as people keep them: the examples that a few-shot classifier learns from."""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int

from denoscope.errors import InputError, MissingError, counted
from denoscope.images import Picture, read
from denoscope.images.picture import IMAGE_SUFFIXES, _opened
from denoscope.segmentation.masks import MOST, Classes
from denoscope.segmentation.pixels import IGNORED, Labels

MASK_SUFFIXES = (".npy", ".png", ".bmp", ".tif", ".tiff", ".gif")
FOLDERS = ("masks", "mask", "labels", "annotations")
_COLOURS = 64  # flat colours that still are classes; more come from smooth edges
_FLAT = 0.05  # share of pixels whose neighbours are all alike, from which on a map is no noise
_LAYOUT = "NAME.npy, NAME_mask.png or NAME.mask.png beside NAME.jpg, or NAME.png in a folder masks"


@dataclass(frozen=True, eq=False)
class Example:
    """picture: a Picture or its file. labels: its classes at its own size, IGNORED (-1) where unknown."""

    picture: Picture | Path
    labels: Labels

    def read(self) -> Picture:
        """The picture. Raises InputError when its labels are of another size."""
        picture = read(self.picture)
        if self.labels.shape[::-1] != picture.size:
            height, width = self.labels.shape
            raise InputError(
                f"The mask of {picture.path or 'a picture'} is {width}x{height} but the picture {picture.width}x"
                f"{picture.height}; they must be equally large."
            )
        return picture


@dataclass(frozen=True, eq=False)
class Examples:
    """A handful of labelled pictures and the classes in them."""

    examples: tuple[Example, ...]
    classes: Classes

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def of(cls, pairs: Iterable[tuple[Any, Any]], names: Sequence[str] | None = None, ignore: int = 255) -> "Examples":
        """From pairs of a picture (anything that `denoscope.read` takes) and integer labels `[H, W]`.

        Raises InputError for labels that are no class numbers, or that are not as large as their picture.
        """
        found = []
        for index, (picture, labels) in enumerate(pairs):
            example = Example(read(picture), as_labels(np.asarray(labels), f"The mask of example {index}", ignore))
            example.read()
            found.append(example)
        return cls(*_finished(found, names, {}, ignore))


def read_examples(folder: str | Path, ignore: int = 255, names: Sequence[str] | None = None) -> Examples:
    """Labelled pictures of a folder (or of `images` in it).

    A picture's mask is, first found: NAME.npy; NAME_mask or NAME.mask with an image's suffix; NAME.npy or an image NAME in a
    folder masks, mask, labels or annotations; NAME.png beside NAME.jpg.

    Masks hold class numbers: integer arrays, indexed pictures (whose colours are kept) and grey ones. If all masks together
    hold 0 and 255 and nothing else but `ignore`, 0 is background and 255 one object. In colour masks every flat colour is a
    class: black is class 0, the others are numbered in the order in which they occur; what is transparent is ignored.

    ignore: the number of pixels to leave out. names: of the classes, in order; by default from classes.txt (one a line) or
    classes.json (a list, or a table from numbers or "#rrggbb" colours to names) in the folder.

    Raises MissingError when there is no folder, picture or mask, InputError for masks that cannot be read, have smooth edges,
    are not as large as their picture, or hold one class only.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingError(f"There is no folder {folder}; name one with pictures and masks ({_LAYOUT}).")
    told = _told_names(folder) if names is None else list(names)
    pairs = _pairs(folder)
    colours: dict[int, tuple[int, int, int]] = {}
    table: dict[int, int] = {}
    if isinstance(told, dict) and all(key.startswith("#") for key in told):  # colours in the order of the file
        table = {int(key[1:], 16): k for k, key in enumerate(told)}
        told = list(told.values())
    raw = [(picture, mask, *_read_mask(mask)) for picture, mask in pairs]
    kinds = {kind for _, _, _, kind, _ in raw}
    if len(kinds & {"colours", "numbers"}) > 1:
        odd = next(mask for _, mask, _, kind, _ in raw if kind == "colours")
        raise InputError(f"{odd} has colours but other masks have numbers; save all masks in one way.")
    occurring = {k for _, _, values, _, _ in raw for k in np.unique(values).tolist()}
    binary = kinds == {"numbers"} and ignore != 0 and {0, 255} <= occurring <= {0, ignore, 255}
    if "colours" in kinds:
        table = table or _colour_table([values for _, _, values, kind, _ in raw if kind == "colours"])
    found = []
    for picture, mask, values, kind, palette in raw:
        if kind == "colours":
            labels = _from_colours(values, table, mask)
        elif binary:
            left_out = as_labels((values == ignore) & (ignore != 255), str(mask)) == 1
            labels = np.where(left_out, IGNORED, as_labels(values == 255, str(mask)))
        else:
            if not _all_named(values, told, ignore):
                _check_edges(values, mask)
            labels = as_labels(values, str(mask), ignore)
        colours = {**palette, **colours}  # the first mask's count
        example = Example(picture, labels)
        example.read()
        found.append(example)
    if not _distinct(list(colours.values())):
        colours = {}
    if binary and told is None:
        told = ["background", "object"]
    if table:
        colours = {k: (code >> 16, code >> 8 & 255, code & 255) for code, k in table.items()}
        if told is None:
            told = ["background" if code == 0 else f"#{code:06x}" for code in table]
    if isinstance(told, dict):
        count = max(map(int, told), default=0) + 1
        told = [told.get(str(k), f"class {k}") for k in range(count)]
    return Examples(*_finished(found, told, colours, ignore))


def as_labels(values: np.ndarray, what: str, ignore: int = 255) -> Int[np.ndarray, "height width"]:
    """Class numbers from an integer or boolean array, IGNORED where it says `ignore`. Raises InputError."""
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze(0 if values.shape[0] == 1 else 2)
    if values.ndim != 2 or not values.size:
        raise InputError(f"{what} must be [height, width] of class numbers, not {list(values.shape)}.")
    if np.issubdtype(values.dtype, np.floating) and np.array_equal(values, np.floor(values)):
        values = values.astype(np.int64)  # NaN is not equal to itself
    if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{what} must hold whole numbers, not {values.dtype}.")
    labels = np.where(values == ignore, IGNORED, values.astype(np.int64))
    inside = labels[labels != IGNORED]
    if inside.size and (inside.min() < 0 or inside.max() >= MOST):
        raise InputError(
            f"{what} has class numbers from {inside.min()} to {inside.max()}; use 0 to {MOST - 1}, and {ignore} for "
            "pixels to leave out."
        )
    return labels.astype(np.int16)


def _finished(
    examples: Sequence[Example], names: Sequence[str] | None, colours: dict[int, tuple[int, int, int]], ignore: int
) -> tuple[tuple[Example, ...], Classes]:
    """The examples and their classes, checked."""
    if not examples:
        raise InputError("There are no examples; label at least one picture.")
    occurring = np.unique(np.concatenate([np.unique(example.labels) for example in examples]))
    occurring = occurring[occurring != IGNORED]
    if len(occurring) < 2:
        which = f"only class {occurring[0]}" if len(occurring) else f"no class, only what is left out ({ignore})"
        raise InputError(f"The masks hold {which}; label at least two classes (background may be one).")
    if names is not None and occurring[-1] >= len(names):
        odd = next(example for example in examples if example.labels.max() >= len(names))
        where = odd.picture if isinstance(odd.picture, Path) else odd.picture.path or "a picture"
        raise InputError(
            f"The mask of {where} has class {odd.labels.max()}, which is beyond the {counted(len(names), 'name')} (the "
            "first is that of class 0)."
        )
    count = int(occurring[-1]) + 1
    classes = Classes.numbered(count, colours) if names is None else Classes.of(names, colours)
    if len(examples) < len(occurring):
        warnings.warn(
            f"There are fewer examples ({len(examples)}) than classes ({len(occurring)}); expect some to be confused.",
            stacklevel=3,
        )
    return tuple(examples), classes


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures and their masks."""
    home = folder / "images" if (folder / "images").is_dir() else folder
    files = {path.name: path for path in sorted(home.iterdir()) if path.is_file()}
    images = [path for path in files.values() if path.suffix.lower() in IMAGE_SUFFIXES]
    photos = {path.stem for path in images if path.suffix.lower() not in MASK_SUFFIXES}
    pictures = [
        path
        for path in images
        if not path.stem.endswith(("_mask", ".mask"))
        and not (path.suffix.lower() in MASK_SUFFIXES and path.stem in photos)
    ]
    if not pictures:
        raise MissingError(f"There are no pictures in {home}.")
    found, without = [], []
    for picture in pictures:
        mask = _mask_of(picture, folder)
        found += [(picture, mask)] if mask else []
        without += [] if mask else [picture.name]
    if not found:
        raise MissingError(f"No picture in {home} has a mask; put {_LAYOUT}.")
    if without:
        few = ", ".join(without[:4]) + (" …" if len(without) > 4 else "")
        warnings.warn(f"{counted(len(without), 'picture')} in {home} left out for want of a mask: {few}.", stacklevel=3)
    return found


def _mask_of(picture: Path, folder: Path) -> Path | None:
    beside = [picture.with_name(f"{picture.stem}{end}") for end in (".npy", *(f"_mask{s}" for s in MASK_SUFFIXES))]
    beside += [picture.with_name(f"{picture.stem}.mask{s}") for s in MASK_SUFFIXES]
    beside += [folder / name / f"{picture.stem}{s}" for name in FOLDERS for s in MASK_SUFFIXES]
    beside += [picture.with_suffix(s) for s in MASK_SUFFIXES if picture.suffix.lower() not in MASK_SUFFIXES]
    return next((path for path in beside if path.is_file()), None)


def _read_mask(path: Path) -> tuple[np.ndarray, str, dict[int, tuple[int, int, int]]]:
    """Values, whether they are "numbers" or "colours" (0xRRGGBB, -1 transparent), and the palette."""
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path), "numbers", {}
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is no array that can be read ({error}).") from None
    with _opened(path) as image:
        if image.mode == "P" and not image.has_transparency_data:
            values, flat = np.array(image), image.getpalette() or []
            known = [int(k) for k in np.unique(values) if 3 * k + 2 < len(flat)]
            return values, "numbers", {k: (flat[3 * k], flat[3 * k + 1], flat[3 * k + 2]) for k in known}
        if image.mode in ("1", "L") or image.mode.startswith("I"):
            values = np.array(image)
            return (values.astype(np.uint8) * 255 if image.mode == "1" else values), "numbers", {}
        rgba = np.array(image.convert("RGBA")).astype(np.int64)
    codes = rgba[..., 0] << 16 | rgba[..., 1] << 8 | rgba[..., 2]
    codes = np.where(rgba[..., 3] < 128, -1, codes)
    if (rgba[..., :3] == rgba[..., :1]).all() and (codes != -1).all():
        return rgba[..., 0].astype(np.uint8), "numbers", {}
    return codes, "colours", {}


def _all_named(values: np.ndarray, told: list[str] | dict[str, str] | None, ignore: int) -> bool:
    """Whether the user names a class for every number of a mask."""
    known = set(map(str, range(len(told)))) if isinstance(told, list) else set(told or ())
    return {str(k) for k in np.unique(values)} <= {*known, str(ignore)}


def _check_edges(values: np.ndarray, path: Path) -> None:
    """Refuse numbers that are the greys of smooth edges rather than classes.

    A value belongs to edges if most of its pixels lie strictly between the least and the greatest of their 3 x 3 neighbours. A
    pixel where two regions meet never does, so classes have few such pixels, however many classes there are; greys between
    black and white have hardly any other. Three such values that are the most of all are too many for outlines.
    """
    values = np.squeeze(values)
    numbers, inverse = np.unique(values, return_inverse=True)
    if values.ndim != 2 or len(numbers) < 5:
        return
    ranks, kernel = inverse.reshape(values.shape).astype(np.float32), np.ones((3, 3), np.uint8)
    least, greatest = cv2.erode(ranks, kernel), cv2.dilate(ranks, kernel)
    between = (least < ranks) & (ranks < greatest)
    share = np.bincount(ranks[between].astype(int), minlength=len(numbers)) / np.bincount(inverse.ravel())
    edges = int((share > 0.5).sum())
    if edges >= 3 and 2 * edges > len(numbers) and (least == greatest).mean() >= _FLAT:
        raise InputError(
            f"{path} has {len(numbers)} values, {edges} of them only between others along edges; a mask has one flat value a "
            "class. Save it as PNG without smooth edges."
        )


def _colour_table(masks: Sequence[np.ndarray]) -> dict[int, int]:
    """Class numbers of colours in the order in which they occur, black first."""
    found: dict[int, None] = {}
    for codes in masks:
        values, first = np.unique(codes, return_index=True)
        if len(values) > _COLOURS:
            break  # told with its path when it is read
        found |= dict.fromkeys(int(values[k]) for k in np.argsort(first) if values[k] >= 0)
    order = ([0] if 0 in found else []) + [code for code in found if code]
    return {code: k for k, code in enumerate(order)}


def _from_colours(codes: np.ndarray, table: dict[int, int], path: Path) -> Labels:
    """Class numbers of colours."""
    values, inverse = np.unique(codes, return_inverse=True)
    if len(values) > _COLOURS:
        raise InputError(
            f"{path} has {len(values)} colours; a mask has one flat colour a class. Save it as PNG without smooth edges."
        )
    if unknown := [int(code) for code in values if code >= 0 and int(code) not in table]:
        raise InputError(f"{path} has the colour #{unknown[0]:06x}, which classes.json does not name.")
    numbers = np.array([table.get(int(code), IGNORED) for code in values], np.int16)
    return numbers[inverse].reshape(codes.shape)


def _distinct(colours: Sequence[tuple[int, int, int]]) -> bool:
    """Whether colours can be told apart; a palette that nobody chose is a ramp of greys."""
    values = np.array(colours, int).reshape(-1, 3)
    distance = np.abs(values[:, None] - values).max(2) + 255 * np.eye(len(values), dtype=int)
    return len(values) > 0 and bool(distance.min() >= 16)


def _told_names(folder: Path) -> list[str] | dict[str, str] | None:
    """Names of classes from classes.txt or classes.json."""
    text, table = folder / "classes.txt", folder / "classes.json"
    if text.is_file():
        names = [line.strip() for line in text.read_text(encoding="utf-8", errors="replace").splitlines()]
        return [name for name in names if name] or None
    if not table.is_file():
        return None
    wrong = InputError(
        f'{table} is not understood; write ["background", "horse"], or {{"0": "background"}}, or {{"#ff0000": "horse"}}.'
    )
    try:
        values = json.loads(table.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise wrong from None
    if isinstance(values, list) and values and all(isinstance(name, str) for name in values):
        return values
    if isinstance(values, dict) and values and all(isinstance(name, str) for name in values.values()):
        codes = {key.lower(): name for key, name in values.items()}
        if all(len(key) == 7 and key[0] == "#" and not set(key[1:]) - set("0123456789abcdef") for key in codes):
            return codes
        if all(key.isdecimal() and int(key) < MOST for key in codes):
            return codes
    raise wrong
