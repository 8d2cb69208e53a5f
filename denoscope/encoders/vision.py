"""Vision towers of transformers as `Encoder`s. The networks are untouched; the families differ by where their parts lie.

Sites, named as in denoisers of transformer blocks (see `denoscope.sites`), without class and register tokens:

    block.N                        output of block N, before the next one's norm
    block.N.query .key .value      attention, as projected (before rotary positions)
    block.N.self_map               softmax maps [heads, cells, cells]; class and register tokens have the rest of each row.
                                   Not for DINOv3, whose positions are rotations, nor SAM, which attends in windows
    block.N.feed_forward           inner activation of the feed-forward layer (not where it is gated)
    down.N                         output of stage N (ConvNeXt)
    out                            after the final norm; CLIP: and its projection to the space of prompts; SAM: after the neck
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.encoders.presets import PRESETS
from denoscope.errors import InputError
from denoscope.sites import Site, Skeleton

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its parts. Paths are dotted and relative to the network.

    blocks: the list of blocks. patches: the convolution that cuts the picture into patches. out: the last layer.
    attention, activation: inside a block; None where their outputs are no tokens. self_map: whether maps can be recomputed.
    interpolate: whether the forward pass must be told to fit its position embeddings to the picture.
    """

    family: str
    blocks: str
    patches: str
    out: str
    attention: str | None = "attention"
    activation: str | None = "mlp.activation_fn"
    self_map: bool = True
    interpolate: bool = False
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


_DINO_PATCHES = "embeddings.patch_embeddings.projection"
_CLIP = Layout(
    "clip", "tower.encoder.layers", "tower.embeddings.patch_embedding", "dense", "self_attn", interpolate=True,
    normalisation=OPENAI,
)  # fmt: skip
_SAM = Layout("sam", "layers", "patch_embed.projection", "neck", None, "mlp.act")
LAYOUTS: dict[str, Layout] = {
    "vit": Layout("dino", "layers", _DINO_PATCHES, "layernorm", interpolate=True),
    "dinov2": Layout("dinov2", "encoder.layer", _DINO_PATCHES, "layernorm"),
    "dinov2_with_registers": Layout("dinov2", "encoder.layer", _DINO_PATCHES, "layernorm"),
    "dinov3_vit": Layout(
        "dinov3", "model.layer", "embeddings.patch_embeddings", "norm", activation="mlp.act_fn", self_map=False
    ),
    "dinov3_convnext": Layout(
        "dinov3-convnext", "model.stages", "model.stages.0.downsample_layers.0", "layer_norm", None, None
    ),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "sam": _SAM,
    "sam_vision_model": _SAM,
}


class ClipTower(nn.Module):
    """CLIP's vision tower whose last norm and projection are applied to every patch, not only to the class token."""

    def __init__(self, tower: Any, projection: nn.Module | None):
        super().__init__()
        self.tower = tower
        self.config = tower.config
        self.dense = nn.Sequential(tower.post_layernorm, *([] if projection is None else [projection]))

    def forward(self, pixel_values: Tensor, **options: Any) -> Tensor:
        return self.dense(self.tower(pixel_values, **options).last_hidden_state)


class VisionEncoder:
    """An `Encoder` around a vision model of transformers.

    build: makes the network again, without its weights, for measuring its sites.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: Layout,
        build: Callable[[], nn.Module],
        name: str = "encoder",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ):
        self._network, self.layout, self._build, self.name, self.family = network, layout, build, name, layout.family
        self.mean, self.std = mean or layout.normalisation[0], std or layout.normalisation[1]
        config: Any = network.config
        patch = 32 if self.family == "dinov3-convnext" else config.patch_size
        side = config.image_size if self.family == "sam" else None
        self.multiple = patch if isinstance(patch, int) else patch[0]
        self.minimum = self.multiple
        self.canvas: int | None = side if side is None or isinstance(side, int) else side[0]
        count = len(network.get_submodule(layout.blocks))  # pyright: ignore[reportArgumentType]
        numbers = {"last": count - 1, "late": min(count - 1, count * 3 // 4), "canvas": self.canvas}
        self.presets: Mapping[str, Mapping[str, Any]] = {
            task: {key: value.format(**numbers) if isinstance(value, str) else value for key, value in preset.items()}
            for task, preset in PRESETS[self.family].items()
        }
        self._sites: list[Site] | None = None

    @property
    def network(self) -> nn.Module:
        return self._network

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._network.parameters()).dtype

    def sites(self, sizes: bool = True) -> list[Site]:
        if not sizes:
            return self._named()
        if self._sites is None:
            with torch.device("meta"):
                side = self.canvas or 16 * self.multiple
                pixels = torch.zeros(1, 3, side, side)
                skeleton = Skeleton(self._build().eval(), self._named())
                self._sites = skeleton.measured(lambda network: self._run(network, pixels), side)
        return self._sites

    def _named(self) -> list[Site]:
        where, grid, patch = self.layout, self.layout.patches, self.multiple
        found: list[Site] = []
        blocks: Any = self._network.get_submodule(where.blocks)
        if self.family == "dinov3-convnext":
            found = [Site(f"down.{n}", "block", f"{where.blocks}.{n}") for n in range(len(blocks))]
            return [*found, Site("out", "block", where.out, grid, patch)]
        for n, block in enumerate(blocks):
            name, path = f"block.{n}", f"{where.blocks}.{n}"
            if where.attention is not None:
                for role in ("query", "key", "value"):
                    projection = f"{path}.{where.attention}.{role[0]}_proj"
                    found.append(Site(f"{name}.{role}", "tokens", projection, grid, patch))
            if where.attention is not None and where.self_map:
                found.append(Site(f"{name}.self_map", "map", f"{path}.{where.attention}", grid, patch))
            if where.activation is not None and not hasattr(block.mlp, "gate_proj"):
                found.append(Site(f"{name}.feed_forward", "tokens", f"{path}.{where.activation}", grid, patch))
            found.append(Site(name, "block", path, grid, patch))
        return [*found, Site("out", "block", where.out, None if self.family == "sam" else grid, patch)]

    def _run(self, network: nn.Module, pixels: Tensor) -> Tensor:
        """What the network returns for normalised pixels: tokens, or a map."""
        output = network(pixels, **({"interpolate_pos_encoding": True} if self.layout.interpolate else {}))
        return output if isinstance(output, Tensor) else output.last_hidden_state

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if height % self.multiple or width % self.multiple or not height or not width:
            raise InputError(
                f"{self.name} needs sides that are multiples of its patch of {self.multiple} pixels, not {width}x{height}."
            )
        if self.canvas is not None and max(height, width) > self.canvas:
            raise InputError(
                f"{self.name} takes pictures of at most {self.canvas}x{self.canvas} pixels, not {width}x{height}; "
                f"use size long{self.canvas}."
            )
        rgb = (pixels.to(self.device).float() + 1) / 2
        mean, std = (rgb.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        rgb = ((rgb - mean) / std).to(self.dtype)
        if self.canvas is not None:
            rgb = F.pad(rgb, (0, self.canvas - width, 0, self.canvas - height))
        out = self._run(self._network, rgb).float()
        if out.ndim == 4:
            return out
        cells = height // self.multiple, width // self.multiple
        return out[:, -cells[0] * cells[1] :].mT.unflatten(-1, cells)
