"""Features of one picture under several techniques: together, and one after the other as published (encode, run whole, repeat).

    python benchmarks/techniques.py                              # operations alone, 512 x 512, no weights needed
    python benchmarks/techniques.py --size 256 --time --threads 2   # also wall time, with random weights

The network has the architecture of Stable Diffusion 1.5 and, for timing, random weights; the ControlNet is its copy. All sides
read the same sites with the same draws, and their features must agree to 1e-4, else the exit status is 1. Sides: the naive
sequence, together (`feature_sets`), and together with Winograd's convolutions (`ds.winograd`). Plans:

practical   six maps of the practical set, one pass each: two seeds with a long prompt, two plain, two with a ControlNet
legacy      the same with the legacy set, the six maps of Meng et al. (arXiv 2410.06719) for correspondence
paper       legacy, and their attention map: denoised from 60 under the ControlNet, 12 passes
released    paper, with the two ControlNet maps denoised from 60 too, as the released commands have them
(their two LoRA maps count as plain ones here: a LoRA costs next to nothing)
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchEncoding, CLIPTextConfig, CLIPTextModel

import denoscope as ds
from denoscope.denoisers.control import ControlInput
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.features import Recipe, feature_sets, recipe
from denoscope.features.denoising import denoised, effective
from denoscope.features.sets import expand, readings
from denoscope.features.technique import shown

PLANS = ("practical", "legacy", "paper", "released")


class OneToken:
    """In the place of the published tokenizer, which is not ours to ship: prompts are told apart by their length alone."""

    model_max_length, unk_token_id = 77, None

    def __call__(self, prompt: str, **options: Any) -> Any:
        return BatchEncoding({"input_ids": torch.full((1, 77), len(prompt)) if options else [0]})


def model(device: str) -> tuple[UNetDenoiser, Any]:
    torch.manual_seed(0)
    with torch.device(device):
        unet: Any = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768
        )
        widths: Any = (128, 256, 512, 512)
        kinds: Any = [[f"{way}Block2D"] * 4 for way in ("DownEncoder", "UpDecoder")]
        vae: Any = AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, latent_channels=4,
            down_block_types=kinds[0], up_block_types=kinds[1],
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        control: Any = ControlNetModel.from_unet(unet)
    if device != "meta":  # what is zero before training would hide mistakes
        for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.01)
    vae.decoder = None
    for network in (unet, vae, text, control):
        network.requires_grad_(False).eval()
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "_class_name": "PNDMScheduler",
    }
    config |= {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}
    schedule = ds.NoiseSchedule.from_config(config)
    return UNetDenoiser(unet, schedule, vae=vae, text=TextEncoder(OneToken(), text), name="sd15"), control


def plan(name: str, denoiser: Any, control: Any, size: int) -> dict[str, Recipe]:
    base = {"t": 50, "ensemble": 1, "size": str(size), "site": "practical" if name == "practical" else "legacy"}
    long = {"prompt": "a photo of many things, high quality"}
    edges = {"control": control} | ({"denoise_from": 60} if name == "released" else {})
    techniques: dict[str, dict[str, Any]] = {
        "words 0": long, "words 1": {**long, "seed": 1}, "plain 0": {}, "plain 1": {"seed": 1}, "edges 0": edges,
        "edges 1": {**edges, "seed": 1},
    }  # fmt: skip
    if name in ("paper", "released"):
        attention = {
            "site": "attention.up_cross",
            "control": control,
            "denoise_from": 60,
            "seed": 2,
            "prompt": "a photo",
        }
        techniques["attention"] = attention
    mode = {"timestep_mode": "gdf"}
    return {key: recipe(denoiser, **{**base, **one, **mode}) for key, one in techniques.items()}


def one_by_one(denoiser: Any, picture: ds.Picture, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Tensor]]:
    """The published sequence: for every map encode picture and prompt anew, and run the whole network."""
    found = {}
    for name, one in recipes.items():
        denoiser.text._cache.clear()
        size = int(str(one.size)), int(str(one.size))
        posterior = denoiser.posterior(picture.resized(size)[None])
        shape, t = tuple(posterior.mean.shape[1:]), effective(denoiser, one, one.t)
        draws = ds.Noise.draw(shape, one.seed or 0, picture.digest, t, 1, posterior=True)
        x0, eps = posterior.sample(draws.posterior), draws.diffusion
        assert eps is not None
        condition = denoiser.condition(None if one.prompt is None else [one.prompt])
        given = [  # pixels, which the ControlNet embeds in every pass
            ControlInput(
                control.model, ds.read(shown(control, picture, size, one.resample)).pixels[None], torch.ones(1)
            )
            for control in one.control
            if not isinstance(control.model, str)
        ]
        condition = ds.Condition(condition.tokens, {}, tuple(given))
        if one.denoise_from is None:
            noisy = denoiser.schedule.add_noise(x0, eps.to(x0), t)
        else:
            noisy = denoised(denoiser, x0, eps.to(x0), one, [one.prompt], given, [0])
        sites = readings(denoiser, expand(denoiser, one.site))
        watched = list(dict.fromkeys(name for reading in sites for name in reading.watch))
        with torch.no_grad(), ds.Watch(denoiser, watched, stop=False) as seen:
            denoiser.predict(noisy, t, condition)
        found[name] = {one.name: one.values(seen.seen, shape[1:])[0] for one in sites}
    return found


def together(denoiser: Any, picture: ds.Picture, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Tensor]]:
    denoiser.text._cache.clear()
    found = feature_sets(denoiser, picture, recipes)
    return {name: {site: fm.values for site, fm in maps.items()} for name, maps in found.items()}


def winograd(denoiser: Any, picture: ds.Picture, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Tensor]]:
    with ds.winograd():
        return together(denoiser, picture, recipes)


SIDES = {"naive": one_by_one, "together": together, "winograd": winograd}


def apart(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> float:
    """The largest relative difference of two sets of features."""
    return max(
        ((other[key][site] - values).norm() / values.norm()).item()
        for key, maps in one.items()
        for site, values in maps.items()
    )


def picture_of(side: int) -> ds.Picture:
    """Smooth waves and some edges."""
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([np.sin(9 * x + 5 * y + c) for c in range(3)], -1) / 4 + 0.5
    image[side // 4 : side // 2, side // 3 : side // 2] = (0.9, 0.2, 0.1)
    return ds.read((image * 255).round().astype(np.uint8))


def counted(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--time", action="store_true", help="also wall time (random weights; 5 GB of memory)")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the table here as .json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows, wrong, picture = [], False, picture_of(asked.size)
    weightless, control = model("meta")
    real = model("cpu") if asked.time else None
    for name in asked.plans.split(","):
        recipes = plan(name, weightless, control, asked.size)
        row: dict[str, Any] = {"plan": name, "maps": len(recipes)}
        for side, run in SIDES.items():
            row[f"{side}_tflop"] = counted(partial(run, weightless, picture, recipes))
        if real is not None:
            recipes = plan(name, *real, asked.size)
            seconds: dict[str, list[float]] = {side: [] for side in SIDES}
            found: dict[str, Any] = {}
            for _ in range(asked.rounds):
                for side, run in SIDES.items():
                    gc.collect()
                    began = time.perf_counter()
                    found[side] = run(real[0], picture, recipes)
                    seconds[side].append(time.perf_counter() - began)
            row |= {f"{side}_seconds": min(taken) for side, taken in seconds.items()}
            for side in list(SIDES)[1:]:
                row[f"{side}_difference"] = gap = apart(found["naive"], found[side])
                wrong |= gap > 1e-4
        for what in ("tflop", "seconds"):
            if f"naive_{what}" in row:
                row |= {
                    f"{side}_{what}_ratio": row[f"{side}_{what}"] / row[f"naive_{what}"] for side in list(SIDES)[1:]
                }
        rows.append(row)
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ),
            flush=True,
        )
    if asked.out:
        settings = {"size": asked.size, "threads": asked.threads, "rounds": asked.rounds, "torch": torch.__version__}
        asked.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if wrong:
        sys.exit("The features of the two sides differ.")


if __name__ == "__main__":
    main()
