"""Classifiers `p(y | x_t)` that guide samples or judge them: `Classifier`, and the noisy classifier of guided-diffusion.

A noise-aware classifier reads the noisy sample and its timestep ("Diffusion Models Beat GANs on Image Synthesis", Dhariwal and
Nichol, arXiv 2105.05233, section 4); any other reads clean pictures.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.denoisers.adm import Attention, Layer, Norm, Residual, fitted, timestep_embedding
from denoscope.denoisers.loading import _described, _json, _quietly, _tensors, resolve_device, resolve_dtype
from denoscope.errors import InputError, MissingError
from denoscope.images import atomically

ACTIVE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class ADMClassifierConfig:
    """Shape of the network; the defaults are the published 64x64 ImageNet classifier.

    attention_resolutions: strides at which attention layers follow the residual blocks. image_size: side of its pictures in
    pixels, fixed by the positions that the attention pool learned. The other published files: image_size 128, 256 and 512 with
    num_res_blocks 2, channel_mult (1, 1, 2, 3, 4), (1, 1, 2, 2, 4, 4) and (0.5, 1, 1, 2, 2, 4, 4), and attention at the strides
    that leave 32, 16 and 8 pixels.

    Raises InputError when widths, heads and sides do not divide.
    """

    model_channels: int = 128
    in_channels: int = 3
    classes: int = 1000
    num_res_blocks: int = 4
    channel_mult: tuple[int | float, ...] = (1, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (2, 4, 8)
    num_head_channels: int = 64
    image_size: int = 64

    def __post_init__(self) -> None:
        if not self.channel_mult or any(width < 32 or width % 32 for width in self.widths):
            raise InputError(f"Every level must be a multiple of 32 channels wide, not {list(self.widths)}.")
        attending = [w for i, w in enumerate(self.widths) if 2**i in self.attention_resolutions] + [self.widths[-1]]
        if any(width % self.num_head_channels for width in attending):
            raise InputError(f"Heads of {self.num_head_channels} channels do not divide widths of {attending}.")
        if self.image_size < self.stride or self.image_size % self.stride:
            raise InputError(f"image_size must be a multiple of {self.stride}, not {self.image_size}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(int(multiple * self.model_channels) for multiple in self.channel_mult)

    @property
    def stride(self) -> int:
        """Pixels per place of the innermost map."""
        return 2 ** (len(self.channel_mult) - 1)


class AttentionPool(nn.Module):
    """One vector from a map: its mean asks, itself and all places answer.

    With tokens `z = [mean(x), x_1, …, x_n] + p`: `out = W_o concat_h softmax(q_h k_h^T / sqrt(d)) v_h + b_o`, where q is of the
    first token only and q, k, v are cut apart before the heads are (unlike `Attention`).
    """

    def __init__(self, places: int, channels: int, head_channels: int, out: int):
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, places + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out"]:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) + self.positional_embedding
        q, k, v = (part.unflatten(1, (self.heads, -1)).mT for part in self.qkv_proj(tokens).chunk(3, 1))
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # [batch, heads, 1, channels of a head]
        return self.c_proj(pooled.flatten(1)[..., None])[..., 0]


class ADMClassifier(nn.Module):
    """The contracting half of an ADM U-Net and an attention pool, with the state-dict keys of the published files."""

    def __init__(self, config: ADMClassifierConfig):
        super().__init__()
        self.config = config
        c, embedding, heads = config.model_channels, 4 * config.model_channels, config.num_head_channels
        self.time_embed = nn.Sequential(nn.Linear(c, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        channels = config.widths[0]
        self.input_blocks = nn.ModuleList([Layer(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        for level, width in enumerate(config.widths):
            if level > 0:
                self.input_blocks.append(Layer(Residual(channels, channels, embedding, -1)))
            attends = 2**level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                attention = [Attention(width, heads)] if attends else []
                self.input_blocks.append(Layer(Residual(channels, width, embedding), *attention))
                channels = width
        self.middle_block = Layer(
            Residual(channels, channels, embedding), Attention(channels, heads), Residual(channels, channels, embedding)
        )
        pool = AttentionPool((config.image_size // config.stride) ** 2, channels, heads, config.classes)
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), pool)

    def forward(
        self, x: Float[Tensor, "batch channels size size"], t: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits of x at timesteps t; without t the pictures are clean (t = 0)."""
        t = x.new_zeros(len(x), dtype=torch.long) if t is None else t
        embedding = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        for block in self.input_blocks:
            x = block(x, embedding)
        return self.out(self.middle_block(x, embedding))


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network that tells classes apart, as guidance and judges use it.

    module: called as `module(x, t)` when noise_aware and `module(x)` otherwise; returns logits or an object that has them.
    classes: how many. names: of the classes, in order, or empty.
    size: side in pixels of the pictures that the module takes; None takes any.
    mean, std: per channel, of pictures in [0, 1], when the module wants them normalised; without them it is given [-1, 1].
    """

    module: nn.Module
    noise_aware: bool
    classes: int
    names: tuple[str, ...] = ()
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    name: str = "classifier"

    def __post_init__(self) -> None:
        if self.names and len(self.names) != self.classes:
            raise InputError(f"{self.name} has {self.classes} classes but {len(self.names)} names.")
        if (self.mean is None) != (self.std is None):
            raise InputError(f"{self.name} is normalised by mean and std together; give both or neither.")

    @classmethod
    def of(cls, module: nn.Module, classes: int | None = None, **options: Any) -> "Classifier":
        """Wrap a network; it is noise-aware when its forward requires two inputs (or calls the second t or timesteps).

        classes: by default what the module's config or last linear layer says. options: the other fields.
        Raises InputError when the number of classes cannot be seen.
        """
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        inputs = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in positional]
        second = inputs[1] if len(inputs) > 1 else None
        noise_aware = second is not None and (
            second.default is inspect.Parameter.empty or second.name in ("t", "timestep", "timesteps")
        )
        config = getattr(module, "config", None)
        linear = [part.out_features for part in module.modules() if isinstance(part, nn.Linear)]
        seen = getattr(config, "classes", None) or getattr(config, "num_labels", None) or (linear or [None])[-1]
        if (classes := classes or seen) is None:
            raise InputError(f"How many classes {type(module).__name__} has cannot be seen; give classes=.")
        if isinstance(config, ADMClassifierConfig):
            options.setdefault("size", config.image_size)
        return cls(module, **{"noise_aware": noise_aware, **options}, classes=classes)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters(), torch.empty(0)).dtype

    @property
    def channels(self) -> int | None:
        """Of the pictures that the module takes, if its normalisation or its first convolution tells."""
        convolutions = (part.in_channels for part in self.module.modules() if isinstance(part, nn.Conv2d))
        return len(self.mean) if self.mean else next(convolutions, None)

    def logits(
        self, x: Float[Tensor, "batch channels height width"], t: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """log p(y | x) up to a constant, float32, differentiable in x.

        x: pictures in [-1, 1], noisy ones for a noise-aware classifier (of the size it was trained on; others are resized).
        t: original timesteps (0 to 999) of x; None for clean pictures. Classifiers that know no noise ignore it.
        Grey pictures (one channel) are given to colour classifiers as grey colours.
        Raises InputError when dropout or batch normalisation are in training mode, or channels, sizes or classes do not fit.
        """
        if any(part.training and isinstance(part, ACTIVE_IN_TRAINING) for part in self.module.modules()):
            raise InputError(f"{self.name} is in training mode, which makes its answers random; call .eval() first.")
        x = x.to(self.device, self.dtype)
        if x.shape[1] == 1 and self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        if self.channels not in (None, x.shape[1]):
            raise InputError(f"{self.name} takes pictures of {self.channels} channels, not {x.shape[1]}.")
        if self.size and x.shape[2:] != (self.size, self.size):
            if self.noise_aware:
                raise InputError(
                    f"{self.name} takes {self.size}x{self.size} pixels, not {x.shape[3]}x{x.shape[2]}; sample at that size."
                )
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if self.mean and self.std:
            mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
            x = ((x + 1) / 2 - mean) / std
        if self.noise_aware:
            output = self.module(x, (torch.zeros(len(x)) if t is None else t).to(x.device, torch.long))
        else:
            output = self.module(x)
        found = getattr(output, "logits", output)
        if found.shape != (len(x), self.classes):
            raise InputError(f"{self.name} returned {list(found.shape)} where {[len(x), self.classes]} was expected.")
        return found.float()

    def check_labels(self, labels: int | str | Sequence[int | str] | Tensor, batch: int) -> Int[Tensor, " batch"]:
        """Class numbers (or names) as a tensor on the classifier's device, one for all or one for each of the batch.

        Raises InputError when there is no such class or another number of labels.
        """
        values = labels.flatten().tolist() if isinstance(labels, Tensor) else labels
        given = [values] if isinstance(values, int | str) else list(values)
        numbers = [self.names.index(label) if label in self.names else label for label in given]
        for label in numbers:
            if not isinstance(label, int) or not 0 <= label < self.classes:
                more = ", …" if len(self.names) > 12 else ""
                known = f" or one of {', '.join(self.names[:12])}{more}" if self.names else ""
                raise InputError(f"{self.name} has no class {label!r}; choose 0 to {self.classes - 1}{known}.")
        if len(numbers) not in (1, batch):
            raise InputError(f"{len(numbers)} labels were given for {batch} pictures; give one, or one for each.")
        return torch.tensor(numbers, device=self.device).expand(batch)


def load_classifier(
    path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype | None = None
) -> Classifier:
    """Load a classifier.

    path: a noisy classifier of guided-diffusion or of `save_classifier` (.pt or .safetensors; its class names, whether it
        is noise-aware, and another architecture than the published 64x64 one stand in a .json file beside it); or a folder in
        transformers' layout with an image-classification head (ResNet, ViT, …).
    dtype: float32 by default on every device, since guidance takes its gradients.

    Raises MissingError when there is no such file, InputError when it is damaged or something else.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype or torch.float32, place)
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_folder(path, place, kind)
    if not path.is_file():
        raise MissingError(f"There is no classifier {str(path)!r}; give a .pt or .safetensors file or a folder.")
    state = _tensors(path)
    shape = _described(path, [*(field.name for field in fields(ADMClassifierConfig)), "names", "noise_aware"])
    names, noise_aware = shape.pop("names", ()), shape.pop("noise_aware", True)
    config = _from_json(shape, path.with_suffix(".json"))
    state = {key: value.to(kind) for key, value in state.items()}
    module = fitted(ADMClassifier, config, state, f"{path} is not an ADM classifier").to(place)
    return Classifier(module, noise_aware, config.classes, names, config.image_size, name=path.stem)


def _from_json(values: Mapping[str, Any], file: Path) -> ADMClassifierConfig:
    try:
        return ADMClassifierConfig(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (TypeError, ValueError):
        raise InputError(f"{file} does not describe an ADM classifier; its values must be like {values}.") from None


def _load_folder(path: Path, device: torch.device, dtype: torch.dtype) -> Classifier:
    config = _json(str(path), "config.json")
    if config is None:
        raise MissingError(f"{path} holds no config.json; it is not a folder of transformers.")
    if not any("ForImageClassification" in kind for kind in config.get("architectures") or ()):
        raise InputError(f"{path} has no image-classification head ({', '.join(config.get('architectures') or ())}).")
    pictures = _json(str(path), "preprocessor_config.json")
    if pictures is None:
        raise MissingError(f"{path} holds no preprocessor_config.json, so the size and colours it takes are unknown.")
    factory = transformers.AutoModelForImageClassification
    module = _quietly(str(path), lambda: factory.from_pretrained(path, dtype=dtype, trust_remote_code=False))
    size = pictures.get("crop_size" if pictures.get("do_center_crop") else "size") or pictures.get("size")
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise InputError(f"{path}/preprocessor_config.json names no square size ({size}); set size to one number.")
    normalised = pictures.get("do_normalize", True)
    mean, std = (pictures.get(key) if normalised else None for key in ("image_mean", "image_std"))
    names = tuple(name for _, name in sorted(module.config.id2label.items()))
    return Classifier(
        module.to(device).requires_grad_(False).eval(),
        noise_aware=False,
        classes=module.config.num_labels,
        names=names,
        size=side,
        mean=tuple(map(float, mean or (0, 0, 0))),
        std=tuple(map(float, std or (1, 1, 1))),
        name=path.name,
    )


def save_classifier(classifier: Classifier, path: str | Path, dtype: str | torch.dtype = "float32") -> Path:
    """Write an ADM classifier as .safetensors in `dtype`, and beside it a .json that says what it is; never half a file.

    Raises InputError for other networks (save those with their own library) and other suffixes.
    """
    module, path = classifier.module, Path(path)
    if not isinstance(module, ADMClassifier):
        raise InputError(f"{classifier.name} is no ADM classifier; save it with the library it comes from.")
    if path.suffix != ".safetensors":
        raise InputError(f"A classifier is saved as .safetensors, not {path.suffix or 'without a suffix'}.")
    kind = resolve_dtype(dtype, torch.device("cpu"))
    state = {key: value.detach().to("cpu", kind).contiguous() for key, value in module.state_dict().items()}
    about = {**asdict(module.config), "noise_aware": classifier.noise_aware, "names": classifier.names}
    atomically(path.with_suffix(".json"), lambda beside: beside.write_text(json.dumps(about, indent=2) + "\n"))
    return atomically(path, lambda beside: save_file(state, beside))
