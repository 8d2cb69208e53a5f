"""Three small classifiers for the guidance experiments on the seedling: one that guides, one that does not, one that judges.

    nice -n 5 python experiments/guidance/classifiers.py --data DATA --out experiments/guidance/classifiers

`on` and `off` are noise-aware and saw disjoint halves of the training images; `judge` is clean and saw all of them. The classes
are kinds of things that the seedling's prompts know (the last word of a phrase in its recipe). DATA holds `birds`, `faces` and
`tiny_imagenet30`, each with `train.parquet` (training) and `dev.parquet` (the table). About ten minutes each on one core;
`--only on` trains one, and the table covers what is there.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import denoscope as ds
from denoscope.denoisers.classifiers import load_classifier, save_classifier
from denoscope.training import read_denoiser_config
from denoscope.training.classifier import accuracy, as_square, small_classifier, train_classifier
from denoscope.training.data import read_source

KINDS = ("face", "bird", "dog", "cat", "car", "bus", "butterfly", "bear", "elephant")
SIZE, STORED = 32, 48  # pixels: of the networks, of the pictures that crops are cut from
TIMESTEPS = (0, 100, 300, 500, 700, 900)
RECIPE = Path(ds.__file__).parent / "seedling" / "recipe.toml"
SETTINGS = {"on": (0, "even"), "off": (1, "odd"), "judge": (2, "all")}  # seed, which images of a kind


def read_kinds(root: Path, split: str) -> list[list[Tensor]]:
    """Per kind its pictures, `[3, STORED, STORED]` in [-1, 1]."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for source in read_denoiser_config(RECIPE).sources:
        for example in read_source(replace(source, path=source.path.replace("train", split)), root):
            if (kind := example.phrase.split()[-1]) in found:
                found[kind].append(as_square(example.image, STORED))
    return list(found.values())


def gathered(pictures: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """All pictures and their labels."""
    labels = [label for label, some in enumerate(pictures) for _ in some]
    return torch.stack([one for some in pictures for one in some]), torch.tensor(labels)


def train(name: str, data: Path, out: Path, steps: int) -> None:
    seed, which = SETTINGS[name]
    start, stride = {"even": (0, 2), "odd": (1, 2), "all": (0, 1)}[which]
    images, labels = gathered([some[start::stride] for some in read_kinds(data, "train")])
    schedule = ds.load("seedling", device="cpu").schedule if name != "judge" else None

    def report(step: int, loss: float, seconds: float) -> None:
        if step % 100 == 0:
            print(f"{name}: step {step}/{steps}  loss {loss:.3f}  {seconds:.2f} s", flush=True)

    config = small_classifier(SIZE, len(KINDS))
    options = {"steps": steps, "seed": seed, "crop": (0.4, 1.0), "device": "cpu"}
    classifier = train_classifier(images, labels, schedule, config, names=KINDS, report=report, **options)
    save_classifier(classifier, out / f"{name}.safetensors", "float16")


def table(data: Path, out: Path) -> None:
    """Mean over the kinds of the share that is told rightly, on pictures that nobody was trained on; kinds weigh the same."""
    schedule, kinds, rows = ds.load("seedling", device="cpu").schedule, read_kinds(data, "dev"), {}
    for name in SETTINGS:
        if not (file := out / f"{name}.safetensors").exists():
            continue
        classifier = load_classifier(file, "cpu")
        shares = {
            t: [accuracy(classifier, *gathered([some if k == kind else [] for k in range(len(KINDS))]), schedule, t)
                for kind, some in enumerate(kinds)]
            for t in TIMESTEPS
        }  # fmt: skip
        parameters = sum(weights.numel() for weights in classifier.module.parameters())
        rows[name] = {"parameters": parameters, "bytes": file.stat().st_size, "accuracy": shares}
    about = {"kinds": KINDS, "dev_images": [len(some) for some in kinds], "classifiers": rows}
    (out / "classifiers.json").write_text(json.dumps(about, indent=1) + "\n")
    mean = {name: {t: sum(v) / len(v) for t, v in row["accuracy"].items()} for name, row in rows.items()}
    lines = [
        "Share of held-out pictures (dev files) told rightly, mean over the nine kinds, at noise level t of the seedling's",
        "schedule; chance is 0.11. `judge` knows no noise and is meant for t = 0.",
        "",
        "| classifier | trained on | " + " | ".join(f"t = {t}" for t in TIMESTEPS) + " |",
        "|---" * (len(TIMESTEPS) + 2) + "|",
    ]
    for name, values in mean.items():
        half = {"even": "one half of the pictures", "odd": "the other half", "all": "all, without noise"}
        cells = [name, half[SETTINGS[name][1]], *(f"{value:.2f}" for value in values.values())]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Per kind, t = 0:", "", "| classifier | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    lines += [f"| {n} | " + " | ".join(f"{v:.2f}" for v in row["accuracy"][0]) + " |" for n, row in rows.items()]
    lines += ["| pictures | " + " | ".join(str(len(some)) for some in kinds) + " |"]
    (out / "classifiers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "classifiers")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="train only this one (may be repeated)")
    parser.add_argument("--table", action="store_true", help="train nothing, only measure")
    parser.add_argument("--steps", type=int, default=2200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for chosen in [] if given.table else given.only or SETTINGS:
        train(chosen, given.data, given.out, given.steps)
    table(given.data, given.out)
