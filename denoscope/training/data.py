"""Training images: read once into memory, then drawn as a pure function of (seed, draw number)."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from denoscope.errors import InputError, MissingError
from denoscope.training.config import DenoiserConfig, Source

ARTICLES = ("{}", "a {}", "a photo of a {}")


class Example(NamedTuple):
    image: Image.Image
    phrase: str


def read_source(source: Source, root: str | Path = ".") -> list[Example]:
    """All images of a source with their phrases, e.g. "black footed albatross bird".

    Raises MissingError when the path is not there, InputError when it holds no readable images.
    """
    path = Path(root) / source.path
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp", ".bmp"})
        rows = [(file.read_bytes(), file.parent.name) for file in files]
    elif path.is_file():
        table = pq.read_table(path)
        if "img" not in table.column_names:
            raise InputError(f"{path} has no column 'img'; it must be parquet in the Hugging Face image layout.")
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        names = features.get("features", {}).get("label", {}).get("names")
        labels = table["label"].to_pylist() if names else [None] * table.num_rows
        rows = [
            (cell["bytes"], "" if label is None else names[label])
            for cell, label in zip(table["img"].to_pylist(), labels, strict=True)
        ]
    else:
        raise MissingError(f"There are no training images at {path}; give the folder that holds them with --data.")
    if not rows:
        raise InputError(f"{path} holds no images.")
    return [Example(Image.open(io.BytesIO(data)).convert("RGB"), _phrase(source, label)) for data, label in rows]


def _phrase(source: Source, label: str) -> str:
    words = source.labels.get(label, label.replace("_", " "))
    return " ".join(source.prompt.format(label=words).lower().split())


class Draw(NamedTuple):
    """pixels in [-1, 1], noise of the same shape, timestep in [0, 1000), prompt."""

    pixels: Float[Tensor, "3 size size"]
    noise: Float[Tensor, "3 size size"]
    timestep: int
    prompt: str


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
        examples = self.sources[rng.choice(len(self.sources), p=self.shares)]
        image, phrase = examples[rng.integers(len(examples))]
        size = self.config.size
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=self._crop(rng, image.size)))
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        noise = rng.standard_normal((3, size, size), dtype=np.float32)
        return Draw(
            torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1),
            torch.from_numpy(noise),
            int(rng.integers(self.timesteps)),
            self._prompt(rng, phrase),
        )

    def _crop(self, rng: np.random.Generator, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """A random box of `scale` of the image area with an aspect ratio of 3/4 to 4/3, as (left, top, right, bottom)."""
        (w, h), (low, high) = size, self.config.scale
        area, aspect = rng.uniform(low, high) * w * h, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        bw, bh = min(w, np.sqrt(area * aspect)), min(h, np.sqrt(area / aspect))
        x, y = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
        return x, y, x + bw, y + bh

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
