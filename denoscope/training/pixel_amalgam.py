"""Training the weights of an amalgam on labelled pixels, jointly with a classifier (Meng et al., arXiv 2410.06719, section 5).

The released pixel classifier has weight assigners before its layers, and every network of the ensemble learns its own. Here
the assigners are learned once, with a classifier that is then put away, so that the amalgam serves any classifier and any verb.
The released code has a second bucket of maps (DDPM features) with assigners of its own; here there is one.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.errors import InputError
from denoscope.features.amalgam import Amalgam
from denoscope.features.amalgamation import (
    MOVES,
    Assigners,
    SparsityWalk,
    check_kinds,
    official_loss,
    paper_loss,
    weight_norms,
)
from denoscope.images import atomically
from denoscope.segmentation.examples import Examples
from denoscope.segmentation.few_shot import SIDE, Side, gather
from denoscope.segmentation.pixels import FEWEST, PixelStore, digest
from denoscope.training.amalgam import maps_of
from denoscope.training.checkpoint import Checkpoint

_AT_ONCE = 4096  # pixels classified at a time


@dataclass(frozen=True)
class PixelAmalgamConfig:
    """How to train: `batch` pixels a step by Adam; see `AmalgamConfig` for the rest. every: steps between looks."""

    steps: int = 2000
    every: int = 200
    batch: int = 64
    lr: int | float = 1e-3
    weights: str = "channel"
    count: int = 1
    gamma1: int | float = 0.0
    gamma2: int | float = 0.0
    official: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1 or self.batch < 2:
            raise InputError("steps and every must be at least 1, and batch at least 2.")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr:g}; it must be a number above 0, e.g. 0.001.")
        check_kinds(self.weights, count=self.count)
        if self.official and (self.gamma1 or self.gamma2):
            raise InputError("The official loss has no use for gamma1 and gamma2; leave them out.")


class PixelClassifier(nn.Module):
    """Assigners and the layers of the released classifier of fewer than 30 classes: 128, 32, with ReLU and batch norm."""

    def __init__(self, assigners: Assigners, width: int, classes: int):
        super().__init__()
        self.assigners = assigners
        hidden = (128, 32) if classes < 30 else (256, 128)
        layers: list[nn.Module] = []
        for before, after in zip((width, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.BatchNorm1d(after)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], classes))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, attention: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Logits [pixels, classes] of maps [pixels, maps, channels], and the weights of the maps."""
        mixture = self.assigners(x, attention)
        return self.layers(mixture.values), mixture.weights


def train_pixel_amalgam(
    extractor: Amalgam,
    train: Examples,
    validation: Examples,
    out: str | Path,
    cache: str | Path,
    *,
    config: PixelAmalgamConfig | None = None,
    side: Side = SIDE,
    pixels: int | None = None,
    fewest: int = FEWEST,
    report: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
    prepared: Callable[[int, int], None] = lambda made, pictures: None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Train assigners of pixels, and write those that classified the validation pixels best to `out`.

    cache: folder for the pixels' features, read through memory maps. side, pixels, fewest: see `FewShot.fit`. Returns what was
    measured, which is also in a .json beside `out`: "looks" (share of validation pixels told rightly, step by step) and "best".
    A run that was stopped goes on when it is called again, see `train_amalgam`. The batch of step n is a function of (seed, n).

    Raises InputError for examples that do not suffice or do not fit each other, and for a loss that is not finite.
    """
    config, out = config or PixelAmalgamConfig(), Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"Assigners are saved as .safetensors, not {out.suffix or 'without suffix'}.")
    goes_on = checkpoint or Checkpoint(out)
    if out.is_file() and not goes_on.path.is_file():
        raise InputError(f"{out} is already there; choose another file or delete it.")
    if train.classes.names != validation.classes.names:
        raise InputError(
            f"Training has the classes {', '.join(train.classes.names)} but validation {', '.join(validation.classes.names)}."
        )
    whole = Amalgam(extractor.base, extractor.techniques, "concat")
    described = json.loads(json.dumps(whole.describe(), default=str))
    learned, kept = PixelStore(Path(cache)), PixelStore(Path(cache))
    every = [(learned, example) for example in train.examples] + [(kept, example) for example in validation.examples]
    for done, (store, example) in enumerate(every, 1):
        gather(store, [example], whole, described, side, pixels, fewest, config.seed)
        prepared(done, len(every))
    if not len(learned) or not len(kept):
        raise InputError("There are no labelled pixels to learn from, or none to validate with.")
    maps, attention = maps_of(whole(train.examples[0].read()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        beside = 0 if attention is None else len(attention)
        assigners = Assigners(
            maps.shape[1], beside, config.count, config.weights, "nn", config.official, pixels=True
        )  # fmt: skip
        width = config.count * maps.shape[1] + beside * (config.count if config.official else 1)
        network = PixelClassifier(assigners, width, len(train.classes)).to(extractor.base.denoiser.device)
    own = {key: value for key, value in asdict(config).items() if key != "steps"}
    parts = [[[one.read().digest, digest(one.labels)] for one in part.examples] for part in (train, validation)]
    settings = [own, described, list(train.classes.names), parts, side, pixels, fewest]
    looks = _learn(network, learned, kept, len(maps), config, report, goes_on, settings)
    told = {
        "config": asdict(config), "features": described, "classes": list(train.classes.names), "looks": looks,
        "best": max(looks, key=lambda look: look["right"])["step"], "pixels": {"train": len(learned), "validation": len(kept)},
    }  # fmt: skip
    assigners.made = told
    atomically(out.with_suffix(".json"), lambda path: path.write_text(json.dumps(told, indent=2, default=str) + "\n"))
    assigners.save(out)
    if checkpoint is None:
        goes_on.remove()
    return told


def _learn(
    network: PixelClassifier,
    learned: PixelStore,
    kept: PixelStore,
    maps: int,
    config: PixelAmalgamConfig,
    report: Callable[[int, float, float], None],
    checkpoint: Checkpoint,
    settings: Any,
) -> list[dict[str, Any]]:
    """Train; leave the network with the weights of its best look, and tell the looks."""
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), config.lr)
    walk, looks, losses, done = SparsityWalk(), [], [], 0
    best: dict[str, Tensor] = {}
    if held := checkpoint.resume(settings, config.steps, device):
        network.load_state_dict(held["network"])
        optimizer.load_state_dict(held["optimizer"])
        walk, looks, losses, best, done = (
            SparsityWalk(**held["walk"]), held["looks"], held["losses"], held["best"], held["step"],
        )  # fmt: skip

    def state() -> dict[str, Any]:
        told = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "walk": asdict(walk)}
        return {**told, "looks": looks, "losses": losses, "best": best}

    for step in range(done + 1, config.steps + 1):
        started = time.perf_counter()
        rng = np.random.default_rng([config.seed, step])
        x, beside, labels = _batch(
            learned, torch.from_numpy(rng.integers(len(learned), size=config.batch)), maps, network
        )
        network.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.integers(1 << 62)))  # dropout
            logits, weights = network(x, beside)
        task = F.cross_entropy(logits, labels)
        if config.official:
            loss = official_loss(task, weights, walk.strength)
        else:
            loss = paper_loss(task, weights, config.gamma1, config.gamma2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if not math.isfinite(value := task.item()):
            raise InputError(f"The loss is {value} at step {step}; lower lr.")
        losses.append(value)
        if config.official and step % 5 == 0:
            walk.look(value, MOVES[rng.integers(3)], bool(rng.integers(20) == 0))
        if looked := step % config.every == 0 or step == config.steps:
            right = _share_right(network, kept, maps)
            if not looks or right > max(look["right"] for look in looks):
                best = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            norm = weight_norms(weights).mean().item()
            looks.append({"step": step, "loss": float(np.mean(losses)), "norm": norm, "right": right})
            losses = []
        checkpoint.keep(step, state, now=looked)
        report(step, value, time.perf_counter() - started)
    network.load_state_dict(best)
    return looks


def _batch(
    store: PixelStore, rows: Tensor, maps: int, network: PixelClassifier
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Maps [pixels, maps, channels], attention [pixels, channels] if there is one, and classes."""
    device, channels = next(network.parameters()).device, network.assigners.settings["channels"]
    values, labels = (one.to(device) for one in store.take(rows))
    beside = values[:, maps * channels :] if network.assigners.settings["attention"] else None
    return values[:, : maps * channels].unflatten(1, (maps, channels)), beside, labels


def _share_right(network: PixelClassifier, store: PixelStore, maps: int) -> float:
    """Share of the pixels of a store that are told rightly."""
    network.eval()
    right = 0
    with torch.no_grad():
        for rows in torch.arange(len(store)).split(_AT_ONCE):
            x, beside, labels = _batch(store, rows, maps, network)
            right += int((network(x, beside)[0].argmax(1) == labels).sum())
    return right / len(store)


def split_examples(examples: Examples, share: float = 0.3, seed: int = 0) -> tuple[Examples, Examples]:
    """(training, validation) examples, the second a share of the pictures, at least one of either."""
    if len(examples) < 2:
        raise InputError("One labelled picture cannot be divided; give validation pictures of their own.")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    held = min(max(1, round(share * len(examples))), len(examples) - 1)
    parts = sorted(order[held:]), sorted(order[:held])
    one, other = (replace(examples, examples=tuple(examples.examples[i] for i in part)) for part in parts)
    return one, other
