"""`denoscope demo`: the main job on photos that come with the package."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from denoscope.cli import options

PHOTOS = Path(__file__).parent.parent / "photos"


def demo(
    model: options.Model = "seedling",
    recipe: options.Recipe = None,
    device: options.Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")] = Path("out/demo"),
) -> None:
    """Match points between real photos with the embedded model, or as a recipe says, and say how far off they are."""
    import denoscope as ds
    from denoscope.images import as_points, write
    from denoscope.images.draw import contact_sheet

    console = Console()
    own = options.load_extractor(model, device, None, recipe=recipe) if recipe else ds.load(model, device)
    options.folder(out)
    for pair in json.loads((PHOTOS / "pairs.json").read_text()):
        source, target = (ds.read(PHOTOS / pair[role]) for role in ("source", "target"))
        said = {} if recipe else {"prompt": pair["prompt"]}  # a recipe says itself what is shown
        matches = ds.match(own, source, target, pair["source_points"], **said)
        truth = as_points(pair["target_points"])
        errors = (matches.points - truth).norm(dim=1)
        extent = (truth.amax(0) - truth.amin(0)).max().item()
        table = Table(title=f"{pair['source']} to {pair['target']}", title_justify="left", box=None, pad_edge=False)
        for column in ("#", "part", "found x, y", "cosine", "off by, px", "of extent"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for row, part, error in zip(matches.rows(), pair["parts"], errors.tolist(), strict=True):
            where = f"{row['x']:g}, {row['y']:g}"
            table.add_row(
                str(row["index"]), part, where, f"{row['score']:.3f}", f"{error:.1f}", f"{error / extent:.0%}"
            )
        console.print(table)
        right = errors / extent <= 0.1
        console.print(f"{int(right.sum())} of {len(right)} within 10 % of the extent of the points.\n", highlight=False)
        write(matches.draw(correct=right), out / f"{pair['name']}.png")
        write(matches.draw(heat=True), out / f"{pair['name']}_heat.png")
        write(contact_sheet([matches.source.pca(), matches.target.pca()], side=320), out / f"{pair['name']}_pca.png")
        matches.save(out / f"{pair['name']}.json")
    print(f"Pictures and numbers: {out}")
