"""Training configurations: TOML files read into frozen dataclasses, every mistake named."""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from denoscope.errors import InputError, MissingError


@dataclass(frozen=True)
class Source:
    """One set of training images.

    path: parquet file in the Hugging Face image layout, or a folder with one sub-folder of images per label,
        relative to the data folder.
    prompt: the phrase of an image, `{label}` standing for its label; its last word names the kind of thing.
    weight: the share of draws that come from this source, relative to the others.
    labels: label name -> words used in its place.
    mirror: whether the two views of the alignment loss are mirrored independently (a bird facing left has the same parts
        as one facing right; but on a face a left eye must not become a right eye).
    """

    path: str
    prompt: str = "{label}"
    weight: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)
    mirror: bool = True


@dataclass(frozen=True)
class DenoiserConfig:
    """What `denoscope train denoiser` needs; see `denoscope/seedling/recipe.toml` for a commented example.

    size: side of the training crops in pixels.
    scale: smallest and largest share of the image area that a random crop covers.
    channels, attention_levels, layers, head_dim, text_dim, tokens: shape of the U-Net and of its text encoder.
    prediction: "epsilon" or "v_prediction".
    drop: share of examples whose prompt is dropped, so that the empty prompt means "anything".
    warmup, decay: steps of linear warm-up; share of all steps over which the rate falls linearly to zero at the end
        (so a stopped run continues with more steps and loses nothing).
    align: weight of the alignment loss (see `denoiser.alignment`) on the activation `align_site`; 0 trains a plain denoiser.
        It begins after `align_after` steps; from then on examples come as two views of one picture, `align_share` of them
        with strong colour changes, timesteps below `align_t` and `align_points` points to be found again.
    """

    sources: list[Source]
    name: str = "denoiser"
    size: int = 48
    scale: tuple[float, float] = (0.2, 1.0)
    channels: tuple[int, ...] = (32, 64, 128, 256)
    attention_levels: tuple[int, ...] = (2, 3)
    layers: int = 1
    head_dim: int = 32
    text_dim: int = 128
    tokens: int = 12
    prediction: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    drop: float = 0.12
    steps: int = 4000
    batch: int = 64
    lr: float = 4e-4
    weight_decay: float = 0.01
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    align: float = 0.0
    align_site: str = "up.1"
    align_after: int = 0
    align_share: float = 0.75
    align_t: int = 250
    align_points: int = 64
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 200
    sample_every: int = 1000
    sample_prompts: tuple[str, ...] = ("bird", "face", "dog", "cat")


def _fill(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}.")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) and k != "sources" else v for k, v in values.items()})
    except TypeError as error:
        raise InputError(f"{where}: {error}.") from None


def read_denoiser_config(path: str | Path) -> DenoiserConfig:
    """Read a training configuration from a TOML file.

    Raises MissingError when the file is not there, InputError when it is not TOML or holds unknown or bad values.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"There is no training configuration at {path}.")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from None
    sources = [_fill(Source, source, f"{path}, [[sources]]") for source in values.pop("sources", [])]
    if not sources:
        raise InputError(f"{path} names no images; add at least one [[sources]] table with a path.")
    config: DenoiserConfig = _fill(DenoiserConfig, {**values, "sources": sources}, str(path))
    for field_ in fields(DenoiserConfig):
        value = getattr(config, field_.name)
        kind = type(field_.default)
        if field_.name != "sources" and not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{path}: {field_.name} must be like {field_.default!r}, not {value!r}.")
    stride = 2 ** (len(config.channels) - 1) if config.channels else 1
    groups = min(32, min(config.channels, default=0) // 2)
    counts = (config.steps, config.batch, config.tokens - 2, config.head_dim, config.layers, config.align_points)
    checks = {
        f"size must be a multiple of {stride}": config.size % stride == 0 and config.size > 0,
        "channels must be two or more numbers that share the divisor of half the smallest": len(config.channels) > 1
        and groups > 0
        and all(isinstance(c, int) and c > 0 and c % groups == 0 for c in config.channels),
        "attention_levels must name levels of channels": set(config.attention_levels)
        <= set(range(len(config.channels))),
        "text_dim must be a positive multiple of 4": config.text_dim > 0 and config.text_dim % 4 == 0,
        "beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2'": config.beta_schedule
        in ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction must be 'epsilon' or 'v_prediction'": config.prediction in ("epsilon", "v_prediction"),
        "scale must be two shares with 0 < low <= high <= 1": len(config.scale) == 2
        and 0 < config.scale[0] <= config.scale[1] <= 1,
        "drop and decay must lie in [0, 1]": 0 <= config.drop <= 1 and 0 <= config.decay <= 1,
        "batch must be even when align is on": config.align == 0 or config.batch % 2 == 0,
        "steps, batch, head_dim, layers and align_points must be at least 1, tokens at least 3": min(counts) >= 1,
        "every source weight must be positive": all(s.weight > 0 for s in config.sources),
    }
    for sentence, holds in checks.items():
        if not holds:
            raise InputError(f"{path}: {sentence}.")
    return config
