"""`denoscope features`: dense features of pictures, saved as safetensors with a PCA picture beside them."""

from pathlib import Path
from typing import Annotated

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
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Save the features of every IMAGE; pictures that are done with the same settings are not done again."""
    import denoscope as ds
    from denoscope.cli.match import write_image
    from denoscope.images.picture import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in images:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no images.")
        files += inside
    names = _names(files)
    denoiser = ds.load(model, device, dtype)
    asked = {"t": t, "site": site, "ensemble": ensemble, "size": size, "prompt": prompt}
    console, failed, last = Console(), [], None
    out.mkdir(parents=True, exist_ok=True)
    for file, name in track(list(zip(files, names, strict=True)), "Features", disable=not console.is_terminal):
        target, done = out / f"{name}.safetensors", None
        settings = {"model": model, "preset": preset, **asked, "seed": seed, "dtype": str(denoiser.dtype)}
        if target.is_file():
            done = ds.FeatureMap.load(target)
            if done.recipe.get("asked") != settings or done.recipe.get("picture") != str(file):
                done = None
        try:
            if done is None:
                done = ds.features(denoiser, file, preset=preset, seed=seed, **asked)
                done.recipe["asked"] = settings
                write_image(done.pca(), out / f"{name}.png")
                done.save(target)
        except DenoscopeError as error:
            if len(files) == 1:
                raise
            failed.append(error)
        last = done or last
    if last is not None:
        c, h, w = last.values.shape
        console.print(
            f"{len(files) - len(failed)} of {len(files)} pictures: {c} channels, e.g. {w}x{h} cells, in {out}."
        )
    if failed:
        raise InputError(f"{len(failed)} of {len(files)} pictures failed; the first: {failed[0]}")


def _names(files: list[Path]) -> list[str]:
    """Output names: the stems, with the parent folder in front where two pictures would share one."""
    stems = [file.stem for file in files]
    return [
        stem if stems.count(stem) == 1 else f"{file.parent.name}_{file.stem}{file.suffix.replace('.', '_')}"
        for file, stem in zip(files, stems, strict=True)
    ]
