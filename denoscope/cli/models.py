"""`denoscope models`: what can be loaded, and the places that can be read in a model."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from denoscope.cli import options


def models(
    model: Annotated[str | None, typer.Argument(help="A model to look into; without one, what can be loaded.")] = None,
    sites: Annotated[
        bool, typer.Option("--sites", help="Every site with its shape, GDF's name of it, sets and attention features.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the pictures that shapes are for: 512, 768x512; by default the semantic preset's, square."
        ),
    ] = None,
    device: options.Device = "cpu",
) -> None:
    """List what can be loaded, or the sites of MODEL with channels and strides. Runs no weights."""
    console = Console()
    if model is None:
        table = Table(box=None, pad_edge=False)
        table.add_column("give", style="bold")
        table.add_column("and get")
        table.add_row("seedling", "the embedded pixel-space model (see its card in denoscope/seedling)")
        table.add_row(
            "FOLDER or HUB/ID", "pipeline in diffusers layout: Stable Diffusion 1.x, 2.x, XL or 3, FLUX.1, DiT, PixArt"
        )
        table.add_row("PIPELINE+UNET", "the same with another U-Net in it (a CleanDIFT checkpoint, for --preset clean)")
        table.add_row("FOLDER", "pixel-space UNet2DModel or UNet2DConditionModel in diffusers layout")
        table.add_row("FOLDER or HUB/ID", "encoder in transformers layout: DINO, DINOv2, DINOv3, CLIP or SAM")
        table.add_row(
            "rgb, sift, sift-fine, position",
            "baselines: colour patches, dense SIFT (40 and 16 px), the position itself",
        )
        table.add_row(
            "FILE.pt / .safetensors", "ADM (guided-diffusion) checkpoint; other shapes in FILE.json beside it"
        )
        console.print(table)
        return
    from denoscope.features import PRESETS, Baseline, load_model

    denoiser = load_model(model, device)
    if isinstance(denoiser, Baseline):
        print(f"{model}: a baseline without a network or sites")
        return
    parameters = sum(p.numel() for p in denoiser.network.parameters()) / 1e6
    print(f"{denoiser.name}: {denoiser.family}, {parameters:.1f} M parameters in the network")
    for name, preset in {**PRESETS.get(denoiser.family, {}), **denoiser.presets}.items():
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in preset.items()))
    if sites or size is not None:
        _shapes(denoiser, size, sites)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("site", "kind", "channels", "stride"):
        table.add_column(column, justify="left" if column in ("site", "kind") else "right")
    for site in denoiser.sites():
        if _coarse(site):
            table.add_row(site.name, site.kind, str(site.channels), f"{site.stride:g}")
    console.print(table)


def _coarse(site: Any) -> bool:
    return site.kind in ("block", "resnet") and site.name.count(".") <= 1


def _shapes(model: Any, size: str | None, every: bool) -> None:
    """Sites with the shapes of their activations for a picture of `size`, and what is made of several of them."""
    from denoscope.features import PRESETS, resolve_size
    from denoscope.features.gdf import gdf_of

    presets = {**PRESETS.get(model.family, {}), **model.presets}
    asked = size or str(presets.get("semantic", {}).get("size", "512")).split("+")[0]
    square = (512, 512)  # what "long640" and the like are applied to
    width, height = resolve_size(asked, square, model.multiple, model.minimum)
    if canvas := getattr(model, "canvas", None):
        width = height = canvas
    found = model.sites()
    known = [site.name for site in found]
    print(
        f"Shapes for pictures of {width}x{height} pixels: channels x rows x columns; heads x cells x cells or words (maps)."
    )
    listed = [site for site in found if every or _coarse(site)]
    ours = [gdf_of(site.name, known) if hasattr(model, "schedule") else None for site in listed]
    rows = [("site", "kind", "shape", "GDF" if any(ours) else "")]
    rows += [
        (site.name, site.kind, _shape(site, height, width), gdf or "") for site, gdf in zip(listed, ours, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # whole names, however narrow the terminal
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if every and hasattr(model, "schedule"):
        _print_sets(model, {site.name: site.channels for site in found})


def _shape(site: Any, height: int, width: int) -> str:
    rows, columns = (-int(-side // site.stride) for side in (height, width))
    if site.kind != "map":
        return f"{site.channels} x {rows} x {columns}"
    cells = rows * columns
    return f"{site.channels} x {cells} x {'words' if site.name.endswith('cross_map') else cells}"


def _print_sets(denoiser: Any, channels: dict[str, int]) -> None:
    from denoscope.errors import InputError
    from denoscope.features.sets import SETS, attention_places, readings

    for name, members in SETS.get(denoiser.family, {}).items():
        if all(site in channels for site in members):
            print(f"set {name}: {sum(channels[site] for site in members)} channels, {' + '.join(members)}")
    usable = []
    for place in attention_places(denoiser):
        try:
            readings(denoiser, [f"attention.{place}"])
        except InputError:
            continue  # no layer of a size that counts
        usable.append(f"attention.{place}")
    if usable:
        print(f"attention features: {', '.join(usable)}")
