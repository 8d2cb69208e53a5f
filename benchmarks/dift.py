"""DIFT side by side with the authors' code: wall time, peak memory and FLOPs of extraction and matching, in one run.

    python benchmarks/dift.py --official CHECKOUT                   # a checkout of github.com/Tsingularity/dift
    python benchmarks/dift.py --arch tiny --size 64 --ensemble 2    # to try the script; without --official only ours

The network has the architecture of Stable Diffusion 2.1 and random weights, equal on both sides, as are the picture, the
prompt's embedding and all noise: the results must agree, else the exit status is 1. The sides take turns, every pass in a
process of its own. The authors' classes were written for diffusers 0.15 on CUDA; names and devices are put right at run time,
their `forward` is untouched. Their matching is a loop inside an evaluation script, whose steps are followed here.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from denoscope import DenoscopeError, FeatureMap, Frame, Noise, NoiseSchedule, Picture, features, transfer
from denoscope.denoisers.unet import UNetDenoiser

CODE = Path("src/models/dift_sd.py")
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PICTURE = (500, 375)  # the pictures matched: the usual size in SPair-71k
EXTRAS = ("bfloat16", "bfloat16+channels_last", "bfloat16+channels_last+compile")
COLUMNS = ("", "seconds", "peak MiB", "GFLOP", "time ×", "memory ×", "FLOP ×", "difference")
FORMATS = {"seconds": ".3g", "peak_mib": ",.4g", "gflop": ",.4g"}
NOTES = """Ratios (×) are official / this row: above 1 is better than official. Seconds are medians over the rounds,
each in a new process, after a pass thrown away if warm. Peak is what a pass needs beyond the model or the maps. GFLOP
count products alone (1 multiply-add = 2; PyTorch's FlopCounterMode), so not the renormalising in the official
matching; "killed" means that memory ran out. Difference from official (or else from ours): relative L2 distance of the
features; for matching, the largest gap between the cosines at the points found. The official attention runs on
PyTorch's fused kernel, as ours does, in place of xformers. Rows "ours + …" switch things on that the official code
does not have."""


class Arch(NamedTuple):
    """Shape of the network, and channels and cells per side of the maps that are matched."""

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    prompt: int
    vae: tuple[int, ...]
    maps: tuple[int, int]


ARCHS = {
    "sd21": Arch((320, 640, 1280, 1280), (5, 10, 20, 20), 1024, (128, 256, 512, 512), (1280, 48)),
    "tiny": Arch((32, 64, 64, 64), (2, 4, 4, 4), 64, (32, 32, 64, 64), (64, 12)),
}


@dataclass(frozen=True)
class Task:
    """One row of the table: one side's extraction or matching.

    warm: throw one pass away before each timed one. extra: parts of EXTRAS, switched on besides.
    """

    part: str
    side: str
    arch: str
    size: int
    ensemble: int
    t: int
    site: str
    dtype: str
    points: int
    device: str
    threads: int
    official: Path | None
    warm: bool
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.part}: {' + '.join([self.side, *self.extra])}"


def official_code(checkout: Path) -> Any:
    """The authors' module, imported from the checkout under the names that it expects."""
    # what it imports is loaded before, since leaving patch.dict drops every module that was first imported under it
    import matplotlib.pyplot  # noqa: F401
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401
    from diffusers.models.unets import unet_2d_condition

    transforms = ModuleType("torchvision.transforms")
    vars(transforms)["PILToTensor"] = None  # the class measured here does not use it
    stubs = {"torchvision": ModuleType("torchvision"), "torchvision.transforms": transforms}
    spec: Any = importlib.util.spec_from_file_location("official_dift_sd", checkout / CODE)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {**stubs, "diffusers.models.unet_2d_condition": unet_2d_condition}):
        spec.loader.exec_module(module)
    return module


def extraction(task: Task) -> Callable[[], Tensor]:
    """A function that makes the features of one picture, [channels, height, width]."""
    arch, size = ARCHS[task.arch], task.size
    dtype = torch.bfloat16 if "bfloat16" in task.extra else getattr(torch, task.dtype)
    code = official_code(task.official) if task.side == "official" and task.official else None
    networks: list[Any] = [code.MyUNet2DConditionModel if code else UNet2DConditionModel, AutoencoderKL]
    configs: list[dict[str, Any]] = [
        {"sample_size": 96, "block_out_channels": arch.widths, "attention_head_dim": arch.heads}
        | {"cross_attention_dim": arch.prompt, "use_linear_projection": True},
        {"block_out_channels": arch.vae, "layers_per_block": 2, "latent_channels": 4}
        | {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    ]
    torch.manual_seed(0)  # the same weights for both sides, each in its process
    with torch.device(task.device):
        unet, vae = (network(**config) for network, config in zip(networks, configs, strict=True))
    vae.decoder = None
    for network in (unet, vae):
        network.to(dtype).requires_grad_(False).eval()
        if "channels_last" in task.extra:
            network.to(memory_format=torch.channels_last)
    if "compile" in task.extra:
        unet.compile_repeated_blocks()
    generator = torch.Generator().manual_seed(1)
    picture = Picture(torch.randint(256, (3, size, size), generator=generator) / 255)
    tokens = torch.randn(1, 77, arch.prompt, generator=generator).to(task.device, dtype)
    draws = torch.randn(2, task.ensemble, 4, size // 8, size // 8, generator=generator)
    if code:
        return official_extraction(task, code, unet, vae, tokens, picture.resized((size, size)).to(dtype), draws)
    fixed: Any = lambda prompts: tokens  # noqa: E731  (stands for the text encoder)
    denoiser = UNetDenoiser(unet, NoiseSchedule.from_config(SCHEDULE), vae=vae, text=fixed, name=task.arch)
    noise = Noise(diffusion=draws[0], posterior=draws[1])
    return lambda: features(denoiser, picture, t=task.t, site=task.site, size=size, noise=noise).values


def official_extraction(
    task: Task, code: Any, unet: Any, vae: Any, tokens: Tensor, image: Tensor, draws: Tensor
) -> Callable[[], Tensor]:
    from diffusers import DDIMScheduler
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1)
    featurizer = code.SDFeaturizer.__new__(code.SDFeaturizer)  # its constructor downloads a model
    featurizer.pipe = code.OneStepSDPipeline(
        unet=unet, vae=vae, scheduler=scheduler, requires_safety_checker=False, **none
    )
    featurizer.null_prompt, featurizer.null_prompt_embeds = "", tokens
    index = int(task.site.removeprefix("up."))

    def sample(posterior: Any) -> Tensor:
        return posterior.mean + posterior.std * draws[1].to(posterior.mean)

    def run() -> Tensor:
        with (
            mock.patch.object(DiagonalGaussianDistribution, "sample", sample),
            mock.patch.object(torch, "randn_like", lambda like: draws[0].to(like)),
            mock.patch.object(Tensor, "cuda", lambda tensor: tensor.to(task.device)),
        ):
            # a list because tensors without data cannot be indexed by a single one; it is broadcast like the number
            return featurizer.forward(image, t=[task.t], up_ft_index=index, ensemble_size=task.ensemble)[0].float()

    return run


def maps(task: Task) -> tuple[FeatureMap, FeatureMap, Tensor]:
    """Source, target (the source, moved and made noisy) and whole-pixel points (x, y)."""
    channels, cells = ARCHS[task.arch].maps
    generator = torch.Generator().manual_seed(2)
    source, other = torch.randn(2, channels, cells, cells, generator=generator)
    target = 0.8 * source.roll((2, -3), (1, 2)) + 0.6 * other
    points = (torch.rand(task.points, 2, generator=generator) * torch.tensor(PICTURE)).long()
    frame = Frame.of(PICTURE).resize((cells, cells))
    return FeatureMap(source.to(task.device), frame), FeatureMap(target.to(task.device), frame), points


def matching(task: Task) -> Callable[[], Tensor]:
    """A function that finds the points of one pair, [points, (x, y)]."""
    source, target, points = maps(task)
    width, height = PICTURE

    def official() -> Tensor:
        whole = [F.interpolate(fm.values[None], size=(height, width), mode="bilinear")[0] for fm in (source, target)]
        pixels, found = whole[1].flatten(1).mT, []
        for x, y in points.tolist():
            vector = F.normalize(whole[0][:, y, x], dim=0)
            found.append((F.normalize(pixels, dim=1) @ vector[:, None]).argmax())
        index = torch.stack(found)
        return torch.stack([index % width, index // width], 1)

    return official if task.side == "official" else lambda: transfer(source, target, points).points


def resident(peak: bool) -> int:
    """Bytes of main memory that this process holds, or the most that it has held."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS tells only the most held, in bytes
        return getrusage(RUSAGE_SELF).ru_maxrss
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status.read_text())
    return 1024 * int(found[1]) if found else 0


def once(task: Task) -> tuple[float, int, Tensor]:
    """Seconds, peak bytes and result of one pass."""
    torch.set_num_threads(task.threads)
    run, cuda = (extraction if task.part == "extraction" else matching)(task), task.device == "cuda"
    if task.warm:
        run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide what the pass needs
        reset.write_text("5")  # from here on the peak is that of the pass, not of making the model
    before = torch.cuda.memory_allocated() if cuda else resident(peak=False)
    start = time.perf_counter()
    output = run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
    return seconds, peak - before, output.cpu()


def flops(task: Task) -> int:
    """Counted on tensors without data, but for `transfer`, which looks at values."""
    torch.set_num_threads(task.threads)
    device = "cpu" if task.part == "matching" and task.side == "ours" else "meta"
    run = (extraction if task.part == "extraction" else matching)(replace(task, device=device))
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def alone(function: Callable[[Task], Any], task: Task) -> Any:
    """The function's result from a process of its own; None when memory runs out (the system kills the process)."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(function, task).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            return None


def measure(tasks: list[Task], rounds: int, console: Console) -> list[dict[str, Any]]:
    """One record per task, the tasks having taken turns `rounds` times."""
    passes: dict[Task, list[Any]] = {task: [] for task in tasks}
    for number in range(rounds):
        for task in tasks:
            passes[task].append(alone(once, task))
            told = f"{passes[task][-1][0]:.3g} s" if passes[task][-1] else "killed"
            console.print(f"round {number + 1} of {rounds}: {task.name}: {told}", highlight=False)
    counted = {side: alone(flops, replace(tasks[0], side=side)) for side in {task.side for task in tasks}}
    base = next((one[0][2] for one in passes.values() if all(one)), None)
    rows: list[dict[str, Any]] = []
    for task, found in passes.items():
        row: dict[str, Any] = {"part": task.part, "row": task.name, "gflop": counted[task.side] / 1e9}
        if base is not None and all(found):
            row["all_seconds"] = [one[0] for one in found]
            row["seconds"] = statistics.median(row["all_seconds"])
            row["peak_mib"] = statistics.median(one[1] for one in found) / 2**20
            row["difference"] = difference(task, base, found[0][2])
        rows.append(row)
        if tasks[0].side == "official":
            row |= {f"{key}_ratio": rows[0][key] / row[key] for key in FORMATS if rows[0].get(key) and row.get(key)}
    return rows


def difference(task: Task, base: Tensor, output: Tensor) -> float:
    if task.part == "extraction":
        return float((output - base).norm() / base.norm())
    source, target, points = maps(replace(task, device="cpu"))
    vectors, one, two = source.at(points.double()), target.at(base.double()), target.at(output.double())
    cosines = (F.cosine_similarity(vectors.double(), found.double()) for found in (one, two))
    return float(torch.stack(list(cosines)).diff(dim=0).abs().max())


def cells(row: dict[str, Any]) -> list[str]:
    styles = {**FORMATS, **{f"{key}_ratio": ".2f" for key in FORMATS}, "difference": ".1e"}
    values = [format(row[key], style) if key in row else "–" for key, style in styles.items()]
    return [row["row"], "killed" if values[0] == "–" else values[0], *values[1:]]


def machine(task: Task) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = found[1] if found else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if task.device == "cuda" else "no GPU used"
    return f"{cpu}, {task.threads} of {os.cpu_count()} cores used; {gpu}; PyTorch {torch.__version__}."


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--official", type=Path, help="checkout of github.com/Tsingularity/dift to compare with")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for dift.json and dift.md")
    parser.add_argument("--arch", choices=ARCHS, default="sd21")
    parser.add_argument("--site", choices=[f"up.{i}" for i in range(4)], default="up.1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of both sides")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    numbers = {"size": 768, "ensemble": 8, "t": 261, "points": 8, "repeats": 3, "threads": torch.get_num_threads()}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} unless given")
    choices = (*EXTRAS, "channels_last", "compile")
    parser.add_argument("--extra", nargs="*", choices=choices, help="more rows of ours (on CUDA three, unless given)")
    given = vars(parser.parse_args())
    out, repeats, extra = (given.pop(name) for name in ("out", "repeats", "extra"))
    extra = (EXTRAS if given["device"] == "cuda" else ()) if extra is None else extra
    if given["official"] and not (given["official"] / CODE).is_file():
        parser.exit(2, f"There is no {CODE} in {given['official']}; give a checkout of github.com/Tsingularity/dift.\n")
    if min(given["size"] - 63, given["ensemble"], given["points"], given["threads"], repeats) < 1:
        parser.exit(2, "The size must be at least 64; ensemble, points, repeats and threads at least 1.\n")
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}  # of the processes started

    console, rows = Console(width=None if sys.stdout.isatty() else 120), []
    warm = given["device"] == "cuda" or any("compile" in one for one in extra)  # all rows or none, to be fair
    task = Task("matching", "ours", **given, warm=warm)
    head = [machine(task)]
    sides = [replace(task, side="official"), task] if task.official else [task]
    fast = [replace(task, part="extraction", extra=tuple(one.split("+"))) for one in extra]
    try:
        rows += measure([*(replace(one, part="extraction") for one in sides), *fast], repeats, console)
    except DenoscopeError as error:
        parser.exit(2, f"{error}\n")
    rows += measure(sides, repeats, console)

    settings = {key: value for key, value in asdict(task).items() if key not in ("part", "side", "official", "extra")}
    settings |= {"repeats": repeats, "pictures matched": "x".join(map(str, PICTURE))}
    head += [", ".join(f"{key} {value}" for key, value in settings.items()) + ".", NOTES.replace("\n", " ")]
    if not task.official:
        head.append("Only ours was measured: a comparison needs a checkout of the authors' code (--official PATH).")
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    console.print("\n".join(head), table, highlight=False, sep="\n")
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": head[0], "settings": settings, "rows": rows}
    (out / "dift.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [COLUMNS, ("---", *["---:"] * 7), *map(cells, rows)]
    (out / "dift.md").write_text("\n\n".join(head) + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    console.print(f"Saved {out / 'dift.json'} and {out / 'dift.md'}.", highlight=False)

    exact = task.device == "cpu" and task.dtype == "float32"  # elsewhere kernels and rounding vary with the batch size
    limits = {"extraction": 1e-4 if exact else 5e-2, "matching": 1e-5}
    wrong = [r["part"] for r in rows if r["row"].endswith(": ours") and not r.get("difference", 0) <= limits[r["part"]]]
    if wrong:
        console.print(f"The results of {' and '.join(wrong)} do not agree.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
