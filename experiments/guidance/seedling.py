"""Guidance on a fifth of the steps, on the embedded model: nine kinds of things by prompt (CFG) and by classifier.

    python experiments/guidance/seedling.py --data DATA --weights WEIGHTS --out experiments/guidance

Needs the classifiers of `classifiers.py`: `on` guides, `off` and `judge` only look. DATA holds the training pictures of the
seedling, WEIGHTS the ResNet-20 for CIFAR-10 whose 64 pooled features the Fréchet distance is measured in. Finished rows are
kept in runs/guidance/seedling, so a run that was stopped goes on. About an hour on one core.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifiers import KINDS, SIZE, read_kinds
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import denoscope as ds
from denoscope.benchmarks.generation import frechet_distance, precision_recall
from denoscope.denoisers.classifiers import load_classifier
from denoscope.images import atomically, write
from denoscope.images.chart import chart
from denoscope.images.draw import contact_sheet
from denoscope.sampling import ClassifierFree, ClassifierGuidance, GuidanceSchedule, sample

STEPS, EACH, SEEDS = 50, 12, (0, 1, 2)  # sampling steps, samples a kind and seed
R5, R5K2 = (partial(GuidanceSchedule.power, rate=5, k=k) for k in (1.0, 2.0))
INTERVAL = partial(GuidanceSchedule.interval, start=0.3, stop=0.8)


def rows() -> dict[str, dict[str, Any]]:
    """What is compared: settings of CFG, or of the classifier (without prompts)."""
    free: dict[str, Any] = {"CFG none": {"scale": 1.0, "schedule": GuidanceSchedule.none}}
    for w in (2.0, 3.0, 5.0):
        free[f"CFG full w={w:g}"] = {"scale": w}
    for w in (3.0, 5.0, 9.0):
        free[f"CFG mask r5 w={w:g}"] = {"scale": w, "schedule": R5}
    for w in (2.0, 3.0):
        free[f"CFG gap r5 w={w:g}"] = {"scale": w, "schedule": R5, "rule": "gap"}
    free["CFG reuse r5 w=2"] = {"scale": 2.0, "schedule": R5, "rule": "reuse"}
    free["CFG gap r5 k2 w=2"] = {"scale": 2.0, "schedule": R5K2, "rule": "gap"}
    free["CFG interval .3-.8 w=3"] = {"scale": 3.0, "schedule": INTERVAL}
    led: dict[str, Any] = {"classifier none": {"scale": 0.0}}
    for s in (1.0, 2.0, 4.0):
        led[f"classifier full s={s:g}"] = {"scale": s}
    for s in (1.0, 2.0, 4.0):
        led[f"classifier gap r5 s={s:g}"] = {"scale": s, "schedule": R5}
    led["classifier reuse r5 s=2"] = {"scale": 2.0, "schedule": R5, "rule": "reuse"}
    led["classifier uniform skip s=2"] = {"scale": 2.0, "schedule": R5, "rule": "mask"}
    return free | led


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, option A; the 64 pooled features of pictures in [-1, 1]."""

    def __init__(self, weights: Path):
        super().__init__()
        self.w = load_file(weights)

    def norm(self, x: Tensor, name: str) -> Tensor:
        w: dict[str, Any] = {key: self.w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(x, **w)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        x = F.relu(self.norm(F.conv2d(((x + 1) / 2 - mean) / std, self.w["conv1.weight"], padding=1), "bn1"))
        for level in (1, 2, 3):
            for j in range(3):
                name, stride = f"layer{level}.{j}", 2 if level > 1 and j == 0 else 1
                h = F.relu(self.norm(F.conv2d(x, self.w[f"{name}.conv1.weight"], None, stride, 1), f"{name}.bn1"))
                h = self.norm(F.conv2d(h, self.w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
                if stride == 2:
                    x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
                x = F.relu(h + x)
        return x.mean((2, 3))


def sampled(name: str, settings: dict[str, Any], seed: int, folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Samples of one row and seed with their record, from the folder when they are there."""
    file = folder / f"{name.replace(' ', '_').replace('=', '')}_{seed}.npz"
    if not file.exists():
        labels = [label for label in range(len(KINDS)) for _ in range(EACH)]
        by_classifier = name.startswith("classifier")
        options: dict[str, Any] = {"steps": STEPS, "seed": 1000 * seed, "at_once": 54, "solver": "ddpm"}
        if by_classifier:
            options |= {"labels": labels, "classifier": ClassifierGuidance(parts["on"], **settings)}
        else:
            options |= {"prompts": [f"a photo of a {KINDS[label]}" for label in labels]}
            if settings["scale"] != 1:
                options |= {"guidance": ClassifierFree(**settings)}
        made = sample(parts["denoiser"], **options)
        calls = made.record["network_calls"]
        numbers = {
            "calls": [calls["denoiser"], calls["classifier"]],
            "seconds": made.record["seconds"],
            "labels": labels,
        }
        atomically(file, lambda part: np.savez(part, x=made.latents.clamp(-1, 1).numpy(), **numbers))
        print(f"{name}, seed {seed}: {made.record['seconds']:.0f} s", flush=True)
    return dict(np.load(file))


def judged(made: dict[str, Any], parts: dict[str, Any], real: Tensor) -> dict[str, float]:
    x, labels = torch.from_numpy(made["x"]), torch.from_numpy(made["labels"])
    found: dict[str, float] = {"denoiser": float(made["calls"][0]), "guide": float(made["calls"][1])}
    found["seconds"] = float(made["seconds"])
    for who in ("on", "off", "judge"):
        with torch.no_grad():
            logits = parts[who].logits(x)
        found[who] = 100 * (logits.argmax(1) == labels).float().mean().item()
        found[f"ce_{who}"] = F.cross_entropy(logits, labels).item()
    features = parts["features"](x)
    found["fid"] = float(frechet_distance(features, real))
    found["precision"], found["recall"] = map(float, precision_recall(real, features))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder with cifar10_resnet20.safetensors")
    parser.add_argument("--out", type=Path, default=Path("experiments/guidance"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path("runs/guidance/seedling")
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        who: load_classifier(given.out / "classifiers" / f"{who}.safetensors", "cpu") for who in ("on", "off", "judge")
    }
    parts |= {
        "denoiser": ds.load("seedling", device="cpu"),
        "features": ResNet20(given.weights / "cifar10_resnet20.safetensors"),
    }
    pictures = [
        F.interpolate(torch.stack(some[:240]), (SIZE, SIZE), mode="area") for some in read_kinds(given.data, "train")
    ]
    real = parts["features"](torch.cat([some[:120] for some in pictures]))
    # the floor: as many real pictures of the same kinds as a row has samples, others than those compared with
    floors = [
        frechet_distance(
            parts["features"](torch.cat([some[120 + EACH * i : 120 + EACH * (i + 1)] for some in pictures])), real
        )
        for i in range(10)
    ]
    table: dict[str, dict[str, list[float]]] = {}
    for name, settings in rows().items():
        per_seed = [judged(sampled(name, settings, seed, folder, parts), parts, real) for seed in SEEDS]
        table[name] = {key: [one[key] for one in per_seed] for key in per_seed[0]}
    record = {
        "steps": STEPS, "samples": EACH * len(KINDS), "seeds": SEEDS, "kinds": KINDS,
        "fid_floor": [float(np.mean(floors)), float(np.std(floors, ddof=1))], "rows": table,
    }  # fmt: skip
    (given.out / "seedling.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "seedling.md").write_text(text(record))
    draw(record, given.out / "seedling_quality.png")
    sheets(folder, given.out / "seedling_samples.png")
    print(text(record))


def text(record: dict[str, Any]) -> str:
    """The table, mean and standard deviation over seeds."""

    def cell(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

    lines = [
        "| row | denoiser calls | guide calls | on % | off % | judge % | CE on / off | FID | precision | recall | seconds |"
    ]
    lines += ["|---" + "|---:" * 10 + "|"]
    for name, row in record["rows"].items():
        entropies = f"{np.mean(row['ce_on']):.2f} / {np.mean(row['ce_off']):.2f}"
        cells = [name, f"{np.mean(row['denoiser']):.0f}", f"{np.mean(row['guide']):.0f}"]
        cells += [cell(row[who], 1) for who in ("on", "off", "judge")] + [entropies]
        cells += [cell(row[key], 2) for key in ("fid", "precision", "recall")] + [f"{np.mean(row['seconds']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    floor = record["fid_floor"]
    about = (
        f"{record['steps']} steps DDPM, {record['samples']} samples a row and seed, {len(record['seeds'])} seeds: mean ± sd. "
        "FID in the 64 pooled features of a ResNet-20 for CIFAR-10, against 120 training pictures of each kind; "
        f"as many other real pictures as a row has samples score {floor[0]:.2f} ± {floor[1]:.2f}. "
        "Seconds for all samples of a seed, on one core shared with other work. Made by `seedling.py`."
    )
    return about + "\n\n" + "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Quality against what the independent judge recognises: full guidance and a fifth of it at many strengths."""
    groups = {
        "full": ("CFG full", "classifier full"),
        "mask r5": ("CFG mask r5", "classifier uniform"),
        "gap r5": ("CFG gap r5 w", "classifier gap r5 s"),
        "other": ("CFG reuse", "CFG gap r5 k2", "CFG interval", "classifier reuse"),
        "none": ("CFG none", "classifier none"),
    }
    with chart(9, 3.8, columns=2) as drawn:
        for axes, kind in zip(drawn.panels, ("CFG", "classifier"), strict=True):
            for label, prefixes in groups.items():
                some = [
                    row for name, row in record["rows"].items() if name.startswith(prefixes) and name.startswith(kind)
                ]
                x, y, dx, dy = (
                    [f(row[key]) for row in some]
                    for key, f in (("judge", np.mean), ("fid", np.mean), ("judge", np.std), ("fid", np.std))
                )
                style = "o-" if label in ("full", "gap r5", "mask r5") else "s"
                axes.errorbar(x, y, dy, dx, style, ms=4, lw=1, elinewidth=0.7, label=label)
            axes.axhline(record["fid_floor"][0], color="0.6", ls=":", lw=1)
            axes.set(xlabel="recognised by the judge, %", ylabel="Fréchet distance", title=f"{kind} guidance")
        drawn.panels[0].legend()
        write(drawn.image(), path)


def sheets(folder: Path, path: Path) -> None:
    """The same seeds under five settings, a column for each kind."""
    shown = [
        "CFG none",
        "CFG full w=3",
        "CFG mask r5 w=5",
        "CFG gap r5 w=2",
        "classifier full s=2",
        "classifier gap r5 s=2",
    ]
    images, labels = [], []
    for name in shown:
        x = np.load(folder / f"{name.replace(' ', '_').replace('=', '')}_0.npz")["x"]
        for k, kind in enumerate(KINDS):
            pixels = torch.from_numpy(x[k * EACH])
            images.append(ds.Picture((pixels + 1) / 2).image())
            labels.append(name if k == 0 else kind)
    write(contact_sheet(images, labels, len(KINDS), 96), path)


if __name__ == "__main__":
    main()
