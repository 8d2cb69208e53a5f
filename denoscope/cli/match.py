"""`denoscope match`: points in one picture to the matching points in others."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoscope.cli import geometric, options
from denoscope.errors import InputError


def match(
    source: Annotated[Path, typer.Argument(help="Picture that the points lie in.")],
    targets: Annotated[list[Path], typer.Argument(help="Pictures to find them in.", metavar="TARGET...")],
    points: Annotated[
        str | None, typer.Option(help="'x,y;x,y' in source pixels, or a .json / .csv file of them.")
    ] = None,
    grid: Annotated[int | None, typer.Option(help="N x N points spread over the source instead.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Use only grid points (default 16 x 16 over its box) where this image is white.")
    ] = None,
    model: options.Model = "seedling",
    preset: options.Preset = None,
    t: options.T = None,
    site: options.SiteName = None,
    ensemble: options.Ensemble = None,
    size: options.Size = None,
    prompt: options.Prompt = None,
    join: options.Join = None,
    pca: options.Pca = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    soft: Annotated[float, typer.Option(help="Soft-argmax window in feature cells; 0 takes the best pixel.")] = 0.0,
    mutual: Annotated[
        bool, typer.Option("--mutual", help="Also match back and print the distance from the start.")
    ] = False,
    flip: Annotated[
        bool, typer.Option("--flip", help="Also try SOURCE mirrored, and take for each TARGET what is more like it.")
    ] = False,
    heat: Annotated[bool, typer.Option("--heat", help="Draw the cosine map of point 0 over the target.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for matches.png and matches.json.")] = Path("out"),
    geometry: Annotated[
        bool, typer.Option("--geometric", help="Match key points of two views of one scene and find its geometry.")
    ] = False,
    keypoints: geometric.Keypoints = None,
    keypoints_b: geometric.KeypointsB = None,
    count: geometric.Count = None,
    metric: geometric.Metric = None,
    convention: geometric.Convention = None,
    estimate: geometric.Estimate = None,
    method: geometric.Method = None,
    threshold: geometric.Threshold = None,
    focal: geometric.Focal = None,
    truth: geometric.Truth = None,
) -> None:
    """Find points of SOURCE in every TARGET; writes a picture and all numbers."""
    import denoscope as ds
    from denoscope.images import atomically, read_mask, write
    from denoscope.images.draw import draw_matches

    given = {"keypoints": keypoints, "keypoints_b": keypoints_b, "n": count, "metric": metric, "convention": convention}
    given |= {"matrix": estimate, "method": method, "threshold": threshold, "focal": focal, "truth": truth}
    if not geometry and (named := [name for name, value in given.items() if value is not None]):
        raise InputError(f"{geometric.OPTIONS[named[0]]} belongs to --geometric; add it or leave this out.")
    settings = {
        "preset": preset,
        "t": t,
        "site": site,
        "ensemble": ensemble,
        "size": size,
        "prompt": prompt,
        "seed": seed,
        "join": join,
        "pca": pca,
        "feature": feature,
        "recipe": recipe,
    }
    if geometry:
        sparse = {"--points": points, "--mask": mask, "--soft": soft, "--mutual": mutual, "--heat": heat}
        sparse |= {"--flip": flip}
        if unfit := [name for name, value in sparse.items() if value]:
            raise InputError(f"{unfit[0]} does not go with --geometric, which chooses its own points.")
        geometric.geometric(source, targets, model, device, dtype, settings, grid, given, out)
        return
    if heat and len(targets) > 1:
        raise InputError("--heat draws one target; give a single TARGET or leave it out.")
    picture, others = ds.read(source), [ds.read(target) for target in targets]
    chosen = choose_points(picture, points, grid, mask)
    options.folder(out)
    extract = options.load_extractor(model, device, dtype, **settings)
    region = read_mask(mask, picture.size) if flip and mask is not None else None
    found = ds.match(extract, picture, others, chosen, soft_window=soft, cycle=mutual, flip=flip, region=region)
    one = found[0]
    drawn = (
        one.draw(heat=heat)
        if len(found) == 1
        else draw_matches(
            picture, others, one.source_points, [m.points for m in found], scores=[m.scores for m in found]
        )
    )
    write(drawn, out / "matches.png")
    if len(found) == 1:
        one.save(out / "matches.json")
    else:
        text = json.dumps([m.to_dict() for m in found], indent=2) + "\n"
        atomically(out / "matches.json", lambda path: path.write_text(text))
    print_matches(found, [str(target) for target in targets])
    for one, target in zip(found, targets, strict=True):
        if one.recipe.get("mirrored"):
            print(f"{source} is mirrored for {target}.")
    print(f"Picture: {out / 'matches.png'}\nNumbers: {out / 'matches.json'}")


def choose_points(picture: Any, points: str | None, grid: int | None, mask: Path | None) -> Any:
    """The points that the options ask for: given, on a grid, or on a grid inside a mask."""
    from denoscope.images import grid_points, read_mask

    if points is not None and (grid is not None or mask is not None):
        raise InputError("Give either --points, or --grid and --mask.")
    if points is not None:
        return options.parse_points(points)
    if mask is None:
        if grid is None:
            raise InputError("Say which points to match: --points 'x,y;x,y', --grid N or --mask IMAGE.")
        return grid_points(picture.size, grid)
    inside = read_mask(mask, picture.size)
    ys, xs = inside.nonzero()
    spread = grid_points((int(xs.max() - xs.min()) + 1, int(ys.max() - ys.min()) + 1), grid or 16)
    spread = spread.unique(dim=0) + spread.new_tensor([xs.min(), ys.min()])
    kept = [(x, y) for x, y in spread.tolist() if inside[int(y), int(x)]]
    if not kept:
        raise InputError(f"No grid point falls inside {mask}; use a larger --grid.")
    return kept


def print_matches(found: list[Any], names: list[str], most: int = 24) -> None:
    """A short table; everything is in the JSON."""
    table = Table(box=None, pad_edge=False)
    for column in ("#", "source x, y", "target x, y", "cosine", *(["back, px"] if found[0].cycle is not None else [])):
        table.add_column(column, justify="right")
    for matches, name in zip(found, names, strict=True):
        if len(found) > 1:
            table.add_section()
            table.add_row("", "", f"[bold]{escape(name)}")
        for row in matches.rows()[:most]:
            cells = [str(row["index"]), f"{row['source_x']:g}, {row['source_y']:g}", f"{row['x']:.5g}, {row['y']:.5g}"]
            table.add_row(*cells, f"{row['score']:.3f}", *([f"{row['cycle']:.1f}"] if "cycle" in row else []))
        if len(matches) > most:
            table.add_row("…", "", f"{len(matches) - most} more")
    Console().print(table)
