"""Training the weights of an amalgam (`features.amalgamation`), on pairs of pictures or on labelled pixels.

Pairs: the harness of Diffusion Hyperfeatures (Luo et al., NeurIPS 2023, arXiv 2305.14334), which Meng et al. (arXiv 2410.06719)
train and evaluate in: symmetric InfoNCE over the cells of the two maps, one pair a step, AdamW. They choose the best checkpoint
on the very pairs that they report; here validation chooses, and a test set, if there is one, is looked at once, at the end.

The released code has every picture's maps on disk before it begins; so has this (`FeatureStore`), and reads them as it goes.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.protocol import Item
from denoscope.benchmarks.running import FeatureStore
from denoscope.benchmarks.semantic import Semantic
from denoscope.errors import InputError
from denoscope.features import FeatureMap
from denoscope.features.amalgam import ATTENTION, Amalgam
from denoscope.features.amalgamation import (
    MOVES,
    Assigners,
    Mixture,
    SparsityWalk,
    check_kinds,
    check_shapes,
    official_loss,
    paper_loss,
    weight_norms,
)
from denoscope.images import Frame, Points, atomically
from denoscope.training.checkpoint import Checkpoint

SCALE = 1 / 0.07  # of the cosines, as CLIP begins; it is not learned
_EPOCH = 5000  # pairs of an epoch of the released code, drawn anew for the next


@dataclass(frozen=True)
class AmalgamConfig:
    """How to train. weights, head, count, official: see `Assigners`; gamma1, gamma2: see `paper_loss`.

    official: the loss is `official_loss` with its `SparsityWalk`, cells of points are found without regard to half pixels, and
    the gammas have no use. every: steps between looks at the validation pairs. Published are 10000 steps, a look every 500.
    """

    steps: int = 2000
    every: int = 250
    lr: int | float = 5e-4
    weight_decay: int | float = 0.01
    weights: str = "channel"
    head: str = "conv"
    count: int = 1
    gamma1: int | float = 0.0
    gamma2: int | float = 0.0
    official: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1:
            raise InputError("steps and every must be at least 1.")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise InputError(
                f"lr is {self.lr:g} and weight_decay {self.weight_decay:g}; lr must be above 0, e.g. 0.0005."
            )
        if not all(-math.inf < gamma < math.inf for gamma in (self.gamma1, self.gamma2)):
            raise InputError("gamma1 and gamma2 must be finite numbers.")
        check_kinds(self.weights, self.head, self.count)
        if self.official and (self.gamma1 or self.gamma2):
            raise InputError("The official loss has no use for gamma1 and gamma2; leave them out.")


@dataclass(frozen=True, eq=False)
class Trained:
    """path: the weights. columns: what is measured, PCK in percent. looks: on the validation pairs, step by step. best: the
    step chosen. validation, test: a row for "trained", for the "mean" of the maps and for each technique by itself.
    """

    path: Path
    columns: Sequence[str]
    best: int
    looks: Sequence[Mapping[str, Any]]
    validation: Mapping[str, Mapping[str, Any]]
    test: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def maps_of(
    fm: FeatureMap,
) -> tuple[Float[Tensor, "maps channels height width"], Float[Tensor, "attention height width"] | None]:
    """The maps that a concatenation by `Amalgam` is made of, and the attention beside them.

    Raises InputError where the maps have different shapes.
    """
    shapes = fm.recipe["shapes"]
    check_shapes(shapes)
    count, channels = len(shapes), shapes[0][0]
    own = fm.values[: count * channels].unflatten(0, (count, channels))
    return own, fm.values[count * channels :] if len(fm.values) > count * channels else None


def info_nce(
    source: Float[Tensor, "channels h w"],
    target: Float[Tensor, "channels k l"],
    source_cells: Int[Tensor, "points 2"],
    target_cells: Int[Tensor, "points 2"],
) -> Float[Tensor, ""]:
    """-log softmax, over the cells of the other map, of 14.3 times the cosine at the true one; mean of both directions.

    Cells are (x, y), the k-th of one map is where the k-th of the other belongs.
    """
    one, two = (F.normalize(values.flatten(1), dim=0) for values in (source, target))
    at, to = (y * values.shape[2] + x for values, (x, y) in ((source, source_cells.T), (target, target_cells.T)))
    forward = F.cross_entropy(SCALE * one[:, at].mT @ two, to)
    return (forward + F.cross_entropy(SCALE * two[:, to].mT @ one, at)) / 2


def cells_of(frame: Frame, points: Points, official: bool = False) -> Int[Tensor, "points 2"]:
    """The cell (x, y) in which each picture point lies. official: the nearest by scaling coordinates, up to half a cell off."""
    last = points.new_tensor(frame.grid) - 1
    scaled = (
        points * (points.new_tensor(frame.grid) / points.new_tensor(frame.picture))
        if official
        else frame.to_grid(points)
    )
    return scaled.clamp(min=0).minimum(last).round().long()


def train_amalgam(
    extractor: Amalgam,
    data: Semantic,
    train: Sequence[Item],
    validation: Sequence[Item],
    out: str | Path,
    cache: str | Path,
    *,
    test: Sequence[Item] = (),
    config: AmalgamConfig | None = None,
    prompt: str | None = None,
    report: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
    prepared: Callable[[int, int], None] = lambda made, pictures: None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train assigners (and head) for point transfer and write the best on the validation pairs to `out`.

    extractor: whose techniques are amalgamated; its own `how` does not matter. data: where the pictures of all items are, and
    how PCK is measured; its first column decides what is best (where official its second, over all points). cache: folder of
    the pictures' maps, made once. prompt: with "{category}" in it, for the techniques that name none. report: called once a
    step with step, loss and seconds. prepared: called for every picture whose maps are there, with their number and all.
    checkpoint: what a run that was stopped goes on from when it is called again; by default one beside `out`, removed at the
    end (one that is given is for the caller to remove). It is written at every look, and between looks when it is time to.

    The pair of step n and its dropout are functions of (seed, n). Beside `out` lies a .json with everything measured.

    Raises InputError for no pairs, a loss that is not finite, maps of different shapes, and an `out` made with other settings.
    """
    config, out = config or AmalgamConfig(), Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"Assigners are saved as .safetensors, not {out.suffix or 'without suffix'}.")
    if not train or not validation:
        raise InputError("Training needs at least one pair to learn from and one to validate with.")
    store = FeatureStore(Amalgam(extractor.base, extractor.techniques, "concat"), prompt, Path(cache))
    run = _Run(store, data, config, extractor.base.denoiser.device)
    kept = checkpoint or Checkpoint(out)
    if out.is_file() and not kept.path.is_file():
        raise InputError(f"{out} is already there; choose another file or delete it.")
    pictures = _prepare(store, data, [*train, *validation, *test], prepared)
    run.begin(train[0])
    own = {key: value for key, value in asdict(config).items() if key != "steps"}
    pairs = [[[item.key, *_points(item.data)] for item in part] for part in (train, validation)]
    if held := kept.resume([own, store.settings, pictures, pairs, list(data.columns)], config.steps, run.device):
        run.restore(held)
    while run.step < config.steps:
        run.learn(train, report)
        if looked := run.step % config.every == 0 or run.step == config.steps:
            run.look(validation)
        kept.keep(run.step, run.state, now=looked)
    run.network.load_state_dict(run.best)
    columns = list(data.columns)
    measured = {"validation": run.compare(validation), "test": run.compare(test) if test else {}}
    told = {
        "config": asdict(config),
        "features": store.settings,
        "columns": columns,
        "best": run.best_step,
        "looks": run.looks,
        "pairs": {"train": len(train), "validation": len(validation), "test": len(test)},
        **measured,
    }
    run.network.made = told
    text = json.dumps(told, indent=2, default=str) + "\n"
    atomically(out.with_suffix(".json"), lambda path: path.write_text(text))
    run.network.save(out)
    if checkpoint is None:
        kept.remove()
    return Trained(out, columns, run.best_step, run.looks, **measured)


def _points(pair: Pair) -> list[Any]:
    return [pair.source_points.tolist(), pair.target_points.tolist()]


def _prepare(store: FeatureStore, data: Semantic, items: Sequence[Item], told: Callable[[int, int], None]) -> list[int]:
    """Every picture's maps, made and on disk; returns what names the pictures' pixels."""
    wanted = dict.fromkeys((name, item.category) for item in items for name in (item.data.source, item.data.target))
    found = []
    for n, (name, category) in enumerate(wanted, 1):
        picture = data.picture(name)
        maps_of(store(picture, category))
        found.append(picture.digest)
        told(n, len(wanted))
    return found


class _Run:
    """The state of one training: what is learned, and how far it is."""

    def __init__(self, store: FeatureStore, data: Semantic, config: AmalgamConfig, device: torch.device):
        self.store, self.data, self.config, self.device = store, data, config, device
        self.step, self.best_step, self.walk = 0, 0, SparsityWalk()
        self.looks: list[dict[str, Any]] = []
        self.losses: list[float] = []

    def begin(self, item: Item) -> None:
        """Fresh weights, of the sizes that the maps of a pair have."""
        maps, attention = maps_of(self._stored(item, "source"))
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = Assigners(
                maps.shape[1], 0 if attention is None else len(attention), config.count, config.weights, config.head,
                config.official,
            ).to(self.device)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.network.parameters(), config.lr, weight_decay=config.weight_decay)
        self.best = _copied(self.network)

    def _stored(self, item: Item, end: str) -> FeatureMap:
        return self.store(self.data.picture(getattr(item.data, end)), item.category)

    def mixture(self, stored: Sequence[FeatureMap]) -> list[Mixture]:
        """Of each picture; those of one size in one batch, as released (batch norm sees both)."""
        parts = [maps_of(fm) for fm in stored]
        x = [maps[None].to(self.device) for maps, _ in parts]
        beside = [None if attention is None else attention[None].to(self.device) for _, attention in parts]
        if len({one.shape for one in x}) > 1:
            return [self.network(one, other) for one, other in zip(x, beside, strict=True)]
        both = self.network(
            torch.cat(x), None if beside[0] is None else torch.cat([one for one in beside if one is not None])
        )
        return [Mixture(both.values[k : k + 1], [w[k : k + 1] for w in both.weights]) for k in range(len(stored))]

    def learn(self, train: Sequence[Item], report: Callable[[int, float, float], None]) -> None:
        """One step on one pair."""
        started, config = time.perf_counter(), self.config
        rng = np.random.default_rng([config.seed, self.step])
        length = min(len(train), _EPOCH)
        epoch, place = divmod(self.step, length)
        item = train[np.random.default_rng([config.seed, 1 << 40, epoch]).permutation(len(train))[place]]
        pair: Pair = item.data
        stored = [self._stored(item, end) for end in ("source", "target")]
        cells = [
            cells_of(fm.frame, points, config.official).to(self.device)
            for fm, points in zip(stored, (pair.source_points, pair.target_points), strict=True)
        ]
        self.network.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(rng.integers(1 << 62)))  # dropout
            one, two = self.mixture(stored)
        weights = [torch.cat(both) for both in zip(one.weights, two.weights, strict=True)]
        task = info_nce(one.values[0], two.values[0], *cells)
        if config.official:
            loss = official_loss(task, weights, self.walk.strength)
        else:
            loss = paper_loss(task, weights, config.gamma1, config.gamma2)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        if not math.isfinite(value := task.item()):
            raise InputError(f"The loss is {value} at step {self.step}; lower lr.")
        self.losses.append(value)
        if config.official and self.step % 5 == 0:
            self.walk.look(value, MOVES[rng.integers(3)], bool(rng.integers(20) == 0))
        report(self.step, value, time.perf_counter() - started)

    def features(self, picture: Any, category: str) -> FeatureMap:
        """The trained amalgam of a picture."""
        stored = self.store(picture, category)
        self.network.eval()
        with torch.no_grad():
            made = self.mixture([stored])[0].values[0].cpu()
        return replace(stored, values=made, recipe={**stored.recipe, "amalgam": "trained"})

    def _row(self, items: Sequence[Item], features: Callable[[Any, str], FeatureMap]) -> dict[str, Any]:
        return self.data.rows(items, [self.data.run(item, features) for item in items])[0]

    def look(self, validation: Sequence[Item]) -> None:
        """Measure on the validation pairs, and keep the weights if they are better than any before."""
        row, headline = self._row(validation, self.features), self.data.columns[int(self.config.official)]
        norm = float(np.mean([float(weight_norms(m.weights).mean()) for m in self._mixtures(validation[:8])]))
        loss = float(np.mean(self.losses))
        self.looks.append(
            {"step": self.step, "loss": loss, "norm": norm, **{name: row[name] for name in self.data.columns}}
        )
        self.losses = []
        if self.best_step == 0 or row[headline] > max(look[headline] for look in self.looks[:-1]):
            self.best, self.best_step = _copied(self.network), self.step

    def _mixtures(self, items: Sequence[Item]) -> list[Mixture]:
        self.network.eval()
        with torch.no_grad():
            return [self.mixture([self._stored(item, "source")])[0] for item in items]

    def compare(self, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
        """Rows of the trained amalgam, of the mean of the maps, and of each map by itself."""

        def mean(picture: Any, category: str) -> FeatureMap:
            stored = self.store(picture, category)
            return replace(stored, values=maps_of(stored)[0].mean(0))

        def single(k: int) -> Callable[[Any, str], FeatureMap]:
            def one(picture: Any, category: str) -> FeatureMap:
                stored = self.store(picture, category)
                return replace(stored, values=maps_of(stored)[0][k])

            return one

        extractor = self.store.extractor
        assert isinstance(extractor, Amalgam)
        names = [name for name in extractor.techniques if name != ATTENTION]
        rows = {"trained": self._row(items, self.features), "mean": self._row(items, mean)}
        return rows | {name: self._row(items, single(k)) for k, name in enumerate(names)}

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        return {
            "best_step": self.best_step, "best": self.best, "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(), "looks": self.looks, "losses": self.losses, "walk": asdict(self.walk),
        }  # fmt: skip

    def restore(self, held: Mapping[str, Any]) -> None:
        """Go on from what `state` told."""
        self.network.load_state_dict(held["network"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.step, self.best_step, self.best = held["step"], held["best_step"], held["best"]
        self.looks, self.losses, self.walk = held["looks"], held["losses"], SparsityWalk(**held["walk"])


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
