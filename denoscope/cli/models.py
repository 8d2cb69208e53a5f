"""`denoscope models`: what can be loaded, and the places that can be read in a model."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from denoscope.cli import options


def models(
    model: Annotated[str | None, typer.Argument(help="A model to look into; without one, what can be loaded.")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="Every site, not only blocks.")] = False,
    device: options.Device = "cpu",
) -> None:
    """List what can be loaded, or the sites of MODEL with channels and strides."""
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
    table = Table(box=None, pad_edge=False)
    for column in ("site", "kind", "channels", "stride"):
        table.add_column(column, justify="left" if column in ("site", "kind") else "right")
    for site in denoiser.sites():
        if sites or (site.kind in ("block", "resnet") and site.name.count(".") <= 1):
            table.add_row(site.name, site.kind, str(site.channels), f"{site.stride:g}")
    console.print(table)
