"""Compressed guidance on handwritten digits: what it saves, what it costs, and what is left of it at matched strength.

    nice -n 5 python experiments/guidance/digits.py --seeds 3 --out experiments/guidance

Every seed trains its own denoiser and two classifiers that differ only in their seed: `on` guides, `off` only judges. Two clean
networks are shared by all seeds: `held` judges, the other's penultimate layer gives the features of FID, precision and recall.
About five minutes a seed on one core; networks and samples are kept in runs/, so that a stopped run goes on where it was.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.benchmarks.generation import evaluate_generation, noise_floor
from denoscope.denoisers import NoiseSchedule
from denoscope.denoisers.adm import timestep_embedding
from denoscope.denoisers.classifiers import Classifier
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.images import atomically, write
from denoscope.images.chart import LINES, chart
from denoscope.sampling import ClassifierFree, ClassifierGuidance, GuidanceSchedule, Respaced, trajectory

CLASSES, ANY = 10, 10  # the class number that stands for "any"
SCHEDULE = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
Metrics = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """Sizes of networks and training; the defaults are the experiment's, the regression test has smaller ones."""

    channels: tuple[int, ...] = (16, 32)  # of the denoiser
    groups: int = 8
    iterations: int = 2600
    learning_rate: float = 2e-3
    width: int = 24  # of the classifiers
    classifier_images: int = 600
    classifier_iterations: int = 800
    batch: int = 64
    steps: int = 50
    samples: int = 500

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(self).encode(), digest_size=4).hexdigest()


# --- networks and their training ---------------------------------------------------------------------------------------


def read_digits() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] in [-1, 1], labels)."""
    digits: Any = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


class Convolutional(nn.Module):
    """A small classifier; its penultimate layer has 32 features. Noise-aware: the timestep shifts its inner layers."""

    def __init__(self, width: int, noise_aware: bool):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.wide, self.out = nn.Linear(2 * width * 4, 32), nn.Linear(32, CLASSES)
        self.time = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4 * width)) if noise_aware else None

    def features(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        early = late = x.new_zeros(())
        if self.time is not None and t is not None:
            early, late = self.time(timestep_embedding(t, 32))[:, :, None, None].chunk(2, 1)
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(self.second(x) + early)
        x = F.max_pool2d(F.relu(self.third(x) + late), 2)
        return F.relu(self.wide(x.flatten(1)))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.out(self.features(x, t))


def batches(count: int, size: int, iterations: int, seed: int, optimizer: Any) -> Iterator[tuple[Tensor, Any]]:
    """(indices, generator) for every iteration, the learning rate falling as half a cosine."""
    generator = torch.Generator().manual_seed(seed)
    top = optimizer.param_groups[0]["lr"]
    for i in range(iterations):
        warm = min(1.0, (i + 1) / 100)
        optimizer.param_groups[0]["lr"] = top * warm * (0.5 + 0.5 * math.cos(math.pi * i / iterations))
        yield torch.randint(count, (size,), generator=generator), generator


def train_classifier(images: Tensor, labels: Tensor, noise_aware: bool, seed: int, settings: Settings) -> Classifier:
    torch.manual_seed(seed)
    module = Convolutional(settings.width, noise_aware)
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    sizes = len(images), 2 * settings.batch, settings.classifier_iterations, seed
    for chosen, generator in batches(*sizes, optimizer):
        x, t = images[chosen], None
        if noise_aware:
            t = torch.randint(len(SCHEDULE), chosen.shape, generator=generator)
            x = SCHEDULE.add_noise(x, torch.randn(x.shape, generator=generator), t)
        optimizer.zero_grad()
        F.cross_entropy(module(x, t), labels[chosen]).backward()
        optimizer.step()
    return Classifier(module.eval().requires_grad_(False), noise_aware, CLASSES)


def untrained(settings: Settings) -> Any:
    depth = len(settings.channels)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=settings.channels,
        norm_num_groups=settings.groups,
        down_block_types=("DownBlock2D",) * depth,
        up_block_types=("UpBlock2D",) * depth,
        add_attention=False,
        num_class_embeds=CLASSES + 1,
    )


def train_denoiser(images: Tensor, labels: Tensor, seed: int, settings: Settings) -> UNetDenoiser:
    """DDPM, with 15 % of the labels dropped; the moving average of its weights is what is kept."""
    torch.manual_seed(seed)
    unet = untrained(settings)
    average = copy.deepcopy(unet)
    optimizer = torch.optim.Adam(unet.parameters(), settings.learning_rate)
    sizes = len(images), settings.batch, settings.iterations, seed
    for i, (chosen, generator) in enumerate(batches(*sizes, optimizer)):
        x0, t = images[chosen], torch.randint(len(SCHEDULE), chosen.shape, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        told = labels[chosen].masked_fill(torch.rand(chosen.shape, generator=generator) < 0.15, ANY)
        said = unet(SCHEDULE.add_noise(x0, eps, t), t, class_labels=told, return_dict=False)[0]
        optimizer.zero_grad()
        F.mse_loss(said, eps).backward()
        optimizer.step()
        share = 1 - min(0.999, (i + 1) / (i + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), share)
    return wrapped(average)


def wrapped(unet: Any) -> UNetDenoiser:
    return UNetDenoiser(unet.eval().requires_grad_(False), SCHEDULE, null_class=ANY, name="digits")


@dataclass(frozen=True)
class Networks:
    denoiser: UNetDenoiser
    on: Classifier
    off: Classifier


@dataclass(frozen=True)
class Judges:
    """The networks that see only finished samples, and the features of all real digits."""

    held: Classifier
    features: Convolutional
    real: Tensor


def kept(folder: Path | None, name: str, empty: Callable[[], Any], train: Callable[[], Any]) -> Any:
    """A module with its weights from the folder, or trained and then kept there."""
    path = folder / f"{name}.safetensors" if folder else None
    if path is None or not path.is_file():
        began, module = time.perf_counter(), train()
        if path is not None:
            state = {key: value.contiguous() for key, value in module.state_dict().items()}
            atomically(path, lambda part: save_file(state, part))
            print(f"{path.parent.name}: trained {name}, {time.perf_counter() - began:.0f} s", flush=True)
        return module
    module = empty()
    module.load_state_dict(load_file(path))
    return module.eval().requires_grad_(False)


def prepare_judges(settings: Settings, folder: Path | None = None) -> Judges:
    images, labels = read_digits()

    def clean(name: str, seed: int) -> Any:
        def train() -> nn.Module:
            return train_classifier(images, labels, False, seed, settings).module

        return kept(folder, name, lambda: Convolutional(settings.width, False), train)

    held, features = clean("held", 1001), clean("features", 1002)
    with torch.no_grad():
        return Judges(Classifier(held, False, CLASSES), features, features.features(images))


def prepare(seed: int, settings: Settings, folder: Path | None = None) -> Networks:
    """The denoiser and both classifiers of a seed; the classifiers see the same images."""
    images, labels = read_digits()
    seen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: settings.classifier_images]

    def noisy(name: str, own: int) -> Classifier:
        def train() -> nn.Module:
            return train_classifier(images[seen], labels[seen], True, own, settings).module

        module = kept(folder, name, lambda: Convolutional(settings.width, True), train)
        return Classifier(module, True, CLASSES, name=name)

    def train() -> nn.Module:
        return train_denoiser(images, labels, seed, settings).unet

    unet = kept(folder, "denoiser", lambda: untrained(settings), train)
    return Networks(wrapped(unet), noisy("on", 100 + seed), noisy("off", 200 + seed))


# --- what is compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to guide. kind "classifier": the unlabelled model, `scale` is s. "free": the class-conditional one, w'."""

    name: str
    kind: str
    scale: float
    schedule: Callable[[int, int], GuidanceSchedule]  # of the number of steps and the seed
    rule: Any = "mask"
    gap_variance: Any = "own"

    @property
    def file(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.kind} {self.name}".lower()) + ".npz"


def power(k: float) -> Callable[[int, int], GuidanceSchedule]:
    return lambda n, seed: GuidanceSchedule.power(n, 5, k)


def everywhere(n: int, seed: int) -> GuidanceSchedule:
    return GuidanceSchedule.all(n)


def interval(start: float, stop: float) -> Callable[[int, int], GuidanceSchedule]:
    return lambda n, seed: GuidanceSchedule.interval(n, start, stop)


NOWHERE = Row("none", "classifier", 0, lambda n, seed: GuidanceSchedule.none(n))
SWEEP = {s: Row(f"full, s={s:g}", "classifier", s, everywhere) for s in (1, 2, 2.5, 3, 3.5, 4, 5, 8)}
GAP = {s: Row(f"gap r5 k1, s={s:g}", "classifier", s, power(1), "gap") for s in (1, 2, 3, 8)}
SUMMED = {s: Row(f"gap r5 k1, summed S, s={s}", "classifier", s, power(1), "gap", "sum") for s in (2, 3)}
CLASSIFIER_ROWS = [
    NOWHERE,
    *SWEEP.values(),
    *GAP.values(),
    *SUMMED.values(),
    *(Row(f"gap r5 k{k}, s={s}", "classifier", s, power(k), "gap") for k in (2, 5) for s in (2, 8)),
    *(Row(f"reuse r5 k{k}, s={s}", "classifier", s, power(k), "reuse") for k in (1, 2) for s in (2, 8)),
    Row("multiplicity r5 k2, 5 s, s=2", "classifier", 10, power(2), "multiplicity"),
    Row("uniform r5, 5 s, s=2", "classifier", 10, lambda n, seed: GuidanceSchedule.uniform(n, 5)),
    Row("uniform r5, s=2 (UG)", "classifier", 2, lambda n, seed: GuidanceSchedule.uniform(n, 5)),
    Row("early stop, s=2 (ES)", "classifier", 2, lambda n, seed: GuidanceSchedule.early_stop(n)),
    Row("early stop, 5 s, s=2", "classifier", 10, lambda n, seed: GuidanceSchedule.early_stop(n)),
    Row("random 10 steps, 5 s, s=2", "classifier", 10, lambda n, seed: GuidanceSchedule.random(n, 10, seed)),
    Row("interval .3-.8, 2 s, s=2", "classifier", 4, interval(0.3, 0.8)),
]
FREE_ROWS = [
    Row("none", "free", 0, NOWHERE.schedule),
    *(
        Row(f"{name}, w'={w}", "free", w, schedule, rule)
        for w in (1, 4)
        for name, schedule, rule in (
            ("full", everywhere, "mask"),
            ("mask r5 k1", power(1), "mask"),
            ("mask r5 k2", power(2), "mask"),
            ("gap r5 k1", power(1), "gap"),
            ("reuse r5 k1", power(1), "reuse"),
            ("interval .3-.8", interval(0.3, 0.8), "mask"),
            ("interval .4-.6", interval(0.4, 0.6), "mask"),
            ("first 20 %", lambda n, seed: GuidanceSchedule.first(n, 0.2), "mask"),
        )
    ),
]
CURVES = ("full, s=2", "gap r5 k1, s=2", "uniform r5, s=2 (UG)", "early stop, 5 s, s=2")


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Rows of every batch that goes through a network."""
    rows: list[int] = []
    handle = module.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


def generate(networks: Networks, row: Row, seed: int, settings: Settings) -> dict[str, np.ndarray]:
    """Samples of a row, [samples, 8, 8] as `pixels`; network `calls` a sample that guidance cost; CPU `seconds`.

    Rows of a seed start from the same noise. `curves`, of some rows: cross-entropy of on and off along the way.
    """
    n, steps = settings.samples, settings.steps
    labels, schedule = [i % CLASSES for i in range(n)], row.schedule(steps, seed)
    guide: nn.Module
    given: dict[str, Any]
    if row.kind == "classifier":
        guide, given = networks.on.module, {"batch": n, "labels": labels}
        given["classifier"] = ClassifierGuidance(
            networks.on, row.scale, schedule, row.rule, gap_variance=row.gap_variance
        )
    else:
        guide, given = networks.denoiser.network, {"prompts": labels}
        if schedule.positions:
            given["guidance"] = ClassifierFree(1 + row.scale, schedule, row.rule, space="x0")
    solver = Respaced(SCHEDULE, method="ddpm", variance="small")
    began = time.process_time()
    with counted(guide) as rows:
        path = list(trajectory(networks.denoiser, steps=steps, solver=solver, seed=10_000 * (seed + 1), **given))
    seconds = time.process_time() - began
    found: dict[str, Any] = {"pixels": path[-1].after[:, 0].numpy(), "seconds": seconds}
    found["calls"] = sum(rows) / n - (steps if row.kind == "free" else 0)
    if row.name in CURVES:
        target = torch.tensor(labels)
        found["curves"] = [
            [F.cross_entropy(one.logits(step.latents, torch.full((n,), int(step.timestep))), target) for step in path]
            for one in (networks.on, networks.off)
        ]
        found["timesteps"] = [step.timestep for step in path]
    return {name: np.asarray(value) for name, value in found.items()}


@torch.no_grad()
def measure(found: dict[str, np.ndarray], networks: Networks, judges: Judges) -> Metrics:
    """Everything in the tables; accuracies in percent."""
    x = torch.from_numpy(found["pixels"])[:, None]
    labels = torch.arange(len(x)) % CLASSES
    metrics: Metrics = {"calls": float(found["calls"]), "seconds": float(found["seconds"])}
    for name, classifier in (("on", networks.on), ("off", networks.off), ("held", judges.held)):
        logits = classifier.logits(x)
        metrics[name] = 100 * (logits.argmax(1) == labels).double().mean().item()
        metrics[f"ce_{name}"] = F.cross_entropy(logits, labels).item()
    metrics["gap"] = metrics["on"] - metrics["off"]
    return metrics | evaluate_generation(judges.features.features(x), judges.real)


def run_seed(seed: int, settings: Settings, judges: Judges, folder: Path) -> dict[str, dict[str, Any]]:
    """Per row its metrics and what was generated, from the folder where it is there already."""
    networks, results = prepare(seed, settings, folder), {}
    for row in (*CLASSIFIER_ROWS, *FREE_ROWS):
        path = folder / row.file
        if not path.is_file():
            made: dict[str, Any] = generate(networks, row, seed, settings)
            atomically(path, lambda part, made=made: np.savez(part, **made))
        with np.load(path) as stored:
            found = dict(stored)
        metrics = measure(found, networks, judges)
        results[f"{row.kind} {row.name}"] = {"metrics": metrics, "found": found}
        shown = "  ".join(f"{key} {metrics[key]:.2f}" for key in ("calls", "on", "off", "held", "fid", "recall"))
        print(f"seed {seed}  {row.kind:10s} {row.name:28s} {shown}", flush=True)
    return results


# --- matched strength --------------------------------------------------------------------------------------------------


def equal_strength(sweep: dict[float, Metrics], by: str, value: float) -> Metrics:
    """What full guidance gives at the scale where its `by` equals `value`: interpolated linearly in log s between the scales.

    The measured strength is made monotone in s first; beyond the sweep its end is taken.
    """
    scales = np.log(sorted(sweep))
    strength = np.array([sweep[s][by] for s in sorted(sweep)])
    rising = np.maximum.accumulate(strength if strength[-1] > strength[0] else -strength)
    rising = rising + 1e-9 * np.arange(len(rising))  # plateaus: the least scale that reaches it
    at = np.interp(value if strength[-1] > strength[0] else -value, rising, scales)
    names = ("fid", "recall", "precision", "held", "off", "gap")
    return {"scale": float(np.exp(at))} | {
        name: float(np.interp(at, scales, [sweep[s][name] for s in sorted(sweep)])) for name in names
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation) over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def margin(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the 95 % interval of the mean) over seeds, by Student's t."""
    mean, sd = spread(values)
    return mean, sd * float(student.ppf(0.975, len(values) - 1)) / math.sqrt(len(values)) if len(
        values
    ) > 1 else math.nan


MATCHES = {"off": "off accuracy", "held": "held accuracy", "ce_off": "off cross-entropy"}


def matched(seeds: list[dict[str, Metrics]]) -> list[dict[str, Any]]:
    """Gap minus full guidance, of the same seed, at the same strength (and at the same nominal scale)."""
    lines = []
    for row in (GAP[2], GAP[3], *SUMMED.values()):
        s = row.scale
        for by in ("scale", *MATCHES):
            scales, differences = [], {"fid": [], "recall": [], "precision": [], "gap": []}
            for results in seeds:
                gap = results[f"classifier {row.name}"]
                sweep = {scale: results[f"classifier {full.name}"] for scale, full in SWEEP.items()}
                full = {"scale": s, **sweep[s]} if by == "scale" else equal_strength(sweep, by, gap[by])
                scales.append(full["scale"])
                for name, values in differences.items():
                    values.append(gap[name] - full[name])
            line = {"row": row.name, "matched_by": by, "full_scale": spread(scales), "seeds": len(seeds)}
            lines.append(line | {name: margin(values) for name, values in differences.items()})
    return lines


def verdict(line: dict[str, Any], name: str, better: int) -> str:
    mean, half = line[name]
    if math.isnan(half) or abs(mean) <= half:
        return "no difference resolved"
    return "better" if mean * better > 0 else "worse"


def conclusions(lines: list[dict[str, Any]]) -> list[str]:
    """What the matched comparisons support, in words."""
    said = []
    for name in dict.fromkeys(line["row"] for line in lines):
        own = [line for line in lines if line["row"] == name]
        nominal, equal = own[0], own[1:]
        results = [(verdict(line, "fid", -1), verdict(line, "recall", 1)) for line in equal]
        fid, recall = ([pair[i] for pair in results] for i in (0, 1))
        if "worse" in fid + recall:
            meaning = "a loss at matched strength by at least one of the comparisons"
        elif fid.count("better") == len(fid):
            meaning = "a gain in FID at matched strength too, with no loss of recall resolved"
        elif "better" in fid:
            meaning = "parity, with a gain in FID by some of the comparisons only"
        else:
            meaning = "parity; no gain in FID is shown"
        at_equal = ", ".join(f"{line['fid'][0]:+.1f}" for line in equal)
        said.append(
            f"- {name}: FID {nominal['fid'][0]:+.1f} at the same nominal scale ({verdict(nominal, 'fid', -1)}), "
            f"{at_equal} at the same strength by {len(equal)} measures: {meaning}, at a quarter of the guide calls."
        )
    return said


# --- tables and pictures -----------------------------------------------------------------------------------------------

COLUMNS = {
    "calls": ("guide calls", 0),
    "on": ("on %", 1),
    "off": ("off %", 1),
    "gap": ("on - off", 1),
    "ce_on": ("CE on", 3),
    "ce_off": ("CE off", 3),
    "held": ("held %", 1),
    "fid": ("FID", 1),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "seconds": ("CPU s", 1),
}


def table(rows: Sequence[Row], seeds: list[dict[str, Metrics]], columns: Sequence[str]) -> list[str]:
    lines = ["| run | " + " | ".join(COLUMNS[c][0] for c in columns) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            mean, sd = spread([results[f"{row.kind} {row.name}"][column] for results in seeds])
            digits = COLUMNS[column][1]
            cells.append(f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if column not in ("calls", "seconds") else ""))
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return lines


def matched_table(lines: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| run | full guidance at the same | full s | Δ FID | Δ recall | Δ precision | Δ (on - off) | FID | recall |"
    ]
    rows.append("|---|" + "---|" * 8)
    for line in lines:
        cells = [line["row"], {"scale": "scale s", **MATCHES}[line["matched_by"]]]
        cells.append("{:.2f} ± {:.2f}".format(*line["full_scale"]))
        for name, digits in (("fid", 1), ("recall", 3), ("precision", 3), ("gap", 1)):
            cells.append(f"{line[name][0]:+.{digits}f} ± {line[name][1]:.{digits}f}")
        rows.append("| " + " | ".join([*cells, verdict(line, "fid", -1), verdict(line, "recall", 1)]) + " |")
    return rows


def report(seeds: list[dict[str, Metrics]], floor: Metrics, lines: list[dict[str, Any]], settings: Settings) -> str:
    n = settings.samples
    return "\n".join(
        [
            "# Guidance on digits",
            "",
            f"`python experiments/guidance/digits.py --seeds {len(seeds)}`: {n} samples of 8x8 digits against 1797 real ones, "
            f"{settings.steps} ancestral steps; mean ± standard deviation over {len(seeds)} seeds, each with its own denoiser, "
            "guide (on) and judge (off). `s` and `w'` are the nominal scales; rows with `5 s` or `2 s` use that multiple at "
            "the guided steps. Guide calls are per sample, counted by a hook.",
            "",
            f"Noise floor of the FID here: two random halves of the real digits {floor['halves']:.1f}; {n} real digits against "
            f"the other {1797 - n} {floor['samples']:.1f}.",
            "",
            "## Classifier guidance of the unlabelled model",
            "",
            *table(CLASSIFIER_ROWS, seeds, list(COLUMNS)),
            "",
            "## Classifier-free guidance of the class-conditional model",
            "",
            *table(FREE_ROWS, seeds, ("calls", "held", "fid", "precision", "recall", "seconds")),
            "",
            "## Matched strength",
            "",
            "Gap-compressed guidance (12 guide calls) minus full guidance (50) of the same seed, full guidance interpolated "
            f"over its scales; ± is half the 95 % interval over {len(seeds)} seeds (Student's t). The last columns say whether "
            "that interval leaves out 0.",
            "",
            *matched_table(lines),
            "",
            "In words:",
            "",
            *conclusions(lines),
            "",
        ]
    )


def draw_curves(seeds: list[dict[str, dict[str, Any]]], settings: Settings) -> Image.Image:
    """Cross-entropy of on and off on x_t along the way, ticks at guided steps."""
    rows = [row for row in CLASSIFIER_ROWS if row.name in CURVES]
    with chart(11, 2.9, len(rows)) as drawn:
        for axes, row in zip(drawn.panels, rows, strict=True):
            found = [results[f"classifier {row.name}"]["found"] for results in seeds]
            curves = np.mean([one["curves"] for one in found], 0)
            for values, name, colour in zip(curves, ("on (guides)", "off (judges)"), LINES, strict=False):
                axes.plot(values, color=colour, label=name, lw=1.6)
            axes.axhline(math.log(CLASSES), color="grey", lw=0.8, ls=":")
            guided = row.schedule(settings.steps, 0).positions
            axes.plot(
                guided, np.full(len(guided), 0.03), "|", color="black", ms=6, transform=axes.get_xaxis_transform()
            )
            axes.set(yscale="log", ylim=(0.04, 15), xlabel="step (ticks: guided)", title=row.name)
        drawn.axes.set_ylabel("cross-entropy on $x_t$ (dots: chance)")
        drawn.axes.legend(loc="lower left", bbox_to_anchor=(0, 0.06))
        return drawn.image()


def draw_quality(seeds: list[dict[str, Metrics]], floor: Metrics) -> Image.Image:
    """FID over strength, FID of everything at s=2, and FID over recall for classifier-free guidance."""

    def column(row: Row, name: str) -> np.ndarray:
        return np.array([results[f"{row.kind} {row.name}"][name] for results in seeds])

    def mean(row: Row, name: str) -> float:
        return float(column(row, name).mean())

    def error(row: Row, name: str) -> float:
        return float(column(row, name).std(ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else 0.0

    with chart(13, 4, 3) as drawn:
        strength, calls, free = drawn.panels
        for label, rows, colour in (("full, 50 calls", SWEEP, LINES[0]), ("gap r5 k1, 12 calls", GAP, LINES[1])):
            wrong, fid = [100 - mean(row, "off") for row in rows.values()], [mean(row, "fid") for row in rows.values()]
            errors = [error(row, "fid") for row in rows.values()]
            strength.errorbar(wrong, fid, errors, color=colour, marker="o", ms=4, lw=1.4, capsize=2, label=label)
            for s, x, y in zip(rows, wrong, fid, strict=True):
                place = (-4, -14) if rows is SWEEP else (2, 10)
                if s in (2.5, 3.5):  # too close
                    continue
                strength.annotate(f"{s:g}", (x, y), place, textcoords="offset points", color=colour, fontsize=8)
        strength.set(xscale="log", xlabel="error of the off classifier, %", ylabel="FID", ylim=(0, None))
        strength.set_title("Quality over strength (numbers: s)")
        strength.invert_xaxis()
        strength.set_xticks([30, 10, 5, 3, 2, 1], ["30", "10", "5", "3", "2", "1"])
        strength.set_xticks([], minor=True)
        strength.legend(loc="upper right")
        shown = [row for row in CLASSIFIER_ROWS if row.name == "none" or re.search(r"s=2( |$)", row.name)]
        shown.sort(key=lambda row: -mean(row, "fid"))
        fid, errors = ([value(row, "fid") for row in shown] for value in (mean, error))
        calls.barh(range(len(shown)), fid, xerr=errors, color=LINES[5], height=0.65, error_kw={"lw": 0.8})
        for y, row in enumerate(shown):
            text = f"{mean(row, 'calls'):.0f} calls, off {mean(row, 'off'):.0f} %"
            end = fid[y] + errors[y]
            calls.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=7)
        calls.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7.5)
        calls.set(xlabel="FID", xlim=(0, 1.45 * max(fid)), title="Classifier guidance at s=2")
        calls.grid(axis="y", visible=False)
        for w, colour in ((1, LINES[0]), (4, LINES[1])):
            chosen = [row for row in FREE_ROWS if row.name.endswith(f"w'={w}")]
            for row, mark in zip(chosen, "osD^vP*X", strict=True):
                free.plot(mean(row, "recall"), mean(row, "fid"), mark, color=colour, ms=6)
                if w == 1:
                    free.plot([], [], mark, color="grey", ms=6, label=f"{row.name[:-6]} ({mean(row, 'calls'):.0f})")
            free.plot([], [], lw=4, color=colour, label=f"w'={w}")
        unguided = FREE_ROWS[0]
        free.plot(mean(unguided, "recall"), mean(unguided, "fid"), "+", color="black", ms=9, mew=2, label="none (0)")
        free.set(xlabel="recall", ylabel="FID", ylim=(0, None))
        free.set_title("Classifier-free guidance (calls)")
        free.legend(loc="upper right", fontsize=7.5)
        for axes in (strength, free):
            axes.axhline(floor["samples"], color="grey", lw=0.8, ls=":")
        calls.axvline(floor["samples"], color="grey", lw=0.8, ls=":")
        return drawn.image()


SHOWN = (
    "classifier none",
    "classifier full, s=2",
    "classifier gap r5 k1, s=2",
    "classifier full, s=3",
    "classifier gap r5 k1, s=3",
    "classifier uniform r5, s=2 (UG)",
    "classifier early stop, 5 s, s=2",
    "free none",
    "free full, w'=4",
    "free mask r5 k1, w'=4",
    "free gap r5 k1, w'=4",
)


def draw_samples(results: dict[str, dict[str, Any]], each: int = 2) -> Image.Image:
    """Digits of the first seed, from the same noise in every row."""
    order = [digit + CLASSES * i for digit in range(CLASSES) for i in range(each)]
    with chart(8.1, 0.4 * len(SHOWN), 1, len(SHOWN)) as drawn:
        for axes, name in zip(drawn.panels, SHOWN, strict=True):
            pixels = np.pad(results[name]["found"]["pixels"][order], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
            axes.imshow(np.concatenate(pixels, 1), cmap="gray_r", vmin=-1, vmax=1, aspect="equal")
            label = name.replace("classifier ", "").replace("free ", "labelled, ")
            axes.set(xticks=[], yticks=[4.5], yticklabels=[label])
            axes.tick_params(length=0, labelsize=8)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        return drawn.image()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--runs", type=Path, default=Path("runs/guidance/digits"), help="networks and samples so far")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings()
    folder = arguments.runs / settings.digest
    judges = prepare_judges(settings, folder / "judges")
    halves, samples = noise_floor(judges.real, seeds=20), noise_floor(judges.real, settings.samples, seeds=20)
    floor = {"halves": halves, "samples": samples}
    results = [run_seed(seed, settings, judges, folder / f"seed{seed}") for seed in range(arguments.seeds)]
    seeds = [{name: one["metrics"] for name, one in found.items()} for found in results]
    lines = matched(seeds)
    text = report(seeds, floor, lines, settings)
    values = {"settings": vars(settings), "noise_floor": floor, "matched": lines, "seeds": seeds}
    atomically(arguments.out / "digits.md", lambda part: part.write_text(text))
    atomically(arguments.out / "digits.json", lambda part: part.write_text(json.dumps(values, indent=1) + "\n"))
    write(draw_curves(results, settings), arguments.out / "digits_curves.png")
    write(draw_quality(seeds, floor), arguments.out / "digits_quality.png")
    write(draw_samples(results[0]), arguments.out / "digits_samples.png")
    print(text)


if __name__ == "__main__":
    main()
