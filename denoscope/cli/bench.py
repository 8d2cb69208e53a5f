"""`denoscope bench` and `denoscope sweep`: official protocols on data sets in their official layouts."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from denoscope.cli import options
from denoscope.errors import InputError

# name on the command line: module below denoscope.benchmarks and class
BENCHMARKS = {
    "spair": ("spair", "SPair"),
    "pf-willow": ("proposal_flow", "PFWillow"),
    "pf-pascal": ("proposal_flow", "PFPascal"),
    "cub": ("cub", "CUB"),
    "keypoints": ("keypoints", "Keypoints"),
    "pairs": ("pairs", "Pairs"),
    "hpatches": ("hpatches", "HPatches"),
    "dense": ("dense", "Dense"),
    "davis": ("davis", "DAVIS"),
    "jhmdb": ("jhmdb", "JHMDB"),
    "animal": ("jhmdb", "AnimalVideo"),
    "few-shot": ("segmentation", "FewShot"),
    "camvid": ("segmentation", "CamVid"),
    "ade20k": ("segmentation", "ADE20K"),
}

Name = Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")]
Data = Annotated[Path, typer.Option(help="Folder of the data set, in its official layout.")]
Limit = Annotated[int | None, typer.Option(help="At most so many pairs or videos, spread evenly over the data set.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting of the protocol, NAME=VALUE; again for more. A wrong name lists all of them."
    ),
]
PromptTemplate = Annotated[
    str | None, typer.Option(help="What the pictures show; {category} is filled in. By default the protocol's own.")
]


def bench(
    name: Name,
    data: Data,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model, as for 'match'; again to compare several.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Add baselines: position, RGB patches, dense SIFT, and the task's own.")
    ] = False,
    limit: Limit = None,
    settings: Set = None,
    preset: options.Preset = None,
    t: options.T = None,
    site: options.SiteName = None,
    ensemble: options.Ensemble = None,
    size: options.Size = None,
    prompt: PromptTemplate = None,
    join: options.Join = None,
    pca: options.Pca = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the features of pictures (default OUT/features; video: none).")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no features on disk.")] = False,
    pictures: Annotated[int, typer.Option(help="How many of the worst and of the best to draw.")] = 3,
    results: Annotated[
        Path | None,
        typer.Option(help="Evaluate predictions that lie there in the official layout, and no model (davis)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures, records and features.")] = Path("out/bench"),
) -> None:
    """Evaluate MODEL on a data set by its official protocol; a run that was stopped goes on where it was."""
    from denoscope.benchmarks.running import FeatureStore, evaluate, methods
    from denoscope.features.baselines import BASELINES
    from denoscope.features.joint import takes_prompts

    benchmark = make(name, data, settings)
    benchmark.items()  # a wrong folder is told before a model is loaded
    asked = {
        "preset": preset or benchmark.preset,
        "t": t,
        "site": site,
        "ensemble": ensemble,
        "size": size,
        "seed": seed,
        "join": join,
        "pca": pca,
        "feature": feature,
        "recipe": recipe,
    }
    chosen = model or ([] if results else ["seedling"])
    extractors = [options.load_extractor(one, device, dtype, **asked) for one in chosen]
    options.folder(out)
    template = prompt_of(benchmark, prompt, recipe)
    folder = None if no_cache or (cache is None and benchmark.preset == "temporal") else cache or out / "features"
    stores = [FeatureStore(one, template if takes_prompts(one) else None, folder) for one in extractors]
    if baselines:
        taken = {one.name for one in extractors}
        # on a video, positions as fine as the other features are, and one SIFT: the finer one takes as long as all the others
        video = benchmark.preset == "temporal"
        left_out = {*taken, *(("sift-fine",) if video else ())}
        own = {"position": {"stride": 8}} if video else {}
        plain = [
            one(preset=benchmark.preset, **own.get(key, {})) for key, one in BASELINES.items() if key not in left_out
        ]
        stores += [FeatureStore(one) for one in plain]
    compared = [*(given_results(benchmark, results) if results else []), *methods(benchmark, stores, baselines)]
    report = evaluate(benchmark, compared, out, limit, pictures, track=tracked(name))
    print_report(report)
    print(f"Tables: {out / (name + '.json')}, {out / (name + '.csv')}")
    if pictures:
        print(f"Pictures: {out / 'pictures'}")


def prompt_of(benchmark: Any, prompt: str | None, recipe: Path | None) -> str | None:
    """What pictures are said to show: --prompt, else what the recipe says (None leaves it), else the protocol's own."""
    if prompt is not None or recipe is not None:
        return prompt
    return getattr(benchmark, "prompt", None)


def sweep(
    name: Name,
    data: Data,
    model: options.Model = "seedling",
    t: Annotated[str | None, typer.Option("--t", help="Timesteps: '0,50,100' or 'start:stop:step'.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="Sites: 'up.0,up.1'; by default every block.")] = None,
    ensemble: Annotated[str | None, typer.Option(help="Ensemble sizes: '1,4,8'.")] = None,
    limit: Limit = None,
    settings: Set = None,
    preset: options.Preset = None,
    size: options.Size = None,
    prompt: PromptTemplate = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, the heat map and records.")] = Path("out/sweep"),
) -> None:
    """Evaluate every combination of timestep, site and ensemble size, and draw the heat map.

    Sites are read from the same forward passes, so a further site costs next to nothing.
    """
    from denoscope.benchmarks.sweep import run_sweep, sweep_image
    from denoscope.features import Amalgam, Dift
    from denoscope.images import atomically, write

    benchmark = make(name, data, settings)
    benchmark.items()
    asked = {"preset": preset or benchmark.preset, "size": size, "seed": seed, "feature": feature, "recipe": recipe}
    extractor = options.load_extractor(model, device, dtype, **asked)
    if isinstance(extractor, Amalgam):
        raise InputError(f"{recipe} amalgamates several techniques, which are not swept over; use 'denoscope bench'.")
    if not isinstance(extractor, Dift):
        raise InputError(f"{model} has no timesteps to sweep over; compare its sites with 'denoscope bench --site'.")
    known = {one.name: one for one in extractor.denoiser.sites(sizes=False)}
    sites = [part.strip() for part in site.split(",")] if site else [n for n, s in known.items() if s.kind == "block"]
    if wrong := [one for one in sites if one not in known]:
        raise InputError(f"{model} has no site {wrong[0]!r}; see 'denoscope models {model} --sites'.")
    times = numbers(t, "--t") if t else [extractor.recipe.t]
    members = numbers(ensemble, "--ensemble") if ensemble else [extractor.recipe.ensemble]
    options.folder(out)
    template = prompt_of(benchmark, prompt, recipe)
    found = run_sweep(benchmark, extractor, times, sites, members, template, out, limit, tracked)
    text = json.dumps({"benchmark": name, "cells": found}, indent=1, default=str) + "\n"
    atomically(out / f"{name}-sweep.json", lambda path: path.write_text(text))
    write(sweep_image(found, benchmark.columns[0]), out / f"{name}-sweep.png")
    table = Table(box=None, pad_edge=False)
    for column in ("t", "site", "ensemble", *benchmark.columns[:4]):
        table.add_column(column, justify="left" if column == "site" else "right")
    best = sorted(found, key=lambda row: -row[benchmark.columns[0]])
    for row in best[:10]:
        table.add_row(
            str(row["t"]), row["site"], str(row["ensemble"]), *(number(row[c]) for c in benchmark.columns[:4])
        )
    console = Console()
    console.print(f"Best {min(10, len(best))} of {len(best)} by {benchmark.columns[0]}:", highlight=False)
    console.print(table)
    print(f"Heat map: {out / (name + '-sweep.png')}\nNumbers: {out / (name + '-sweep.json')}")


def given_results(benchmark: Any, folder: Path) -> list[Any]:
    """The method whose predictions are the files of a folder; a file that changes makes its records new."""
    from denoscope.benchmarks.running import Method

    if not hasattr(benchmark, "read_results"):
        raise InputError(f"--results is for davis; {benchmark.name} has no official layout of predictions.")
    run = benchmark.read_results(folder)
    changed = max((path.stat().st_mtime_ns for path in folder.rglob("*.png")), default=0)
    return [Method(folder.name, run, {"results": str(folder.resolve()), "changed": changed})]


def make(name: str, data: Path, settings: Sequence[str] | None) -> Any:
    """The benchmark of that name over a folder. Raises InputError for unknown names and settings, listing the known."""
    if name not in BENCHMARKS:
        raise InputError(f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    module, kind = BENCHMARKS[name]
    factory = getattr(import_module(f"denoscope.benchmarks.{module}"), kind)
    own = {
        field.name: field.default if field.default is not MISSING else field.default_factory()  # pyright: ignore
        for field in fields(factory)
        if field.name != "root" and not (field.default is MISSING and field.default_factory is MISSING)
    }
    given = {}
    for setting in settings or []:
        key, sign, value = setting.partition("=")
        if not sign and key in own:
            raise InputError(f"--set {key} has no value; its default is {key}={shown(own[key])}.")
        if key not in own:
            known = ", ".join(f"{k}={shown(v)}" for k, v in own.items())
            raise InputError(f"{name} has no setting {key!r}; write --set NAME=VALUE with one of {known}.")
        given[key] = parsed(key, value, own[key])
    return factory(data, **given)


def parsed(key: str, text: str, like: Any) -> Any:
    """A value written on the command line, of the type that a setting's default has."""
    try:
        match like:
            case bool():
                if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
                    raise ValueError
                return text.lower() in ("true", "yes", "1")
            case int():
                return int(text)
            case float():
                return float(text)
            case tuple():
                parts = [part.strip() for part in text.split(",") if part.strip()]
                kind = type(like[0]) if like else str
                if not like and all(part.lstrip("-").isdigit() for part in parts):
                    kind = int
                return tuple(kind(part) for part in parts)
    except ValueError:
        raise InputError(f"--set {key}={text} is not understood; its default is {shown(like)}.") from None
    return text


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers from '0,50,100' or 'start:stop:step' (stop included)."""
    try:
        if ":" in text:
            start, stop, step = (int(part) for part in text.split(":"))
            found = list(range(start, stop + 1, step))
        else:
            found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise InputError(f"{option} {text!r} is not understood; write '0,50,100' or '0:800:100'.")
    return list(dict.fromkeys(found))


def tracked(label: str) -> Callable[[Sequence[Any], int], Iterable[Any]]:
    """A progress bar on a terminal, a line for every tenth of the work elsewhere; a word about how to go on after Ctrl-C."""

    def track(jobs: Sequence[Any], done: int) -> Iterable[Any]:
        console, total = Console(stderr=True), done + len(jobs)
        if done and jobs:
            console.print(f"{label}: {done} of {total} are done already.", highlight=False)
        finished = done
        try:
            if console.is_terminal:
                bar = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                with Progress(*bar, console=console) as progress:
                    task = progress.add_task(label, total=total, completed=done)
                    for finished, job in enumerate(jobs, done):  # noqa: B007
                        yield job
                        progress.advance(task)
            else:
                for finished, job in enumerate(jobs, done):
                    yield job
                    if (finished + 1) * 10 // total > finished * 10 // total:
                        print(f"{label}: {finished + 1} of {total}", flush=True)
        except (KeyboardInterrupt, GeneratorExit):
            console.print(f"{label}: stopped after {finished} of {total}; the same command goes on from there.")
            raise

    return track


def number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def print_report(report: Any) -> None:
    """One line a method; with a single method, one line a category too."""
    console, columns = Console(), list(report.columns)
    each = {method: [row for row in rows[1:] if row["count"]] for method, rows in report.rows.items()}
    names = [*report.rows, *(f"  {row['category']}" for rows in each.values() for row in rows)]
    room = console.width - max(map(len, names)) - 8
    fitting = [c for i, c in enumerate(columns) if sum(max(len(one), 5) + 2 for one in columns[: i + 1]) <= room]
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in ("count", *fitting):
        table.add_column(column, justify="right", no_wrap=True)

    def line(label: str, row: Mapping[str, Any]) -> None:
        table.add_row(label, str(row["count"]), *(number(row.get(column)) for column in fitting))

    for method, rows in report.rows.items():
        line(method, rows[0])
        if len(report.rows) == 1:
            for row in each[method]:
                line(f"  {row['category']}", row)
    console.print(table)
    if len(fitting) < len(columns):
        console.print(f"Not shown for want of room: {', '.join(columns[len(fitting) :])}.", highlight=False)
