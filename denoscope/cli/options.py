"""Options that several verbs share."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from denoscope.errors import InputError

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="'seedling', a diffusers or transformers folder, an ADM checkpoint file, a hub id, or rgb, sift, sift-fine, "
        "position; see 'denoscope models'.",
    ),
]
Preset = Annotated[str | None, typer.Option(help="semantic, geometric or temporal: the model's published settings.")]
T = Annotated[int | None, typer.Option("--t", help="Timestep of the noise that is added.")]
SiteName = Annotated[str | None, typer.Option("--site", help="Where to read, e.g. up.1 (see 'denoscope models').")]
Ensemble = Annotated[int | None, typer.Option(help="Draws of the noise to average over.")]
Size = Annotated[
    str | None,
    typer.Option(help="Size to resize to: 768, 768x512, short480, long512, 0 for none, or several: long48+long96."),
]
Join = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        metavar="MODEL[@SITE[@SIZE[@WEIGHT]]]",
        help="Put the features of another model (or site) beside; again for more. What is left out is the preset's, and 1.",
    ),
]
Pca = Annotated[
    int | None,
    typer.Option("--pca", metavar="N", help="Reduce each model to N components, of both pictures of a pair together."),
]
Feature = Annotated[
    list[str] | None,
    typer.Option(
        "--feature",
        metavar="NAME=VALUE",
        help="Another setting of the features: control=FOLDER@SCALE, lora=FILE@SCALE, denoise_from=60 (or +10: 10 above t), "
        "second_t=150, img2img=0.5, guidance=3, timestep_mode=gdf, pool=2, noise=none (clean latents), adaln=no and "
        "massive=keep (transformers as they are), resample=linear; again for more.",
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="Read features as this file says (of 'denoscope tune'); other options win over it."),
]
SamplingRecipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="Sample with the model, prompt, ControlNets, LoRAs, guidance, size and seed of this file (of 'denoscope tune'); "
        "what is about reading is left aside, and other options win over it.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="What the picture shows, e.g. 'a photo of a cat'; preset:NAME (published ones), @FILE (captions by picture name) "
        "or caption:MODEL (written by a model)."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what suits the device.")]

# what --feature takes; () is anything, checked where it is used
FEATURE_VALUES: dict[str, tuple[str, ...]] = {
    "noise": ("none",), "adaln": ("yes", "no"), "massive": (), "resample": ("bicubic", "linear"), "control": (), "lora": (),
    "denoise_from": (), "img2img": (), "second_t": (), "guidance": (), "timestep_mode": ("exact", "gdf"), "pool": (),
    "long_prompts": ("cut", "chunks"),
}  # fmt: skip
_NUMBERS = {"denoise_from": int, "second_t": int, "pool": int, "img2img": float, "guidance": float}


def load_extractor(
    model: str,
    device: str,
    dtype: str | None,
    join: list[str] | None = None,
    pca: int | None = None,
    feature: list[str] | None = None,
    recipe: Path | None = None,
    **settings: Any,
) -> Any:
    """The models behind --model and --join with the settings of `features`, ready to be called with pictures."""
    from denoscope.features import load_extractor

    model, told = asked_features(model, join, pca, feature, recipe, **settings)
    return load_extractor(model, device, dtype, **told)


def asked_features(
    model: str,
    join: list[str] | None = None,
    pca: int | None = None,
    feature: list[str] | None = None,
    recipe: Path | None = None,
    **settings: Any,
) -> tuple[str, dict[str, Any]]:
    """The model and the settings of `features.load_extractor` that the options and the recipe file ask for."""
    from denoscope.features.recipes import read_recipe

    given = {
        **settings,
        **feature_settings(feature),
        **({"join": join} if join else {}),
        **({"pca": pca} if pca else {}),
    }
    if recipe is None:
        return model, given
    file = read_recipe(recipe)
    # verbs have defaults of these
    own = [name for name in ("preset", "seed") if name in file.settings and not _said(name)]
    told = {name: value for name, value in given.items() if value is not None and name not in own}
    merged = {**file.settings, **told, "amalgamate": file.amalgamate, "techniques": file.techniques}
    return model if _said("model") else file.model, merged


def asked_sampling(model: str, recipe: Path | None, **given: Any) -> tuple[str, dict[str, Any]]:
    """The model and the settings of sampling that the options ask for and, where they are None, the recipe file.

    given: of prompt, control, lora, guidance, size, seed, img2img, long_prompts those that the verb has a use for; the file's
    other settings are about reading features.
    """
    from denoscope.features.recipe import check_settings
    from denoscope.features.recipes import read_recipe

    if recipe is None:
        return model, given
    file = read_recipe(recipe)
    if file.techniques:
        warnings.warn(
            f"{recipe} reads features under several techniques; what stands above them is taken.", stacklevel=2
        )
    told = {name: file.settings[name] for name in given if name in file.settings}
    check_settings(told, f"{recipe}: ")
    own = {name: value for name, value in given.items() if value is not None and (name != "seed" or _said("seed"))}
    return model if _said("model") else file.model, given | told | own


def invocation() -> Any:
    """The context of the command that runs, or None."""
    home, _, _ = typer.Context.__mro__[1].__module__.rpartition(".")  # click, or the one inside newer versions of typer
    return import_module(f"{home}.globals").get_current_context(silent=True)


def _said(parameter: str) -> bool:
    """Whether the user wrote an option, rather than leaving it at its default."""
    context = invocation()
    source = None if context is None else context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def feature_settings(given: list[str] | None) -> dict[str, Any]:
    """What --feature says, as arguments of `features`; control and lora may come several times."""
    found: dict[str, Any] = {}
    for text in given or []:
        name, _, value = text.partition("=")
        if name not in FEATURE_VALUES:
            raise InputError(f"--feature {text}: there is no setting {name!r}; known are {', '.join(FEATURE_VALUES)}.")
        known = FEATURE_VALUES[name]
        if not value or (known and value not in known):
            takes = {"massive": "zero, keep or channel numbers", "control": "FOLDER@SCALE", "lora": "FILE@SCALE"}
            raise InputError(
                f"--feature {text}: write {name}=VALUE with {' or '.join(known) or takes.get(name, 'a number')} as the value."
            )
        if name == "denoise_from" and value.startswith("+"):  # above t
            found[name] = value
        elif name in _NUMBERS:
            try:
                found[name] = _NUMBERS[name](value)
            except ValueError:
                raise InputError(
                    f"--feature {text}: {value!r} is no {'whole ' if _NUMBERS[name] is int else ''}number."
                ) from None
        elif name in ("control", "lora"):
            found[name] = [*found.get(name, []), value]
        else:
            found[name] = value == "yes" if name == "adaln" else value
    return found


def parse_points(text: str) -> list[tuple[float, float]]:
    """Points from "x,y;x,y", or from a .json file (list of pairs, or {"points": …}) or .csv file (columns x, y)."""
    from denoscope.correspondence.keypoints import as_point_list, read_point_list

    path = Path(text)
    if path.suffix.lower() not in (".json", ".csv"):
        try:
            pairs = [tuple(map(float, pair.split(","))) for pair in text.split(";") if pair.strip()]
        except ValueError:
            raise InputError(f"Points {text!r} are not understood; write them as 'x,y;x,y'.") from None
        return as_point_list(pairs, "--points")
    return read_point_list(path)


@contextmanager
def resumable(verb: str) -> Iterator[None]:
    """A word about how to go on after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"{verb}: stopped; the same command goes on from what was kept last.", highlight=False
        )
        raise


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
