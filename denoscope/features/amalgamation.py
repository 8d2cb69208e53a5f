"""Several feature maps of one picture as one, made under different techniques or at different sites: untrained, or learned.

Meng et al., "Suppress Content Shift: Better Diffusion Features via Off-the-Shelf Generation Techniques", NeurIPS 2024
(arXiv 2410.06719), section 4.3: n weight assigners f^j give every map r_i a weight, w_i^j = softmax over i of f^j(r_i); the
amalgam is the concatenation over j of sum_i w_i^j r_i (equation 3), learned with the loss
L - g1 sum_j |w^j| - g2/2 sum_j sum_(k != j) |w^j - w^k| (equations 4 and 5: sparsity, diversity).

The released code differs: one assigner, which gives one weight for each channel (not one for a map), no term of diversity, and
a g1 that wanders at random (`SparsityWalk`, `official_loss`). `ChannelAssigner` is what was released and measured,
`ScalarAssigner` what is printed.
"""

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.errors import InputError, MissingError
from denoscope.features.feature_map import FeatureMap
from denoscope.features.fusing import Joined
from denoscope.images import atomically

HIDDEN = 128  # width of an assigner
MOVES = (-1e-5, 0.0, 1e-5)  # of `SparsityWalk`


def aggregate(maps: Sequence[FeatureMap]) -> FeatureMap:
    """Maps of one picture, enlarged to the largest of them by repeating cells ("nearest") and concatenated as they are.

    What the companion code (arXiv 2410.03558, `--aggregate_output`) makes of several activations, there in the order in which
    the network produced them, here in the order given.

    Raises InputError when there are none, for maps of different pictures or parts of one, and for values that are not finite.
    """
    _check(maps)
    if len(maps) == 1:
        return maps[0]
    size = _largest(maps)
    frame = next(fm.frame for fm in maps if fm.values.shape[1:] == size)
    sites = [str(fm.recipe.get("site")) for fm in maps]
    site = sites[0] if len(set(sites)) == 1 else "+".join(sites)
    values = torch.cat([_nearest(fm.values, size).to(maps[0].values) for fm in maps])
    return replace(maps[0], values=values, frame=frame, recipe={**maps[0].recipe, "site": site})


def standardised(fm: FeatureMap) -> FeatureMap:
    """With mean 0 and variance 1 over the cells in every channel; channels that are the same everywhere are 0."""
    values = fm.values.float()
    variance, mean = torch.var_mean(values, (1, 2), keepdim=True, correction=0)
    # what float32 rounding leaves of a constant channel is not a variance
    constant = variance <= (mean.abs() * 1e-6) ** 2
    return replace(fm, values=torch.where(constant, 0, (values - mean) * variance.clamp_min(1e-30).rsqrt()))


def amalgamate(
    maps: Sequence[FeatureMap], how: "str | Assigners" = "mean", attention: FeatureMap | None = None
) -> FeatureMap:
    """Maps of one picture under different techniques as one map.

    how: "mean"; "concat", the maps beside each other as they are (`aggregate`); "standard", the same with every channel of
        every map brought to mean 0 and variance 1 over the picture first; "pca:N", that in its N main components, found for
        the two pictures of a pair together when they are compared (see `features.paired`; until then the map has all
        channels, each cell of unit length); or trained assigners.
    attention: a map that is put beside the result, as the paper does with attention features; with "pca:N" it is a part of
        its own.

    Raises InputError for maps whose shapes do not fit, for values that are not finite, and for an unknown `how`.
    """
    _check([*maps, *([attention] if attention else [])])
    kind, components = (None, None) if isinstance(how, Assigners) else parse_how(how)
    if not isinstance(how, Assigners) and kind != "mean":
        one = aggregate(maps if kind == "concat" else [standardised(fm) for fm in maps])
        if components is not None:
            whole = Joined.of([one, attention] if attention else [one], components=components)
            return replace(whole, recipe={**whole.recipe, **_told(maps, how, attention)})
    elif isinstance(how, Assigners):
        one = _learned(maps, how, attention)
    else:
        x = torch.stack([fm.values.float() for fm in _alike(maps)])
        one = replace(maps[0], values=x.mean(0))
    if attention is not None and not isinstance(how, Assigners):
        one = aggregate([one, attention])
    return replace(one, recipe={**maps[0].recipe, **_told(maps, how, attention)})


def parse_how(how: str) -> tuple[str, int | None]:
    """(kind, components) of "mean", "concat", "standard" or "pca:N"; InputError for anything else."""
    if how in ("mean", "concat", "standard"):
        return how, None
    if (found := re.fullmatch(r"pca:(\d+)", how)) and int(found[1]):
        return "pca", int(found[1])
    raise InputError(f"There is no way {how!r} to amalgamate; write mean, concat, standard, pca:N or a weights file.")


def _told(maps: Sequence[FeatureMap], how: "str | Assigners", attention: FeatureMap | None) -> dict[str, Any]:
    told = how if isinstance(how, str) else how.describe()
    found = {"amalgam": told, "shapes": [list(fm.values.shape) for fm in maps], "members": [fm.recipe for fm in maps]}
    return found if attention is None else {**found, "attention": attention.recipe}


def _learned(maps: Sequence[FeatureMap], assigners: "Assigners", attention: FeatureMap | None) -> FeatureMap:
    x = torch.stack([fm.values.float() for fm in _alike(maps)])
    size = _largest([*maps, *([attention] if attention else [])])
    place = next(assigners.parameters()).device
    x, beside = _nearest(x, size).to(place), None
    if attention is not None:
        beside = _nearest(attention.values.float(), size).to(place)[None]
    training = assigners.training
    with torch.no_grad():
        values = assigners.eval()(x[None], beside).values[0].to(maps[0].values.device)
    assigners.train(training)
    frame = next(fm.frame for fm in (*maps, attention) if fm is not None and fm.values.shape[1:] == size)
    return replace(maps[0], values=values, frame=frame)


def _check(maps: Sequence[FeatureMap]) -> None:
    """InputError unless the maps lie over the same part of the same picture and are finite."""
    if not maps:
        raise InputError("There is nothing to amalgamate; give at least one map.")
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    for k, fm in enumerate(maps):
        grid = torch.tensor(fm.frame.grid, dtype=torch.float64)
        placed = fm.frame.to_picture(corners * grid - 0.5)
        first = maps[0].frame.to_picture(corners * torch.tensor(maps[0].frame.grid, dtype=torch.float64) - 0.5)
        if fm.frame.picture != maps[0].frame.picture or not torch.allclose(placed, first, atol=1e-6):
            raise InputError(f"Only maps of the same part of one picture can be amalgamated; map {k} is of another.")
        if fm.values.device.type != "meta" and not fm.values.isfinite().all():
            raise InputError(f"Map {k} ({fm.recipe.get('site')}) is not finite; make it in float32 or bfloat16.")


def _alike(maps: Sequence[FeatureMap]) -> Sequence[FeatureMap]:
    check_shapes([list(fm.values.shape) for fm in maps])
    return maps


def check_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """InputError, naming two, unless all shapes are one."""
    for k, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise InputError(
                f"Maps 0 and {k} are {shapes[0]} and {shape}; only maps of one shape have a mean or weights: "
                "give all techniques the same site and size, or use concat."
            )


def _largest(maps: Sequence[FeatureMap]) -> tuple[int, int]:
    h, w = max((fm.values.shape[1:] for fm in maps), key=lambda size: size[0] * size[1])
    return int(h), int(w)


def _nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., h, w] resized by taking the cell at floor(i h / H), as `interpolate(mode="nearest")`."""
    if tuple(values.shape[-2:]) == size:
        return values
    return F.interpolate(values.reshape(1, -1, *values.shape[-2:]), size, mode="nearest").view(
        *values.shape[:-2], *size
    )


class ChannelAssigner(nn.Sequential):
    """f of the released code: [batch, channels, h, w] or, for pixels, [batch, channels] -> a number for each channel.

    For maps: 3x3 convolution to 128 without bias, ReLU, batch norm, dropout of a half, mean over the cells, linear layer. For
    pixels: linear layer to 128, ReLU, batch norm, dropout, linear layer. The names of the weights are the released ones.
    """

    outputs: int | None = None  # numbers for a map: one for each channel

    def __init__(self, channels: int, pixels: bool = False):
        last = nn.Linear(HIDDEN, self.outputs or channels)
        if pixels:
            super().__init__(nn.Linear(channels, HIDDEN), nn.ReLU(), nn.BatchNorm1d(HIDDEN), nn.Dropout(), last)
            return
        convolution = nn.Conv2d(channels, HIDDEN, 3, padding=1, bias=False)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(convolution, nn.ReLU(), nn.BatchNorm2d(HIDDEN), nn.Dropout(), *pool, last)


class ScalarAssigner(ChannelAssigner):
    """f of the paper (equation 3): one number for a map. Its body is not told; it is the released one."""

    outputs = 1


def mixing_weights(f: nn.Module, x: Float[Tensor, "batch maps channels *cells"]) -> Float[Tensor, "batch maps weights"]:
    """softmax over the maps of f of each. In training, batch norm sees one map at a time, as released."""
    return torch.stack([f(x[:, i]) for i in range(x.shape[1])], 1).softmax(1)


def mixed(
    weights: Float[Tensor, "batch maps weights"], x: Float[Tensor, "batch maps channels *cells"]
) -> Float[Tensor, "batch channels *cells"]:
    """sum_i w_i r_i."""
    return (weights.reshape(*weights.shape, *[1] * (x.ndim - 3)) * x).sum(1)


@dataclass(frozen=True, eq=False)
class Mixture:
    """values: the amalgam. weights: of each assigner, [batch, maps, channels or 1]; of pixels, all cells are in the batch."""

    values: Float[Tensor, "batch channels *cells"]
    weights: list[Tensor]


def check_kinds(weights: str, head: str = "nn", count: int = 1) -> None:
    """InputError for kinds of assigners and heads that there are none of, and for fewer than one assigner."""
    if weights not in ("channel", "scalar"):
        raise InputError(f"weights is channel or scalar, not {weights!r}.")
    if head not in ("conv", "nn"):
        raise InputError(f"head is conv or nn, not {head!r}.")
    if count < 1:
        raise InputError(f"count, the number of assigners, is {count}; it must be at least 1.")


class Assigners(nn.Module):
    """n weight assigners and a head, with the released names of weights.

    channels: of every map. attention: channels of the attention map, 0 for none. weights: "channel" (`ChannelAssigner`) or
    "scalar" (`ScalarAssigner`). head: "conv", a 3x3 convolution without bias of every mixture with the attention map beside it,
    or "nn", none. official: with n > 1 all mixtures go through one and the same convolution, and without a convolution the
    attention map is put beside each of them, as the released code has it; otherwise each has its own, and attention comes once.
    pixels: whether every cell has weights of its own, as in the released pixel classifier, or the whole map has the same.
    made: what they were trained on, kept in the file.
    """

    def __init__(
        self,
        channels: int,
        attention: int = 0,
        count: int = 1,
        weights: str = "channel",
        head: str = "conv",
        official: bool = False,
        pixels: bool = False,
        made: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if channels < 1 or attention < 0:
            raise InputError("Assigners need at least 1 channel and 0 or more channels of attention.")
        check_kinds(weights, head, count)
        if pixels and head == "conv":
            raise InputError("Assigners of pixels have no convolution; take the head nn.")
        self.settings = {"channels": channels, "attention": attention, "count": count, "weights": weights}
        self.settings |= {"head": head, "official": official, "pixels": pixels}
        self.made = dict(made or {})
        kind = ChannelAssigner if weights == "channel" else ScalarAssigner
        self.weight_assigner = nn.ModuleList(kind(channels, pixels) for _ in range(count))
        self.out = nn.ModuleList()
        if head == "conv":
            both = channels + attention
            heads = [nn.Conv2d(both, both, 3, padding=1, bias=False) for _ in range(1 if official else count)]
            self.out = nn.ModuleList(heads * (count if official else 1))

    def forward(
        self,
        x: Float[Tensor, "batch maps channels *cells"],
        attention: Float[Tensor, "batch attention *cells"] | None = None,
    ) -> Mixture:
        """The amalgam of each batch element. Raises InputError where the channels are not those that it was made for."""
        given = 0 if attention is None else attention.shape[1]
        if (x.shape[2], given) != (self.settings["channels"], self.settings["attention"]):
            raise InputError(
                f"The maps have {x.shape[2]} channels and {given} of attention, but the assigners were made for "
                f"{self.settings['channels']} and {self.settings['attention']}."
            )
        cells = x.shape[3:]
        if self.settings["pixels"]:
            x = x.flatten(3).permute(0, 3, 1, 2).flatten(0, 1) if cells else x
        weights = [mixing_weights(f, x) for f in self.weight_assigner]
        parts = [mixed(w, x) for w in weights]
        if self.settings["pixels"] and cells:
            parts = [part.unflatten(0, (-1, cells.numel())).mT.unflatten(2, cells) for part in parts]
        if attention is not None and (self.out or self.settings["official"]):
            parts = [torch.cat([part, attention], 1) for part in parts]
        elif attention is not None:
            parts.append(attention)
        if self.out:
            parts = [head(part) for head, part in zip(self.out, parts, strict=True)]
        return Mixture(torch.cat(parts, 1), weights)

    def describe(self) -> dict[str, Any]:
        """JSON values that decide what they make; weights go by a digest of all their values."""
        return {**self.settings, "assigners": _digest(self.state_dict())}

    def save(self, path: str | Path) -> Path:
        """Write weights and settings to one .safetensors file (beside, then renamed)."""
        if Path(path).suffix != ".safetensors":
            raise InputError(f"Assigners are saved as .safetensors, not {Path(path).suffix or 'without suffix'}.")
        values = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        meta = {"assigners": json.dumps(self.settings), "made": json.dumps(self.made, default=str)}
        return atomically(path, lambda beside: save_file(values, beside, metadata=meta))


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# what the readers of files raise for files of another kind
_DAMAGED = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    EOFError,
    AttributeError,
)


def read_assigners(path: str | Path, head: str | None = None) -> Assigners:
    """Trained assigners, in eval mode: what `Assigners.save` wrote, or a checkpoint of the released code (.pt, .pth).

    head: "nn" leaves the convolution of a released checkpoint out, which holds one whether it was used or not ("conv"). Of a
        released pixel classifier the assigners of its first set of maps are read.

    Raises MissingError, or InputError when the file holds something else or a weight that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"There are no trained assigners at {path}.")
    made: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            settings = json.loads(meta["assigners"]) if "assigners" in meta else _settings_of(state)
            made = json.loads(meta.get("made", "{}"))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                held = torch.load(path, map_location="cpu", weights_only=True)
            state = held.get("aggregation_network", held)
            settings = _settings_of(state)
        if head == "nn":
            settings |= {"head": "nn"}
        used = ("weight_assigner.", "out.") if settings["head"] == "conv" else ("weight_assigner.",)
        state = {name: value for name, value in state.items() if name.startswith(used)}
        assigners = Assigners(**settings, made=made)
        assigners.load_state_dict(state)
    except _DAMAGED as error:
        raise InputError(f"{path} does not hold trained assigners ({str(error).split(chr(10))[0]}).") from None
    if not all(value.isfinite().all() for value in assigners.state_dict().values()):
        raise InputError(f"{path} holds weights that are not finite; train the assigners again.")
    return assigners.eval().requires_grad_(False)


def _settings_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of released weights tell; KeyError where they are none."""
    channels = state["weight_assigner.0.0.weight"].shape[1]
    count = len({name.split(".")[1] for name in state if name.startswith("weight_assigner.")})
    pixels = state["weight_assigner.0.0.weight"].ndim == 2
    last = state[f"weight_assigner.0.{4 if pixels else 6}.weight"]
    weights = "scalar" if last.shape[0] == 1 < channels else "channel"
    both = state["out.0.weight"].shape[0] if "out.0.weight" in state else channels
    head = "conv" if "out.0.weight" in state else "nn"
    return {"channels": channels, "attention": both - channels, "count": count, "weights": weights, "head": head,
            "official": True, "pixels": pixels}  # fmt: skip


def weight_norms(weights: Sequence[Float[Tensor, "batch maps weights"]]) -> Float[Tensor, " assigners"]:
    """|w^j| of every assigner: the length over the maps, in [1/sqrt(maps), 1], averaged over batch and channels."""
    return torch.stack([torch.linalg.vector_norm(w, dim=1).mean() for w in weights])


def paper_loss(
    task: Float[Tensor, ""],
    weights: Sequence[Float[Tensor, "batch maps weights"]],
    gamma1: int | float = 0.0,
    gamma2: int | float = 0.0,
) -> Float[Tensor, ""]:
    """L - g1 sum_j |w^j| - g2/2 sum_j sum_(k != j) |w^j - w^k| (equations 4 and 5): few maps each, and others for each."""
    loss = task - gamma1 * weight_norms(weights).sum()
    if gamma2:
        apart = [one - other for j, one in enumerate(weights) for k, other in enumerate(weights) if j != k]
        loss = loss - gamma2 / 2 * sum(torch.linalg.vector_norm(d, dim=1).mean() for d in apart)
    return loss


def official_loss(
    task: Float[Tensor, ""], weights: Sequence[Float[Tensor, "batch maps weights"]], strength: int | float
) -> Float[Tensor, ""]:
    """L + s P L' / -P', with P minus the mean of the |w^j| and the dashed values held: the term of sparsity as large as s L.

    Its value is (1 - s) L and its gradient that of L less s (L / |w|) times that of |w|. The released term of diversity is 0.
    """
    penalty = -weight_norms(weights).mean()
    return task + strength * penalty * task.detach() / -penalty.detach()


@dataclass
class SparsityWalk:
    """The strength of `official_loss`, which the released code changes at random every 5 steps: by -1e-5, 0 or 1e-5, from 0 up.

    The strength in use is kept when the loss fell more since the last look than when one was kept last (that fall shrinks by
    a tenth at every look), and in one case of 20 anyway; the walk goes on from the one kept.
    """

    strength: float = 0.0
    kept: float = 0.0
    fall: float = 0.0
    loss: float | None = None

    def look(self, loss: float, move: float, anyway: bool) -> None:
        """The loss of every fifth step, and what was drawn: the next move, one of `MOVES`, and whether to keep it anyway."""
        fall = 0.0 if self.loss is None else self.loss - loss
        self.loss = loss
        if anyway or fall > self.fall:
            self.kept, self.fall = self.strength, fall
        self.fall *= 0.9
        self.strength = max(0.0, self.kept + move)
