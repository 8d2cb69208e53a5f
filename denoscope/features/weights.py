"""What made a feature: telling one set of weights, or one file, from another, and the versions of the libraries."""

import hashlib
import json
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from denoscope.denoisers.lora import text_encoders
from denoscope.denoisers.protocol import Denoiser

_known: dict[Any, tuple[Any, bytes]] = {}  # digests of tensors, by where their values lie


def weights_digest(model: nn.Module | Denoiser) -> str:
    """16 hexadecimal digits that name weights: "meta" for networks without any.

    Covered are names, shapes, types and every byte of all parameters and stored buffers: of a module, its own; of a denoiser,
    those of its network, its autoencoder and its text encoders as they are now (with the LoRAs of an open `adapters`), and also
    the autoencoder's scale and the noise schedule. Not covered are tokenizers. The same on every device; another in another
    number format.

    A tensor is read once (benchmarks/weights.py: 2.5 s of one core for all of Stable Diffusion 1.5 in float32) and then known
    by its memory, PyTorch's count of changes and three of its values. A change that touches none of these is not noticed: one
    by way of `.data`, NumPy or a fused optimiser that leaves the first, the middle and the last value as they were.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part, module in _modules(model):
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            if tensor.device.type == "meta":
                return "meta"
            digest.update(f"{part} {name} {tensor_digest(tensor)} ".encode())
    if not isinstance(model, nn.Module):
        digest.update(_constants(model))
    for gone in [key for key in _known if key[0].expired()]:
        del _known[gone]
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits that name the shape, the type and every byte of a tensor."""
    told = f"{list(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.blake2b(told + _digest(tensor.detach()), digest_size=8).hexdigest()


def _modules(model: nn.Module | Denoiser) -> list[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        return [("", model)]
    others = {"vae": getattr(model, "vae", None)}
    others |= {f"text{k}": text.encoder for k, text in enumerate(text_encoders(model))}
    return [("", model.network), *((part, one) for part, one in others.items() if isinstance(one, nn.Module))]


def _constants(denoiser: Denoiser) -> bytes:
    """What decides features beside weights."""
    schedule = denoiser.schedule
    vae: Any = getattr(getattr(denoiser, "vae", None), "config", None)
    scale = [] if vae is None else [vae.scaling_factor, vae.shift_factor]
    told = {k: v for k, v in schedule.config.items() if k == "_class_name" or not k.startswith("_")}
    text = json.dumps([scale, schedule.prediction, told], sort_keys=True, default=str)
    return text.encode() + _sum(schedule.signal) + _sum(schedule.noise)


def _digest(tensor: Tensor) -> bytes:
    """Of all values of a tensor; they are read again when they lie elsewhere or have changed."""
    if tensor.is_inference() or not tensor.numel():  # changes are not counted, or there is nothing to read
        return _sum(tensor)
    place = StorageWeakRef(tensor.untyped_storage())  # while it is held, no other storage gets the same name
    key = place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    some = [tensor[tuple((side - 1) * k // 2 for side in tensor.shape)].item() for k in range(3)]
    state = tensor._version, repr(some)
    if key not in _known or _known[key][0] != state:
        _known[key] = state, _sum(tensor)
    return _known[key][1]


def _sum(tensor: Tensor) -> bytes:
    """SHA-256 of the values, row by row."""
    return hashlib.sha256(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data).digest()


def path_digest(path: Path) -> str:
    """16 hexadecimal digits that name the bytes of a file, or the names and bytes of all files of a folder.

    Files are read once, and again when their size or time of change is another. What is not there has a digest too.
    """
    digest = hashlib.blake2b(digest_size=8)
    for one in [path] if path.is_file() else sorted(path.rglob("*")):
        if one.is_file():
            state = one.stat()
            name = "" if one == path else str(one.relative_to(path))
            digest.update(f"{name} {state.st_size} ".encode())
            digest.update(_file(str(one.resolve()), state.st_size, state.st_mtime_ns, state.st_ino))
    return digest.hexdigest()


@lru_cache(maxsize=1 << 16)
def _file(path: str, *changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@cache
def versions() -> dict[str, str]:
    """Of the libraries that decide the numbers; looking them up takes milliseconds."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}
