"""Wall time of guidance on every step against a fifth of them, on a network of the size of Stable Diffusion 1.5, in one run.

    python benchmarks/guidance.py --size 256 --steps 5 --always-last 0 --batch 1 4 --rounds 1
    python benchmarks/guidance.py --arch tiny --size 64 --steps 10       # to try the script

Weights are random, and there is neither text encoder nor autoencoder: what is timed is the denoising loop alone, by
diffusers' own pipeline with and without `compress_guidance`, and by denoscope's sampler. The rows take turns, on CUDA after
a short run of each that is thrown away. Ratios are to diffusers' full guidance at the same batch; "difference" is the
relative distance of results that must agree (full: of diffusers; compress_guidance: of ours).
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from denoscope import ClassifierFree, GuidanceSchedule, NoiseSchedule, compress_guidance, trajectory
from denoscope.denoisers.unet import UNetDenoiser

SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}
WIDTHS = {"sd15": (320, 640, 1280, 1280), "tiny": (32, 64, 64, 64)}
SCALE = 5.0
COLUMNS = ("batch", "row", "network rows", "seconds", "time of full", "rows of full", "difference")


def networks(arch: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(block_out_channels=WIDTHS[arch], cross_attention_dim=768 if arch == "sd15" else 32)
        autoencoder: Any = AutoencoderKL
        vae = autoencoder(block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    return tuple(network.to(dtype).requires_grad_(False).eval() for network in (unet, vae))  # type: ignore[return-value]


def rows(
    unet: Any, vae: Any, size: int, batch: int, schedule: Callable[[int], GuidanceSchedule]
) -> dict[str, Callable[[int], Tensor]]:
    """What is timed: functions from a number of steps to final latents."""
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    tokens = {p: torch.randn(1, 77, width, generator=generator).to(unet.device, unet.dtype) for p in ("", "a cat")}
    fixed: Any = lambda prompts: torch.cat([tokens[p] for p in prompts])  # noqa: E731  (stands for the text encoder)
    denoiser = UNetDenoiser(unet, NoiseSchedule.from_config(SCHEDULE), vae=vae, text=fixed)
    none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipeline: Any = StableDiffusionPipeline
    pipe = pipeline(
        unet=unet, vae=vae, scheduler=DDIMScheduler.from_config(SCHEDULE), requires_safety_checker=False, **none
    )
    pipe.set_progress_bar_config(disable=True)

    def theirs(steps: int) -> Tensor:
        embeds = {"prompt_embeds": tokens["a cat"], "negative_prompt_embeds": tokens[""]}
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        return pipe(
            **{key: value.expand(batch, -1, -1) for key, value in embeds.items()}, height=size, width=size,
            num_inference_steps=steps, guidance_scale=SCALE, generator=generators, output_type="latent",
        ).images.float()  # fmt: skip

    def dropped_in(steps: int) -> Tensor:
        with compress_guidance(pipe, schedule):
            return theirs(steps)

    def ours(schedule: Any, steps: int) -> Tensor:
        guidance = ClassifierFree(SCALE, schedule)
        *_, last = trajectory(denoiser, ["a cat"] * batch, steps=steps, guidance=guidance, size=(size, size))
        return last.after

    return {
        "diffusers, full": theirs,
        "diffusers + compress_guidance": dropped_in,
        "denoscope, full": partial(ours, None),
        "denoscope, compressed": partial(ours, schedule),
    }


def timed(run: Callable[[int], Tensor], steps: int, unet: Any) -> tuple[float, int, Tensor]:
    """Seconds, rows that went through the network, and the result."""
    counted = 0

    def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal counted
        counted += len(args[0] if args else kwargs["sample"])

    handle = unet.register_forward_pre_hook(count, with_kwargs=True)
    if unet.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run(steps).cpu()  # waits for the GPU
    seconds = time.perf_counter() - start
    handle.remove()
    return seconds, counted, result


def machine(device: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU used"
    cpu = found[1] if found else platform.machine()
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores used; {gpu}; PyTorch {torch.__version__}."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", choices=WIDTHS, default="sd15")
    parser.add_argument("--size", type=int, default=256, help="of the pictures, pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=5)
    parser.add_argument("--always-last", type=int, default=2, help="last steps that are guided in any case")
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    sides = ("diffusers", "denoscope")
    parser.add_argument("--sides", nargs="*", choices=sides, default=sides, help="whose rows; ratios need diffusers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for guidance.json and guidance.md")
    given = parser.parse_args()
    if given.size % 64 or given.size < 64 or min(*given.batch, given.rounds, given.steps - 4) < 1:
        parser.exit(2, "The size must be a multiple of 64, batch and rounds at least 1, and steps at least 5.\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    unet, vae = networks(given.arch, given.device, getattr(torch, given.dtype))
    records: list[dict[str, Any]] = []
    for batch in given.batch:
        schedule = partial(GuidanceSchedule.power, rate=given.rate, always_last=given.always_last)
        runs = rows(unet, vae, given.size, batch, schedule)
        runs = {name: run for name, run in runs.items() if name.startswith(("diffusers, full", *given.sides))}
        if given.device == "cuda":
            for run in runs.values():
                run(10)  # kernels are chosen and memory is taken before anything is timed
        passes: dict[str, list[tuple[float, int, Tensor]]] = {name: [] for name in runs}
        for number in range(given.rounds):
            for name, run in list(runs.items())[:: 1 if number % 2 == 0 else -1]:
                passes[name].append(timed(run, given.steps, unet))
                console.print(
                    f"batch {batch}, round {number + 1}: {name}: {passes[name][-1][0]:.1f} s", highlight=False
                )
        base = passes["diffusers, full"]
        same = {"denoscope, full": "diffusers, full", "diffusers + compress_guidance": "denoscope, compressed"}
        for name, found in passes.items():
            seconds, full = (statistics.median(one[0] for one in some) for some in (found, base))
            record = {"batch": batch, "row": name, "network_rows": found[0][1], "seconds": seconds}
            record |= {"all_seconds": [one[0] for one in found], "time_ratio": seconds / full}
            record |= {"rows_ratio": found[0][1] / base[0][1]}
            if same.get(name) in passes:
                one, other = found[0][2], passes[same[name]][0][2]
                record["difference"] = float((one - other).norm() / other.norm())
            records.append(record)
    settings = {k: v for k, v in vars(given).items() if k != "out"}
    head = [
        machine(given.device),
        ", ".join(f"{k} {v}" for k, v in settings.items()) + ".",
        (__doc__ or "").split("\n\n")[2],
    ]
    lines = [
        [str(r["batch"]), r["row"], str(r["network_rows"]), f"{r['seconds']:.1f}", f"{r['time_ratio']:.3f}",
         f"{r['rows_ratio']:.3f}", f"{r['difference']:.1e}" if "difference" in r else ""]
        for r in records
    ]  # fmt: skip
    table = Table(*COLUMNS)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "guidance.json").write_text(
        json.dumps({"machine": head[0], "settings": settings, "rows": records}, indent=1) + "\n"
    )
    text = "".join(f"| {' | '.join(line)} |\n" for line in [list(COLUMNS), ["---:", "---", *["---:"] * 5], *lines])
    (given.out / "guidance.md").write_text("\n\n".join(" ".join(part.split()) for part in head) + "\n\n" + text)
    console.print(f"Saved {given.out / 'guidance.json'} and {given.out / 'guidance.md'}.", highlight=False)
    wrong = [r["row"] for r in records if r.get("difference", 0) > (1e-3 if given.dtype == "float32" else 0.2)]
    if wrong:
        console.print(f"The results of {', '.join(wrong)} do not agree.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
