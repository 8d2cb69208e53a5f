"""LoRA: low-rank weights added to a model's own while a context is open, and taken away again.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685), section 4.1:
`W = W_0 + scale (alpha / rank) up down`, for linear layers and, as LoCon has it, for convolutions. With a magnitude beside
the pair it is DoRA (Liu et al., ICML 2024, arXiv 2402.09353, equation 5): the sum is brought to norms that were learned.
Other weights (LoHa, LoKr, whole differences) are not read.

The sums stand in the place of the model's weights, and the model's own tensors come back afterwards: nothing is rounded, no
module is wrapped, and every site is where it was.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn

from denoscope.denoisers.loading import CHECKPOINTS, HUB_ID, _json, _quietly, _tensors
from denoscope.denoisers.mmdit import FluxDenoiser
from denoscope.denoisers.protocol import Denoiser
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import DenoscopeError, InputError, MissingError

# of kohya: .lora_down.weight; of peft: .lora_A.weight, .lora_A.NAME.weight; of older diffusers: _lora.down.weight,
# .lora_linear_layer.down.weight
_PAIR = re.compile(r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<part>down|up|A|B)(?:\.\w+)?\.weight")
# of DoRA: peft and diffusers, .lora_magnitude_vector, for each output; LyCORIS (kohya), .dora_scale, of either axis
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.(?P<part>lora_magnitude_vector|dora_scale)(?:\.\w+)?(?:\.weight)?")
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
_TEXT = re.compile(r"(?:text_encoder(?:_(\d))?\.|lora_te(\d)?_)(.+)")
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True, eq=False)
class Pair:
    """What a file adds to one layer: `factor up down`, the factor being alpha / rank.

    magnitude: of DoRA, one number for each slice of the weight along `axis` (0: outputs, 1: inputs).
    """

    layer: nn.Module
    down: Tensor
    up: Tensor
    factor: float
    magnitude: Tensor | None = None
    axis: int = 0

    def delta(self, scale: float = 1.0) -> Tensor:
        """W - W_0, in the shape of the layer's weight, float32 on its device.

        With a magnitude m, `W = m (W_0 + scale factor up down) / |W_0 + scale factor up down|`, as peft has it: the scale is
        that of the pair, and m acts whole.
        """
        weight: Any = self.layer.weight
        up, down = (one.to(weight.device, torch.float32) for one in (self.up, self.down))
        change = (scale * self.factor * (up.flatten(1) @ down.flatten(1))).reshape(weight.shape)
        if self.magnitude is None:
            return change
        own = weight.detach().float()
        slices = (own + change).transpose(0, self.axis)
        norms = slices.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # 0 / 0 of empty slices
        gain = self.magnitude.to(own) / norms
        return (slices * gain.view(-1, *[1] * (own.dim() - 1))).transpose(0, self.axis) - own


_LOADED: WeakKeyDictionary[Any, dict[tuple[str, int, int], list[Pair]]] = WeakKeyDictionary()


@contextmanager
def adapters(denoiser: Denoiser, loras: Sequence[tuple[str | Path, int | float]]) -> Iterator[None]:
    """Inside, the LoRAs of the files act on the denoiser's network and text encoders, each times its scale; several add up
    (DoRA too: the changes that each makes to the model's own weights).

    with adapters(denoiser, [("style.safetensors", 0.8)]):
        condition = denoiser.condition(["a cat"])  # made here, so that it is told by the text encoder's LoRA too
        noise = denoiser.predict(noisy, t, condition)

    Afterwards, also after an exception, the model is bit for bit what it was. Contexts may be nested.

    loras: (file, scale). Files are safetensors (or .pt files of plain tensors) in the layout of diffusers, peft or kohya,
        folders that diffusers or peft wrote, or files on the hub ("owner/name/file.safetensors"). They are read once.

    Raises MissingError for a file that is not there; InputError for one that is damaged, holds anything but pairs of LoRA or
    DoRA for this model (saying how many match nothing), or was made for layers of other shapes (naming both).
    """
    for _, scale in loras:
        if not math.isfinite(scale):
            raise InputError(f"The scale of a LoRA must be a finite number, not {scale}.")
    sums: dict[nn.Module, Tensor] = {}
    for path, scale in loras:
        pairs = load_lora(path, denoiser)
        for pair in pairs if scale else ():
            delta = pair.delta(scale)
            sums[pair.layer] = sums[pair.layer] + delta if pair.layer in sums else delta
    weights: list[tuple[Any, Tensor, Tensor]] = []
    while sums:  # the sums are let go one by one
        layer, delta = sums.popitem()
        own: Any = layer.weight
        weights.append((own, own.data, (own.data.float() + delta).to(own.dtype)))
    changed = {id(own) for own, *_ in weights}
    texts = [one for one in text_encoders(denoiser) if any(id(p) in changed for p in one.encoder.parameters())]
    caches = [text._cache for text in texts]
    try:
        for own, _, merged in weights:
            own.data = merged
        for text in texts:
            text._cache = {}  # what prompts are encoded as is another thing here
        yield
    finally:
        for own, before, _ in weights:
            own.data = before
        for text, cache in zip(texts, caches, strict=True):
            text._cache = cache


def text_encoders(denoiser: Denoiser) -> list[TextEncoder]:
    """In the order of the pipeline's text_encoder, text_encoder_2, text_encoder_3."""
    given: Any = denoiser
    found = [getattr(given, name, None) for name in ("text", "texts", "clip", "t5")]
    flat = [one for part in found for one in (part if isinstance(part, tuple) else (part,))]
    return [one for one in flat if one is not None]


def load_lora(path: str | Path, denoiser: Denoiser) -> list[Pair]:
    """The pairs of a file and the layers they belong to; see `adapters`. Read once for each denoiser, unless it changes."""
    file, folder = _found(path)
    state = file.stat()
    key = (str(file.resolve()), state.st_mtime_ns, state.st_size)
    known = _LOADED.setdefault(denoiser, {})
    if key not in known:
        known[key] = _Layout(denoiser, str(path)).pairs(_tensors(file), _alphas(file, folder))
    return known[key]


def _found(path: str | Path) -> tuple[Path, Path | None]:
    """The file with the weights, and the folder that holds it if that is what was named."""
    place = Path(path).expanduser()
    if place.is_dir():
        for name in _FILES:
            if (place / name).is_file():
                return place / name, place
        raise MissingError(f"{path} holds neither {' nor '.join(_FILES)}; name the file of the LoRA itself.")
    if (
        not place.is_file()
        and place.suffix in CHECKPOINTS
        and (hub := re.fullmatch(rf"({HUB_ID.pattern})/(.+)", str(path)))
    ):
        from huggingface_hub import hf_hub_download

        place = Path(_quietly(str(path), lambda: hf_hub_download(hub[1], hub[2])))
    if not place.is_file():
        raise MissingError(f"There is no LoRA {str(path)!r}; give a .safetensors file.")
    return place, None


@dataclass(frozen=True)
class _Alphas:
    """What a configuration says of alpha: by part of the model ("" for any), a peft LoraConfig."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def factor(self, part: str, module: str, rank: int) -> float:
        config = self.configs.get(part) or self.configs.get("")
        if not config:
            return 1.0
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _alphas(file: Path, folder: Path | None) -> _Alphas:
    """From peft's adapter_config.json, or from what diffusers writes into the file's own header."""
    if folder is not None and (config := _json(str(folder), "adapter_config.json")) is not None:
        return _Alphas({"": config})
    if file.suffix != ".safetensors":
        return _Alphas()

    def header() -> dict[str, Any]:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))

    configs: dict[str, dict[str, Any]] = {}
    for name, value in _quietly(str(file), header).items():
        part, _, setting = name.rpartition(".")
        configs.setdefault(part, {})[setting] = value
    return _Alphas(configs)


class _Layout:
    """Finding the layers of a model by the many names that files have for them."""

    def __init__(self, denoiser: Denoiser, label: str):
        self.denoiser, self.label = denoiser, label
        network: Any = getattr(denoiser, "_network", denoiser.network)
        self.part = "unet" if isinstance(denoiser, UNetDenoiser) else "transformer"
        self.roots: dict[str, nn.Module] = {self.part: network}
        for number, text in enumerate(text_encoders(denoiser), 1):
            self.roots["text_encoder" if number == 1 else f"text_encoder_{number}"] = text.encoder
        self.layers = {part: _by_name(root) for part, root in self.roots.items()}

    def pairs(self, state: Mapping[str, Tensor], alphas: _Alphas) -> list[Pair]:
        found, unknown = self._sorted(state)
        if unknown:
            converted = self._converted(state)
            more = None if converted is None else self._sorted(converted)
            if more is not None and len(more[1]) < len(unknown):
                found, unknown = more
        if unknown or not found:
            first = f" (first: {unknown[0]})" if unknown else ""
            raise InputError(
                f"{len(unknown) or len(state)} of {len(state)} weights of {self.label} match nothing in "
                f"{self.denoiser.name}{first}; only LoRA, LoCon and DoRA pairs that were trained for this base can be used."
            )
        return [self._pair(part, module, given, alphas) for (part, module), given in found.items()]

    def _sorted(self, state: Mapping[str, Tensor]) -> tuple[dict[tuple[str, str], dict[str, Tensor]], list[str]]:
        """Weights by layer, as "down", "up", "alpha" and what `_MAGNITUDE` finds, and the keys that belong to none."""
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        unknown = []
        for key, value in state.items():
            name, what = key.removesuffix(".alpha"), "alpha" if key.endswith(".alpha") else ""
            if pair := _PAIR.fullmatch(name):
                name, what = pair["module"], what or {"A": "down", "B": "up"}.get(pair["part"], pair["part"])
            elif magnitude := _MAGNITUDE.fullmatch(key):
                name, what = magnitude["module"], magnitude["part"]
            place = self._place(name) if what else None
            if place is None:
                unknown.append(key)
            else:
                found.setdefault(place, {})[what] = value
        return found, unknown

    def _place(self, name: str) -> tuple[str, str] | None:
        """(part of the model, dotted path) of a layer, by its name in the file."""
        if text := _TEXT.fullmatch(name):
            number = text[1] or text[2]
            part, name = "text_encoder" if number in (None, "1") else f"text_encoder_{number}", text[3]
        else:
            part = self.part
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
        layers = self.layers.get(part, {})
        name = name.replace(".processor", "")
        tried = [name, f"{name}.0", f"text_model.{name}", name.removeprefix("text_model.").removeprefix("text_model_")]
        tried += [re.sub(r"to_([qkv]|out)$", r"\1_proj", one) for one in tried]
        return next(((part, layers[one]) for one in tried if one in layers), None)

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """In the layout of diffusers, by its own converters: the original block numbers of SDXL, joined projections of Flux."""
        from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

        end = ".lora_down.weight"
        denoiser = self.denoiser
        # the converters drop these, and those of joined projections cannot be split
        norms = {found["module"]: value for key, value in state.items() if (found := _MAGNITUDE.fullmatch(key))}
        if not isinstance(denoiser, UNetDenoiser) and (norms or not isinstance(denoiser, FluxDenoiser)):
            return None
        plain = {key: value for key, value in state.items() if not _MAGNITUDE.fullmatch(key)}

        def convert(given: Mapping[str, Tensor]) -> Any:
            if isinstance(denoiser, UNetDenoiser):
                return StableDiffusionLoraLoaderMixin.lora_state_dict(dict(given), unet_config=denoiser.unet.config)
            return FluxLoraLoaderMixin.lora_state_dict(dict(given), return_alphas=True)

        try:
            made, alphas = _quietly(self.label, lambda: convert(plain))
            # U-Nets' weights only get other names: a magnitude in the place of its pair's lower half gets the right one
            there = {key: norms[key.removesuffix(end)] for key in plain if key.removesuffix(end) in norms}
            renamed = _quietly(self.label, lambda: convert(plain | there))[0] if there else {}
        except DenoscopeError:  # keys that the converter does not know either
            return None
        if len(there) < len(norms):
            return None
        moved = {id(value) for value in there.values()}
        magnitudes = {_PAIR.sub(r"\g<module>.dora_scale", key): v for key, v in renamed.items() if id(v) in moved}
        return {**made, **{key: torch.as_tensor(value) for key, value in (alphas or {}).items()}, **magnitudes}

    def _pair(self, part: str, module: str, given: Mapping[str, Tensor], alphas: _Alphas) -> Pair:
        layer: Any = self.roots[part].get_submodule(module)
        if "down" not in given or "up" not in given:
            raise InputError(
                f"{self.label} is incomplete: {part}.{module} has {' and '.join(sorted(given))} only; fetch it again."
            )
        down, up, shape = given["down"], given["up"], list(layer.weight.shape)
        rank = down.shape[0]
        made = [up.shape[0], *down.shape[1:]]
        fits = up[0].numel() == rank and made[0] == shape[0] and math.prod(made) == math.prod(shape)
        if not fits:
            raise InputError(
                f"{self.label} was made for another base than {self.denoiser.name}: {part}.{module} has the shape {made} "
                f"there (rank {rank}) and {shape} here; use a LoRA trained for this model."
            )
        magnitude, axis = self._magnitude(f"{part}.{module}", given, shape)
        if not all(one.isfinite().all() for one in (down, up, magnitude) if one is not None):
            raise InputError(f"{self.label} holds values that are not finite, in {part}.{module}; it cannot be used.")
        alpha = given.get("alpha")
        factor = alphas.factor(part, module, rank) if alpha is None else float(alpha) / rank
        return Pair(layer, down, up, factor, magnitude, axis)

    def _magnitude(self, place: str, given: Mapping[str, Tensor], shape: list[int]) -> tuple[Tensor | None, int]:
        """DoRA's norms of a layer, flat, and the axis of the weight that they go along."""
        peft, kohya = given.get("lora_magnitude_vector"), given.get("dora_scale")
        found = peft if kohya is None else kohya
        if found is None:
            return None, 0
        outputs, inputs = shape[:2]
        # LyCORIS writes [out, 1, …] or, the older way, [1, in, …]; peft [out], of convolutions [1, out, 1, 1]
        along_inputs = kohya is not None and found.dim() > 1 and found.shape[0] == 1 and found.numel() == inputs
        if found.numel() != (inputs if along_inputs else outputs):
            raise InputError(
                f"{self.label} was made for another base than {self.denoiser.name}: {place} has {found.numel()} magnitudes "
                f"there, and a weight of the shape {shape} here; use a LoRA trained for this model."
            )
        return found.flatten(), int(along_inputs)


def _by_name(root: nn.Module) -> dict[str, str]:
    """The dotted paths of linear and convolution layers, by these paths and by what kohya makes of them."""
    layers = [name for name, one in root.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    return {name.replace(".", "_"): name for name in layers} | {name: name for name in layers}
