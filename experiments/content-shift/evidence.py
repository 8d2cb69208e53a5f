"""Do the content-shift score and GATE's check foretell whether a technique helps? Measured on the embedded model.

    python experiments/content-shift/evidence.py pairs --of birds --data DATA     (then --of faces)
    python experiments/content-shift/evidence.py camvid --data DATA
    python experiments/content-shift/evidence.py shift --of birds --data DATA     (then faces and camvid; baselines alike)
    python experiments/content-shift/evidence.py amalgam --of birds --data DATA
    python experiments/content-shift/evidence.py report

`pairs`: PCK@0.1 of random pairs of dev pictures (cropped at random) under every technique, timestep and site. `camvid`:
few-shot mIoU of the street scenes. `shift`: the score of 40 of these pictures, over t too, and the check of some.
`baselines`: features that know nothing, by the same protocols. `amalgam`: PCK of several techniques made one. Records are
kept in runs/, and a stage that was stopped goes on. `report` writes tables.md and the figures. Techniques are trained by
techniques.py, and tuned.py is about `denoscope tune`.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import denoscope as ds
from denoscope.benchmarks.keypoints import Keypoints
from denoscope.benchmarks.running import FeatureStore, Method, evaluate
from denoscope.benchmarks.segmentation import CamVid
from denoscope.features import Amalgam, Baseline, Dift, feature_sets, varied
from denoscope.features.bootstrap import interval
from denoscope.features.compared import of_another
from denoscope.features.content_shift import scores
from denoscope.features.dift import recipe
from denoscope.features.gate import gate
from denoscope.features.shift import content_shift
from denoscope.images import atomically, write
from denoscope.images.chart import chart

HERE = Path(__file__).parent
RUNS, WEIGHTS = Path("runs/content-shift"), HERE / "weights"
TIMES, SITES, SIZE, DRAWS = (20, 101, 261), ("up.0", "up.1", "up.2"), "long64", 2
CURVE, CURVED = (5, 20, 50, 101, 180, 261, 400, 500), ("label", "wrong label", "canny", "LoRA", "guidance 3")
CHECKED = {"birds": 16, "faces": 24, "camvid": 18}  # pictures of the check
SEEDS, STEPS = 4, 12  # of the check: draws of the noise, steps
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


def measured(of: str) -> list[str]:
    """What PCK was measured of: the techniques, and edges that are another picture's."""
    return [*techniques(of), "wrong:canny"]


def told_by_images(of: str) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in techniques(of).items() if name not in ("second t", "denoised 5", "img2img 0.3")}


def measure_pairs(of: str, data: Path, count: int) -> None:
    """PCK under every technique; what the records of a pair lack is added to them."""
    denoiser = ds.load("seedling", device="cpu")
    benchmark = drawn_pairs(of, data, count)
    items = benchmark.items()
    base = recipe(denoiser, t=TIMES[0], size=SIZE, ensemble=1)
    compared = {t: {**at(of, t), "wrong:canny": techniques(of)["canny"]} for t in TIMES}
    recipes = {
        f"{name}@{t}": varied(denoiser, base, {**one, "t": t}) for t in TIMES for name, one in compared[t].items()
    }
    path = RUNS / f"pairs-{of}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = pair_records(of)
    for n, item in enumerate(items):
        wanted = {name: one for name, one in recipes.items() if f"{name}@{SITES[0]}" not in done.get(item.key, {})}
        if not wanted:
            continue
        pair, other = item.data, benchmark.picture(items[(n + 1) % len(items)].data.source)
        maps = []
        for name in (pair.source, pair.target):
            picture = benchmark.picture(name)
            with TemporaryDirectory() as folder:
                own = of_another(wanted, picture, other, denoiser, Path(folder))
                maps.append(feature_sets(denoiser, picture, own, sites=SITES))
        right = {}
        for name in wanted:
            for site in SITES:
                source, target = (found[name][site] for found in maps)
                points = ds.transfer(source, target, source.frame.clamped(pair.source_points)).points
                right[f"{name}@{site}"] = pair.correct(points, 0.1, "kp").double().mean().item()
        with path.open("a") as file:
            file.write(json.dumps({"key": item.key, "right": right}) + "\n")
        if n % 10 == 9:
            print(f"{of}: {n + 1} of {len(items)} pairs", flush=True)


def pair_records(of: str) -> dict[str, dict[str, float]]:
    """Of every pair the PCK (a share) by TECHNIQUE@T@SITE."""
    path, found = RUNS / f"pairs-{of}.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        one = json.loads(line)
        found.setdefault(one["key"], {}).update(one["right"])
    return found


def measure_shift(of: str, data: Path, count: int) -> None:
    """Score at the timesteps of the tables, score over timesteps, and the check."""
    denoiser, settings = ds.load("seedling", device="cpu"), {"size": SIZE}
    if of == "camvid":
        found = sorted((data / "camvid" / "val").iterdir())[:18]
        pictures = [ds.read(path) for path in found]
    else:
        benchmark = drawn_pairs(of, data, count)
        pictures = [benchmark.picture(item.data.source) for item in benchmark.items()[:40]]
    for t in TIMES:
        path = RUNS / f"score-{of}-{t}.json"
        if not path.is_file():
            shared = {"t": t, "sites": list(SITES), "settings": settings, "draws": DRAWS}
            found = content_shift(denoiser, pictures, {k: v for k, v in at(of, t).items() if k != "plain"}, **shared)
            found.save(path)
            print(f"{of}: score at t = {t}", flush=True)
    # the frames of a street follow each other: neighbours by nine, so that the wrong edges are not those of the next frame
    pictures = [picture for k in range(9) for picture in pictures[k::9]] if of == "camvid" else pictures
    path = RUNS / f"gate-{of}-{SEEDS}-seeds.json"
    if not path.is_file():
        checked = {"settings": settings, "wrong_control": True, "seeds": SEEDS, "steps": STEPS}
        found = gate(denoiser, pictures[: CHECKED[of]], told_by_images(of), **checked)
        write(found.draw(), HERE / f"gate_{of}.png")
        found.save(path)
        print(f"{of}: image-to-image", flush=True)
    path = RUNS / f"curves-{of}.json"
    if not path.is_file():
        shared = {"t": CURVE, "sites": list(SITES), "settings": settings, "draws": DRAWS, "wrong_control": True}
        found = content_shift(denoiser, pictures, {name: techniques(of)[name] for name in CURVED}, **shared)
        for value in ("score", "diff"):
            write(found.draw_curves(value), HERE / f"{value}_over_t_{of}.png")
        found.save(path)
        print(f"{of}: score over t", flush=True)


def baselines() -> dict[str, Baseline]:
    return {name: Baseline(name) for name in ("rgb", "sift", "sift-fine", "position")}


def measure_baselines(of: str, data: Path, count: int, runs: int, shots: int) -> None:
    """Features that know nothing, by the protocol of the other tables, at sizes of their own."""
    benchmark = streets(data, runs, shots) if of == "camvid" else drawn_pairs(of, data, count)
    column = "mIoU" if of == "camvid" else "kp@0.1"
    found = []
    for name, extractor in baselines().items():
        store = FeatureStore(extractor)
        found.append(Method(name, lambda item, store=store: benchmark.run(item, store), store.settings))
    evaluate(benchmark, found, RUNS / f"baselines-{of}")
    rows = {name: by_item(benchmark, RUNS / f"baselines-{of}", name, column) for name in baselines()}
    atomically(RUNS / f"baselines-{of}.json", lambda path: path.write_text(json.dumps(rows, indent=1)))


def streets(data: Path, runs: int, shots: int) -> CamVid:
    class Small(CamVid):
        """Predictions are compared at 160 x 120, a ninth of the pixels."""

        def measured(self) -> int:
            return 160

    return Small(data / "camvid", runs=runs, shots=shots, pixels=200)


def measure_camvid(data: Path, runs: int, shots: int) -> None:
    denoiser = ds.load("seedling", device="cpu")
    benchmark = streets(data, runs, shots)
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


def by_item(benchmark: Any, folder: Path, method: str, column: str) -> list[float]:
    """A column of the table for every item by itself, from the records of a method."""
    safe = "".join(c if c.isalnum() or c in "-.@" else "_" for c in method)
    files = (folder / "records").glob(f"{benchmark.name}-{safe}-{'[0-9a-f]' * 16}.jsonl")
    lines = max(files, key=lambda path: path.stat().st_mtime).read_text().splitlines()
    records = {one["key"]: one["record"] for one in map(json.loads, lines)}
    return [benchmark.rows([item], [records[item.key]])[0][column] for item in benchmark.items()]


def drawn_pairs(of: str, data: Path, count: int) -> Keypoints:
    own = {"birds": (), "faces": (36, 39, 42, 45, 30, 31, 35, 48, 54, 51, 57, 8, 0, 16, 4, 12, 17, 21, 22, 26)}[of]
    return Keypoints(data / of / "dev.parquet", pairs_drawn=count, points=own, jitter=True, seed=5, label=KIND[of])


def measure_amalgam(of: str, data: Path, count: int) -> None:
    """Maps of four techniques as one, on the pairs of `pairs`, at the preset's timestep."""
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
    records = pair_records(of).values()
    for t in TIMES:
        for site in SITES:
            plain = 100 * np.array([one[f"plain@{t}@{site}"] for one in records])
            for name in measured(of):
                yield name, t, site, plain, 100 * np.array([one[f"{name}@{t}@{site}"] for one in records])


@cache
def load(name: str) -> Any:
    return json.loads((RUNS / f"{name}.json").read_text())


def score_rows(of: str, t: int) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Rows by technique and site; those of another picture's edges are from the curves."""
    rows = [*load(f"score-{of}-{t}")["rows"], *(row for row in load(f"curves-{of}")["rows"] if row["t"] == t)]
    return {(row["technique"], row["site"]): row for row in reversed(rows)}


def gate_rows(of: str) -> dict[str, Mapping[str, Any]]:
    """Rows by technique, without plain."""
    return {row["technique"]: row for row in load(f"gate-{of}-{SEEDS}-seeds")["rows"] if row["technique"] != "plain"}


def likeness(row: Mapping[str, Any]) -> float:
    """The three changes as one number, each in units of the margin that counts as no change."""
    return float(np.mean([row[f"{m}_change"] / margin for m, margin in zip(MEASURES, (0.1, 0.005, 0.01), strict=True)]))


def correlation(x: Sequence[float], y: Sequence[float]) -> str:
    """Spearman's; "-" where all values are the same."""
    if len(set(x)) < 2:
        return f"- (n {len(x)})"
    found: Any = spearmanr(x, y)
    return f"{found.statistic:+.2f} (p {found.pvalue:.2f}, n {len(x)})"


def sign(low: float, high: float) -> int:
    """Of a change: 0 where its interval holds 0."""
    return (low > 0) - (high < 0)


def span(values: Sequence[float] | None, plus: str = "+") -> str:
    return "" if values is None else f" [{values[0]:{plus}.1f}, {values[1]:{plus}.1f}]"


def report() -> None:
    lines = ["# Content shift on the embedded model, measured", ""]
    for of in ("birds", "faces"):
        lines += [*report_pairs(of), *report_check(of), *report_curves(of)]
        if (RUNS / f"amalgam-{of}.json").is_file():
            rows = {name: np.array(values) for name, values in load(f"amalgam-{of}").items()}
            lines += [f"Amalgams at up.1, t = 20, {of} | PCK@0.1 | against plain", "---|---|---"]
            for name, own in rows.items():
                change = own - rows["plain"]
                lines.append(f"{name} | {own.mean():.1f} | {change.mean():+.1f}{span(interval(change))}")
            lines.append("")
    lines += [*report_learned(), *report_camvid(), *report_check("camvid"), *report_curves("camvid")]
    atomically(HERE / "tables.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))


def report_pairs(of: str) -> list[str]:
    table = list(gains(of))
    verdicts = gate_rows(of)
    n = len(table[0][3])
    lines = [
        f"## {of.capitalize()}: {n} pairs, PCK@0.1 (box of the points), change against plain with 95 % intervals",
        "",
        "Features that know nothing, the same pairs | PCK@0.1",
        "---|---",
        *(
            f"{name} | {np.mean(own):.1f}{span(interval(np.array(own)), '')}"
            for name, own in load(f"baselines-{of}").items()
        ),
        "",
    ]
    for t in TIMES:
        rows = score_rows(of, t)
        plain = {site: np.mean(p) for _, tt, site, p, _ in table if tt == t}
        head = " | ".join(
            f"{site}: plain {plain[site]:.1f}, score {rows['plain', site]['score']:.2f}" for site in SITES
        )
        lines += [f"t = {t} | {head} | GATE", "---|" + "---|" * len(SITES) + "---"]
        for name in measured(of):
            cells = []
            for site in SITES:
                p, q = next((p, q) for nn, tt, s, p, q in table if (nn, tt, s) == (name, t, site))
                cells.append(f"{np.mean(q - p):+.1f}{span(interval(q - p))}; score {rows[name, site]['score']:.2f}")
            lines.append(
                f"{name} | " + " | ".join(cells) + f" | {verdicts[name]['verdict'] if name in verdicts else '-'}"
            )
        lines.append("")
    cells = {}
    for name, t, site, p, q in table:
        row, change = score_rows(of, t)[name, site], interval(q - p)
        assert change is not None
        told = Foretold(float(np.mean(q - p)), sign(*change), row["gain"], sign(row["gain_low"], row["gain_high"]))
        cells.setdefault(f"t = {t}, {site}", []).append(told.by(verdicts.get(name)))
    lines += foretelling(cells, "PCK")
    figure(of, [one for one in table if one[0] in techniques(of)])
    return lines


@dataclass(frozen=True)
class Foretold:
    """A change and what was said of it before; signs are 1, -1 and 0 (not certain, no effect, undecided)."""

    change: float
    sign: int
    gain: float  # in score
    score: int  # sign of the gain
    likeness: float | None = None
    verdict: int = 0  # of GATE

    def by(self, row: Mapping[str, Any] | None) -> "Foretold":
        if row is None:
            return self
        return replace(self, likeness=likeness(row), verdict={"helps": 1, "hurts": -1}.get(row["verdict"], 0))


SAID: Mapping[str, tuple[Callable[[Foretold], float | None], Callable[[Foretold], int]]] = {
    "score": (lambda one: one.gain, lambda one: one.score),
    "verdict of the score": (lambda one: one.score, lambda one: one.score),
    "GATE's likeness": (lambda one: one.likeness, lambda one: int(np.sign(one.likeness or 0))),
    "GATE's verdict": (lambda one: None if one.likeness is None else one.verdict, lambda one: one.verdict),
}


def foretelling(cells: Mapping[str, Sequence[Foretold]], what: str) -> list[str]:
    """Rank correlations by cell and of all cells together; then how often signs agree."""
    lines = [f"Spearman's rank correlation with the change in {what} | {' | '.join(SAID)}", "---|" * len(SAID) + "---"]
    together = [one for found in cells.values() for one in found]
    for name, found in {**cells, "all together": together}.items():
        pairs = [[(value(one), one.change) for one in found if value(one) is not None] for value, _ in SAID.values()]
        lines.append(f"{name} | " + " | ".join(correlation(*zip(*pair, strict=True)) for pair in pairs))
    lines += [
        "",
        f'Signs, where {what} changes for certain | right | wrong | silent | "hurts" of all would be right '
        "| right or rightly silent, of all changes",
        "---|---|---|---|---|---",
    ]
    for name, (value, told) in SAID.items():
        if name == "score":
            continue
        every = [one for one in together if value(one) is not None]
        sure = [one for one in every if one.sign]
        right, silent = (
            sum(told(one) == wanted(one) for one in sure) for wanted in (lambda one: one.sign, lambda one: 0)
        )
        hurts = sum(one.sign < 0 for one in sure)
        equal = sum(told(one) == one.sign for one in every)
        lines.append(
            f"{name} | {right} | {len(sure) - right - silent} | {silent} | {hurts} of {len(sure)} | {equal} of {len(every)}"
        )
    return [*lines, ""]


def report_check(of: str) -> list[str]:
    found = load(f"gate-{of}-{SEEDS}-seeds")
    told, plain = found["settings"], next(row for row in found["rows"] if row["technique"] == "plain")
    given = f"{plain['pictures']} pictures, {told['seeds']} seeds, strength {told['strength']}, {told['steps']} steps"
    heads = f"PSNR in dB, against plain ({plain['psnr']:.1f}) | SSIM ({plain['ssim']:.2f}) | edge F1 ({plain['edge_f1']:.2f})"
    lines = [f"GATE's check, {of}: {given} | {heads} | verdict", "---|---|---|---|---"]
    for name, row in gate_rows(of).items():
        changes = [
            f"{row[f'{m}_change']:+.{d}f} [{row[f'{m}_low']:+.{d}f}, {row[f'{m}_high']:+.{d}f}]"
            for m, d in zip(MEASURES, (2, 3, 3), strict=True)
        ]
        lines.append(f"{name} | {' | '.join(changes)} | {row['verdict']}")
    return [*lines, ""]


def report_curves(of: str) -> list[str]:
    rows = {(row["technique"], row["site"], row["t"]): row for row in load(f"curves-{of}")["rows"]}
    lines = []
    for value, digits in (("score", 2), ("diff", 0)):
        lines += [f"{value} over t, {of} | {' | '.join(map(str, CURVE))}", "---|" * len(CURVE) + "---"]
        for site in SITES:
            for name in dict.fromkeys(name for name, *_ in rows):
                told = (f"{rows[name, site, t][value]:.{digits}f}" for t in CURVE)
                lines.append(f"{site}, {name} | {' | '.join(told)}")
        lines.append("")
    return lines


def report_learned() -> list[str]:
    found = load("amalgam-learned")
    lines = [
        f"Learned weights of `train amalgam`, faces, {found['config']['steps']} steps, {found['pairs']['train']} pairs; "
        f"{found['pairs']['validation']} pairs held out | PCK@0.1",
        "---|---",
    ]
    return [*lines, *(f"{name} | {row['kp@0.1']:.1f}" for name, row in found["validation"].items()), ""]


def report_camvid() -> list[str]:
    found, verdicts = load("camvid"), gate_rows("camvid")
    lines = ["## CamVid: few-shot mIoU", "", "Features that know nothing, the same protocol | mIoU (runs)", "---|---"]
    for name, values in load("baselines-camvid").items():
        lines.append(f"{name} | {np.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})")
    lines += ["", "5 shots, 1 run, all pixels, predictions at full size | mIoU", "---|---"]
    lines += [f"{name} | {rows[0]['mIoU']:.1f}" for name, rows in load("camvid-baselines/camvid")["rows"].items()]
    lines.append("")
    cells: dict[str, list[Foretold]] = {}
    for t in (20, 101):
        lines += [f"t = {t} | mIoU | change (runs) | score (mean of sites) | GATE", "---|---|---|---|---"]
        plain, score = found[f"plain@{t}"], score_means("camvid", t)
        for name in ["plain", *techniques("camvid")]:
            one = found[f"{name}@{t}"]
            by_run = [a - b for a, b in zip(one["runs"], plain["runs"], strict=True)]
            told = f"{np.mean(by_run):+.1f} ({', '.join(f'{v:+.1f}' for v in by_run)})" if name != "plain" else ""
            verdict = verdicts[name]["verdict"] if name in verdicts else "-"
            lines.append(
                f"{name} | {one['row']['mIoU']:.1f} ± {one['row']['± runs']:.1f} | {told} | {score[name].mean():.2f}"
                f" | {verdict}"
            )
            if name != "plain":
                gain = score[name] - score["plain"]
                span_of = interval(gain)
                assert span_of is not None
                # two runs have no interval: certain is what both of them say
                change = Foretold(
                    float(np.mean(by_run)), sign(min(by_run), max(by_run)), float(gain.mean()), sign(*span_of)
                )
                cells.setdefault(f"t = {t}", []).append(change.by(verdicts.get(name)))
        lines.append("")
    lines += ["Certain is here what both runs say.", ""]
    return lines + foretelling(cells, "mIoU")


def score_means(of: str, t: int) -> dict[str, np.ndarray]:
    """Score of every technique, a value a picture: the mean over sites and draws."""
    pictures = [
        [(row["technique"], scores(row["diff"], row["anchor"]).mean()) for row in picture["rows"]]
        for picture in load(f"score-{of}-{t}")["pictures"]
    ]
    return {
        name: np.array([np.mean([value for own, value in rows if own == name]) for rows in pictures])
        for name in dict.fromkeys(own for own, _ in pictures[0])
    }


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


STAGES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "pairs": lambda a: measure_pairs(a.of, a.data, a.count),
    "camvid": lambda a: measure_camvid(a.data, a.runs, a.shots),
    "shift": lambda a: measure_shift(a.of, a.data, a.count),
    "baselines": lambda a: measure_baselines(a.of, a.data, a.count, a.runs, a.shots),
    "amalgam": lambda a: measure_amalgam(a.of, a.data, a.count),
    "report": lambda a: report(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--of", choices=("birds", "faces", "camvid"), default="birds")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shots", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    STAGES[asked.stage](asked)


if __name__ == "__main__":
    main()
