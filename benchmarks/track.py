"""Label propagation side by side with the dense formula: wall time, peak memory and FLOPs of one frame, in one run.

    python benchmarks/track.py                          # 480p, stride 8, 640 channels, 28 + 1 frames; dense needs 15 GB
    python benchmarks/track.py --official CHECKOUT      # of github.com/Tsingularity/dift: the authors' own label_propagation
    python benchmarks/track.py --height 30 --width 52 --channels 64     # to try the script

Random features and labels, equal on both sides; the soft labels must agree to 1e-5, else the exit status is 1. Every pass runs
in a process of its own. The dense formula follows the published code step by step (which keeps its window from frame to frame,
so making that is not timed); with --official the checkout's own function runs, its `.cuda` calls sent to the device asked for.
"""

import argparse
import ctypes
import importlib.util
import json
import os
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
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from denoscope.correspondence.propagation import _step

CODE = Path("eval_davis.py")
COLUMNS = ("", "seconds", "peak MiB", "GFLOP", "time ×", "memory ×", "FLOP ×", "difference")


@dataclass(frozen=True)
class Task:
    """side: "dense", "official" or "ours". The rest are the sizes of the problem and where it runs."""

    side: str
    height: int
    width: int
    channels: int
    classes: int
    context: int
    radius: int
    topk: int
    temperature: float
    device: str
    threads: int
    official: Path | None


def problem(task: Task, device: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Features of the target and of the context, [channels, height, width], and labels [context, classes, height, width]."""
    generator = torch.Generator().manual_seed(0)
    shape = task.channels, task.height, task.width
    base = torch.randn(shape, generator=generator)
    frames = [base + 0.5 * torch.randn(shape, generator=generator) for _ in range(task.context + 2)]
    labels = torch.rand(task.context + 1, task.classes, task.height, task.width, generator=generator)
    return frames[0].to(device), [frame.to(device) for frame in frames[1:]], labels.to(device)


def window(task: Task, device: str) -> Tensor:
    y, x = (torch.arange(n, device=device) for n in (task.height, task.width))
    near = [((axis[:, None] - axis).abs() <= task.radius) for axis in (y, x)]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1).float()


def propagation(task: Task, device: str) -> Callable[[], Tensor]:
    """A function that makes the soft labels of one frame, [classes, height, width]."""
    target, sources, labels = problem(task, device)
    if task.side == "ours":
        unit = [F.normalize(one, dim=0).permute(1, 2, 0).contiguous() for one in (target, *sources)]
        block = 16 if device == "cuda" else 8
        return lambda: _step(unit[0], unit[1:], labels, task.radius, task.topk, task.temperature, block)
    mask = window(task, device)
    if task.side == "official":
        return official(task, target, sources, labels, mask, device)

    def dense() -> Tensor:
        wanted = F.normalize(target.flatten(1).T, dim=1).repeat(len(sources), 1, 1)
        known = F.normalize(torch.stack([source.flatten(1) for source in sources]), dim=1)
        affinity = torch.exp(torch.bmm(wanted, known) / task.temperature)
        affinity *= mask.repeat(len(sources), 1, 1)
        affinity = affinity.transpose(2, 1).reshape(-1, wanted.shape[1])
        least = torch.topk(affinity, dim=0, k=task.topk).values.amin(0)
        affinity[affinity < least] = 0
        affinity = affinity / affinity.sum(0, keepdim=True)
        given = labels.flatten(2).transpose(2, 1).flatten(0, 1).T
        return (given @ affinity).unflatten(1, labels.shape[2:])

    return dense


def official(
    task: Task, target: Tensor, sources: list[Tensor], labels: Tensor, mask: Tensor, device: str
) -> Callable[[], Tensor]:
    """The authors' function on given features; modules that it does not use here are stood in for."""
    assert task.official
    names = ("tqdm", "src", "src.models", "src.models.dift_sd", "src.models.dift_adm")
    stubs = {name: ModuleType(name) for name in names}
    vars(stubs["tqdm"])["tqdm"] = iter
    vars(stubs["src.models.dift_sd"])["SDFeaturizer"] = vars(stubs["src.models.dift_adm"])["ADMFeaturizer"] = None
    spec: Any = importlib.util.spec_from_file_location("official_eval_davis", task.official / CODE)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    arguments = SimpleNamespace(temperature=task.temperature, size_mask_neighborhood=task.radius, topk=task.topk)
    flat = target.flatten(1).T
    vars(module)["extract_feature"] = lambda *_, **__: (flat, task.height, task.width)
    segs, context, whole = list(labels[:, None]), [source.flatten(1) for source in sources], mask[None]

    def run() -> Tensor:
        with mock.patch.object(Tensor, "cuda", lambda tensor, **_: tensor.to(device)):
            known = whole.repeat(len(context), 1, 1)
            return module.label_propagation(arguments, None, None, context, segs, known)[0][0]

    return run


def resident(peak: bool) -> int:
    """Bytes of main memory that this process holds, or the most that it has held."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS tells only the most held, in bytes
        return getrusage(RUSAGE_SELF).ru_maxrss
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status.read_text())
    return 1024 * int(found[1]) if found else 0


def once(task: Task) -> tuple[float, int, Tensor]:
    """Seconds, peak bytes beyond features and labels, and result of one pass."""
    torch.set_num_threads(task.threads)
    run, cuda = propagation(task, task.device), task.device == "cuda"
    if cuda:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide what the pass needs
        reset.write_text("5")
    before = torch.cuda.memory_allocated() if cuda else resident(peak=False)
    start = time.perf_counter()
    output = run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
    return seconds, peak - before, output.cpu()


def flops(task: Task) -> int:
    """Products (1 multiply-add = 2). The dense side is a sum of two products; ours is counted as it runs."""
    cells, known = task.height * task.width, task.context + 1
    if task.side != "ours":
        return 2 * known * cells**2 * (task.channels + task.classes)
    torch.set_num_threads(task.threads)
    run = propagation(task, "cpu")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--official", type=Path, help="checkout of github.com/Tsingularity/dift to compare with")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for track.json and track.md")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    numbers = {"height": 60, "width": 104, "channels": 640, "classes": 3, "context": 28, "radius": 15, "topk": 15}
    numbers |= {"repeats": 1, "threads": torch.get_num_threads()}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} unless given")
    given = vars(parser.parse_args())
    out, repeats = given.pop("out"), given.pop("repeats")
    if given["official"] and not (given["official"] / CODE).is_file():
        parser.exit(2, f"There is no {CODE} in {given['official']}; give a checkout of github.com/Tsingularity/dift.\n")
    if min(given[name] for name in (*list(numbers)[:4], "topk", "threads")) < 1 or min(repeats, given["radius"]) < 1:
        parser.exit(2, "Sizes, radius, topk, threads and repeats must be at least 1.\n")
    if given["context"] < 0:
        parser.exit(2, "The context must be 0 or more.\n")
    ours = Task("ours", **given, temperature=0.2)
    tasks = [replace(ours, side="official" if ours.official else "dense"), ours]

    console, rows = Console(width=None if sys.stdout.isatty() else 120), []
    passes: dict[str, list[Any]] = {task.side: [] for task in tasks}
    for number in range(repeats):
        for task in tasks:
            passes[task.side].append(alone(once, task))
            found = passes[task.side][-1]
            told = f"{found[0]:.3g} s" if found else "killed"
            console.print(f"round {number + 1} of {repeats}: {task.side}: {told}", highlight=False)
    base = passes[tasks[0].side][0]
    for task in tasks:
        row: dict[str, Any] = {"row": task.side, "gflop": alone(flops, task) / 1e9}
        if all(passes[task.side]):
            row["seconds"] = statistics.median(one[0] for one in passes[task.side])
            row["peak_mib"] = statistics.median(one[1] for one in passes[task.side]) / 2**20
            if base:
                row["difference"] = (passes[task.side][0][2] - base[2]).abs().max().item()
        rows.append(row)
        for key in ("seconds", "peak_mib", "gflop"):
            if rows[0].get(key) and row.get(key):
                row[f"{key}_ratio"] = rows[0][key] / row[key]

    styles = {"seconds": ".3g", "peak_mib": ",.4g", "gflop": ",.4g", "seconds_ratio": ".2f", "peak_mib_ratio": ".1f"}
    styles |= {"gflop_ratio": ".2f", "difference": ".1e"}
    lines = [
        [row["row"], *(format(row[key], style) if key in row else "–" for key, style in styles.items())] for row in rows
    ]
    settings = {key: value for key, value in asdict(ours).items() if key not in ("side", "official")}
    features = 4 * (ours.context + 2) * ours.channels * ours.height * ours.width / 2**20
    head = [
        f"{os.cpu_count()} cores; PyTorch {torch.__version__}; "
        + ", ".join(f"{key} {value}" for key, value in {**settings, "repeats": repeats}.items()) + ".",
        f"One frame. Ratios (×) are {tasks[0].side} / this row: above 1 is better. Peak is what a pass needs beyond the "
        f"features themselves ({features:,.0f} MiB) and the labels. GFLOP count products alone.",
    ]  # fmt: skip
    table = Table(*COLUMNS)
    for line in lines:
        table.add_row(*line)
    console.print("\n".join(head), table, highlight=False, sep="\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "track.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    marked = [COLUMNS, ("---", *["---:"] * 7), *lines]
    (out / "track.md").write_text("\n\n".join(head) + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in marked))
    console.print(f"Saved {out / 'track.json'} and {out / 'track.md'}.", highlight=False)
    if "difference" in rows[1] and rows[1]["difference"] > 1e-5:
        console.print("The results do not agree.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
