"""`denoscope train`: small trainers."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from denoscope.cli import options

app = typer.Typer(help="Train small models.", no_args_is_help=True)


@app.callback()
def front() -> None:
    """Train small models."""


@app.command()
def denoiser(
    config: Annotated[Path, typer.Argument(help="TOML file, e.g. denoscope/seedling/recipe.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, samples and the model.")] = Path("runs/denoiser"),
    data: Annotated[Path, typer.Option(help="Folder that the image paths of the configuration start from.")] = Path(
        "."
    ),
    device: options.Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, no, bf16 or fp16.")] = "auto",
) -> None:
    """Train a pixel-space denoiser; a run that was stopped goes on from its last checkpoint."""
    from denoscope.training import read_denoiser_config, train_denoiser

    settings, console = read_denoiser_config(config), Console()
    columns = (TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, said = progress.add_task("", total=settings.steps, loss=float("nan")), 0.0

        def report(step: int, loss: float, seconds: float) -> None:
            nonlocal said
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and (time.monotonic() - said > 30 or step == settings.steps):
                said = time.monotonic()
                console.print(f"step {step}/{settings.steps}  loss {loss:.4f}  {seconds:.2f} s", highlight=False)

        model = train_denoiser(settings, out, data, device=device, mixed_precision=precision, report=report)
    print(f"Model: {model} (use it with --model {model})")
