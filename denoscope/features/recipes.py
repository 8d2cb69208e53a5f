"""Files of settings: a recipe (a model and how it is read), and techniques to compare, as TOML or JSON.

A recipe is what `denoscope tune` writes and what verbs take with --recipe:

    model = "seedling"
    t = 20
    site = "up.1"
    prompt = "a photo of a bird"
    control = [{ model = "FOLDER", scale = 1.0 }]

With several techniques the features of all are amalgamated; what stands above is common to them:

    amalgamate = "mean"
    [techniques.words]
    prompt = "a photo of a bird"
    [techniques.edges]
    control = "FOLDER@1.0"

A file of techniques has one table for each, with the same settings. Paths are relative to the file.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from denoscope.errors import InputError, MissingError
from denoscope.features.baselines import BASELINES
from denoscope.features.recipe import Recipe
from denoscope.features.technique import controls, loras
from denoscope.images import atomically

_NAMED = re.compile(r"(@|caption:)(.+)")  # prompts that name a file, a folder or a model
_BESIDE = ("model", "amalgamate", "techniques", "notes", "join", "pca")


@dataclass(frozen=True)
class RecipeFile:
    """model: a name for `load_model`. settings: of `features`. techniques: to amalgamate by `amalgamate`, see `Amalgam`."""

    model: str
    settings: dict[str, Any]
    amalgamate: str | None = None
    techniques: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_recipe(path: str | Path) -> RecipeFile:
    """What `write_recipe` wrote, or a person. Raises MissingError, or InputError naming what is wrong."""
    path = Path(path)
    found = _document(path)
    if not isinstance(found.get("model"), str):
        raise InputError(f'{path} does not say which model it is for; add model = "NAME".')
    settings = {name: value for name, value in found.items() if name not in _BESIDE}
    settings |= {name: found[name] for name in ("join", "pca") if name in found}
    techniques = _tables(path, found.get("techniques", {}))
    if bool(techniques) != ("amalgamate" in found):
        raise InputError(f"{path} needs both amalgamate and [techniques.NAME] tables, or neither.")
    model, how = found["model"], found.get("amalgamate")
    how = str(path.parent / how) if isinstance(how, str) and (path.parent / how).is_file() else how
    model = _model(model, lambda name: str(path.parent / name) if (path.parent / name).exists() else None)
    _known(path, {name: value for name, value in settings.items() if name not in ("join", "pca")})
    return RecipeFile(model, _beside(path, settings), how, techniques)


def read_techniques(path: str | Path) -> dict[str, dict[str, Any]]:
    """Techniques by name: a table of settings each.

    Raises MissingError, or InputError for a file without tables or with settings that features do not have.
    """
    path = Path(path)
    found = _tables(path, _document(path))
    if not found:
        raise InputError(f'{path} names no techniques; write a table for each, such as [label] and prompt = "a bird".')
    return found


def write_recipe(
    path: str | Path,
    model: str,
    settings: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
    amalgamate: str | None = None,
    techniques: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a recipe as .toml or .json, whole or not at all. settings: JSON values. notes: how it was found; nobody reads them.

    Raises InputError for other suffixes.
    """
    path = Path(path)
    given = {name: value for name, value in settings.items() if value is not None}
    document: dict[str, Any] = {"model": _model(model, _seen_from(path)), **_apart(path, given)}
    if techniques:
        tables = {name: _apart(path, one) for name, one in techniques.items()}
        document |= {"amalgamate": amalgamate, "techniques": tables}
    document |= {"notes": dict(notes)} if notes else {}
    if path.suffix == ".json":
        text = json.dumps(document, indent=2) + "\n"
    elif path.suffix == ".toml":
        text = _toml(document)
    else:
        raise InputError(f"A recipe is saved as .toml or .json, not {path.suffix or 'without suffix'}.")
    return atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _toml(document: Mapping[str, Any]) -> str:
    """Plain values first, then a table for each technique and for the notes."""
    tables = {f"techniques.{json.dumps(name)}": one for name, one in document.get("techniques", {}).items()}
    tables |= {"notes": document["notes"]} if "notes" in document else {}
    lines = [f"{name} = {_value(value)}" for name, value in document.items() if name not in ("techniques", "notes")]
    for name, table in tables.items():
        lines += [
            "",
            f"[{name}]",
            *(f"{json.dumps(key)} = {_value(value)}" for key, value in table.items() if value is not None),
        ]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    return json.dumps(value)


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'} ({error}).") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a table of settings.")
    return found


def _tables(path: Path, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    for name, table in found.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: {name} is no table of settings; write [{name}] above it.")
        _known(path, table, name)
    return {name: _beside(path, table) for name, table in found.items()}


def _known(path: Path, settings: Mapping[str, Any], table: str | None = None) -> None:
    known = [one.name for one in fields(Recipe)]
    if unknown := [name for name in settings if name not in known]:
        where = f" in [{table}]" if table else ""
        raise InputError(f"{path} has an unknown setting {unknown[0]!r}{where}; known are {', '.join(known)}.")


def _beside(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose paths that lie beside the file are found from anywhere."""
    return _paths(settings, lambda name: str(path.parent / name) if (path.parent / name).exists() else None)


def _apart(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose paths are written as seen from the file."""
    return _paths(settings, _seen_from(path))


def _seen_from(path: Path) -> Callable[[str], str | None]:
    """Where a path lies as seen from a file; None for what is no path."""
    parent = path.parent.resolve()

    def placed(name: str) -> str | None:
        place = Path(name).expanduser()
        return os.path.relpath(place.resolve(), parent) if place.exists() else None

    return placed


def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `load_extractor`, and its "model" if there is one, with paths that hold in any working directory."""

    def placed(name: str) -> str | None:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else None

    found = _paths(settings, placed)
    if techniques := found.get("techniques"):
        found["techniques"] = {name: _paths(one, placed) for name, one in techniques.items()}
    if isinstance(found.get("model"), str):
        found["model"] = _model(found["model"], placed)
    if isinstance(how := found.get("amalgamate"), str):
        found["amalgamate"] = placed(how) or how if "." in how else how
    return found


def missing(settings: Mapping[str, Any]) -> str | None:
    """The first absolute path in settings of `load_extractor` (and its "model") that is not there."""
    names: list[str] = []
    for one in (settings, *(settings.get("techniques") or {}).values()):
        chosen = controls(one.get("control"))
        names += [str(control.described()[what]) for control in chosen for what in ("model", "image")]
        names += [lora.path for lora in loras(one.get("lora"))]
        names += [] if (named := _NAMED.fullmatch(str(one.get("prompt")))) is None else [named[2]]
    names += [str(settings.get(name)) for name in ("model", "amalgamate")]
    names += [text.partition("@")[0] for text in settings.get("join") or ()]
    parts = [part for name in names for part in ([name] if Path(name).exists() else name.split("+"))]
    return next((part for part in parts if Path(part).is_absolute() and not Path(part).exists()), None)


def _model(name: str, place: Callable[[str], str | None]) -> str:
    """A name for `load_model`, "NAME+UNET" too."""
    if name in ("seedling", *BASELINES):
        return name
    base, plus, unet = name.rpartition("+")
    return place(name) or (plus and _model(base, place) + plus + (place(unet) or unet)) or name


def _paths(settings: Mapping[str, Any], place: Callable[[str], str | None]) -> dict[str, Any]:
    """Settings with every path in `control`, `lora`, `prompt` and `join` put where `place` says (None leaves it)."""

    def text(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, at, scale = value.rpartition("@")
        return place(value) or (name and (moved := place(name)) and moved + at + scale) or value

    def nested(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [nested(one) for one in value]
        if isinstance(value, Mapping):
            return {
                k: text(v) if k in ("model", "path") or (k == "image" and v != "canny") else v for k, v in value.items()
            }
        return text(value)

    found = {name: nested(value) if name in ("control", "lora") else value for name, value in settings.items()}
    if joined := found.get("join"):
        parts = [one.partition("@") for one in joined]
        found["join"] = [_model(name, place) + at + rest for name, at, rest in parts]
    if isinstance(prompt := found.get("prompt"), str) and (named := _NAMED.fullmatch(prompt)):
        found["prompt"] = named[1] + (place(named[2]) or named[2])
    return found
