"""The pixel classifier of label-scarce segmentation: ten small networks that vote.

Baranchuk et al., "Label-Efficient Semantic Segmentation with Diffusion Models", ICLR 2022 (arXiv 2112.03126), section 4, after
DatasetGAN (Zhang et al., CVPR 2021). Each network is an MLP on the feature vector of one pixel:
`linear -> ReLU -> batch norm -> linear -> ReLU -> batch norm -> linear`, 128 and 32 wide (256 and 128 from 30 classes on).

The networks are stacked and trained together, as one batched computation; every one has its own initial weights, its own order
of the pixels and its own end, so that each is the network that training it alone would give.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from denoscope.denoisers.noise import draw
from denoscope.errors import InputError
from denoscope.features import FeatureMap
from denoscope.segmentation.pixels import PixelStore, interpolated

Logits = Float[Tensor, "models pixels classes"]
LINEAR, NORM = (0, 3, 6), (2, 5)  # places in the published nn.Sequential
MANY = 30  # classes from which the networks are wider
_GAIN, _RATE, _BATCH, _EPS, _MOMENTUM = 0.02, 1e-3, 64, 1e-5, 0.1  # Adam and batch norm otherwise as in PyTorch
_VALUES_AT_ONCE, _CELL_VALUES = 1 << 22, 1 << 26  # hidden values held at a time: of pixels, of feature cells
_FREE, _PATIENCE = 4, 50  # epochs before a network may stop, and batches without a lower loss after which it does


@dataclass(frozen=True, eq=False)
class PixelEnsemble:
    """weights: the published state dict (`layers.0.weight` …) with an axis for the models in front of every tensor."""

    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        missing = [name for name in _names() if name not in self.weights]
        if missing:
            raise InputError(f"A pixel classifier has the weights {', '.join(_names())}; {missing[0]} is missing.")

    @classmethod
    def initial(cls, channels: int, classes: int, models: int = 10, seed: int = 0) -> "PixelEnsemble":
        """Linear weights from N(0, 0.02), biases 0; those of model k are named by (seed, k)."""
        if models < 1:
            raise InputError(f"An ensemble needs at least 1 model, not {models}.")
        if classes < 2:
            raise InputError(f"There is nothing to tell apart with {classes} class; label at least two.")
        widths = (channels, *((128, 32) if classes < MANY else (256, 128)), classes)
        weights = {}
        for index, (place, one, two) in enumerate(zip(LINEAR, widths[:-1], widths[1:], strict=True)):
            drawn = [draw((two, one), seed, k, place, "weight") for k in range(models)]
            weights[f"layers.{place}.weight"] = torch.stack(drawn) * _GAIN
            weights[f"layers.{place}.bias"] = torch.zeros(models, two)
            if index < len(NORM):
                norm = f"layers.{NORM[index]}"
                weights |= {f"{norm}.weight": torch.ones(models, two), f"{norm}.bias": torch.zeros(models, two)}
                weights |= {f"{norm}.running_mean": torch.zeros(models, two)}
                weights |= {f"{norm}.running_var": torch.ones(models, two)}
        return cls(weights)

    @classmethod
    def stacked(cls, networks: Sequence[Mapping[str, Tensor]]) -> "PixelEnsemble":
        """From the state dicts of single networks, as published ones are saved (also under `module.`)."""
        plain = [{name.removeprefix("module."): value for name, value in one.items()} for one in networks]
        try:
            return cls({name: torch.stack([one[name] for one in plain]) for name in _names()})
        except (KeyError, RuntimeError) as error:
            raise InputError(f"These are no networks of one ensemble ({error}).") from None

    @property
    def models(self) -> int:
        return self.weights["layers.0.weight"].shape[0]

    @property
    def channels(self) -> int:
        return self.weights["layers.0.weight"].shape[2]

    @property
    def classes(self) -> int:
        return self.weights["layers.6.bias"].shape[1]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the weights."""
        found = hashlib.blake2b(digest_size=8)
        for name in _names():
            found.update(self.weights[name].float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def to(self, device: str | torch.device) -> "PixelEnsemble":
        return PixelEnsemble({name: value.to(device) for name, value in self.weights.items()})

    def first(self, features: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows models_hidden"]:
        """The first linear layer of all models, [rows, models * width].

        It is linear, so it may be applied to feature cells and interpolated afterwards: the channels shrink before there are
        as many rows as pixels.
        """
        if features.shape[1] != self.channels:
            raise InputError(
                f"This classifier reads {self.channels} channels, but the features have {features.shape[1]}."
            )
        weight, bias = self.weights["layers.0.weight"], self.weights["layers.0.bias"]
        return torch.addmm(bias.flatten(), features.to(weight), weight.flatten(0, 1).mT)

    def rest(self, hidden: Float[Tensor, "rows models_hidden"]) -> Logits:
        """What follows the first linear layer."""
        stacked = hidden.unflatten(1, (self.models, -1)).transpose(0, 1)
        return _after_first(self.weights, stacked, training=False)

    def logits(self, features: Float[Tensor, "pixels channels"]) -> Logits:
        return self.rest(self.first(features))


def fit(
    store: PixelStore,
    classes: int,
    models: int = 10,
    epochs: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
    report: Callable[[int, int], None] = lambda step, running: None,
    start: PixelEnsemble | None = None,
) -> PixelEnsemble:
    """Train on all pixels of a store: cross entropy, Adam (1e-3), batches of 64, at most `epochs` epochs.

    From the fifth epoch on, a network stops once more than 50 batches in a row brought no new lowest loss. As published, the
    last, smaller batch of an epoch is dropped (unless it is the only one), and so are labels that are IGNORED.
    report: called after every batch with their number and that of the networks still running. start: initial weights.

    Raises InputError for an empty store, fewer than two classes, and classes beyond `classes`.
    """
    found = store.classes
    if not len(store):
        raise InputError("There are no labelled pixels to learn from.")
    if len(found) < 2:
        raise InputError(f"All labelled pixels are of class {found[0]}; label at least two classes.")
    if found[-1] >= classes:
        raise InputError(f"There are pixels of class {found[-1]}, but only {classes} classes (0 to {classes - 1}).")
    if epochs < 1:
        raise InputError(f"At least 1 epoch is needed, not {epochs}.")
    chosen = start or PixelEnsemble.initial(store.channels, classes, models, seed)
    batch = min(_BATCH, len(store))
    if batch < 2:
        raise InputError("One labelled pixel is too little to learn from.")
    done = {name: value.to(device).clone() for name, value in chosen.weights.items()}
    learning = _Learning({name: value.clone() for name, value in done.items()})
    members = list(range(chosen.models))  # those that still learn
    lowest, since = torch.full((len(members),), 1e7, device=device), torch.zeros(len(members), device=device)
    step = 0
    for epoch in range(epochs):
        orders = torch.stack([_order(len(store), seed, k, epoch) for k in members])
        for begin in range(0, len(store) - batch + 1, batch):
            features, labels = store.take(orders[:, begin : begin + batch].long())
            losses = learning.step(features.to(device), labels.to(device))
            step += 1
            if epoch >= _FREE:
                better = losses < lowest
                lowest = torch.where(better, losses, lowest)
                since = torch.where(better, 0, since + 1)
                if (since > _PATIENCE).any():
                    stay = (since <= _PATIENCE).nonzero()[:, 0]
                    for name, value in learning.weights.items():
                        done[name][members] = value
                    members = [members[k] for k in stay.tolist()]
                    learning.keep(stay)
                    lowest, since, orders = lowest[stay], since[stay], orders[stay.cpu()]
            report(step, len(members))
            if not members:
                return PixelEnsemble(done)
    for name, value in learning.weights.items():
        done[name][members] = value
    return PixelEnsemble(done)


class _Learning:
    """The weights of the models that still learn, and the state of their optimiser."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights
        self.optimizer = self._adam()

    def _adam(self) -> torch.optim.Adam:
        """On the trained weights; the fused kernel costs a tenth of the plain one on a CPU."""
        trained = [value for name, value in self.weights.items() if "running" not in name]
        return torch.optim.Adam(trained, lr=_RATE, fused=trained[0].device.type in ("cpu", "cuda"))

    def step(
        self, features: Float[Tensor, "models batch channels"], labels: Int[Tensor, "models batch"]
    ) -> Float[Tensor, " models"]:
        """One step of every model on its own batch; returns their losses."""
        own = self.optimizer.param_groups[0]["params"]
        with torch.enable_grad():
            for value in own:
                value.requires_grad_(True)
            weights = self.weights
            x = torch.baddbmm(weights["layers.0.bias"][:, None], features, weights["layers.0.weight"].mT)
            logits = _after_first(weights, x, training=True)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
            gradients = torch.autograd.grad(losses.sum(), own)
        for value, gradient in zip(own, gradients, strict=True):
            value.requires_grad_(False)
            value.grad = gradient.contiguous()  # the fused kernel takes the layout of the weights for granted
        self.optimizer.step()
        return losses.detach()

    def keep(self, stay: Int[Tensor, " models"]) -> None:
        """Only these models learn on."""
        before = [self.optimizer.state[value] for value in self.optimizer.param_groups[0]["params"]]
        self.weights = {name: value[stay] for name, value in self.weights.items()}
        self.optimizer = self._adam()
        for value, old in zip(self.optimizer.param_groups[0]["params"], before, strict=True):
            moments = {name: old[name][stay] for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[value] = {"step": old["step"], **moments}


def vote(logits: Logits) -> Int[Tensor, " pixels"]:
    """The class that most models find likeliest; of several, the lowest number (as `torch.mode` has it)."""
    found = logits.argmax(2)
    counts = torch.zeros(logits.shape[1:], dtype=torch.int32, device=logits.device)
    return counts.scatter_add_(1, found.mT, torch.ones_like(found.mT, dtype=torch.int32)).argmax(1)


def disagreement(logits: Logits) -> Float[Tensor, " pixels"]:
    """`H(mean p) - mean H(p)` in nats: how much less sure the ensemble is than its models, 0 where they agree."""
    p = logits.transpose(1, 2).float().contiguous().softmax(1)
    return (torch.special.entr(p.mean(0)).sum(0) - torch.special.entr(p).sum(1).mean(0)).clamp(min=0)


def uncertainty(values: Float[Tensor, "*pixels"]) -> float:
    """Of a picture: the mean of the top decile of its pixels' disagreement."""
    flat = values.flatten()
    return flat.topk(max(1, len(flat) // 10)).values.mean().item()


def classified(
    ensemble: PixelEnsemble, fm: FeatureMap, size: tuple[int, int]
) -> tuple[Int[np.ndarray, "height width"], Float[np.ndarray, "height width"]]:
    """Class and disagreement of every pixel of the picture at (width, height); features are interpolated bilinearly.

    Interpolation and the first linear layer change places where that is cheaper, which changes nothing but rounding.
    """
    device = ensemble.weights["layers.0.weight"].device
    cells = fm.values.flatten(1).mT.float().to(device).contiguous()
    hidden, pixels = ensemble.weights["layers.0.bias"].numel(), size[0] * size[1]
    early = len(cells) * 2 < pixels and len(cells) * hidden <= _CELL_VALUES
    cells = ensemble.first(cells) if early else cells
    labels, doubt = np.empty(pixels, np.int16), np.empty(pixels, np.float32)
    for places in torch.arange(pixels).split(max(1, _VALUES_AT_ONCE // hidden)):
        values = interpolated(cells, fm.frame, size, places)
        logits = ensemble.rest(values) if early else ensemble.logits(values)
        some = slice(int(places[0]), int(places[-1]) + 1)
        labels[some], doubt[some] = vote(logits).cpu().numpy(), disagreement(logits).cpu().numpy()
    return labels.reshape(size[::-1]), doubt.reshape(size[::-1])


def _names() -> list[str]:
    linear = [f"layers.{place}.{part}" for place in LINEAR for part in ("weight", "bias")]
    parts = ("weight", "bias", "running_mean", "running_var")
    return linear + [f"layers.{place}.{part}" for place in NORM for part in parts]


def _order(count: int, seed: int, member: int, epoch: int) -> Int[Tensor, " pixels"]:
    """A member's order of the pixels in an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + member) * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator, dtype=torch.int32)


def _after_first(weights: Mapping[str, Tensor], x: Float[Tensor, "models rows width"], training: bool) -> Logits:
    """Everything behind the first linear layer. In training, batch statistics are used and the running ones updated."""
    models, rows, _ = x.shape
    for norm, linear in zip(NORM, LINEAR[1:], strict=True):
        weight, bias, mean, var = (
            weights[f"layers.{norm}.{part}"].view(-1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        side_by_side = x.relu().transpose(0, 1).reshape(rows, -1)
        x = F.batch_norm(side_by_side, mean, var, weight, bias, training, _MOMENTUM, _EPS)
        x = x.unflatten(1, (models, -1)).transpose(0, 1)
        x = torch.baddbmm(weights[f"layers.{linear}.bias"][:, None], x, weights[f"layers.{linear}.weight"].mT)
    return x
