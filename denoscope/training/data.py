"""Training images: read once into memory, then drawn as a pure function of (seed, draw number)."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from denoscope.errors import InputError, MissingError
from denoscope.images import read
from denoscope.training.config import DenoiserConfig, Source

ARTICLES = ("{}", "a {}", "a photo of a {}")


class Example(NamedTuple):
    image: Image.Image
    phrase: str


def read_source(source: Source, root: str | Path = ".") -> list[Example]:
    """All images of a source with their phrases, e.g. "black footed albatross bird".

    Raises MissingError when the path is not there, InputError when it holds no readable images.
    """
    rows = labelled_rows(Path(root) / source.path)
    return [
        Example(decoded(data, where), _phrase(source, label if isinstance(label, str) else ""))
        for data, label, where in rows
    ]


def labelled_rows(path: Path) -> Iterator[tuple[bytes, str | int | None, str]]:
    """(encoded image, label, where it is) of a folder or parquet file; a label is a name, or a number that has no name.

    Raises MissingError when the path is not there, InputError when it holds no images.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp", ".bmp"})
        if not files:
            raise InputError(f"{path} holds no images.")
        yield from ((file.read_bytes(), file.parent.name, str(file)) for file in files)
    elif path.is_file():
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid:
            raise InputError(f"{path} is neither a folder of images nor a parquet file.") from None
        if "img" not in table.column_names:
            raise InputError(f"{path} has no column 'img'; it must be parquet in the Hugging Face image layout.")
        if not table.num_rows:
            raise InputError(f"{path} holds no images.")
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        names = features.get("features", {}).get("label", {}).get("names")
        labels = table["label"].to_pylist() if "label" in table.column_names else [None] * table.num_rows
        for i, (cell, label) in enumerate(zip(table["img"].to_pylist(), labels, strict=True)):
            yield cell["bytes"], names[label] if names and label is not None else label, f"row {i} of {path}"
    else:
        raise MissingError(f"There are no training images at {path}; give the folder that holds them with --data.")


def decoded(data: bytes, where: str) -> Image.Image:
    try:
        return read(Image.open(io.BytesIO(data))).image()
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{where} is not an image that can be read ({error}).") from None


def _phrase(source: Source, label: str) -> str:
    words = source.labels.get(label, label.replace("_", " "))
    return " ".join(source.prompt.format(label=words).lower().split())


class Draw(NamedTuple):
    """pixels in [-1, 1], noise of the same shape, timestep in [0, 1000), prompt; for the alignment loss the same points of
    the picture in this view, in [-1, 1] from border to border (none in plain examples), and the kind of thing shown."""

    pixels: Float[Tensor, "3 size size"]
    noise: Float[Tensor, "3 size size"]
    timestep: int
    prompt: str
    points: Float[Tensor, "points 2"]
    kind: str


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class Draws(Dataset):
    """The n-th training example ever drawn, wherever and whenever it is asked for (so resuming is exact)."""

    def __init__(self, config: DenoiserConfig, root: str | Path = ".", timesteps: int = 1000):
        self.config, self.timesteps = config, timesteps
        self.sources = [read_source(source, root) for source in config.sources]
        weights = np.array([source.weight for source in config.sources], dtype=np.float64)
        self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return self.config.steps * self.config.batch

    def __getitem__(self, n: int) -> Draw:
        rng = np.random.default_rng([self.config.seed, n])
        if self.config.align and n >= self.config.align_after * self.config.batch:
            return self._view(rng, np.random.default_rng([self.config.seed, n // 2, 1]), n % 2)
        _, example = self._example(rng)
        box, flip = self._crop(rng, example.image.size), rng.random() < 0.5
        return self._draw(rng, example, box, flip, self.timesteps, torch.empty(0, 2))

    def _view(self, rng: np.random.Generator, pair: np.random.Generator, which: int) -> Draw:
        """One of two views of a picture; `pair` makes the choices that both share."""
        source, example = self._example(pair)
        flips = pair.random(2) < 0.5
        flip = bool(flips[which if self.config.sources[source].mirror else 0])
        if pair.random() >= self.config.align_share:
            box = self._crop(rng, example.image.size)
            return self._draw(rng, example, box, flip, self.timesteps, torch.empty(0, 2))
        boxes = [self._crop(pair, example.image.size)] * 2
        for _ in range(10):
            other = self._crop(pair, example.image.size)
            left, top, right, bottom = _common(boxes[0], other)
            if right - left > 0.3 * (other[2] - other[0]) and bottom - top > 0.3 * (other[3] - other[1]):
                boxes = [boxes[0], other]
                break
        left, top, right, bottom = _common(*boxes)
        points = pair.uniform((left, top), (right, bottom), (self.config.align_points, 2))
        low, high = np.array(boxes[which][:2]), np.array(boxes[which][2:])
        points = 2 * (points - low) / (high - low) - 1
        if flip:
            points[:, 0] *= -1
        return self._draw(rng, example, boxes[which], flip, self.config.align_t, torch.from_numpy(points).float())

    def _example(self, rng: np.random.Generator) -> tuple[int, Example]:
        source = int(rng.choice(len(self.sources), p=self.shares))
        return source, self.sources[source][rng.integers(len(self.sources[source]))]

    def _draw(
        self, rng: np.random.Generator, example: Example, box: Box, flip: bool, timesteps: int, points: Tensor
    ) -> Draw:
        image, size = example.image, self.config.size
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
        if flip:
            pixels = pixels[:, ::-1]
        noise = rng.standard_normal((3, size, size), dtype=np.float32)
        pixels = pixels.transpose(2, 0, 1) / np.float32(127.5) - 1
        if len(points):
            pixels = _recoloured(rng, pixels)
        return Draw(
            torch.from_numpy(np.ascontiguousarray(pixels)),
            torch.from_numpy(noise),
            int(rng.integers(timesteps)),
            self._prompt(rng, example.phrase),
            points,
            example.phrase.split()[-1] if example.phrase else "",
        )

    def _crop(self, rng: np.random.Generator, size: tuple[int, int]) -> Box:
        return random_box(rng, size, self.config.scale)

    def _prompt(self, rng: np.random.Generator, phrase: str) -> str:
        if rng.random() < self.config.drop or not phrase:
            return ""
        if rng.random() < 0.3:  # the kind alone: "bird"
            phrase = phrase.split()[-1]
        return ARTICLES[rng.integers(len(ARTICLES))].format(phrase)

    def words(self) -> list[str]:
        """Every word that a prompt can hold, sorted."""
        phrases = {example.phrase for examples in self.sources for example in examples}
        return sorted({word for text in [*phrases, *ARTICLES] for word in text.replace("{}", "").split()})


def random_box(rng: np.random.Generator, size: tuple[int, int], scale: tuple[int | float, int | float]) -> Box:
    """A random box of `scale` of the area of an image of (width, height), with an aspect ratio of 3/4 to 4/3."""
    (w, h), (low, high) = size, scale
    area, aspect = rng.uniform(low, high) * w * h, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    bw, bh = min(w, np.sqrt(area * aspect)), min(h, np.sqrt(area / aspect))
    x, y = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
    return x, y, x + bw, y + bh


def _common(one: Box, other: Box) -> Box:
    return max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])


def _recoloured(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Other gains, brightness and sometimes swapped or no colours; at low noise levels a denoiser does not mind."""
    if rng.random() < 0.2:
        pixels = np.broadcast_to(pixels.mean(0, keepdims=True), pixels.shape)
    elif rng.random() < 0.2:
        pixels = pixels[rng.permutation(3)]
    gains, shift = np.exp(rng.uniform(-0.35, 0.35, (3, 1, 1))), rng.uniform(-0.2, 0.2)
    return (pixels * gains + shift).clip(-1, 1).astype(np.float32)
