"""`load(name)`: from a name, folder, file or hub id to a Denoiser."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from denoscope.denoisers.adm import ADMConfig, ADMDenoiser
from denoscope.denoisers.protocol import Denoiser
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import DenoscopeError, InputError, MissingError

SEEDLING = Path(__file__).parent.parent / "seedling" / "model"
CHECKPOINTS = {".safetensors", ".pt", ".pth"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU. Raises InputError when the device asked for is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from None
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """By default bfloat16 on CUDA and float32 elsewhere. Raises InputError for what is not a floating type of torch."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"{dtype!r} is not a floating-point type; use float32, bfloat16 or float16.")
    return found


def load(
    name: str | Path = "seedling",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> Denoiser:
    """Load a diffusion model.

    name: "seedling" (embedded); a local diffusers folder (a Stable Diffusion 1.x / 2.x pipeline, a pixel-space pipeline, or a
        bare `UNet2DModel`); an ADM checkpoint file (.pt or .safetensors; another architecture than the published unconditional
        256x256 one is described in a .json file beside it); or a hub id such as "stabilityai/stable-diffusion-2-1".

    Raises MissingError when there is no such model, InputError when it is of a kind that cannot be read.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    if not str(name).strip():
        raise MissingError("The model has no name; give 'seedling', a folder, a checkpoint file or a hub id.")
    path = SEEDLING if name == "seedling" else Path(name).expanduser()
    if path.is_dir():
        return _load_folder(str(path), str(name), place, kind)
    if path.is_file():
        return _load_adm(path, place, kind)
    if path.suffix not in CHECKPOINTS and HUB_ID.fullmatch(str(name)):
        return _load_folder(str(name), str(name), place, kind)
    raise MissingError(
        f"There is no model {str(name)!r}; give 'seedling', a diffusers folder, an ADM checkpoint file or a hub id."
    )


def _load_folder(source: str, name: str, device: torch.device, dtype: torch.dtype) -> UNetDenoiser:
    index = _json(source, "model_index.json")
    if index is None:
        config = _json(source, "config.json")
        if config is None:
            raise MissingError(f"{name} holds neither model_index.json nor config.json; it is not a diffusers folder.")
        parts = {"unet": ("diffusers", config.get("_class_name", "an unknown class"))}
    else:
        parts = {key: tuple(value) for key, value in index.items() if isinstance(value, list) and value[0]}
    network = parts.get("unet", ("", next((parts[k][1] for k in ("transformer", "prior") if k in parts), "no U-Net")))[
        1
    ]
    if network not in ("UNet2DConditionModel", "UNet2DModel"):
        raise InputError(f"{name} is built on {network}; supported are UNet2DConditionModel and UNet2DModel.")
    if "text_encoder_2" in parts:
        raise InputError(f"{name} has two text encoders (SDXL); supported are Stable Diffusion 1.x and 2.x.")

    def part(key: str, **options: Any) -> Any:
        library, kind = parts[key]
        if library not in ("diffusers", "transformers"):
            raise InputError(f"{name} brings its own class for {key} ({library}); only library classes are loaded.")
        factory = getattr(diffusers if library == "diffusers" else transformers, kind)
        folder = {"subfolder": key} if index is not None else {}
        return _quietly(name, lambda: factory.from_pretrained(source, **folder, **options))

    def weights(key: str) -> Any:
        option = "torch_dtype" if parts[key][0] == "diffusers" else "dtype"
        return part(key, **{option: dtype}).to(device).requires_grad_(False).eval()

    scheduler = _json(source, "scheduler_config.json", "scheduler" if index is not None else "")
    if scheduler is None:
        raise MissingError(
            f"{name} has no scheduler_config.json, so its noise levels are unknown; put it beside the model."
        )
    own = _json(source, "denoscope.json") or {}
    has_text = "text_encoder" in parts and "tokenizer" in parts
    return UNetDenoiser(
        weights("unet"),
        NoiseSchedule.from_config(scheduler),
        vae=weights("vae") if "vae" in parts else weights("vqvae") if "vqvae" in parts else None,
        text=TextEncoder(part("tokenizer"), weights("text_encoder")) if has_text else None,
        name=name,
        presets=own.get("presets"),
        null_class=own.get("null_class"),
    )


def _json(source: str, file: str, subfolder: str = "") -> dict[str, Any] | None:
    """A JSON file of a local folder or hub repository; None when the repository does not have it."""
    path = Path(source) / subfolder / file
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def download() -> str | None:
            try:
                return hf_hub_download(source, file, subfolder=subfolder or None)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None

        found = _quietly(source, download)
        if found is None:
            return None
        path = Path(found)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None


def _quietly(name: str, action: Callable[[], Any]) -> Any:
    """Run a loader of another library: no progress bars, and its errors in one sentence of ours."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    try:
        return action()
    except DenoscopeError:
        raise
    except SafetensorError as error:
        raise InputError(f"The weights of {name} are damaged ({error}); fetch them again.") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if reason.startswith("Unable to load weights"):
            raise InputError(f"The weights of {name} are damaged; fetch them again.") from error
        if isinstance(error, OSError) or "huggingface_hub" in type(error).__module__:
            raise MissingError(f"{name} could not be loaded: {reason}") from error
        raise InputError(f"{name} could not be loaded: {reason}") from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint file; a pickle may hold nothing but tensors."""
    if path.suffix not in CHECKPOINTS:
        raise InputError(f"{path} is not a checkpoint; supported files are {', '.join(sorted(CHECKPOINTS))}.")
    if path.suffix == ".safetensors":
        state = _quietly(str(path), lambda: load_file(path))
    else:
        try:
            state = _quietly(str(path), lambda: torch.load(path, map_location="cpu", weights_only=True))
        except InputError:
            state = None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is not a checkpoint of plain tensors; it is not opened, since a pickle can run code.")
    return state


def _described(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """What the .json beside a checkpoint says of it; lists become tuples."""
    given = _json(str(path.parent), path.with_suffix(".json").name) or {}
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"{path.with_suffix('.json')}: unknown key {unknown[0]!r}; known are {', '.join(known)}.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _load_adm(path: Path, device: torch.device, dtype: torch.dtype) -> ADMDenoiser:
    state = _tensors(path)
    config = ADMConfig(**_described(path, ADMConfig.__dataclass_fields__))
    denoiser = ADMDenoiser.from_state_dict({k: v.to(dtype) for k, v in state.items()}, config, path.stem)
    denoiser.unet.to(device)
    return denoiser
