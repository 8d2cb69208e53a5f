"""`denoscope tune`: search the settings of features within a stated number of rows of the network, and write a recipe."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from denoscope.cli import options
from denoscope.cli.bench import numbers, parsed, shown, tracked
from denoscope.errors import InputError

BUDGET = 1000


def tune(
    model: Annotated[str, typer.Argument(help="A diffusion model or an encoder, as for --model elsewhere.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Pictures, or folders of them, of things of one kind: tuning without labels.", metavar="IMAGE..."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Annotated pairs: a .json list, a .parquet file of keypoints, or a folder like SPair-71k's."),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of pictures with masks, as for 'denoscope segment --examples'.")
    ] = None,
    ignore: Annotated[
        int | None, typer.Option(help="Number in masks of what does not count (default 255, as for 'segment').")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the pairs, NAME=VALUE, as for 'denoscope bench'.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many pairs, spread evenly over all.")] = None,
    t: Annotated[
        str | None, typer.Option("--t", help="Timesteps: '0,51,101' or 'start:stop:step' (default 0,51,101,261).")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option("--sites", help="Sites, sets, several joined by +: 'up.0,up.1,practical' (default: blocks)."),
    ] = None,
    techniques: Annotated[
        Path | None,
        typer.Option(
            help='TOML or JSON file, a table of settings for each technique: \\[label] and prompt = "a bird".'
        ),
    ] = None,
    ensembles: Annotated[str, typer.Option(help="Ensemble sizes: '1,4'.")] = "1",
    sizes: Annotated[str | None, typer.Option(help="Picture sizes to try beside the preset's: '512,long384'.")] = None,
    budget: Annotated[
        int, typer.Option(help="Rows of the network: forward passes of one member of one picture, in all.")
    ] = BUDGET,
    holdout: Annotated[
        float, typer.Option(help="Share of the pairs or masks to keep aside and judge the choice on.")
    ] = 0.0,
    exhaustive: Annotated[
        bool,
        typer.Option(
            "--exhaustive", help="Score the whole grid too, beyond the budget, and compare the choice with it."
        ),
    ] = False,
    preset: options.Preset = None,
    prompt: Annotated[
        str | None, typer.Option(help="What is said without a technique, e.g. 'a photo of a bird'.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[
        Path, typer.Option(help="Recipe to write, .toml or .json; all numbers go into a folder beside it.")
    ] = Path("recipe.toml"),
) -> None:
    """Find settings of features that suit annotated pairs, labelled pictures, or just pictures, and write a recipe.

    Other verbs read features as it says with --recipe.
    """
    from denoscope.benchmarks.tune import tune as search
    from denoscope.features import load_model
    from denoscope.features.recipes import read_techniques, write_recipe

    if out.suffix not in (".toml", ".json"):
        raise InputError(f"--out {out} must end in .toml or .json.")
    if settings and not pairs:
        raise InputError("--set is for --pairs.")
    if ignore is not None and not masks:
        raise InputError("--ignore is for --masks.")
    task = _task(pairs, masks, images or [], settings or [], limit, 255 if ignore is None else ignore, seed)
    named = read_techniques(techniques) if techniques else None
    asked: dict[str, Any] = {
        "times": numbers(t, "--t") if t else None,
        "sites": _listed(sites, "--sites"),
        "ensembles": numbers(ensembles, "--ensembles"),
        "sizes": _listed(sizes, "--sizes"),
    }
    options.file(out, "--out")
    folder = options.folder(out.with_name(f"{out.stem}-tune"))
    loaded: Any = load_model(model, device, dtype)
    found = search(
        loaded, task, budget=budget, techniques=named, **asked, preset=preset, prompt=prompt, seed=seed, holdout=holdout,
        exhaustive=exhaustive, out=folder, track=tracked,
    )  # fmt: skip
    saved = [found.save(folder / f"tune{suffix}") for suffix in (".json", ".csv", ".png")]
    notes = {
        "verdict": found.sentence, "metric": found.metric, "value": found.value, "preset_value": found.preset_value,
        "items": found.items, "rows": found.rows, "budget": found.budget, "seed": seed,
    }  # fmt: skip
    write_recipe(out, model, found.settings, notes)
    _print(found)
    print(f"Recipe: {out}\nNumbers: {saved[0]}, {saved[1]}\nHeat map: {saved[2]}")


def _task(
    pairs: Path | None,
    masks: Path | None,
    images: Sequence[Path],
    settings: Sequence[str],
    limit: int | None,
    ignore: int,
    seed: int,
) -> Any:
    from denoscope.benchmarks.pairs import open_pairs
    from denoscope.benchmarks.tune_tasks import MasksTask, PairsTask, UnlabelledTask
    from denoscope.cli.shift import image_files
    from denoscope.segmentation import read_examples

    if (pairs is not None) + (masks is not None) + bool(images) != 1:
        raise InputError("Say what to tune for: --pairs, --masks, or pictures after the model; one of them.")
    if limit is not None and pairs is None:
        raise InputError("--limit is for --pairs.")
    if pairs is not None:
        data = open_pairs(pairs)
        return PairsTask(replace(data, **_given(data, settings)) if settings else data, limit)
    if masks is not None:
        return MasksTask(read_examples(masks, ignore))
    return UnlabelledTask(image_files(images), seed=seed)


def _given(data: Any, settings: Sequence[str]) -> dict[str, Any]:
    own = {field.name: getattr(data, field.name) for field in fields(data) if field.name != "root"}
    found = {}
    for text in settings:
        key, sign, value = text.partition("=")
        if key not in own or not sign:
            known = ", ".join(f"{k}={shown(v)}" for k, v in own.items())
            raise InputError(f"--set {text}: write NAME=VALUE with one of {known}.")
        found[key] = parsed(key, value, own[key])
    return found


def _listed(text: str | None, option: str) -> list[str] | None:
    if text is None:
        return None
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise InputError(f"{option} {text!r} names none; leave it out, or write them with commas between.")
    return found


def _print(found: Any) -> None:
    console, table = Console(), Table(box=None, pad_edge=False)
    timed = found.choice.t is not None
    for column in (
        "technique",
        *(["t"] if timed else []),
        "site",
        *(["ensemble"] if timed else []),
        "items",
        found.metric,
    ):
        table.add_column(column, justify="left" if column in ("technique", "site") else "right", no_wrap=True)
    table.add_column("rows", justify="right")
    cells = found.rows_of_table()
    for cell in cells[:10]:
        times, members = ([str(cell["t"])], [str(cell["ensemble"])]) if timed else ([], [])
        value = f"{cell['value']:.1f}"
        table.add_row(cell["technique"], *times, cell["site"], *members, str(cell["items"]), value, str(cell["rows"]))
    console.print(f"Best {min(10, len(cells))} of {len(cells)} that were scored:", highlight=False)
    console.print(table)
    for line in filter(None, (found.sentence, *found.notes, found.comparison)):
        console.print(line, highlight=False, markup=False)
    console.print(f"Rows of the network: {found.rows} of a budget of {found.budget}.", highlight=False)
