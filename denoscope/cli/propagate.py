"""`denoscope propagate`: what was painted on one picture, carried to others."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoscope.cli import options
from denoscope.cli.features import _names


def propagate(
    edit: Annotated[Path, typer.Argument(help="What was painted: RGBA, as large as SOURCE.")],
    source: Annotated[Path, typer.Argument(help="Picture that it was painted on.")],
    targets: Annotated[list[Path], typer.Argument(help="Pictures to carry it to.", metavar="TARGET...")],
    model: options.Model = "seedling",
    preset: options.Preset = None,
    t: options.T = None,
    site: options.SiteName = None,
    ensemble: options.Ensemble = None,
    size: options.Size = None,
    prompt: options.Prompt = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    points: Annotated[int, typer.Option(help="At most so many random pixels under the edit are matched.")] = 1000,
    fit: Annotated[
        str, typer.Option(help="homography, or affine or similarity: less free, more robust.")
    ] = "homography",
    method: Annotated[str, typer.Option(help="ransac, lmeds, usac-magsac, … (see 'match').")] = "ransac",
    threshold: Annotated[float, typer.Option(help="Distance in pixels up to which a match agrees.")] = 5.0,
    cycle: Annotated[
        float | None, typer.Option(help="Use only points that come back to within so many source pixels.")
    ] = None,
    convention: Annotated[
        str, typer.Option(help="exact, or official: sampling and warping of the published code.")
    ] = "exact",
    stickers: Annotated[
        bool, typer.Option("--stickers", help="Also write NAME_edit.png, the warped edit alone.")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for NAME.png, contact_sheet.png and edits.json.")] = Path("out"),
) -> None:
    """Carry EDIT from SOURCE to every TARGET; what cannot be placed is said, not guessed."""
    import denoscope as ds
    from denoscope.correspondence.edits import composite, read_edit
    from denoscope.images import atomically, write
    from denoscope.images.draw import contact_sheet

    original, pictures = ds.read(source), [ds.read(target) for target in targets]
    painted = read_edit(edit, original.size)
    names = _names(targets)
    settings = {"preset": preset, "t": t, "site": site, "ensemble": ensemble, "size": size, "prompt": prompt}
    extract = options.load_extractor(model, device, dtype, **settings, seed=seed, feature=feature, recipe=recipe)
    options.folder(out)
    found = ds.propagate_edit(
        extract,
        painted,
        original,
        pictures,
        points=points,
        fit=fit,
        method=method,
        threshold=threshold,
        cycle=cycle,
        convention=convention,
        seed=seed,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("target", "points", "agree", ""):
        table.add_column(column, justify="left" if column in ("target", "") else "right")
    for name, one in zip(names, found, strict=True):
        agreeing = int(one.inliers.sum())
        table.add_row(escape(name), str(len(one.points)), str(agreeing), "" if one.ok else f"not placed: {one.reason}")
        for path, image in ((f"{name}.png", one.image), (f"{name}_edit.png", one.sticker if stickers else None)):
            if one.ok and image is not None:
                write(image, out / path)
            else:
                (out / path).unlink(missing_ok=True)  # of an earlier run
    labels = [
        f"{name}: {int(one.inliers.sum())} of {len(one.points)} agree" if one.ok else f"{name} (not placed)"
        for name, one in zip(names, found, strict=True)
    ]
    panels = [composite(original, painted), *(one.image for one in found)]
    write(contact_sheet(panels, ["the edit", *labels], side=320), out / "contact_sheet.png")
    values = {"edit": str(edit), "source": str(source), "targets": [one.to_dict() for one in found]}
    atomically(out / "edits.json", lambda path: path.write_text(json.dumps(values, indent=2) + "\n"))
    Console().print(table)
    print(f"Pictures: {out}\nNumbers: {out / 'edits.json'}")
