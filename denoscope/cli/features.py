"""`denoscope features`: dense features of pictures, saved as safetensors with a PCA picture beside them."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from denoscope.cli import options
from denoscope.errors import DenoscopeError, InputError


def features(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", metavar="IMAGE...")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.safetensors and NAME.png.")] = Path("out"),
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
) -> None:
    """Save the features of every IMAGE; pictures that are done with the same settings are not done again."""
    import denoscope as ds
    from denoscope.images import write
    from denoscope.images.picture import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in images:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no images.")
        files += inside
    names = _names(files)
    options.folder(out)
    for name in names:
        if any(
            (out / f"{name}.png").samefile(file) for file in files if (out / f"{name}.png").exists() and file.exists()
        ):
            raise InputError(
                f"{out / name}.png would be overwritten by its features' picture; name another folder for --out."
            )
    asked = {"preset": preset, "t": t, "site": site, "ensemble": ensemble, "size": size, "prompt": prompt, "seed": seed}
    extract = options.load_extractor(
        model, device, dtype, join, feature=feature, recipe=recipe, **asked
    )  # a wrong setting is one error, not many
    settings = json.loads(json.dumps(extract.describe()))
    console, failed, last = Console(), [], None
    for file, name in track(list(zip(files, names, strict=True)), "Features", disable=not console.is_terminal):
        target = out / f"{name}.safetensors"
        try:
            picture = ds.read(file)
            made = {**settings, "digest": picture.digest}
            fm = _done(target, made)
            if fm is None:
                fm = extract(picture)
                fm.recipe["asked"] = made
                write(fm.pca(), out / f"{name}.png")
                fm.save(target)
            last = fm
        except DenoscopeError as error:
            if len(files) == 1:
                raise
            failed.append(error)
    if last is not None:
        c, h, w = last.values.shape
        console.print(
            f"{len(files) - len(failed)} of {len(files)} pictures: {c} channels, e.g. {w}x{h} cells, in {out}."
        )
    if failed:
        raise InputError(f"{len(failed)} of {len(files)} pictures failed: {' '.join(map(str, failed))}")


def _done(path: Path, settings: dict[str, Any]) -> Any:
    """The features at `path` if they were made with the same settings from the same pixels; damaged ones are made again."""
    from denoscope import FeatureMap

    if not path.is_file() or not path.with_suffix(".png").is_file():
        return None
    try:
        found = FeatureMap.load(path)
    except DenoscopeError:
        return None
    return found if found.recipe.get("asked") == settings else None


def _names(files: list[Path]) -> list[str]:
    """Output names: the stems; where two pictures would share one, the paths below their common folder."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    full = [file.resolve() for file in files]
    if len(set(full)) < len(full):
        twice = next(file for file, path in zip(files, full, strict=True) if full.count(path) > 1)
        raise InputError(f"{twice} is named twice.")
    root = os.path.commonpath([path.parent for path in full])
    return [str(path.relative_to(root)).replace("_", "__").replace(os.sep, "_") for path in full]
