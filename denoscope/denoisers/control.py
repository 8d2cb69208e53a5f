"""ControlNets: loading them for a model, and what they are shown.

Zhang, Rao and Agrawala, ICCV 2023 (arXiv 2302.05543). How they act inside a forward pass is in residuals.py.

    network = load_control("lllyasviel/sd-controlnet-canny", denoiser)
    edges = canny(np.array(picture.image()))
    shown = control_input(denoiser, network, read(edges), picture.size)
    condition = replace(denoiser.condition(["a cat"]), controls=(shown,))
"""

import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import cv2
import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import UInt8
from torch import Tensor, nn

from denoscope.denoisers import autoencoder
from denoscope.denoisers.loading import HUB_ID, _json, _quietly
from denoscope.denoisers.mmdit import FluxDenoiser, SD3Denoiser
from denoscope.denoisers.protocol import ControlInput, Denoiser
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, read

__all__ = ["ControlInput", "canny", "control_input", "load_control"]

_LOADED: WeakKeyDictionary[Any, dict[str, nn.Module]] = WeakKeyDictionary()


def canny(
    picture: UInt8[np.ndarray, "height width 3"], low: int | float = 100, high: int | float = 200
) -> UInt8[np.ndarray, "height width 3"]:
    """Edges (Canny, PAMI 1986; OpenCV's, on RGB): 255 on them and 0 elsewhere, three channels alike.

    low, high: gradients, of 8-bit values, below which nothing is an edge and above which everything is. Warns when there is no
    edge at all: such a picture tells a ControlNet nothing.

    Raises InputError for thresholds that are not ordered.
    """
    if not 0 <= low <= high < float("inf"):
        raise InputError(
            f"The thresholds of the edges are {low} and {high}; the low one must not be above the high one."
        )
    edges = cv2.Canny(np.ascontiguousarray(picture), low, high)
    if not edges.any():
        warnings.warn(
            f"The picture has no edges at the thresholds {low} and {high}; a ControlNet learns nothing from it.",
            stacklevel=2,
        )
    return np.repeat(edges[..., None], 3, 2)


def load_control(model: str | Path | nn.Module, denoiser: Denoiser) -> nn.Module:
    """The ControlNet of a folder or hub id (loaded once for each denoiser), or a loaded one, checked to fit the denoiser.

    Moved to the denoiser's device and dtype; a loaded one too.

    Raises MissingError when it is not there, InputError when it is none, or was made for another base: both shapes are named.
    """
    kind = _kind(denoiser)
    if isinstance(model, nn.Module):
        found, label = model, type(model).__name__
    else:
        known = _LOADED.setdefault(denoiser, {})
        label = str(model)
        if label not in known:
            known[label] = _loaded(label, kind, denoiser)
        found = known[label]
    if type(found).__name__ != kind:
        raise InputError(f"{label} is a {type(found).__name__}; {denoiser.name} takes a {kind}.")
    _check(found, label, denoiser)
    if isinstance(denoiser, SD3Denoiser) and getattr(found, "pos_embed", None) is None:
        # the large ones of SD3.5 have none of their own; their pipeline lends them the model's
        borrowed: Any = found
        borrowed.pos_embed = borrowed._get_pos_embed_from_transformer(denoiser.network)
    if (own := next(found.parameters())).device != denoiser.device or own.dtype != denoiser.dtype:
        found = found.to(denoiser.device, denoiser.dtype)
    return found.requires_grad_(False).eval()


def control_input(
    denoiser: Denoiser,
    network: nn.Module,
    image: Picture | Tensor,
    width_height: tuple[int, int],
    scale: int | float = 1.0,
) -> ControlInput:
    """What a ControlNet is shown while the denoiser looks at a picture of (width, height) pixels; one row.

    image: [3, H, W] in [0, 1], resized if it has another size. Stable Diffusion's ControlNets embed pixels, as many as their
    embedding shrinks to the size of the latents; that needs neither latents nor timestep and is done here once, where the
    pipelines repeat it in every pass. Those of SD3 and Flux take latents, also made here: the mode of the autoencoder's
    posterior, of which the pipelines draw a sample.
    """
    if not float("-inf") < scale < float("inf"):
        raise InputError(f"The scale of a ControlNet must be a finite number, not {scale}.")
    picture = read(image)
    config: Any = network.config
    width, height = width_height
    if isinstance(denoiser, UNetDenoiser):
        ratio = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        pixels = _at(picture, (max(1, width // denoiser.stride) * ratio, max(1, height // denoiser.stride) * ratio))
        shown = pixels[None]
        if config.controlnet_conditioning_channel_order == "rgb":  # else the network turns channels around first
            embed: Any = network.controlnet_cond_embedding
            with torch.no_grad():
                shown = embed(shown.to(embed.conv_in.weight))
    else:
        shown = _at(picture, width_height)[None] * 2 - 1
        if getattr(network, "input_hint_block", None) is None:
            vae: Any = denoiser.vae  # pyright: ignore[reportAttributeAccessIssue]
            shown = autoencoder.posterior(vae, shown).mean
            if config.get(
                "force_zeros_for_pooled_projection"
            ):  # those of InstantX for SD3 were trained without the shift
                shown = shown + (vae.config.shift_factor or 0.0) * vae.config.scaling_factor
    return ControlInput(network, shown.to(denoiser.device), torch.tensor([float(scale)]))


def _at(picture: Picture, size: tuple[int, int]) -> Tensor:
    """Pixels in [0, 1] at (width, height)."""
    return picture.pixels if picture.size == size else picture.resized(size) / 2 + 0.5


def _kind(denoiser: Denoiser) -> str:
    """The class of the ControlNets that a denoiser takes."""
    if isinstance(denoiser, UNetDenoiser) and isinstance(denoiser.unet, UNet2DConditionModel):
        return "ControlNetModel"
    if isinstance(denoiser, SD3Denoiser):
        return "SD3ControlNetModel"
    if isinstance(denoiser, FluxDenoiser):
        return "FluxControlNetModel"
    raise InputError(
        f"There are no ControlNets for {denoiser.name}; use a model of Stable Diffusion, SDXL, SD3 or Flux, or a U-Net "
        "that is told by prompts."
    )


def _loaded(label: str, kind: str, denoiser: Denoiser) -> nn.Module:
    path = Path(label).expanduser()
    if path.is_file():
        raise InputError(
            f"{label} is a file; a ControlNet is read from a diffusers folder with its config.json, or from the hub."
        )
    if not path.is_dir() and not HUB_ID.fullmatch(label):
        raise MissingError(f"There is no ControlNet {label!r}; give a diffusers folder or a hub id.")
    source = str(path) if path.is_dir() else label
    config = _json(source, "config.json")
    if config is None:
        raise MissingError(f"{label} holds no config.json; give the folder of the ControlNet itself.")
    name = config.get("_class_name")
    if name != kind:
        raise InputError(f"{label} is a {name}; {denoiser.name} takes a {kind}.")
    factory = getattr(diffusers, kind)
    network, report = _quietly(
        label, lambda: factory.from_pretrained(source, torch_dtype=denoiser.dtype, output_loading_info=True)
    )
    if missing := report["missing_keys"]:
        raise InputError(
            f"The weights of {label} are incomplete: {len(missing)} are missing ({missing[0]}); fetch them again."
        )
    return network


def _check(network: Any, label: str, denoiser: Any) -> None:
    """InputError unless the ControlNet's residuals fit the denoiser's network."""
    config = network.config
    if isinstance(denoiser, UNetDenoiser):
        own = {
            "residual channels": [layer.out_channels for layer in network.controlnet_down_blocks],
            "input channels": config.in_channels,
            "prompt width": config.cross_attention_dim,
        }
        unet: Any = denoiser.unet
        base = {
            "residual channels": _skips(unet),
            "input channels": unet.config.in_channels,
            "prompt width": unet.config.cross_attention_dim,
        }
        optional = ("projection_class_embeddings_input_dim", "num_class_embeds")
        own |= {name: config[name] for name in optional if config[name] is not None}
        base |= {name: unet.config[name] for name in optional if name in own}
        told = config.conditioning_channels
    else:
        names = {
            "input channels": "in_channels",
            "prompt width": "joint_attention_dim",
            "pooled width": "pooled_projection_dim",
        }
        own = {what: config[name] for what, name in names.items() if config[name] is not None}
        transformer = denoiser._network
        base = {what: transformer.config[names[what]] for what in own}
        own["residual channels"], base["residual channels"] = network.inner_dim, transformer.inner_dim
        told = 3 + config.get("extra_conditioning_channels", 0)
        if getattr(network, "union", False):
            raise InputError(
                f"{label} has several modes, which cannot be chosen here; use a ControlNet of one kind of picture."
            )
    if differing := [what for what in own if own[what] != base[what]]:
        what = differing[0]
        raise InputError(
            f"{label} was made for another base than {denoiser.name}: {what} {own[what]}, where {base[what]} is needed; use a "
            "ControlNet trained for this model."
        )
    if told != 3:
        raise InputError(f"{label} is shown {told} channels; only ControlNets that are shown RGB pictures can be used.")


def _skips(unet: Any) -> list[int]:
    """Channels of a U-Net's skip connections, in order."""
    found = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        found += [resnet.out_channels for resnet in block.resnets]
        found += [layer.out_channels for layer in block.downsamplers or []]
    return found
