"""PCK of a pixel-space denoiser over timestep x site x size, and the table against simple baselines.

    python experiments/seedling/evaluate.py sweep --data DATA     # birds and faces dev: chooses the presets
    python experiments/seedling/evaluate.py table --data DATA     # spair_style, every category, all pairs
    python experiments/seedling/evaluate.py ensemble --data DATA  # ensemble size and prompt at the chosen preset

DATA holds `birds/dev.parquet`, `faces/dev.parquet` and `spair_style/`. Results go beside this file.
"""

import argparse
import io
import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.progress import track

import denoscope as ds
from denoscope.benchmarks import Pair, pck, read_pairs
from denoscope.features import feature_maps, recipe

HERE = Path(__file__).parent
# PCK@0.1 bbox per image on spair_style, as measured by those who made the set (dense SIFT: the better of two patch sizes)
REFERENCE = {
    "bird": {"chance": 4.4, "copy": 17.3, "copy_bbox": 17.2, "rgb": 7.0, "sift": 21.7},
    "face": {"chance": 0.4, "copy": 11.3, "copy_bbox": 33.1, "rgb": 6.4, "sift": 18.0},
    "cathead": {"chance": 0.9, "copy": 4.3, "copy_bbox": 45.6, "rgb": 3.9, "sift": 6.3},
    "person": {"chance": 2.3, "copy": 10.2, "copy_bbox": 14.2, "rgb": 3.8, "sift": 9.0},
}
# 68-point landmarks: eyes' corners, nose, mouth, jaw, brows (the same 20 as spair_style uses)
LANDMARKS = [36, 39, 42, 45, 30, 31, 35, 48, 54, 51, 57, 8, 0, 16, 4, 12, 17, 21, 22, 26]


def dev_pairs(root: Path, name: str, count: int, seed: int = 0) -> list[tuple[Pair, ds.Picture, ds.Picture]]:
    """Random pairs of `birds` or `faces` dev. Faces are cropped again at random, since they come centred."""
    rows = pq.read_table(root / name / "dev.parquet").to_pylist()
    rng, pairs = random.Random(seed), []
    while len(pairs) < count:
        chosen, sides = rng.sample(rows, 2), []
        for row in chosen:
            image = Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")
            points = np.array(row["kps_xy"], dtype=np.float64)
            visible = np.array(row.get("kps_visible", [True] * len(points)), dtype=bool)
            if name == "faces":
                points, visible = points[LANDMARKS], visible[LANDMARKS]
                side = rng.randint(80, 128)
                left, top = rng.randint(0, 128 - side), rng.randint(0, 128 - side)
                image = image.crop((left, top, left + side, top + side))
                points = points - np.array([left, top])
            inside = ((points >= 0) & (points <= np.array(image.size) - 1)).all(1)
            sides.append((ds.read(image), points, visible & inside))
        both = sides[0][2] & sides[1][2]
        if both.sum() < 3:
            continue
        (one, p, _), (two, q, _) = sides
        (x1, y1), (x2, y2) = ([0, 0], two.size) if name == "birds" else (q[both].min(0), q[both].max(0))
        box = float(x1), float(y1), float(x2), float(y2)
        points = [torch.from_numpy(v[both]) for v in (p, q)]
        pairs.append((Pair("", "", name, points[0], points[1], box, two.size), one, two))
    return pairs


def correctness(
    denoiser: Any,
    pairs: Sequence[tuple[Pair, ds.Picture, ds.Picture]],
    chosen: Any,
    sites: Sequence[str],
    alphas: Iterable[float] = (0.1,),
) -> dict[tuple[str, float], list[torch.Tensor]]:
    """Per site and alpha, which keypoints of every pair are right; every picture goes through the network once."""
    cache: dict[int, dict[str, ds.FeatureMap]] = {}
    found: dict[tuple[str, float], list[torch.Tensor]] = {}
    for pair, one, two in pairs:
        for picture in (one, two):
            if picture.digest not in cache:
                cache[picture.digest] = feature_maps(denoiser, picture, chosen, sites)
        for site in sites:
            points = ds.transfer(cache[one.digest][site], cache[two.digest][site], pair.source_points).points
            for alpha in alphas:
                found.setdefault((site, alpha), []).append(pair.correct(points, alpha))
    return found


def sweep(arguments: argparse.Namespace) -> None:
    """t x site x size on dev pairs; writes sweep.json, sweep.md, sweep.png."""
    denoiser = ds.load(arguments.model)
    results = []
    for name in ("birds", "faces"):
        pairs = dev_pairs(arguments.data, name, arguments.pairs)
        grid = [(size, t) for size in arguments.sizes for t in arguments.t]
        for size, t in track(grid, name):
            chosen = recipe(denoiser, t=t, site=arguments.sites[0], ensemble=arguments.ensemble, size=size)
            for (site, alpha), right in correctness(denoiser, pairs, chosen, arguments.sites).items():
                row = {"set": name, "size": size, "t": t, "site": site, "alpha": alpha, "pck": pck(right)[0]}
                results.append({**row, "pairs": len(pairs), "ensemble": arguments.ensemble})
        (HERE / "sweep.json").write_text(json.dumps(results, indent=0) + "\n")
    lines = ["# Sweep on dev pairs", "", f"PCK@0.1 per image, percent; {arguments.pairs} random pairs a set, ensemble "]
    lines[-1] += f"{arguments.ensemble}. Standard error about 2 points."
    figure, axes = plt.subplots(2, len(arguments.sizes), figsize=(3.4 * len(arguments.sizes), 7), squeeze=False)
    for i, name in enumerate(("birds", "faces")):
        top = max(r["pck"] for r in results if r["set"] == name)
        for j, size in enumerate(arguments.sizes):
            table = np.array(
                [
                    [
                        next(
                            r["pck"]
                            for r in results
                            if (r["set"], r["size"], r["t"], r["site"]) == (name, size, t, site)
                        )
                        for t in arguments.t
                    ]
                    for site in arguments.sites
                ]
            )
            axis = axes[i, j]
            axis.imshow(table, vmin=0, vmax=top, cmap="viridis", aspect="auto")
            axis.set_title(f"{name}, {size}")
            axis.set_xticks(range(len(arguments.t)), arguments.t)
            axis.set_yticks(range(len(arguments.sites)), arguments.sites if j == 0 else [""] * len(arguments.sites))
            axis.set_xlabel("timestep t")
            for y, x in np.ndindex(*table.shape):
                value = table[y, x]
                colour = "black" if value > 0.6 * top else "white"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
            lines += ["", f"## {name}, size {size}", "", "| site | " + " | ".join(f"t={t}" for t in arguments.t) + " |"]
            lines += ["|---|" + "---|" * len(arguments.t)]
            lines += [
                f"| {site} | " + " | ".join(f"{v:.1f}" for v in row) + " |"
                for site, row in zip(arguments.sites, table, strict=True)
            ]
    figure.tight_layout()
    figure.savefig(HERE / "sweep.png", dpi=110)
    (HERE / "sweep.md").write_text("\n".join(lines) + "\n")
    best = sorted(results, key=lambda r: -r["pck"])
    for name in ("birds", "faces"):
        print(name, *[r for r in best if r["set"] == name][:5], sep="\n  ")


def table(arguments: argparse.Namespace) -> None:
    """Every category of spair_style at the model's semantic preset; writes table.json and table.md."""
    denoiser = ds.load(arguments.model)
    chosen = recipe(denoiser)
    untrained = None if arguments.no_control else random_weights(denoiser)
    rows, started = [], time.perf_counter()
    for category, reference in REFERENCE.items():
        pairs = [
            (pair, ds.read(pair.source), ds.read(pair.target))
            for pair in read_pairs(arguments.data / "spair_style", categories=[category])
        ]
        row: dict[str, Any] = {"category": category, "pairs": len(pairs), **reference}
        for label, model in (("random weights", untrained), ("seedling", denoiser)):
            if model is None:
                continue
            right = correctness(model, pairs, chosen, [chosen.site], (0.05, 0.1, 0.2))
            for (_, alpha), values in right.items():
                row[f"{label} @{alpha}"], row[f"{label} @{alpha} per point"] = pck(values)
        rows.append(row)
        print(row, flush=True)
    settings = {"t": chosen.t, "site": chosen.site, "size": chosen.size, "ensemble": chosen.ensemble}
    (HERE / "table.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    columns = ["chance", "copy", "copy_bbox", "rgb", "sift", "random weights @0.1", "seedling @0.1"]
    columns += ["seedling @0.1 per point", "seedling @0.05", "seedling @0.2"]
    lines = [
        "# spair_style, PCK (bbox), percent",
        "",
        f"Per image pair unless said; {', '.join(f'{k} {v}' for k, v in settings.items())}, empty prompt.",
        "",
        "| category | pairs | " + " | ".join(columns) + " |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for row in rows:
        values = " | ".join(f"{row[c]:.1f}" if c in row else "" for c in columns)
        lines.append(f"| {row['category']} | {row['pairs']} | {values} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\n{time.perf_counter() - started:.0f} s")


def random_weights(denoiser: Any) -> Any:
    """The same architecture untrained: what position and colour alone give."""
    from denoscope.denoisers.unet import UNetDenoiser

    torch.manual_seed(0)
    unet = type(denoiser.unet).from_config(denoiser.unet.config).to(denoiser.device).eval()
    return UNetDenoiser(unet, denoiser.schedule, text=denoiser.text, name="random", presets=denoiser.presets)


def ensemble(arguments: argparse.Namespace) -> None:
    """Ensemble size and prompt at the chosen preset on dev pairs; writes ensemble.md."""
    denoiser = ds.load(arguments.model)
    words = {"birds": "a photo of a bird", "faces": "a photo of a face"}
    lines = ["# Ensemble size and prompt", "", f"PCK@0.1 per image, {arguments.pairs} dev pairs a set.", ""]
    lines += ["| set | prompt | " + " | ".join(f"E={e}" for e in arguments.ensembles) + " |"]
    lines += ["|---|---|" + "---|" * len(arguments.ensembles)]
    for name, word in words.items():
        pairs = dev_pairs(arguments.data, name, arguments.pairs)
        for prompt in ("", word, "a photo of a school bus"):
            cells = []
            for members in arguments.ensembles:
                chosen = recipe(denoiser, ensemble=members, prompt=prompt)
                cells.append(pck(correctness(denoiser, pairs, chosen, [chosen.site])[chosen.site, 0.1])[0])
            lines.append(f"| {name} | {prompt or '(empty)'} | " + " | ".join(f"{c:.1f}" for c in cells) + " |")
            print(lines[-1], flush=True)
    (HERE / "ensemble.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("sweep", "table", "ensemble"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="seedling")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--ensemble", type=int, default=2)
    parser.add_argument("--ensembles", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--t", type=int, nargs="+", default=[0, 25, 50, 100, 200, 300, 500])
    parser.add_argument("--sizes", nargs="+", default=["long48", "long64", "long96", "long128"])
    sites = ["down.2", "mid", "up.0.resnet.0", "up.0.resnet.1", "up.0", "up.1.resnet.1", "up.1", "up.2"]
    parser.add_argument("--sites", nargs="+", default=sites)
    parser.add_argument("--no-control", action="store_true", help="skip the untrained control in the table")
    arguments = parser.parse_args()
    {"sweep": sweep, "table": table, "ensemble": ensemble}[arguments.job](arguments)


if __name__ == "__main__":
    main()
