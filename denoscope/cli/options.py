"""Options that several verbs share."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from denoscope.errors import InputError, MissingError

Model = Annotated[
    str, typer.Option("--model", "-m", help="'seedling', a diffusers folder, an ADM checkpoint file or a hub id.")
]
Preset = Annotated[str | None, typer.Option(help="semantic, geometric or temporal: the model's published settings.")]
T = Annotated[int | None, typer.Option("--t", help="Timestep of the noise that is added.")]
SiteName = Annotated[str | None, typer.Option("--site", help="Where to read, e.g. up.1 (see 'denoscope models').")]
Ensemble = Annotated[int | None, typer.Option(help="Draws of the noise to average over.")]
Size = Annotated[
    str | None,
    typer.Option(help="Size to resize to: 768, 768x512, short480, long512, 0 for none, or several: long48+long96."),
]
Prompt = Annotated[str | None, typer.Option(help="What the picture shows, e.g. 'a photo of a cat'.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what suits the device.")]


def load_extractor(model: str, device: str, dtype: str | None, **settings: Any) -> Any:
    """The model behind --model with the settings of `features`, ready to be called with pictures."""
    import denoscope as ds
    from denoscope.features import as_extractor

    return as_extractor(ds.load(model, device, dtype), **settings)


def parse_points(text: str) -> list[tuple[float, float]]:
    """Points from "x,y;x,y", or from a .json file (list of pairs, or {"points": …}) or .csv file (columns x, y)."""
    path = Path(text)
    if path.suffix.lower() not in (".json", ".csv"):
        try:
            pairs = [tuple(map(float, pair.split(","))) for pair in text.split(";") if pair.strip()]
        except ValueError:
            raise InputError(f"Points {text!r} are not understood; write them as 'x,y;x,y'.") from None
        return _pairs(pairs, "--points")
    if not path.is_file():
        raise MissingError(f"There is no points file {path}.")
    try:
        if path.suffix.lower() == ".json":
            values = json.loads(path.read_text("utf-8-sig"))
            return _pairs(values["points"] if isinstance(values, dict) else values, str(path))
        rows = [[cell.strip() for cell in row] for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
        if rows and not all(_is_number(cell) for cell in rows[0]):
            header = [cell.lower() for cell in rows[0]]
            if header.count("x") != 1 or header.count("y") != 1:
                raise InputError(f"{path}: the header must name one column x and one column y, not {rows[0]}.")
            x, y = header.index("x"), header.index("y")
            rows = [[row[x], row[y]] for row in rows[1:]]
        return _pairs([[float(cell) for cell in row] for row in rows], str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} does not hold points; write pairs [[x, y], …] or columns x,y.") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _pairs(values: Any, where: str) -> list[tuple[float, float]]:
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} holds no points; give at least one x,y.")
    for pair in values:
        numbers = isinstance(pair, list | tuple) and all(type(number) in (int, float) for number in pair)
        if not numbers or len(pair) != 2:
            raise InputError(f"{where}: every point needs exactly two numbers, x,y.")
    return [(float(x), float(y)) for x, y in values]


def folder(out: Path) -> Path:
    """The folder for results, made before any long work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {out} is a file or lies in one; name a folder.") from None
    except OSError as error:
        raise InputError(f"--out {out} cannot be written to ({error.strerror}); name another folder.") from None


def file(path: Path, option: str) -> Path:
    """A file for a result; its folder is made before any long work."""
    try:
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{option} {path} lies in a file, not in a folder; name another place.") from None
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written ({error.strerror}); name another place.") from None
