"""`denoscope match --geometric`: two views of one scene, their matching key points and the geometry between them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from denoscope.cli import options
from denoscope.errors import InputError

Keypoints = Annotated[
    str | None, typer.Option(help="With --geometric: sift (default), orb, grid, or a .kp, .npz, .csv or .json file.")
]
KeypointsB = Annotated[str | None, typer.Option(help="The same for TARGET; needed when SOURCE's are a file.")]
Count = Annotated[int | None, typer.Option(help="At most so many detected key points (default 1000).")]
Metric = Annotated[str | None, typer.Option(help="cosine (default) or l2.")]
Convention = Annotated[str | None, typer.Option(help="How features are sampled: exact (default) or official.")]
Estimate = Annotated[
    str | None, typer.Option(help="homography (default), affine, similarity, fundamental or essential.")
]
Method = Annotated[
    str | None,
    typer.Option(help="usac-magsac (default), usac-accurate, usac-default, usac-fast, usac-prosac, ransac or lmeds."),
]
Threshold = Annotated[float | None, typer.Option(help="Distance in pixels up to which a match agrees (default 3).")]
Focal = Annotated[float | None, typer.Option(help="Focal length in pixels, for --estimate essential.")]
Truth = Annotated[Path | None, typer.Option(help="True homography, 3 x 3 numbers in a text file: print the error.")]

OPTIONS = {
    "keypoints": "--keypoints",
    "keypoints_b": "--keypoints-b",
    "n": "--count",
    "metric": "--metric",
    "convention": "--convention",
    "matrix": "--estimate",
    "method": "--method",
    "threshold": "--threshold",
    "focal": "--focal",
    "truth": "--truth",
}


def geometric(
    source: Path,
    targets: list[Path],
    model: str,
    device: str,
    dtype: str | None,
    settings: dict[str, Any],
    grid: int | None,
    given: dict[str, Any],
    out: Path,
) -> None:
    """Write matches.png, matches.json and, where a homography was found, warped.png."""
    import json

    import denoscope as ds
    from denoscope.correspondence.geometric import corner_error, read_homography
    from denoscope.images import atomically, write

    if len(targets) > 1:
        raise InputError("--geometric compares two pictures; give a single TARGET.")
    chosen = {name: value for name, value in given.items() if value is not None}
    truth = chosen.pop("truth", None)
    true_matrix = None if truth is None else read_homography(truth)
    if truth is not None and chosen.get("matrix", "homography") in ("fundamental", "essential"):
        raise InputError("--truth is a homography; leave it out with --estimate fundamental or essential.")
    if grid is not None:
        if chosen.get("keypoints", "grid") != "grid":
            raise InputError("Give either --grid or other --keypoints.")
        chosen["keypoints"] = f"grid:{grid}"
        if chosen.get("keypoints_b") == "grid":
            del chosen["keypoints_b"]
    one, two = ds.read(source), ds.read(targets[0])
    settings = {**settings, "preset": settings["preset"] or "geometric"}
    options.folder(out)
    extract = options.load_extractor(model, device, dtype, **settings)
    found = ds.match_geometric(extract, one, two, **chosen)
    values = found.to_dict()
    if true_matrix is not None:
        error = corner_error(found.matrix if found.ok else None, true_matrix, one.size)
        values["corner_error"] = error if error < float("inf") else None
    write(found.draw(), out / "matches.png")
    text = json.dumps(values, indent=2) + "\n"
    atomically(out / "matches.json", lambda path: path.write_text(text))
    warped = found.ok and found.kind not in ("fundamental", "essential")
    if warped:
        write(found.warped(), out / "warped.png")
    else:
        (out / "warped.png").unlink(missing_ok=True)  # of an earlier run: it would not belong to these matches
    print_geometry(found, values)
    print(f"Picture: {out / 'matches.png'}" + (f"\nWarped: {out / 'warped.png'}" if warped else ""))
    print(f"Numbers: {out / 'matches.json'}")


def print_geometry(found: Any, values: dict[str, Any]) -> None:
    """How many points there were, how many matched, how many agree, and on what."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("key points", f"{found.keypoints[0]} and {found.keypoints[1]}")
    table.add_row("mutual matches", str(len(found)))
    table.add_row("inliers", str(int(found.inliers.sum())))
    if found.matrix is not None and found.ok:
        for i, row in enumerate(found.matrix.tolist()):
            table.add_row(found.kind if i == 0 else "", "  ".join(f"{value:>12.6g}" for value in row))
    if found.rotation is not None and found.translation is not None:
        for i, row in enumerate(found.rotation.tolist()):
            table.add_row("rotation" if i == 0 else "", "  ".join(f"{value:>12.6g}" for value in row))
        table.add_row("direction", "  ".join(f"{value:>12.6g}" for value in found.translation.tolist()))
    if "corner_error" in values:
        error = values["corner_error"]
        table.add_row("corner error", "none" if error is None else f"{error:.2f} px")
    console = Console()
    console.print(table)
    if not found.ok:
        what = "Nothing was estimated" if found.matrix is None else "The estimate is not to be trusted"
        console.print(f"{what}: {found.reason}.", markup=False, highlight=False)
