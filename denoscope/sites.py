"""`Site` and `Watch`: named places in a network, and reading the activations there.

Forward hooks on unmodified modules do the reading, so attention kernels, compiled blocks and offloading keep working;
attention maps are recomputed from the recorded queries and keys. Names, in the order of the forward pass of a U-Net:

    down.L, mid, up.L              output of a resolution level, after its down- or upsampler
    up.L.resnet.J                  output of a residual block; .increment is its branch before the skip is added
    up.L.attn.J                    output of a transformer (or plain attention) layer, its own skip included
    up.L.attn.J.block.K            output of one of its transformer blocks; where there is only one, "block.0" is left out below
    ….query .key .value .self_map  self-attention: tokens as maps, and softmax maps [heads, tokens, tokens]
    ….cross_query .cross_map       cross-attention over the prompt's tokens: [heads, tokens, prompt tokens]
    ….feed_forward                 inner activation of the feed-forward layer
    out.N, in.N                    single layers of families that are numbered by layer (ADM)

Transformers (DiT, PixArt, SD3, Flux) have no levels; a site is always about the tokens of the image, as a map of patches:

    block.N                        output of transformer block N (the input of block N + 1); Flux: its double blocks, then its
                                   single blocks, numbered on
    block.N.query .key .value      attention, as projected (before their norm and rotation)
    block.N.self_map               softmax maps [heads, tokens, tokens]
    block.N.cross_query .cross_map PixArt: cross-attention over the prompt. SD3 and Flux attend to image and prompt in one
                                   softmax: self_map and cross_map are its two parts, and their rows add up to 1 together
    block.N.feed_forward           inner activation of the feed-forward layer
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float
from torch import Tensor, nn

from denoscope.errors import InputError


@dataclass(frozen=True)
class Site:
    """A place where an activation can be read.

    kind: "block", "resnet", "increment", "attention", "tokens" (reshaped to maps) or "map" (attention maps).
    channels: of the map (heads, for attention maps). stride: picture pixels per cell.
    module: dotted path of the module whose output is read. grid: module whose input has the spatial size of tokens, times
    `patch` ("" is the network itself); where the sequence holds other tokens too, the image's are the last.
    """

    name: str
    kind: str
    module: str
    grid: str | None = None
    patch: int = 1
    channels: int = 0
    stride: float = 0.0


@runtime_checkable
class Readable(Protocol):
    """Anything whose activations can be watched: a Denoiser or an Encoder."""

    @property
    def network(self) -> nn.Module: ...

    def sites(self, sizes: bool = True) -> list[Site]: ...


class _Enough(Exception):
    """Everything asked for has been seen."""


class Watch(AbstractContextManager):
    """Record sites during the forward passes made inside the context.

    with Watch(denoiser, ["up.1"]) as seen:
        denoiser.predict(noisy, t, condition)  # stops as soon as up.1 is known; the rest of the block is skipped
    seen["up.1"]  # [batch, channels, height, width]

    With `stop=False` forward passes run to their end and the latest activations are kept. On leaving, every hook is removed,
    also after an exception: the network is exactly as it was found.

    Raises InputError for unknown names (listing the valid ones) and, on leaving, when a site was never reached.
    """

    def __init__(self, model: Readable, names: Iterable[str], stop: bool = True):
        self.names = list(dict.fromkeys(names))
        known = {site.name: site for site in model.sites(sizes=False)}
        for name in self.names:
            if name not in known:
                raise InputError(f"This model has no site {name!r}; it has {_shortlist(known)}.")
        if not self.names:
            raise InputError("Name at least one site to watch.")
        self.sites = [known[name] for name in self.names]
        self.network, self.stop = model.network, stop
        self.seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __getitem__(self, name: str) -> Float[Tensor, "batch channels *cells"]:
        return self.seen[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.seen)

    def take(self) -> dict[str, Tensor]:
        """What has been seen since the last call, forgetting it (for loops over sampler steps)."""
        taken, self.seen = self.seen, {}
        return taken

    def __enter__(self) -> "Watch":
        try:
            for site in self.sites:
                read = (
                    self._read_map if site.kind == "map" else self._read_tokens if site.grid is not None else self._read
                )
                read(site)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._remove()
        if kind is None and (missing := [name for name in self.names if name not in self.seen]) and self.stop:
            raise InputError(f"The forward pass never reached {missing[0]!r}.")
        return kind is _Enough

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see(self, name: str, value: Tensor) -> None:
        self.seen[name] = value
        if self.stop and len(self.seen) == len(self.names):
            raise _Enough

    # Readers are methods and lambdas, not inner functions: these are made once, and a network has many sites.
    def _hook(self, path: str, reader: Callable[[Any], None]) -> None:
        module = self.network.get_submodule(path)
        self._handles.append(module.register_forward_hook(lambda module, args, output: reader(output)))

    def _before(self, path: str, reader: Callable[[tuple, dict[str, Any]], None]) -> None:
        module = self.network.get_submodule(path)
        hook = module.register_forward_pre_hook(lambda module, args, kwargs: reader(args, kwargs), with_kwargs=True)
        self._handles.append(hook)

    def _grid(self, site: Site) -> list[int]:
        """[rows, columns] of the image's tokens, filled in during the forward pass."""
        size: list[int] = []
        assert site.grid is not None
        self._before(site.grid, lambda args, kwargs: _fill(size, args, kwargs, site.patch))
        return size

    def _read(self, site: Site) -> None:
        self._hook(site.module, lambda output: self._see(site.name, _tensor(output)))

    def _read_tokens(self, site: Site) -> None:
        size = self._grid(site)
        self._hook(site.module, lambda output: self._see(site.name, _by_place(output, size)))

    def _read_map(self, site: Site) -> None:
        found = _Softmax(self.network.get_submodule(site.module), site, [] if site.grid is None else self._grid(site))
        self._before(site.module, lambda args, kwargs: found.given.update(kwargs))
        for name, layer in found.layers.items():
            self._hook(f"{site.module}.{layer}", partial(self._part_of_map, found, name))

    def _part_of_map(self, found: "_Softmax", name: str, output: Any) -> None:
        found.take(name, _tensor(output))
        if len(found.parts) == len(found.layers):
            self._see(found.site.name, found.weights())


class _Softmax:
    """softmax(q k^T / sqrt(d)) in float32, from the outputs of the query and key projections of an attention layer."""

    def __init__(self, attention: Any, site: Site, size: list[int]):
        self.attention, self.site, self.size = attention, site, size
        names = ("to_q", "to_k") if hasattr(attention, "to_q") else ("q_proj", "k_proj")  # diffusers, transformers
        self.layers = dict(zip(("q", "k"), names, strict=True))
        self.heads = next(getattr(attention, key) for key in _HEADS if hasattr(attention, key))
        if site.grid is not None and getattr(attention, "add_q_proj", None) is not None:
            self.layers |= {"prompt q": "add_q_proj", "prompt k": "add_k_proj"}
        self.given: dict[str, Any] = {}  # what the layer was called with
        self.parts: dict[str, Tensor] = {}

    def take(self, name: str, output: Tensor) -> None:
        norm = getattr(self.attention, f"norm_{'added_' if ' ' in name else ''}{name[-1]}", None)
        value = output.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        self.parts[name] = value if norm is None else norm(value)

    def _joined(self, name: str) -> Tensor:
        """Queries or keys of prompt and image in one sequence, if they are apart, rotated."""
        names = [f"prompt {name}", name] if len(self.layers) == 4 else [name]
        value = torch.cat([self.parts.pop(one) for one in names], 2)
        rotation = self.given.get("image_rotary_emb")
        rotated: Any = value if rotation is None else apply_rotary_emb(value, rotation)
        return rotated.float()

    def weights(self) -> Tensor:
        q, k = self._joined("q"), self._joined("k")
        if self.site.grid is None:
            bias = self.given.get("attention_mask")  # [batch, 1, keys]: prompt tokens that are padding
            return (q @ k.mT * self.attention.scale + (0 if bias is None else bias[:, None])).softmax(-1)
        image = self.size[0] * self.size[1]
        attended = (q[:, :, -image:] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return attended[..., :-image] if self.site.name.endswith("cross_map") else attended[..., -image:]


def _fill(size: list[int], args: tuple, kwargs: dict[str, Any], patch: int) -> None:
    value = _tensor(args[0] if args else kwargs["hidden_states"])
    size[:] = (side // patch for side in value.shape[-2:])


def _by_place(output: Any, size: list[int]) -> Tensor:
    """Tokens as a map of `size`; other tokens come before the image's."""
    tokens = output[-1] if isinstance(output, tuple) else _tensor(output)  # joint blocks: (prompt, image)
    tokens = tokens.flatten(1, -2)  # SAM keeps them in rows and columns
    return tokens[:, -size[0] * size[1] :].mT.unflatten(-1, size)


_HEADS = ("heads", "num_attention_heads", "num_heads")  # diffusers, and two spellings of transformers


def _tensor(output: Any) -> Tensor:
    """The activation itself, out of the tuples and output records of diffusers modules."""
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.sample


def _shortlist(known: Iterable[str]) -> str:
    names = list(known)
    coarse = [name for name in names if name.count(".") <= 1]
    more = f" and {len(names) - len(coarse)} finer ones (denoscope models NAME --sites)" if coarse != names else ""
    return ", ".join(coarse or names[:20]) + more


def unet_sites(network: nn.Module) -> list[Site]:
    """Sites of any U-Net built from diffusers blocks (`down_blocks`, `mid_block`, `up_blocks`), without sizes."""
    sites: list[Site] = []

    def attention(name: str, path: str, grid: str, cross: bool = False) -> None:
        prefix = "cross_" if cross else ""
        for role, projection in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            if not cross or role == "query":  # keys and values of the prompt have no place in the image
                sites.append(Site(f"{name}.{prefix}{role}", "tokens", f"{path}.{projection}", grid))
        sites.append(Site(f"{name}.{'cross' if cross else 'self'}_map", "map", path))

    def level(name: str, path: str) -> None:
        block: Any = network.get_submodule(path)
        resnets = getattr(block, "resnets", None) or []
        for j in range(max(len(resnets), len(getattr(block, "attentions", None) or []))):
            if j < len(resnets):
                sites.append(Site(f"{name}.resnet.{j}.increment", "increment", f"{path}.resnets.{j}.conv2"))
                sites.append(Site(f"{name}.resnet.{j}", "resnet", f"{path}.resnets.{j}"))
            layer = (getattr(block, "attentions", None) or [])[j : j + 1]
            if layer and layer[0] is not None:
                transformer(f"{name}.attn.{j}", f"{path}.attentions.{j}", layer[0])
        sites.append(Site(name, "block", path))

    def transformer(name: str, path: str, layer: Any) -> None:
        blocks: Any = getattr(layer, "transformer_blocks", ())
        if not len(blocks):  # UNet2DModel: a plain attention layer on the map
            attention(name, path, path)
        for k, block in enumerate(blocks):
            one, inner = (name if len(blocks) == 1 else f"{name}.block.{k}"), f"{path}.transformer_blocks.{k}"
            attention(one, f"{inner}.attn1", path)
            if block.attn2 is not None:
                attention(one, f"{inner}.attn2", path, cross=True)
            sites.append(Site(f"{one}.feed_forward", "tokens", f"{inner}.ff.net.0", path))
            sites.append(Site(f"{name}.block.{k}", "tokens", inner, path))
        sites.append(Site(name, "attention", path))

    for i in range(len(network.down_blocks)):  # pyright: ignore[reportArgumentType]
        level(f"down.{i}", f"down_blocks.{i}")
    if getattr(network, "mid_block", None) is not None:
        level("mid", "mid_block")
    for i in range(len(network.up_blocks)):  # pyright: ignore[reportArgumentType]
        level(f"up.{i}", f"up_blocks.{i}")
    return sites


def transformer_sites(network: nn.Module, lists: Iterable[str], grid: str, patch: int) -> list[Site]:
    """Sites of a network of transformer blocks in the module lists named, without sizes; see `Site` for grid and patch."""
    sites: list[Site] = []
    paths = [f"{path}.{i}" for path in lists for i in range(len(network.get_submodule(path)))]  # pyright: ignore[reportArgumentType]
    for n, path in enumerate(paths):
        name, block = f"block.{n}", network.get_submodule(path)
        joint = not hasattr(block, "attn1")  # image and prompt in one sequence
        own = f"{path}.attn" if joint else f"{path}.attn1"
        for role, projection in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            sites.append(Site(f"{name}.{role}", "tokens", f"{own}.{projection}", grid, patch))
        sites.append(Site(f"{name}.self_map", "map", own, grid if joint else None, patch))
        if joint:
            sites.append(Site(f"{name}.cross_map", "map", own, grid, patch))
        elif getattr(block, "attn2", None) is not None:
            sites.append(Site(f"{name}.cross_query", "tokens", f"{path}.attn2.to_q", grid, patch))
            sites.append(Site(f"{name}.cross_map", "map", f"{path}.attn2"))
        inner = f"{path}.ff.net.0" if hasattr(block, "ff") else f"{path}.act_mlp"
        sites.append(Site(f"{name}.feed_forward", "tokens", inner, grid, patch))
        sites.append(Site(name, "block", path, grid, patch))
    return sites


@dataclass(frozen=True)
class Skeleton:
    """A network without weights (on the meta device) and its sites, enough to be watched."""

    network: nn.Module
    found: list[Site]

    def sites(self, sizes: bool = True) -> list[Site]:
        return self.found

    def measured(self, forward: Callable[[nn.Module], Any], width: int) -> list[Site]:
        """The sites with channels and strides filled in; `forward` runs the network on a picture `width` pixels wide."""
        with Watch(self, [site.name for site in self.found], stop=False) as watch, torch.no_grad():
            forward(self.network)

        def fill(site: Site) -> Site:
            shape = watch[site.name].shape
            cells = shape[-1] if site.kind != "map" else round(shape[2] ** 0.5)
            return replace(site, channels=shape[1], stride=width / cells)

        return [fill(site) for site in self.found]
