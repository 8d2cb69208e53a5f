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
from denoscope.features.recipe import Recipe
from denoscope.images import atomically

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
    model = str(path.parent / model) if (path.parent / model).exists() else model
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
    if os.sep in model and Path(model).exists():
        model = os.path.relpath(Path(model).resolve(), path.parent.resolve())
    document: dict[str, Any] = {"model": model, **_apart(path, {k: v for k, v in settings.items() if v is not None})}
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
    parent = path.parent.resolve()

    def placed(name: str) -> str | None:
        return os.path.relpath(Path(name).resolve(), parent) if Path(name).exists() else None

    return _paths(settings, placed)


def _paths(settings: Mapping[str, Any], place: Callable[[str], str | None]) -> dict[str, Any]:
    """Settings with every path in `control`, `lora` and `prompt` put where `place` says (None leaves it)."""

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
    if isinstance(prompt := found.get("prompt"), str) and (named := re.fullmatch(r"(@|caption:)(.+)", prompt)):
        found["prompt"] = named[1] + (place(named[2]) or named[2])
    return found
