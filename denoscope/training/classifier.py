"""Training small classifiers of noisy or clean pictures, for guidance and for judging it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.denoisers.adm import Attention, Residual
from denoscope.denoisers.classifiers import ADMClassifier, ADMClassifierConfig, Classifier
from denoscope.denoisers.loading import resolve_device
from denoscope.denoisers.noise import draw
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.errors import InputError, MissingError
from denoscope.features.weights import tensor_digest
from denoscope.training.checkpoint import Checkpoint
from denoscope.training.data import decoded, labelled_rows, random_box


def small_classifier(
    size: int, classes: int, width: int = 32, depth: int = 1, channels: int = 3
) -> ADMClassifierConfig:
    """A network for little pictures: levels down to about 4 pixels, the last twice as wide, attention at 8 pixels and below.

    size: side of the pictures in pixels. width: a multiple of 32. depth: residual blocks of a level.
    """
    levels = 1
    while size % 2**levels == 0 and size // 2**levels >= 4:
        levels += 1
    return ADMClassifierConfig(
        model_channels=width,
        in_channels=channels,
        classes=classes,
        num_res_blocks=depth,
        channel_mult=(*[1] * (levels - 1), 2),
        attention_resolutions=tuple(2**i for i in range(levels) if size // 2**i <= 8),
        num_head_channels=32,
        image_size=size,
    )


def as_square(image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """The centre of a picture in [-1, 1], antialiased."""
    pixels = np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def read_labelled(
    path: str | Path, size: int, classes: Sequence[str] = ()
) -> tuple[Float[Tensor, "n 3 size size"], Int[Tensor, " n"], tuple[str, ...]]:
    """Pictures in [-1, 1], their labels and the names of the classes.

    path: a folder with one sub-folder of images per class, or parquet in the Hugging Face image layout with the column `label`.
    classes: the names to use, in this order; by default all there are, sorted.

    Raises MissingError when the path is not there, InputError when there are fewer than two classes, one is asked for twice or
    has no images, or an image cannot be read.
    """
    if twice := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise InputError(f"The class {twice[0]!r} is asked for twice; name every class once.")
    path = Path(path)
    if not path.exists():
        raise MissingError(f"There are no labelled images at {path}; give a folder of class folders or a parquet file.")
    pixels: dict[str, list[Tensor]] = {name: [] for name in classes}
    others = set()
    for data, label, where in labelled_rows(path):
        if label is None:
            raise InputError(f"{path} has no column 'label'; it must be parquet in the Hugging Face image layout.")
        if not classes or str(label) in pixels:
            pixels.setdefault(str(label), []).append(as_square(decoded(data, where), size))
        else:
            others.add(str(label))
    for name, found in pixels.items():
        if not found:
            there = sorted(others | {other for other, some in pixels.items() if some})
            raise InputError(f"{path} has no images of class {name!r}; it has {', '.join(there)}.")
    names = tuple(classes or sorted(pixels))
    if len(names) < 2:
        raise InputError(f"{path} gives one class only ({', '.join(names)}); a classifier needs two or more.")
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(pixels[name]) for name in names]))
    return torch.stack([one for name in names for one in pixels[name]]), labels, names


def resized(images: Float[Tensor, "n channels height width"], size: int) -> Float[Tensor, "n channels size size"]:
    """Squares of `size` pixels, bilinear and antialiased."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _fresh(config: ADMClassifierConfig, seed: int) -> ADMClassifier:
    """Every residual branch ends in zeros, so that the network begins shallow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ADMClassifier(config)
    for part in network.modules():
        if isinstance(part, Residual | Attention):
            last = part.out_layers[-1] if isinstance(part, Residual) else part.proj_out
            for weights in last.parameters():
                nn.init.zeros_(weights)
    return network


def train_classifier(
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, " n"],
    schedule: NoiseSchedule | None,
    config: ADMClassifierConfig,
    *,
    steps: int = 2000,
    batch: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    crop: tuple[int | float, int | float] = (0.5, 1.0),
    flip: bool = True,
    names: tuple[str, ...] = (),
    device: str | torch.device = "auto",
    report: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
    checkpoint: Checkpoint | None = None,
) -> Classifier:
    """Train a classifier by AdamW with a cosine decay; classes are drawn equally often, however many images each has.

    images: in [-1, 1], of at least `config.image_size` pixels (larger ones make sharper crops).
    schedule: pictures are noised to a timestep drawn evenly from it, `x_t = a_t x_0 + s_t eps`, and the network is told which;
        None trains a classifier of clean pictures, which is not noise-aware.
    crop: smallest and largest share of the image area that a random crop covers. flip: whether half of them are mirrored.
    report: called once a step with the step, its loss and its seconds.
    checkpoint: what a run that was stopped goes on from when it is called again, for the caller to remove when the classifier
        is saved; None keeps nothing.

    The n-th batch is a function of (seed, n). Raises InputError when images, labels and config do not fit each other, and when
    the loss becomes infinite.
    """
    _check(images, labels, config)
    if steps < 1 or batch < 1 or not 0 < crop[0] <= crop[1] <= 1:
        raise InputError("steps and batch must be at least 1, and crop two shares with 0 < low <= high <= 1.")
    if not 0 < lr < math.inf:
        raise InputError(f"lr is {lr:g}; it must be a number above 0, e.g. 0.001.")
    place = resolve_device(device)
    network = _fresh(config, seed).to(place).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr, (0.9, 0.99), weight_decay=weight_decay, fused=True)
    warmup = max(1, min(100, steps // 10))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / warmup) * (1 + math.cos(math.pi * n / steps)) / 2
    )
    members = [torch.nonzero(labels == label).flatten().tolist() for label in range(config.classes)]
    done = 0
    if checkpoint is not None:
        decides = [asdict(config), steps, batch, lr, weight_decay, seed, crop, flip, names]
        decides += [tensor_digest(images), tensor_digest(labels)]
        decides += [] if schedule is None else [tensor_digest(schedule.signal), tensor_digest(schedule.noise)]
        if held := checkpoint.resume(decides, steps, place):
            for part, before in ((network, "network"), (optimizer, "optimizer"), (rate, "rate")):
                part.load_state_dict(held[before])
            done = held["step"]

    def state() -> dict[str, Any]:
        return {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "rate": rate.state_dict()}

    for step in range(done + 1, steps + 1):
        started = time.perf_counter()
        rng = np.random.default_rng([seed, step])
        y = rng.integers(config.classes, size=batch)
        chosen = [members[label][rng.integers(len(members[label]))] for label in y]
        x = torch.cat([_view(rng, images[index], config.image_size, crop, flip) for index in chosen])
        t = None
        if schedule is not None:
            t = torch.from_numpy(rng.integers(len(schedule), size=batch))
            x = schedule.add_noise(x, torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)), t).to(x.dtype)
            t = t.to(place)
        loss = F.cross_entropy(network(x.to(place), t), torch.from_numpy(y).to(place))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        if not math.isfinite(value := loss.item()):
            raise InputError(f"The loss is {value} at step {step}; lower lr.")
        if checkpoint is not None:
            checkpoint.keep(step, state, now=step == steps)
        report(step, value, time.perf_counter() - started)
    network.requires_grad_(False).eval()
    return Classifier(network, schedule is not None, config.classes, names, config.image_size)


def _check(images: Tensor, labels: Tensor, config: ADMClassifierConfig) -> None:
    if len(labels) != len(images):
        raise InputError(f"There are {len(images)} images but {len(labels)} labels.")
    if images.shape[1] != config.in_channels:
        raise InputError(f"The images have {images.shape[1]} channels where the network takes {config.in_channels}.")
    counts = torch.bincount(labels, minlength=config.classes)
    if len(counts) != config.classes or not counts.all():
        raise InputError(
            f"Labels must name each of the {config.classes} classes, from 0 to {config.classes - 1}; "
            f"they are {sorted(set(labels.tolist()))}."
        )


def _view(
    rng: np.random.Generator, image: Tensor, size: int, crop: tuple[int | float, int | float], flip: bool
) -> Float[Tensor, "1 channels size size"]:
    """A random crop of one picture, mirrored half of the time."""
    height, width = image.shape[1:]
    left, top, right, bottom = random_box(rng, (width, height), crop)
    left, top = min(round(left), width - 1), min(round(top), height - 1)
    view = resized(image[None, :, top : max(round(bottom), top + 1), left : max(round(right), left + 1)], size)
    return view.flip(3) if flip and rng.random() < 0.5 else view


@torch.no_grad()
def accuracy(
    classifier: Classifier,
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, " n"],
    schedule: NoiseSchedule | None = None,
    t: int | None = None,
    *,
    seed: int = 0,
    batch: int = 250,
) -> float:
    """Share of the pictures that are told rightly, as they are or noised to timestep t of a schedule (and told so)."""
    right = 0
    for start in range(0, len(images), batch):
        x, steps = images[start : start + batch], None
        x = resized(x, classifier.size) if classifier.size else x
        if schedule is not None and t is not None:
            eps = torch.stack([draw(tuple(x.shape[1:]), seed, start + i, t) for i in range(len(x))])
            x, steps = schedule.add_noise(x, eps, t), torch.full((len(x),), t)
        right += int((classifier.logits(x, steps).argmax(1).cpu() == labels[start : start + batch].cpu()).sum())
    return right / len(images)
