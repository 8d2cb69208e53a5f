"""Do the content-shift score and GATE's check foretell whether a technique helps? Measured on the embedded model.

    python experiments/content-shift/evidence.py pairs --of birds --data DATA     (then --of faces)
    python experiments/content-shift/evidence.py camvid --data DATA
    python experiments/content-shift/evidence.py amalgam --of birds --data DATA
    python experiments/content-shift/evidence.py report

`pairs`: PCK@0.1 of random pairs of dev pictures (cropped at random) under every technique, timestep and site, the score of 40
of these pictures and the check of 24. `camvid`: few-shot mIoU, score and check of the street scenes. `amalgam`: PCK of several
techniques made one. Records are kept in runs/, and a stage that was stopped goes on. `report` writes tables.md and the figures.
Techniques are trained by techniques.py.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import denoscope as ds
from denoscope.benchmarks.keypoints import Keypoints
from denoscope.features import feature_sets, varied
from denoscope.features.bootstrap import interval
from denoscope.features.dift import recipe
from denoscope.features.gate import gate
from denoscope.features.shift import content_shift
from denoscope.images import atomically, write
from denoscope.images.chart import chart

HERE = Path(__file__).parent
RUNS, WEIGHTS = Path("runs/content-shift"), HERE / "weights"
TIMES, SITES, SIZE, DRAWS = (20, 101, 261), ("up.0", "up.1", "up.2"), "long64", 2
CURVE = (5, 20, 50, 101, 180, 261, 400, 600)
KIND = {"birds": "bird", "faces": "face", "camvid": "car"}
MEASURES = ("psnr", "ssim", "edge_f1")


def techniques(of: str) -> dict[str, dict[str, Any]]:
    """What is compared; those after "label + canny" are read alike but cannot be told by image-to-image."""
    kind, other = KIND[of], "bird" if of == "faces" else "face"
    canny, mine, its = (str(WEIGHTS / name) for name in ("canny", f"lora-{of}.safetensors", "lora-birds.safetensors"))
    its = str(WEIGHTS / "lora-camvid.safetensors") if of == "birds" else its
    return {
        "label": {"prompt": f"a photo of a {kind}"},
        "wrong label": {"prompt": f"a photo of a {other}"},
        "canny": {"control": canny},
        "canny at half": {"control": f"{canny}@0.5"},
        "LoRA": {"lora": mine},
        "LoRA of others": {"lora": its},
        "guidance 3": {"prompt": f"a photo of a {kind}", "guidance": 3.0},
        "label + canny": {"prompt": f"a photo of a {kind}", "control": canny},
        "second t": {"second_t": 150},
        "denoised 5": {"control": canny, "denoise_from": 5},
        "img2img 0.3": {"img2img": 0.3},
    }


def at(of: str, t: int) -> dict[str, dict[str, Any]]:
    """The techniques at a timestep; short denoising begins five above it."""
    found = {"plain": {}, **techniques(of)}
    return {name: {**one, "denoise_from": t + 5} if "denoise_from" in one else one for name, one in found.items()}


def told_by_images(of: str) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in techniques(of).items() if name not in ("second t", "denoised 5", "img2img 0.3")}


def measure_pairs(of: str, data: Path, count: int) -> None:
    denoiser = ds.load("seedling", device="cpu")
    benchmark = drawn_pairs(of, data, count)
    items = benchmark.items()
    base = recipe(denoiser, t=TIMES[0], size=SIZE, ensemble=1)
    recipes = {f"{name}@{t}": varied(denoiser, base, {**one, "t": t}) for t in TIMES for name, one in at(of, t).items()}
    path = RUNS / f"pairs-{of}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.is_file() else set()
    for n, item in enumerate(items):
        if item.key in done:
            continue
        pair = item.data
        maps = [
            feature_sets(denoiser, benchmark.picture(name), recipes, sites=SITES) for name in (pair.source, pair.target)
        ]
        right = {}
        for name in recipes:
            for site in SITES:
                source, target = (found[name][site] for found in maps)
                points = ds.transfer(source, target, source.frame.clamped(pair.source_points)).points
                right[f"{name}@{site}"] = pair.correct(points, 0.1, "kp").double().mean().item()
        with path.open("a") as file:
            file.write(json.dumps({"key": item.key, "right": right}) + "\n")
        if n % 10 == 9:
            print(f"{of}: {n + 1} of {len(items)} pairs", flush=True)
    pictures = [benchmark.picture(item.data.source) for item in items[:40]]
    measure_shift(of, denoiser, pictures)


def measure_shift(of: str, denoiser: Any, pictures: list[Any]) -> None:
    """Score and check."""
    settings = {"size": SIZE}
    for t in TIMES:
        path = RUNS / f"score-{of}-{t}.json"
        if not path.is_file():
            shared = {"t": t, "sites": list(SITES), "settings": settings, "draws": DRAWS}
            found = content_shift(denoiser, pictures, {k: v for k, v in at(of, t).items() if k != "plain"}, **shared)
            found.save(path)
            print(f"{of}: score at t = {t}", flush=True)
    path = RUNS / f"curve-{of}.json"
    if not path.is_file():
        label = {"label": techniques(of)["label"]}
        found = content_shift(denoiser, pictures, label, t=CURVE, sites=list(SITES), settings=settings, draws=DRAWS)
        write(found.draw_curves("diff"), HERE / f"curve_{of}.png")
        found.save(path)
    path = RUNS / f"gate-{of}.json"
    if not path.is_file():
        found = gate(
            denoiser, pictures[:24], told_by_images(of), settings=settings, wrong_control=True, seeds=2, steps=12
        )
        write(found.draw(), HERE / f"gate_{of}.png")
        found.save(path)
        print(f"{of}: image-to-image", flush=True)


def measure_camvid(data: Path, runs: int, shots: int) -> None:
    from denoscope.benchmarks.running import FeatureStore, Method, evaluate
    from denoscope.benchmarks.segmentation import CamVid
    from denoscope.features import Dift

    class Small(CamVid):
        """Predictions are compared at 160 x 120, a ninth of the pixels."""

        def measured(self) -> int:
            return 160

    denoiser = ds.load("seedling", device="cpu")
    benchmark = Small(data / "camvid", runs=runs, shots=shots, pixels=200)
    base = recipe(denoiser, size=SIZE, ensemble=1, site="+".join(SITES))
    compared = []
    for t in (20, 101):
        for name, one in at("camvid", t).items():
            store = FeatureStore(Dift(denoiser, varied(denoiser, base, {**one, "t": t})))
            run = lambda item, store=store: benchmark.run(item, store)  # noqa: E731
            compared.append(Method(f"{name}@{t}", run, store.settings))
    report = evaluate(benchmark, compared, RUNS / "camvid")
    found = {
        method.name: {
            "row": report.rows[method.name][0],
            "runs": by_item(benchmark, RUNS / "camvid", method.name, "mIoU"),
        }
        for method in compared
    }
    atomically(RUNS / "camvid.json", lambda path: path.write_text(json.dumps(found, indent=1, default=str)))
    pictures = [ds.read(path) for path in sorted((data / "camvid" / "val").iterdir())[:18]]
    measure_shift("camvid", denoiser, pictures)


def by_item(benchmark: Any, folder: Path, method: str, column: str) -> list[float]:
    """A column of the table for every item by itself, from the records of a method."""
    safe = "".join(c if c.isalnum() or c in "-.@" else "_" for c in method)
    lines = next((folder / "records").glob(f"{benchmark.name}-{safe}-*.jsonl")).read_text().splitlines()
    records = {one["key"]: one["record"] for one in map(json.loads, lines)}
    return [benchmark.rows([item], [records[item.key]])[0][column] for item in benchmark.items()]


def drawn_pairs(of: str, data: Path, count: int) -> Keypoints:
    own = {"birds": (), "faces": (36, 39, 42, 45, 30, 31, 35, 48, 54, 51, 57, 8, 0, 16, 4, 12, 17, 21, 22, 26)}[of]
    return Keypoints(data / of / "dev.parquet", pairs_drawn=count, points=own, jitter=True, seed=5, label=KIND[of])


def measure_amalgam(of: str, data: Path, count: int) -> None:
    """Maps of four techniques as one, on the pairs of `pairs`, at the preset's timestep."""
    from denoscope.benchmarks.running import FeatureStore, Method, evaluate
    from denoscope.features import Amalgam, Dift

    denoiser, benchmark = ds.load("seedling", device="cpu"), drawn_pairs(of, data, count)
    base = Dift(denoiser, recipe(denoiser, t=20, size=SIZE, ensemble=1, site="up.1"))
    parts = {"plain": {}, **{name: techniques(of)[name] for name in ("label", "canny", "LoRA")}}
    compared = {name: Amalgam(base, {name: one}) for name, one in parts.items()}
    compared |= {f"four: {how}": Amalgam(base, parts, how) for how in ("mean", "concat", "standard", "pca:64")}
    compared["plain, four draws"] = Amalgam(replace(base, recipe=replace(base.recipe, ensemble=4)), {"plain": {}})
    compared["plain at 20 and 150"] = Amalgam(base, {"plain": {}, "later": {"t": 150}})
    found = []
    for name, extractor in compared.items():
        store = FeatureStore(extractor)
        found.append(Method(name, lambda item, store=store: benchmark.run(item, store), store.settings))
    evaluate(benchmark, found, RUNS / f"amalgam-{of}")
    rows = {name: by_item(benchmark, RUNS / f"amalgam-{of}", name, "kp@0.1") for name in compared}
    atomically(RUNS / f"amalgam-{of}.json", lambda path: path.write_text(json.dumps(rows, indent=1)))


def gains(of: str) -> Iterator[tuple[str, int, str, np.ndarray, np.ndarray]]:
    """(technique, t, site, PCK of every pair under plain, under the technique), percent."""
    records = [json.loads(line)["right"] for line in (RUNS / f"pairs-{of}.jsonl").read_text().splitlines()]
    for t in TIMES:
        for site in SITES:
            plain = 100 * np.array([one[f"plain@{t}@{site}"] for one in records])
            for name in techniques(of):
                yield name, t, site, plain, 100 * np.array([one[f"{name}@{t}@{site}"] for one in records])


def score_rows(of: str, t: int) -> dict[tuple[str, str], Mapping[str, Any]]:
    rows = json.loads((RUNS / f"score-{of}-{t}.json").read_text())["rows"]
    return {(row["technique"], row["site"]): row for row in rows}


def gate_rows(of: str) -> dict[str, Mapping[str, Any]]:
    return {row["technique"]: row for row in json.loads((RUNS / f"gate-{of}.json").read_text())["rows"]}


def likeness(row: Mapping[str, Any]) -> float:
    """The three changes as one number, each in units of the margin that counts as no change."""
    return float(np.mean([row[f"{m}_change"] / margin for m, margin in zip(MEASURES, (0.1, 0.005, 0.01), strict=True)]))


def correlation(x: list[float], y: list[float]) -> str:
    found: Any = spearmanr(x, y)
    return f"{found.statistic:+.2f} (p {found.pvalue:.2f}, n {len(x)})"


def span(values: tuple[float, float] | None) -> str:
    return "" if values is None else f" [{values[0]:+.1f}, {values[1]:+.1f}]"


def report() -> None:
    lines = ["# Content shift on the embedded model, measured", ""]
    for of in ("birds", "faces"):
        if (RUNS / f"pairs-{of}.jsonl").is_file():
            lines += report_pairs(of)
        if (RUNS / f"amalgam-{of}.json").is_file():
            rows = json.loads((RUNS / f"amalgam-{of}.json").read_text())
            rows = {name: np.array(values) for name, values in rows.items()}
            lines += [f"Amalgams at up.1, t = 20, {of} | PCK@0.1 | against plain", "---|---|---"]
            for name, own in rows.items():
                change = own - rows["plain"]
                lines.append(f"{name} | {own.mean():.1f} | {change.mean():+.1f}{span(interval(change))}")
            lines.append("")
    if (RUNS / "gate-camvid.json").is_file():
        lines += report_camvid()
    atomically(HERE / "tables.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))


def report_pairs(of: str) -> list[str]:
    table = list(gains(of))
    verdicts = gate_rows(of)
    n = len(table[0][3])
    lines = [
        f"## {of.capitalize()}: {n} pairs, PCK@0.1 (box of the points), change against plain with 95 % intervals",
        "",
    ]
    for t in TIMES:
        rows = score_rows(of, t)
        plain = {site: np.mean(p) for _, tt, site, p, _ in table if tt == t}
        head = " | ".join(
            f"{site}: plain {plain[site]:.1f}, score {rows['plain', site]['score']:.2f}" for site in SITES
        )
        lines += [f"t = {t} | {head} | GATE", "---|" + "---|" * len(SITES) + "---"]
        for name in techniques(of):
            cells = []
            for site in SITES:
                p, q = next((p, q) for nn, tt, s, p, q in table if (nn, tt, s) == (name, t, site))
                cells.append(f"{np.mean(q - p):+.1f}{span(interval(q - p))}; score {rows[name, site]['score']:.2f}")
            lines.append(
                f"{name} | " + " | ".join(cells) + f" | {verdicts[name]['verdict'] if name in verdicts else '-'}"
            )
        lines.append("")
    lines += [
        "Rank correlation (Spearman) over techniques of the change in PCK with",
        "",
        "t, site | score | GATE's likeness",
        "---|---|---",
    ]
    every: tuple[list[float], list[float]] = ([], [])
    for t in TIMES:
        rows = score_rows(of, t)
        for site in SITES:
            change = {name: float(np.mean(q - p)) for name, tt, s, p, q in table if (tt, s) == (t, site)}
            gain = [rows[name, site]["gain"] for name in change]
            told = [name for name in change if name in verdicts]
            by_gate = correlation([likeness(verdicts[name]) for name in told], [change[name] for name in told])
            lines.append(f"{t}, {site} | {correlation(gain, list(change.values()))} | {by_gate}")
            every[0].extend(gain)
            every[1].extend(change.values())
    lines += [f"all together | {correlation(*every)} |", ""]
    lines += agreement(of, table, verdicts)
    figure(of, table)
    return lines


def agreement(of: str, table: list[Any], verdicts: Mapping[str, Any]) -> list[str]:
    """How often a verdict and the sign of the change in PCK agree, where the interval of the change leaves out 0."""
    sure, right = {"score": 0, "GATE": 0}, {"score": 0, "GATE": 0}
    for name, t, site, p, q in table:
        found = interval(q - p)
        if found is None or found[0] <= 0 <= found[1]:
            continue
        sign = np.sign(np.mean(q - p))
        row = score_rows(of, t)[name, site]
        if row["gain_low"] > 0 or row["gain_high"] < 0:
            sure["score"] += 1
            right["score"] += np.sign(row["gain"]) == sign
        if name in verdicts and verdicts[name]["verdict"] in ("helps", "hurts"):
            sure["GATE"] += 1
            right["GATE"] += (1 if verdicts[name]["verdict"] == "helps" else -1) == sign
    return [
        f"Where PCK changes for certain and the {what} has a sign, it is the right one in {right[what]} of {sure[what]} cases."
        for what in sure
    ] + [""]  # fmt: skip


def report_camvid() -> list[str]:
    found, verdicts = json.loads((RUNS / "camvid.json").read_text()), gate_rows("camvid")
    lines = ["## CamVid: few-shot mIoU", ""]
    for t in (20, 101):
        rows = score_rows("camvid", t)
        lines += [f"t = {t} | mIoU | change | score (mean of sites) | GATE", "---|---|---|---|---"]
        plain, change, gain = found[f"plain@{t}"], [], []
        names = list(techniques("camvid"))
        for name in ["plain", *names]:
            one = found[f"{name}@{t}"]
            score = float(np.mean([rows[name, site]["score"] for site in SITES]))
            by_run = [a - b for a, b in zip(one["runs"], plain["runs"], strict=True)]
            told = f"{np.mean(by_run):+.1f} ({', '.join(f'{v:+.1f}' for v in by_run)})" if name != "plain" else ""
            verdict = verdicts[name]["verdict"] if name in verdicts and name != "plain" else "-"
            lines.append(
                f"{name} | {one['row']['mIoU']:.1f} ± {one['row']['± runs']:.1f} | {told} | {score:.2f} | {verdict}"
            )
            if name != "plain":
                change.append(float(np.mean(by_run)))
                gain.append(float(np.mean([rows[name, site]["gain"] for site in SITES])))
        told = [name for name in names if name in verdicts]
        by_gate = correlation([likeness(verdicts[name]) for name in told], [change[names.index(name)] for name in told])
        lines += [
            "",
            f"Rank correlation with the change in mIoU: score {correlation(gain, change)}, GATE {by_gate}.",
            "",
        ]
    return lines


def figure(of: str, table: list[Any]) -> None:
    """Gain in score against gain in PCK, a panel for each site."""
    with chart(10, 3.4, len(SITES)) as c:
        for axes, site in zip(c.panels, SITES, strict=True):
            for t in TIMES:
                rows = score_rows(of, t)
                points = [
                    (rows[name, site]["gain"], np.mean(q - p)) for name, tt, s, p, q in table if (tt, s) == (t, site)
                ]
                axes.plot(*np.array(points).T, "o", markersize=4, label=f"t = {t}")
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.axvline(0, color="grey", linewidth=0.8)
            axes.set_title(f"{of}, {site}")
            axes.set_xlabel("score, against plain")
            axes.set_ylabel("PCK@0.1, against plain")
        c.panels[0].legend()
        write(c.image(), HERE / f"score_pck_{of}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pairs", "camvid", "amalgam", "report"))
    parser.add_argument("--of", choices=("birds", "faces"), default="birds")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shots", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.stage == "pairs":
        measure_pairs(asked.of, asked.data, asked.count)
    elif asked.stage == "camvid":
        measure_camvid(asked.data, asked.runs, asked.shots)
    elif asked.stage == "amalgam":
        measure_amalgam(asked.of, asked.data, asked.count)
    else:
        report()


if __name__ == "__main__":
    main()
