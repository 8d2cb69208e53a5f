"""`denoscope segment`: a handful of labelled pictures, and the same classes found in all others."""

import csv
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from denoscope.cli import options
from denoscope.errors import DenoscopeError, InputError, MissingError, counted

SHEET = 24  # pictures on the contact sheet, the most uncertain first
NEXT = 5  # pictures that are suggested to be labelled next, at most (and a third of all)


def segment(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Pictures, or folders of them.", metavar="IMAGE...", show_default=False)
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures with masks beside them (NAME.npy, NAME_mask.png, or NAME.png in masks/)."
        ),
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="classifier.safetensors of an earlier run, instead of --examples.")
    ] = None,
    names: Annotated[str | None, typer.Option(help="Names of the classes: 'background,horse,rider'.")] = None,
    ignore: Annotated[int, typer.Option(help="Number in masks of what is not to be learned from.")] = 255,
    side: Annotated[
        int | None,
        typer.Option(help="Longer side of the masks that are learned from (default 128); 0 for their own size."),
    ] = None,
    pixels: Annotated[
        int | None, typer.Option(help="Learn from at most so many pixels of each class of an example (default: all).")
    ] = None,
    fewest: Annotated[
        int | None, typer.Option(help="A class with fewer pixels in an example is left out there (default 20).")
    ] = None,
    voters: Annotated[int | None, typer.Option(help="Networks that vote (default 10).")] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many passes over the pixels (default 100).")] = None,
    finest: Annotated[int, typer.Option(help="Pictures with a longer side are segmented at this one.")] = 1024,
    model: options.Model = "seedling",
    preset: options.Preset = None,
    t: options.T = None,
    site: options.SiteName = None,
    ensemble: options.Ensemble = None,
    size: options.Size = None,
    prompt: options.Prompt = None,
    join: options.Join = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for the classifier, masks, overlays and the summary.")] = Path(
        "out/segment"
    ),
) -> None:
    """Learn classes from a handful of labelled pictures and find them in others; what is done is not done again."""
    from denoscope.segmentation import FewShot, read_examples

    if (examples is None) == (classifier is None):
        raise InputError("Say what to learn from: --examples FOLDER, or --classifier FILE of an earlier run.")
    training = {
        "--names": names, "--side": side, "--pixels": pixels, "--fewest": fewest, "--voters": voters, "--epochs": epochs,
    }  # fmt: skip
    reading = {"--preset": preset, "--t": t, "--site": site, "--ensemble": ensemble, "--size": size, "--prompt": prompt}
    reading |= {"--join": join, "--feature": feature, "--recipe": recipe}
    if classifier is not None:
        given = [f"--{name}" for name in ("model", "ignore", "seed") if options._said(name)]
        given += [name for name, value in {**training, **reading}.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} belongs to the training; {classifier} says how it was trained. Leave it out.")
    for name, value, least in (
        ("--side", side or None, 8), ("--pixels", pixels, 1), ("--voters", voters, 1), ("--epochs", epochs, 1),
        ("--finest", finest, 8),
    ):  # fmt: skip
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, not {value}.")
    files = pictures(images or [])
    if not files and classifier is not None:
        raise InputError("Name the pictures to segment, or folders of them.")
    if examples is not None:
        found = read_examples(examples, ignore, [name.strip() for name in names.split(",")] if names else None)
        asked = {
            "preset": preset,
            "t": t,
            "site": site,
            "ensemble": ensemble,
            "size": size,
            "prompt": prompt,
            "seed": seed,
        }
        source, told = options.asked_features(model, join, None, feature, recipe, **asked)
        told = {name: value for name, value in told.items() if value not in (None, ())}
        extract = options.load_extractor(model, device, dtype, join, None, feature, recipe, **asked)
        options.folder(out)
        settings = {
            "models": 10 if voters is None else voters, "epochs": 100 if epochs is None else epochs,
            "side": 128 if side is None else side or None, "pixels": pixels, "fewest": 20 if fewest is None else fewest,
            "precision": "float16", "seed": seed,
        }  # fmt: skip
        with options.resumable("segment"):
            trained = learned(out, extract, found, settings, source, told, device)
    else:
        assert classifier is not None
        trained = FewShot.load(classifier, device=device, dtype=dtype)
        options.folder(out)
    legend(trained, out)
    if files:
        with options.resumable("segment"):
            segmented(trained, files, out, finest)


def pictures(given: Sequence[Path]) -> list[Path]:
    """Picture files, those in folders sorted by name."""
    from denoscope.images.picture import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [one for one in sorted(path.iterdir()) if one.suffix.lower() in IMAGE_SUFFIXES]
            if not inside:
                raise MissingError(f"There are no pictures in {path}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise MissingError(f"There is no file {path}.")
    return found


def learned(
    out: Path, extract: Any, examples: Any, settings: dict[str, Any], model: str, told: dict[str, Any], device: str
) -> Any:
    """The classifier of the output folder if it was trained on the same, else a new one."""
    from denoscope.denoisers.loading import resolve_device
    from denoscope.segmentation import FewShot
    from denoscope.segmentation.few_shot import placeless

    target = out / "classifier.safetensors"
    wanted = FewShot.told(extract, examples, **settings)
    if target.is_file():
        try:
            before = FewShot.load(target, extract)
            if placeless({name: before.recipe.get(name) for name in wanted}) == placeless(wanted):
                print(f"Classifier: {target}, trained before")
                return before
        except DenoscopeError:
            pass  # of other features, or damaged: trained again
    where = resolve_device(device)
    kept = out / ".pixels"  # so that a run that was stopped goes on where it was
    with reporter() as report:
        found = FewShot.fit(
            extract, examples, **settings, folder=kept, device=where if where.type == "cuda" else "cpu", report=report
        )
    found.save(target, model, told)
    shutil.rmtree(kept, ignore_errors=True)
    amount = f"{found.recipe['labelled_pixels']:,} pixels of {counted(len(examples), 'example')}"
    print(f"Classifier: {target}, {len(examples.classes)} classes from {amount}")
    return found


@contextmanager
def reporter() -> Iterator[Any]:
    """A line that moves on a terminal, a few lines elsewhere."""
    console = Console(stderr=True)

    def line(stage: str, done: int, total: int) -> str:
        if stage == "training":
            return f"training: {done} batches, {counted(total, 'network')} left"
        return f"features: {done} of {total}" + (", kept from before" if stage == "kept" else "")

    if not console.is_terminal:
        said: dict[str, int] = {}

        def lines(stage: str, done: int, total: int) -> None:
            step = 1000 if stage == "training" else max(1, total // 5)
            if done // step > said.get(stage, 0):
                said[stage] = done // step
                print(line(stage, done, total), flush=True)

        yield lines
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as progress:
        task = progress.add_task("features", total=None)

        def shown(stage: str, done: int, total: int) -> None:
            if stage != "training":
                progress.update(task, description=line(stage, done, total), completed=done, total=total)
            elif done % 20 == 0:
                progress.update(task, description=line(stage, done, total), total=None)

        yield shown


def legend(trained: Any, out: Path) -> None:
    from denoscope.images import atomically

    text = json.dumps(trained.classes.to_dict(), indent=1) + "\n"
    atomically(out / "classes.json", lambda path: path.write_text(text, encoding="utf-8"))


def segmented(trained: Any, files: Sequence[Path], out: Path, finest: int) -> None:
    """Every picture's mask, overlay and uncertainty, then the summary."""
    import denoscope as ds
    from denoscope.benchmarks.running import fingerprint
    from denoscope.cli.features import _names
    from denoscope.segmentation.few_shot import placeless

    entries, failed, kept, reads = [], [], [], placeless(trained.extractor.describe())
    for file, name in shown(list(zip(files, _names(list(files)), strict=True)), kept):
        try:
            picture = ds.read(file)
            key = fingerprint([trained.ensemble.digest, reads, trained.classes.to_dict(), picture.digest, finest])
            entry = done(out, name, key)
            if entry is None:
                entry = one(trained.segment(picture, finest), out, name, key)
            else:
                kept.append(name)
            entries.append({**entry, "picture": str(file)})
        except DenoscopeError as error:
            if len(files) == 1:
                raise
            failed.append(error)
    if entries:
        summary(trained, entries, out)
    if failed:
        raise InputError(f"{len(failed)} of {len(files)} pictures failed: {' '.join(map(str, failed))}")


def outputs(out: Path, name: str) -> tuple[Path, Path, Path, Path]:
    return (
        out / "masks" / f"{name}.png",
        out / "overlays" / f"{name}.png",
        out / "uncertainty" / f"{name}.png",
        out / "numbers" / f"{name}.json",
    )


def done(out: Path, name: str, key: str) -> dict[str, Any] | None:
    """What an earlier run found, if it was the same and is all there."""
    paths = outputs(out, name)
    if not all(path.is_file() for path in paths):
        return None
    try:
        entry = json.loads(paths[-1].read_text())
        return entry if entry["key"] == key else None
    except (ValueError, KeyError, TypeError):
        return None


def one(masks: Any, out: Path, name: str, key: str) -> dict[str, Any]:
    """Write a picture's files, the numbers last."""
    import torch

    from denoscope.images import atomically, write
    from denoscope.images.draw import heat_overlay

    mask, overlay, doubt, numbers = outputs(out, name)
    write(masks.indexed(), mask)
    write(masks.draw(), overlay)
    write(heat_overlay(masks.picture, torch.from_numpy(masks.disagreement), alpha=0.75), doubt)
    entry = {"key": key, "name": name, **masks.to_dict()}
    entry.pop("recipe")
    text = json.dumps(entry, indent=1) + "\n"
    atomically(numbers, lambda path: path.write_text(text, encoding="utf-8"))
    return entry


def summary(trained: Any, entries: list[dict[str, Any]], out: Path) -> None:
    """summary.json, summary.csv, the contact sheet, and a short table."""
    from PIL import Image

    from denoscope.images import atomically, write
    from denoscope.images.draw import contact_sheet
    from denoscope.segmentation.masks import with_legend

    order = sorted(entries, key=lambda entry: -entry["uncertainty"])
    following = [entry["picture"] for entry in order[: min(NEXT, -(-len(order) // 3))]]
    if len(order) < 2 or trained.ensemble.models < 2:  # nothing to choose from, or no dispute to choose by
        following = []
    names = trained.classes.names
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["picture", "width", "height", "uncertainty", *names])
    for entry in entries:
        found = {row["index"]: row["pixels"] for row in entry["classes"]}
        writer.writerow(
            [
                entry["picture"],
                *entry["size"],
                f"{entry['uncertainty']:.6f}",
                *(found.get(k, 0) for k in range(len(names))),
            ]
        )
    values = {
        "classes": trained.classes.to_dict(),
        "label_next": following,
        "pictures": [{name: value for name, value in entry.items() if name != "key"} for entry in entries],
        "recipe": trained.recipe,
    }
    document = json.dumps(values, indent=1, default=str) + "\n"
    atomically(out / "summary.json", lambda path: path.write_text(document, encoding="utf-8"))
    atomically(out / "summary.csv", lambda path: path.write_bytes(text.getvalue().encode()))
    images, titles = [], []
    for entry in order[:SHEET]:
        with Image.open(outputs(out, entry["name"])[1]) as image:
            picture = image.crop((0, 0, *entry["size"]))  # without the legend
        picture.thumbnail((512, 512))
        images.append(picture)
        titles.append(f"{entry['name']}: {entry['uncertainty']:.3f}")
    occurring = sorted({row["index"] for entry in order[:SHEET] for row in entry["classes"]})
    write(with_legend(contact_sheet(images, titles), trained.classes, occurring), out / "sheet.png")

    table = Table(box=None, pad_edge=False)
    table.add_column("picture", no_wrap=True)
    table.add_column("uncertainty", justify="right")
    table.add_column("classes")
    for entry in order[:12]:
        largest = sorted(entry["classes"], key=lambda row: -row["share"])[:4]
        table.add_row(
            entry["name"],
            f"{entry['uncertainty']:.3f}",
            ", ".join(f"{r['name']} {100 * r['share']:.0f} %" for r in largest),
        )
    if len(order) > 12:
        table.add_row("…", "", f"{len(order) - 12} more")
    Console().print(table, markup=False)
    if following:
        print(f"Most uncertain, worth labelling next: {', '.join(following)}")
    print(f"Masks: {out / 'masks'}\nSheet: {out / 'sheet.png'}\nNumbers: {out / 'summary.json'}, {out / 'summary.csv'}")


def shown(jobs: Sequence[Any], kept: Sequence[Any]) -> Iterator[Any]:
    """A progress bar on a terminal, a line for every tenth of the work elsewhere. kept: grows with what was done before."""
    console = Console(stderr=True)
    if console.is_terminal:
        bar = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*bar, console=console, transient=True) as progress:
            yield from progress.track(jobs, description="segmenting")
        return
    for count, job in enumerate(jobs, 1):
        yield job
        if count * 10 // len(jobs) > (count - 1) * 10 // len(jobs) and len(jobs) > 1:
            before = f" ({'all' if len(kept) == count else len(kept)} kept from before)" if kept else ""
            print(f"{'done' if before else 'segmented'} {count} of {len(jobs)}{before}", flush=True)
