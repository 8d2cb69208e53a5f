"""What the content-shift score and GATE's check share: techniques made comparable, and controls shown in the wrong place."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from denoscope.denoisers import winograd
from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError
from denoscope.features.recipe import Recipe, recipe, resolve_size
from denoscope.features.technique import contents, shown, without_edges
from denoscope.features.weights import versions, weights_digest
from denoscope.images import Picture, write

PLAIN, WRONG = "plain", "wrong:"
Record = dict[str, Any]  # JSON values: what was measured of one picture
Techniques = Mapping[str, Mapping[str, Any]]
# how features are read, which is one thing for all that is compared
SHARED = ("t", "site", "size", "ensemble", "seed", "noise", "resample", "preset", "adaln", "massive", "pool")
Kind = TypeVar("Kind")


def completed(techniques: Techniques) -> dict[str, dict[str, Any]]:
    """All techniques, "plain" first; what "plain" sets holds for the others too, unless they say otherwise.

    Raises InputError for a technique that would be read at another place than the others.
    """
    plain = dict(techniques.get(PLAIN, {}))
    found = {PLAIN: plain, **{name: {**plain, **own} for name, own in techniques.items() if name != PLAIN}}
    for name, own in found.items():
        if wrong := [key for key in SHARED if key in own]:
            raise InputError(
                f"The technique {name!r} sets {wrong[0]!r}; what is compared is read alike, so set it for all of them."
            )
        if name.startswith(WRONG):
            raise InputError(f"The technique {name!r} needs another name; {WRONG!r} marks what is added here.")
    return found


def base_recipe(denoiser: Denoiser, **settings: Any) -> Recipe:
    """The common settings of all techniques; where the preset joins several picture sizes, the last of them."""
    given = {**settings, "noise": "drawn"}
    size = recipe(denoiser, given.get("preset")).size if given.get("size") is None else given["size"]
    return recipe(denoiser, **{**given, "size": size.rsplit("+", 1)[-1] if isinstance(size, str) else size})


def common_settings(denoiser: Denoiser, base: Recipe) -> dict[str, Any]:
    """What decides the numbers beside techniques and choices, as JSON values."""
    config = denoiser.schedule.config
    told = {**base.described(), "pool": base.pool}
    return {
        "model": denoiser.name,
        "weights": weights_digest(denoiser),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        **winograd.described(denoiser.device, denoiser.dtype),
        "scheduler": {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | None)},
        **{key: told[key] for key in ("preset", "size", "resample", "adaln", "massive", "pool")},
        "versions": dict(versions()),
    }


def files_of(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Digests of what the recipes name by a path and that may change behind it."""
    every = [contents(one.prompt, one.control, one.lora) for one in recipes.values()]
    return {path: digest for found in every for path, digest in found.items()}


def choices_of(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """A dataclass of choices. Raises InputError for names that it does not have."""
    known = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"There is no choice {unknown[0]!r}; known are {', '.join(known)}.")
    return kind(**given)


def wrongly(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """ "wrong:NAME" for every technique with a ControlNet, of which `of_another` puts the controls in the wrong place.

    Raises InputError when there is none.
    """
    found = {f"{WRONG}{name}": one for name, one in recipes.items() if one.control}
    if not found:
        raise InputError("No technique has a ControlNet, so there is no control to take from another picture.")
    return found


def next_ones(pictures: Sequence[Picture], wanted: bool) -> list[Picture | None]:
    """For each picture the one after it, whose controls are the wrong ones; None where that is not wanted.

    Raises InputError for a single picture.
    """
    if not wanted:
        return [None] * len(pictures)
    if len({picture.digest for picture in pictures}) < 2:
        raise InputError("Controls of another picture need another picture; give at least two.")
    return [
        next(other for other in (*pictures[i + 1 :], *pictures) if other.digest != picture.digest)
        for i, picture in enumerate(pictures)
    ]


def of_another(
    recipes: Mapping[str, Recipe], picture: Picture, other: Picture | None, denoiser: Denoiser, folder: Path
) -> dict[str, Recipe]:
    """The recipes, those of `wrongly` with what belongs to `other`, at the size of `picture`, written into `folder`."""
    found = {}
    for name, one in recipes.items():
        if name.startswith(WRONG):
            if other is None:
                raise InputError(f"{name!r} needs another picture, whose control is shown in the wrong place.")
            size, moved = resolve_size(one.size, picture.size, denoiser.multiple, denoiser.minimum), []
            for control in one.control:
                if not without_edges(control, seen := shown(control, other, size, one.resample)):
                    path = write(seen, folder / f"{seen.digest}.png")
                    moved.append(replace(control, image=str(path)))
            one = replace(one, control=tuple(moved))
        found[name] = one
    return found
