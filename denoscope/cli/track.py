"""`denoscope track`: masks, points or boxes of a video's first frame, carried through all of it."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from denoscope.cli import options
from denoscope.errors import InputError

TAIL = 12  # earlier positions that are drawn behind a point
OVERLAYS = ("mp4", "avi", "gif", "none")


def track(
    video: Annotated[Path, typer.Argument(help="Folder of frames, video file or animated GIF.")],
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Mask of the first frame: indexed PNG (a number per object), black and white, or flat colours."
        ),
    ] = None,
    points: Annotated[
        str | None, typer.Option(help="'x,y;x,y' in pixels of the first frame, or a .json / .csv file of them.")
    ] = None,
    boxes: Annotated[str | None, typer.Option(help="'x1,y1,x2,y2;…' in pixels of the first frame.")] = None,
    context: Annotated[int | None, typer.Option(help="Last frames to take labels from, besides the first.")] = None,
    radius: Annotated[int | None, typer.Option(help="Half window in feature cells; 0 for the whole frame.")] = None,
    topk: Annotated[int | None, typer.Option(help="Most similar cells to take labels from.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Smaller trusts the most similar cells more.")] = None,
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
    overlay: Annotated[str, typer.Option(help="What to draw the result into: mp4, avi, gif or none.")] = "mp4",
    out: Annotated[Path, typer.Option(help="Folder for masks, overlay and tracks.json.")] = Path("out/track"),
) -> None:
    """Carry what is marked in the first frame of VIDEO through all of it; writes every frame as it comes."""
    import denoscope as ds
    from denoscope.correspondence.labels import read_mask_labels
    from denoscope.correspondence.tracking import first_labels
    from denoscope.images import atomically
    from denoscope.images.video import Frames, video_writer

    if sum(given is not None for given in (mask, points, boxes)) != 1:
        raise InputError("Say what to track in the first frame: one of --mask, --points and --boxes.")
    if overlay not in OVERLAYS:
        raise InputError(f"--overlay {overlay} is not known; use {', '.join(OVERLAYS)}.")
    frames = Frames(video)
    labels: dict[str, Any] = {
        "mask": mask and read_mask_labels(mask),
        "points": None if points is None else options.parse_points(points),
        "boxes": None if boxes is None else parse_boxes(boxes),
    }
    for kind, given in labels.items():  # labels that do not fit are told before a model is loaded
        if given is not None:
            first_labels(kind, given, frames.size)
    options.folder(out)
    settings = {"preset": preset or "temporal", "t": t, "site": site, "ensemble": ensemble, "size": size}
    extract = options.load_extractor(
        model, device, dtype, **settings, prompt=prompt, seed=seed, join=join, feature=feature, recipe=recipe
    )
    own = {"context": context, "radius": radius, "topk": topk, "temperature": temperature}
    tracked = ds.track(extract, frames, **labels, **own)

    forget(out)
    target, tail, rows, made = out / f"overlay.{overlay}", deque(maxlen=TAIL), [], {}
    with nullcontext() if overlay == "none" else video_writer(target, frames.rate) as draw:
        for one in shown(tracked, len(frames)):
            made = one.recipe
            rows.append({"frame": one.index, "name": one.name, "objects": one.rows()})
            if one.mask is not None:
                one.save(out / "masks" / f"{one.name}.png")
            if draw:
                draw(one.draw(list(tail)))
            if one.points is not None:
                tail.append(one.points)
    kind = next(kind for kind, given in labels.items() if given is not None)
    found = ds.Tracks(kind, rows, frames.size, {**made, "video": str(video)})
    text = json.dumps({**found.to_dict(), "rate": frames.rate}, indent=1) + "\n"
    atomically(out / "tracks.json", lambda path: path.write_text(text))  # last: where it is, the rest is whole
    print_tracks(found)
    if kind != "points":
        print(f"Masks: {out / 'masks'}")
    if overlay != "none":
        print(f"Video: {target}")
    print(f"Numbers: {out / 'tracks.json'}")


def parse_boxes(text: str) -> list[tuple[float, ...]]:
    """Boxes from "x1,y1,x2,y2;…"."""
    try:
        boxes = [tuple(float(part) for part in box.split(",")) for box in text.split(";") if box.strip()]
    except ValueError:
        boxes = []
    if not boxes or any(len(box) != 4 for box in boxes):
        raise InputError(f"Boxes {text!r} are not understood; write them as 'x1,y1,x2,y2;x1,y1,x2,y2'.")
    return boxes


def forget(out: Path) -> None:
    """Remove what an earlier run left in the folder: its tracks.json, and the masks that this file names."""
    numbers = out / "tracks.json"
    try:
        names = [frame["name"] for frame in json.loads(numbers.read_text())["frames"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    numbers.unlink(missing_ok=True)
    for name in names:
        if Path(name).name == name:
            (out / "masks" / f"{name}.png").unlink(missing_ok=True)
    for old in OVERLAYS:
        (out / f"overlay.{old}").unlink(missing_ok=True)


def shown(tracked: Iterable[Any], count: int) -> Iterator[Any]:
    """A progress bar on a terminal, a line for every tenth of the video elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        bar = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*bar, console=console) as progress:
            yield from progress.track(tracked, total=count or None, description="frames")
        return
    step = max(1, count // 10) if count else 25
    for one in tracked:
        yield one
        if (one.index + 1) % step == 0:
            print(f"frame {one.index + 1}" + (f" of {count}" if count else ""), flush=True)


def print_tracks(found: Any, most: int = 24) -> None:
    """One line per object; everything is in the JSON."""
    table = Table(box=None, pad_edge=False)
    where = "last x, y" if found.kind == "points" else "last box"
    for column in ("object", "frames", "mean score", "last score", where):
        table.add_column(column, justify="right")
    objects = list(zip(*(frame["objects"] for frame in found.frames), strict=True))
    for rows in objects[:most]:
        seen = [row for row in rows if row["x"] is not None]
        mean = sum(row["score"] for row in rows) / len(rows)
        last = rows[-1]
        place = "lost"
        if last["x"] is not None:
            place = ", ".join(f"{v:g}" for v in (last.get("box") or (last["x"], last["y"])))
        table.add_row(str(last["object"]), f"{len(seen)} of {len(rows)}", f"{mean:.2f}", f"{last['score']:.2f}", place)
    if len(objects) > most:
        table.add_row("…", f"{len(objects) - most} more")
    Console().print(table)
