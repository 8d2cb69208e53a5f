"""`load(name)`: from a name, folder, file or hub id to a Denoiser."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from denoscope.denoisers.adm import ADMConfig, ADMDenoiser
from denoscope.denoisers.dit import DiTDenoiser, PixArtDenoiser
from denoscope.denoisers.mmdit import FLUX_T5_LENGTH, SD3_T5_LENGTH, FluxDenoiser, SD3Denoiser
from denoscope.denoisers.protocol import Denoiser
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.denoisers.sdxl import SDXLDenoiser
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
    unet: str | Path | None = None,
) -> Denoiser:
    """Load a diffusion model.

    name: "seedling" (embedded); a local diffusers folder (a pipeline of Stable Diffusion 1.x / 2.x / XL / 3, FLUX.1, DiT,
        PixArt or a pixel-space U-Net, or a bare `UNet2DModel`); an ADM checkpoint file (.pt or .safetensors; another
        architecture than the published unconditional 256x256 one is described in a .json file beside it); or a hub id such as
        "stabilityai/stable-diffusion-2-1".
    unet: a checkpoint that takes the place of the pipeline's U-Net, such as a CleanDIFT one: a .safetensors or .pt file, a
        diffusers folder, or a file on the hub ("CompVis/cleandift/cleandift_sd21_unet.safetensors"). "NAME+UNET" says the same.

    Raises MissingError when there is no such model, InputError when it is of a kind that cannot be read.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    if not str(name).strip():
        raise MissingError("The model has no name; give 'seedling', a folder, a checkpoint file or a hub id.")
    label = str(name) if unet is None else f"{name}+{unet}"
    if unet is None and "+" in str(name) and not Path(name).expanduser().exists():
        name, unet = str(name).rsplit("+", 1)
    path = SEEDLING if name == "seedling" else Path(name).expanduser()
    if path.is_file() and unet is not None:
        raise InputError(f"{name} is a checkpoint itself; another U-Net can only be put into a pipeline.")
    if path.is_dir():
        return _load_folder(str(path), label, place, kind, unet)
    if path.is_file():
        return _load_adm(path, place, kind)
    if path.suffix not in CHECKPOINTS and HUB_ID.fullmatch(str(name)):
        return _load_folder(str(name), label, place, kind, unet)
    raise MissingError(
        f"There is no model {str(name)!r}; give 'seedling', a diffusers folder, an ADM checkpoint file or a hub id."
    )


UNETS = ("UNet2DConditionModel", "UNet2DModel")
TRANSFORMERS = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "Transformer2DModel",  # what older DiT and PixArt pipelines call theirs
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)


@dataclass(frozen=True)
class _Parts:
    """The parts of a diffusers folder or hub repository, loaded one by one when asked for.

    index: its model_index.json, or None for a bare network. parts: library and class of each.
    """

    source: str
    name: str
    device: torch.device
    dtype: torch.dtype
    index: dict[str, Any] | None
    parts: Mapping[str, tuple[str, str]]

    def plain(self, key: str, **options: Any) -> Any:
        if key not in self.parts:
            raise MissingError(f"{self.name} has no {key}, which a pipeline of its kind needs; get the whole pipeline.")
        library, kind = self.parts[key]
        if library not in ("diffusers", "transformers"):
            raise InputError(
                f"{self.name} brings its own class for {key} ({library}); only library classes are loaded."
            )
        factory = getattr(diffusers if library == "diffusers" else transformers, kind, None)
        if factory is None:
            raise InputError(f"{self.name} needs {kind} for {key}, which the installed {library} does not have.")
        folder = {"subfolder": key} if self.index is not None else {}
        return _quietly(self.name, lambda: factory.from_pretrained(self.source, **folder, **options))

    def weights(self, key: str, dtype: torch.dtype | None = None) -> Any:
        option = "torch_dtype" if self.parts.get(key, ("",))[0] == "diffusers" else "dtype"
        return self.plain(key, **{option: dtype or self.dtype}).to(self.device).requires_grad_(False).eval()

    def text(self, number: int = 1, **options: Any) -> TextEncoder:
        suffix = "" if number == 1 else f"_{number}"
        return TextEncoder(self.plain(f"tokenizer{suffix}"), self.weights(f"text_encoder{suffix}"), **options)


def _load_folder(
    source: str, name: str, device: torch.device, dtype: torch.dtype, unet: str | Path | None = None
) -> Denoiser:
    index = _json(source, "model_index.json")
    if index is None:
        config = _json(source, "config.json")
        if config is None:
            raise MissingError(f"{name} holds neither model_index.json nor config.json; it is not a diffusers folder.")
        if "model_type" in config and "_class_name" not in config:
            raise InputError(
                f"{name} is a transformers model ({config['model_type']}), not a diffusion model; encoders are read with "
                "load_encoder, and classifiers with load_classifier."
            )
        parts = {"unet": ("diffusers", config.get("_class_name", "an unknown class"))}
    else:
        parts = {key: (value[0], value[1]) for key, value in index.items() if isinstance(value, list) and value[0]}
    found = _Parts(source, name, device, dtype, index, parts)
    kind = next((parts[key][1] for key in ("unet", "transformer", "prior") if key in parts), "no denoising network")
    if kind not in (*UNETS, *TRANSFORMERS):
        raise InputError(f"{name} is built on {kind}; supported are {', '.join((*UNETS, *TRANSFORMERS))}.")
    if kind in TRANSFORMERS and index is None:
        raise InputError(f"{name} is a transformer alone; load the pipeline folder that it belongs to.")
    if kind in TRANSFORMERS and unet is not None:
        raise InputError(f"{name} has no U-Net that {unet} could take the place of.")
    if index and index.get("requires_aesthetics_score"):
        raise InputError(f"{name} is the SDXL refiner, which only finishes pictures; use the base text-to-image model.")
    scheduler = _json(source, "scheduler_config.json", "scheduler" if index is not None else "")
    if scheduler is None:
        raise MissingError(
            f"{name} has no scheduler_config.json, so its noise levels are unknown; put it beside the model."
        )
    schedule, own = NoiseSchedule.from_config(scheduler), _json(source, "denoscope.json") or {}
    if kind in TRANSFORMERS:
        return _transformer(found, schedule, own.get("presets"))
    network = found.weights("unet") if unet is None else _replaced(found, unet)
    if getattr(network.config, "addition_embed_type", None) == "text_time":
        # in float16 SDXL's autoencoder overflows
        vae = found.weights("vae", torch.float32 if dtype == torch.float16 else dtype)
        zeros = bool((index or {}).get("force_zeros_for_empty_prompt", True))
        texts = (found.text(), found.text(2))
        return SDXLDenoiser(network, schedule, vae=vae, texts=texts, name=name, presets=own.get("presets"), zeros=zeros)
    return UNetDenoiser(
        network,
        schedule,
        vae=found.weights("vae") if "vae" in parts else found.weights("vqvae") if "vqvae" in parts else None,
        text=found.text() if "text_encoder" in parts and "tokenizer" in parts else None,
        name=name,
        presets=own.get("presets"),
        null_class=own.get("null_class"),
    )


def _transformer(found: _Parts, schedule: NoiseSchedule, presets: Any) -> Denoiser:
    network, index = found.weights("transformer"), found.index or {}
    given = {"vae": found.weights("vae"), "name": found.name, "presets": presets}
    match type(network).__name__:
        case "DiTTransformer2DModel":
            labels = (index.get("id2label") or {}).items()
            names = {one.strip(): int(number) for number, text in labels for one in text.split(",")}
            return DiTDenoiser(network, schedule, names=names, **given)
        case "PixArtTransformer2DModel":
            length = 300 if "Sigma" in str(index.get("_class_name")) else 120  # as their pipelines have it
            return PixArtDenoiser(network, schedule, text=found.text(length=length, masked=True), **given)
        case "SD3Transformer2DModel":
            t5 = found.text(3, length=SD3_T5_LENGTH) if "text_encoder_3" in found.parts else None
            return SD3Denoiser(network, schedule, clip=(found.text(), found.text(2)), t5=t5, **given)
        case "FluxTransformer2DModel":
            clip, t5 = found.text(), found.text(2, length=FLUX_T5_LENGTH)
            return FluxDenoiser(network, schedule, clip=clip, t5=t5, **given)
        case other:
            raise InputError(f"{found.name} is built on {other}; supported are {', '.join(TRANSFORMERS)}.")


CLEANDIFT = "unet_feature_extractor_cleandift."  # where the full CleanDIFT checkpoints keep the U-Net


def _replaced(found: _Parts, unet: str | Path) -> Any:
    """The pipeline's U-Net with the weights of another file or folder."""
    path = Path(unet).expanduser()
    if path.is_dir():
        config = _json(str(path), "config.json") or {}
        part = replace(found, source=str(path), name=str(path), index=None)
        if config.get("_class_name") != found.parts["unet"][1]:
            raise InputError(f"{path} is no diffusers folder of a {found.parts['unet'][1]}.")
        return part.weights("unet")
    if (
        not path.is_file()
        and (hub := re.fullmatch(rf"({HUB_ID.pattern})/(.+)", str(unet)))
        and path.suffix in CHECKPOINTS
    ):
        from huggingface_hub import hf_hub_download

        path = Path(_quietly(str(unet), lambda: hf_hub_download(hub[1], hub[2])))
    if not path.is_file():
        raise MissingError(
            f"There is no U-Net checkpoint {str(unet)!r}; give a .safetensors file or a diffusers folder."
        )
    state = _tensors(path)
    state = {k.removeprefix(CLEANDIFT): v for k, v in state.items() if k.startswith(CLEANDIFT)} or state
    config = _json(found.source, "config.json", "unet" if found.index is not None else "")
    if config is None:
        raise MissingError(f"{found.name} has no config.json of its U-Net, so {unet} cannot be put in its place.")
    factory = getattr(diffusers, found.parts["unet"][1])
    with torch.device("meta"):
        network = _quietly(found.name, lambda: factory.from_config(config))
    expected = {key: value.shape for key, value in network.state_dict().items()}
    for key in [*expected, *state]:
        if key not in state or key not in expected or state[key].shape != expected[key]:
            raise InputError(
                f"{unet} does not fit the U-Net of {found.name} (first difference: {key}); a checkpoint of Stable Diffusion "
                "1.5 goes into a pipeline of 1.5, one of 2.1 into one of 2.1."
            )
    network.load_state_dict(state, assign=True)
    return network.to(found.device, found.dtype).requires_grad_(False).eval()


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
