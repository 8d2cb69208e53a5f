"""Is what `denoscope tune` chooses as good as the best of its whole grid, with masks and without labels? On the embedded model.

    python experiments/content-shift/tuned.py pictures --data DATA --count 20
    python experiments/content-shift/tuned.py judge --data DATA --count 40
    python experiments/content-shift/tuned.py report

`pictures`: crops of faces that are in none of the pairs of evidence.py, for `denoscope tune` without labels (run.sh has the
commands). `judge`: PCK of every setting that it scored, on the first of these pairs. `report` writes tuned.md and the figure.
Records are kept in runs/, and a stage that was stopped goes on.
"""

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import HERE, RUNS, drawn_pairs, span
from scipy.stats import spearmanr

import denoscope as ds
from denoscope.benchmarks.protocol import Record
from denoscope.benchmarks.running import Records
from denoscope.benchmarks.tune import tune
from denoscope.benchmarks.tune_tasks import UnlabelledTask
from denoscope.benchmarks.tuned import Setting
from denoscope.features import feature_sets, varied
from denoscope.features.amalgamation import aggregate
from denoscope.features.bootstrap import interval
from denoscope.features.dift import recipe
from denoscope.features.recipes import read_techniques
from denoscope.images import atomically, write
from denoscope.images.chart import chart

KEYS = ("technique", "t", "site", "ensemble", "rows")
PAIRS = 100  # of these pairs no photo is among the pictures without labels


def unlabelled_pictures(of: str, data: Path, count: int) -> None:
    """Crops like those of the pairs, of photos that are in none of the first hundred."""
    benchmark = drawn_pairs(of, data, PAIRS + 10 * count)
    items = benchmark.items()
    used = {row for item in items[:PAIRS] for row in rows_of(item)}
    folder, found = RUNS / f"pictures-{of}", 0
    for item in items[PAIRS:]:
        row = rows_of(item)[0]
        if row in used or found == count:
            continue
        used.add(row)
        found += 1
        path = folder / f"{row}.png"
        write(benchmark.picture(item.data.source).image(), path)
    print(f"{found} pictures in {folder}")


def rows_of(item: Any) -> list[str]:
    """Of the parquet file: the photos of a pair."""
    return item.key.split("-")[1:]


def measure_judge(of: str, data: Path, count: int) -> None:
    """PCK of every setting that tune scored without labels, on the first pairs; none of their photos was tuned with."""
    denoiser, benchmark = ds.load("seedling", device="cpu"), drawn_pairs(of, data, count)
    search = unlabelled(of)["recipe"]["search"]
    named = {"plain": {}, **read_techniques(HERE / f"techniques_few_{of}.toml")}
    base = recipe(denoiser)  # the preset's sizes
    recipes = {
        f"{name}@{t}@{ensemble}": varied(denoiser, base, {**named[name], "t": t, "ensemble": ensemble})
        for name in search["techniques"]
        for t in search["times"]
        for ensemble in search["ensembles"]
    }
    single = list(dict.fromkeys(one for site in search["sites"] for one in site.split("+")))
    records = Records(RUNS / f"judge-{of}.jsonl")
    for n, item in enumerate(benchmark.items(), 1):
        if item.key in records:
            continue
        pair = item.data
        maps = [
            feature_sets(denoiser, benchmark.picture(one), recipes, sites=single) for one in (pair.source, pair.target)
        ]
        right = {}
        for name in recipes:
            for site in search["sites"]:
                source, target = (aggregate([found[name][one] for one in site.split("+")]) for found in maps)
                points = ds.transfer(source, target, source.frame.clamped(pair.source_points)).points
                right[f"{name}@{site}"] = 100 * pair.correct(points, 0.1, "kp").double().mean().item()
        records.add(item, {"right": right})
        print(f"{of}: judged on {n} of {count} pairs", flush=True)
    measure_parts(of)


class Part(UnlabelledTask):
    """One of the two parts of the measure without labels, from the same records."""

    shift = False

    def value(self, record: Record, plain: Record | None) -> float:
        whole = super().value(record, plain)
        return whole - record["score"] if self.shift else record["score"]


class ShiftPart(Part):
    shift = True


def measure_parts(of: str) -> None:
    """What stood in for labels, and its two parts, for every setting; `tune` reads nothing again, for all of it is on disk."""
    folder = RUNS / f"tune-{of}-unlabelled-tune"
    saved, denoiser = unlabelled(of), ds.load("seedling", device="cpu")
    search = saved["recipe"]["search"]
    grid = {key: search[key] for key in ("times", "sites", "ensembles")}
    named, pictures = read_techniques(HERE / f"techniques_few_{of}.toml"), sorted((RUNS / f"pictures-{of}").iterdir())
    found = {"the measure": saved["cells"]}
    for name, task in (("cycle consistency", Part), ("content shift", ShiftPart)):
        made = tune(
            denoiser, task(pictures), budget=saved["budget"], techniques=named, exhaustive=True, out=folder, **grid
        )
        found[name] = list(made.cells)
    atomically(RUNS / f"parts-{of}.json", lambda path: path.write_text(json.dumps(found)))


def unlabelled(of: str) -> Any:
    return json.loads((RUNS / f"tune-{of}-unlabelled-tune" / "tune.json").read_text())


TUNED = {"pairs": "faces", "masks": "camvid", "no labels": "faces-unlabelled"}


def report_searches() -> list[str]:
    """The choice of every search against its preset and the best of its whole grid, by the search's own measure."""
    lines = [
        "## tune against exhaustive search, by the measure that was searched",
        "",
        "given | rows of search, of grid | preset | choice | best of all | choice below best | rank "
        "| kept aside: preset, choice, gain",
        "---|---|---|---|---|---|---|---",
    ]
    for given, name in TUNED.items():
        path = RUNS / f"tune-{name}-tune" / "tune.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        told, kept = found["exhaustive"], found["holdout"]
        named = {key: Setting(**one).name for key, one in (("choice", found["choice"]), ("best", told["best"]))}
        own = Setting(**found["preset"])
        aside = ""
        if kept:
            values = kept["values"]
            tried = [value for setting, value in values.items() if setting != own.name]
            gain, *limits = found["gain"]
            aside = f"{values[own.name]:.1f}, {tried[0]:.1f}, {gain:+.1f}{span(limits)} of {kept['items']}"
        lines.append(
            f"{given}: {found['items']} items, {found['metric']} | {found['rows']}, {told['rows']}"
            f" | {found['preset_value']:.1f} | {named['choice']} ({found['verdict']}): {told['value']:.1f}"
            f" | {named['best']}: {told['best_value']:.1f}"
            f" | {told['regret']:.1f}{span(told['regret_interval'])} | {told['rank']} of {told['settings']} | {aside or '-'}"
        )
    return [*lines, "", *report_label(), *report_segmented()]


def report_label() -> list[str]:
    """What the search on pairs measured of the technique that the search without labels is judged by."""
    path = RUNS / "tune-faces-tune" / "tune.json"
    if not path.is_file():
        return []
    saved = json.loads(path.read_text())
    lines = [f"The search on pairs, {saved['items']} of them, t 20, ensemble 1 | plain | label", "---|---|---"]
    for site in ("up.1", "up.1.resnet.1"):
        found = {
            c["technique"]: c["value"] for c in saved["cells"] if (c["t"], c["site"], c["ensemble"]) == (20, site, 1)
        }
        lines.append(f"{site} | {found['plain']:.1f} | {found['label']:.1f}")
    return [*lines, ""]


def report_segmented() -> list[str]:
    """What the linear stand-in of `tune --masks` ranks, by the networks of `segment` too."""
    if not (RUNS / "camvid-worst" / "camvid.csv").is_file():
        return []
    saved = json.loads((RUNS / "tune-camvid-tune" / "tune.json").read_text())
    linear = {
        Setting(**{key: c[key] for key in KEYS}): c["value"] for c in saved["cells"] if c["items"] == saved["items"]
    }
    told = {
        "preset": Setting(**saved["preset"]),
        "tuned": Setting(**saved["choice"]),
        "best": max(linear, key=lambda s: linear[s]),
        "worst": min(linear, key=lambda s: linear[s]),
    }
    lines = ["CamVid, 8 shots, two runs | linear, as tune has it | networks, as segment has them", "---|---|---"]
    for name, setting in told.items():
        with (RUNS / f"camvid-{name}" / "camvid.csv").open() as file:
            row = next(csv.DictReader(file))
        lines.append(
            f"{name}: {setting.name} | {linear[setting]:.1f} | {float(row['mIoU']):.1f} ± {float(row['± runs']):.1f}"
        )
    return [*lines, ""]


def report_unlabelled(of: str) -> list[str]:
    """How a choice without labels does on annotated pairs that it never saw."""
    records = list(map(json.loads, (RUNS / f"judge-{of}.jsonl").read_text().splitlines()))
    saved = unlabelled(of)
    told = {
        name: {Setting(**{key: cell[key] for key in KEYS}): cell["value"] for cell in cells}
        for name, cells in json.loads((RUNS / f"parts-{of}.json").read_text()).items()
    }
    measure = told["the measure"]
    right = {
        s: np.array([one["record"]["right"][f"{s.technique}@{s.t}@{s.ensemble}@{s.site}"] for one in records])
        for s in measure
    }
    pck = {setting: float(values.mean()) for setting, values in right.items()}
    best, preset, choice = max(pck, key=lambda s: pck[s]), Setting(**saved["preset"]), Setting(**saved["choice"])
    top = {name: max(values, key=lambda s, values=values: values[s]) for name, values in told.items()}
    shown = {
        "the preset": preset,
        "**choice of tune**": choice,
        "best of all by the measure": top["the measure"],
        "best of all by cycle consistency alone": top["cycle consistency"],
        "best of all by PCK": best,
    }
    lines = [
        f"## Without labels, {of}: {saved['items']} pictures to search with, PCK@0.1 of {len(records)} annotated pairs",
        "",
        "setting | measure | PCK@0.1 | rank by PCK | against the preset | below the best",
        "---|---|---|---|---|---",
    ]
    for name, s in shown.items():
        rank = 1 + sum(value > pck[s] for value in pck.values())
        lines.append(
            f"{name}: {s.name} | {measure[s]:.1f} | {pck[s]:.1f} | {rank} of {len(pck)}"
            f" | {pck[s] - pck[preset]:+.1f}{span(interval(right[s] - right[preset]))}"
            f" | {pck[best] - pck[s]:.1f}{span(interval(right[best] - right[s]))}"
        )
    halves = []
    for k in (0, 1):
        chosen = max(right, key=lambda s, k=k: right[s][k::2].mean())
        halves.append(right[chosen][1 - k :: 2])
    middle = np.median(list(pck.values()))
    lines += [
        "",
        f"The median of all settings has {middle:.1f}. Chosen by PCK on one half of the pairs and judged on the other "
        f"(both ways, mean): {np.concatenate(halves).mean():.1f}.",
        "",
        f"Spearman's rank correlation with PCK | all {len(measure)} settings | plain over t and site "
        "| techniques, median over t and site",
        "---|---|---|---",
    ]
    first = min(s.ensemble for s in measure)
    plain = [s for s in measure if s.technique == "plain" and s.ensemble == first]
    cells = [
        [s for s in measure if (s.t, s.site, s.ensemble) == (t, site, first)]
        for t, site in {(s.t, s.site): None for s in measure}
    ]
    for name, values in told.items():
        rho = [ranked(values, pck, group) for group in (list(measure), plain)]
        by_technique = float(np.median([ranked(values, pck, group) for group in cells]))
        lines.append(f"{name} | " + " | ".join("-" if np.isnan(r) else f"{r:+.2f}" for r in (*rho, by_technique)))
    lines.append("")
    order = [s.technique for s in sorted(pck, key=lambda s: -pck[s])]
    count = next(k for k, technique in enumerate(order) if technique != order[0])
    lines += [f"The first {count} by PCK all are of the technique {order[0]}.", ""]
    lines += [f"t {preset.t}, {preset.site}, ensemble {first} | {' | '.join(told)} | PCK@0.1", "---|---|---|---|---"]
    for s in [s for s in measure if (s.t, s.site, s.ensemble) == (preset.t, preset.site, first)]:
        lines.append(f"{s.technique} | " + " | ".join(f"{values[s]:.1f}" for values in (*told.values(), pck)))
    lines.append("")
    with chart(9, 4, 2) as c:
        for axes, (name, values) in zip(c.panels, list(told.items())[1::-1], strict=True):
            for technique in dict.fromkeys(s.technique for s in measure):
                own = [s for s in measure if s.technique == technique]
                axes.plot([values[s] for s in own], [pck[s] for s in own], "o", markersize=3, label=technique)
            for s, mark, told_as in ((preset, "s", "preset"), (choice, "*", "choice"), (best, "^", "best by PCK")):
                axes.plot(values[s], pck[s], mark, markersize=11, color="black", fillstyle="none", label=told_as)
            axes.set_xlabel(f"{name}, without labels")
            axes.set_ylabel("PCK@0.1")
        c.panels[1].legend(fontsize=7)
        write(c.image(), HERE / f"unlabelled_{of}.png")
    return lines


def ranked(values: Mapping[Setting, float], pck: Mapping[Setting, float], group: list[Setting]) -> float:
    one, other = ([of[s] for s in group] for of in (values, pck))
    if len(set(one)) < 2:
        return float("nan")
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def report() -> None:
    lines = ["# tune against exhaustive search on the embedded model, measured", "", *report_searches()]
    if (RUNS / "parts-faces.json").is_file():
        lines += report_unlabelled("faces")
    atomically(HERE / "tuned.md", lambda path: path.write_text("\n".join(lines)))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pictures", "judge", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=40)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    match asked.stage:
        case "pictures":
            unlabelled_pictures("faces", asked.data, asked.count)
        case "judge":
            measure_judge("faces", asked.data, asked.count)
        case _:
            report()


if __name__ == "__main__":
    main()
