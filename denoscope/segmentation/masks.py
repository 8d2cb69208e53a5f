"""`Classes` and `Masks`: what can be told apart in pictures, and where it is in one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from denoscope.errors import InputError
from denoscope.images import Picture, save_result
from denoscope.images.draw import DARK, OKABE_ITO, WHITE, _layer, _write
from denoscope.images.palette import PALETTE

Colour = tuple[int, int, int]
MOST = 255  # classes: an indexed picture has 256 numbers, and one says that nothing is known
_SPARE: list[Colour] = [(c[0], c[1], c[2]) for c in OKABE_ITO if any(c)]
_SPARE += [(PALETTE[3 * k], PALETTE[3 * k + 1], PALETTE[3 * k + 2]) for k in range(1, 256)]
_BACKGROUND = {"background", "bg", "other", "void", "unlabelled", "unlabeled", "class 0"}


@dataclass(frozen=True)
class Classes:
    """names: class k is names[k]. colours: RGB of each, for indexed pictures and overlays."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colours) or not 1 <= len(self.names) <= MOST:
            raise InputError(f"There must be 1 to {MOST} classes, each with a colour, not {len(self.names)}.")

    @classmethod
    def of(cls, names: Sequence[str], colours: Mapping[int, Colour] | None = None) -> "Classes":
        """With colours of our own where none are given: eight that the colour-blind tell apart, then those of PASCAL VOC."""
        own = dict(colours or {})
        if names and names[0].lower() in _BACKGROUND:
            own.setdefault(0, (0, 0, 0))
        free = iter([colour for colour in _SPARE if colour not in own.values()])
        return cls(tuple(names), tuple(own[k] if k in own else next(free) for k in range(len(names))))

    @classmethod
    def numbered(cls, count: int, colours: Mapping[int, Colour] | None = None) -> "Classes":
        """Nameless ones."""
        return cls.of([f"class {k}" for k in range(count)], colours)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def background(self) -> bool:
        """Whether class 0 is what is around things, which overlays leave as it is: by its name, or for want of names."""
        return self.names[0].lower() in _BACKGROUND

    def to_dict(self) -> list[dict[str, Any]]:
        code = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in self.colours]
        return [{"index": k, "name": self.names[k], "colour": code[k]} for k in range(len(self))]

    @classmethod
    def from_dict(cls, entries: Sequence[Mapping[str, Any]]) -> "Classes":
        colours = [bytes.fromhex(entry["colour"].removeprefix("#")) for entry in entries]
        return cls(tuple(entry["name"] for entry in entries), tuple((c[0], c[1], c[2]) for c in colours))

    def indexed(self, labels: Int[np.ndarray, "height width"]) -> Image.Image:
        """An indexed picture whose pixels are class numbers; what is no class is 255."""
        image = Image.fromarray(np.where(labels < 0, 255, labels).astype(np.uint8))
        flat = [part for colour in self.colours for part in colour]
        image.putpalette([*flat, *PALETTE[len(flat) : 765], 255, 255, 255])
        return image


@dataclass(frozen=True, eq=False)
class Masks:
    """One picture's classes.

    labels: the class of every pixel. disagreement: per pixel, in nats, see `ensemble.disagreement`. uncertainty: the mean of
    its top decile; pictures where it is high are worth labelling next.
    """

    labels: Int[np.ndarray, "height width"]
    classes: Classes
    disagreement: Float[np.ndarray, "height width"]
    uncertainty: float
    picture: Picture = field(repr=False)
    recipe: dict[str, Any] = field(default_factory=dict)

    def mask(self, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Where a class is. Raises InputError when there is none of that name."""
        if name not in self.classes.names:
            raise InputError(f"There is no class {name!r}; there are {', '.join(self.classes.names)}.")
        return self.labels == self.classes.names.index(name)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each class that occurs: index, name, pixels, share."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        return [
            {"index": k, "name": self.classes.names[k], "pixels": int(n), "share": round(int(n) / self.labels.size, 6)}
            for k, n in enumerate(counts)
            if n
        ]

    def to_dict(self) -> dict[str, Any]:
        """What is saved as JSON."""
        return {
            "picture": str(self.picture.path) if self.picture.path else None,
            "size": list(self.picture.size),
            "uncertainty": self.uncertainty,
            "classes": self.rows(),
            "recipe": self.recipe,
        }

    def indexed(self) -> Image.Image:
        """An indexed picture whose pixels are class numbers, with the colours of the classes as its palette."""
        return self.classes.indexed(self.labels)

    def draw(self, legend: bool = True) -> Image.Image:
        """The picture tinted by class, with the names of those that occur below."""
        image = overlay(self.picture, self.labels, self.classes)
        shown = [row["index"] for row in self.rows()]
        return with_legend(image, self.classes, shown) if legend else image

    def save(self, path: str | Path) -> Path:
        """Write by suffix: .png (the indexed mask; for a drawing, `draw().save`), .json, .npz or .csv (one class a line)."""
        arrays = {
            "labels": self.labels,
            "disagreement": self.disagreement,
            "names": np.array(self.classes.names),
            "recipe": json.dumps(self.to_dict()),
        }
        lines = ["index", "name", "pixels", "share"], self.rows()
        if Path(path).suffix.lower() in (".jpg", ".jpeg", ".webp"):
            raise InputError(
                "Masks are saved as .png: the numbers of classes would be blurred. For a drawing, save draw()."
            )
        return save_result(path, "Masks", self.to_dict, lambda: arrays, self.indexed, lambda: lines)


def overlay(
    picture: Picture, labels: Int[np.ndarray, "height width"], classes: Classes, alpha: int | float = 0.55
) -> Image.Image:
    """The picture tinted by class, with dark lines between them; the background and what is no class stay as they are."""
    pixels = np.array(picture.image()).astype(np.float32)
    shown = labels > 0 if classes.background else labels >= 0
    table = np.array(classes.colours, np.float32)
    tinted = pixels + alpha * (table[np.maximum(labels, 0)] - pixels)
    reach = max(1, round(max(picture.size) / 500))
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    numbers = labels.astype(np.int16)
    tinted[cv2.dilate(numbers, kernel) != cv2.erode(numbers, kernel)] *= 0.45
    return Image.fromarray(np.where(shown[..., None], tinted, pixels).round().astype(np.uint8))


def with_legend(image: Image.Image, classes: Classes, shown: Sequence[int]) -> Image.Image:
    """The image above one chip for each of the classes: its colour and name."""
    size = max(11, min(image.width // 40, 28))
    line, gap = round(size * 1.7), size // 2
    widths = [round(size * (2.2 + 0.56 * len(classes.names[k]))) for k in shown]
    places, x, y = [], gap, gap
    for width in widths:
        if x > gap and x + width > image.width:
            x, y = gap, y + line
        places.append((x, y))
        x += width + gap
    height = y + line + gap // 2 if shown else 0
    sheet = Image.new("RGB", (image.width, image.height + height), WHITE)
    sheet.paste(image)
    with _layer(sheet, (0, image.height, image.width, image.height + height)) as pen:
        for k, (x, y), width in zip(shown, places, widths, strict=True):
            x, y, side = 3 * x, 3 * y, 3 * size  # `_layer` draws at three times the size
            pen.rounded_rectangle(
                (x, y + side // 6, x + side, y + side // 6 + side), side * 0.2, classes.colours[k], DARK, 3
            )
            room = 3 * min(width, image.width - x // 3) - 1.3 * side
            _left(pen, classes.names[k], (x + 1.3 * side, y + side // 6 + side / 2), side, room)
    return sheet


def _left(pen: Any, text: str, at: tuple[int | float, int | float], size: int | float, room: int | float) -> None:
    """Text that begins at a place, cut to a width."""
    from PIL import ImageFont

    length = min(room, ImageFont.load_default(size=size).getlength(text))
    _write(pen, text, (at[0] + length / 2, at[1]), size, DARK, room)
