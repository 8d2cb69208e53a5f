"""`denoscope train`: small trainers."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from denoscope.cli import options
from denoscope.errors import InputError

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

    settings = read_denoiser_config(config)
    with _progress(settings.steps) as report:
        model = train_denoiser(settings, out, data, device=device, mixed_precision=precision, report=report)
    print(f"Model: {model} (use it with --model {model})")


@app.command()
def classifier(
    data: Annotated[Path, typer.Argument(help="Folder of class folders, or parquet with columns img and label.")],
    out: Annotated[Path, typer.Option(help="File for the weights; what they are is told in a .json beside it.")] = Path(
        "runs/classifier.safetensors"
    ),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels, as the guided model makes them.")] = 32,
    clean: Annotated[
        bool, typer.Option("--clean", help="Train on pictures without noise: to judge, not to guide.")
    ] = False,
    model: options.Model = "seedling",
    classes: Annotated[str | None, typer.Option(help="Use only these classes: dog,cat,bird.")] = None,
    steps: Annotated[int, typer.Option(help="Batches to learn from.")] = 2000,
    batch: Annotated[int, typer.Option(help="Pictures of a batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    width: Annotated[int, typer.Option(help="Channels of the first levels, a multiple of 32.")] = 32,
    depth: Annotated[int, typer.Option(help="Residual blocks of a level.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of weights, draws and noise.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Train a classifier that guides a model's samples, by the noise levels of --model, or (--clean) judges them."""
    import torch

    from denoscope.denoisers import load
    from denoscope.denoisers.classifiers import save_classifier
    from denoscope.training.classifier import accuracy, read_labelled, small_classifier, train_classifier

    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors.")
    for option, value, least in (("size", size, 4), ("steps", steps, 1), ("batch", batch, 1), ("depth", depth, 1)):
        if value < least:
            raise InputError(f"--{option} is {value}; it must be at least {least}.")
    if width < 32 or width % 32:
        raise InputError(f"--width is {width}; it must be a multiple of 32.")
    if not 0 < lr < math.inf:
        raise InputError(f"--lr is {lr:g}; it must be a number above 0, e.g. 0.001.")
    if not 0 <= seed < 1 << 62:
        raise InputError(f"--seed is {seed}; it must be a whole number from 0 to 2^62.")
    options.file(out, "--out")
    for there in (out, out.with_suffix(".json")):
        if there.exists():
            raise InputError(f"--out {out}: {there} is already there; choose another --out or delete it.")
    wanted = [name.strip() for name in (classes or "").split(",") if name.strip()]
    guided = None if clean else load(model, device="cpu")
    channels = 3 if guided is None else guided.latent_shape()[0]
    if channels not in (1, 3):
        raise InputError(
            f"{model} works on latents, not on pixels; train with --clean and let it look at x0 estimates."
        )
    images, labels, names = read_labelled(data, size * 3 // 2, wanted)
    if channels == 1:
        images = images.mean(1, keepdim=True)
    schedule = None if guided is None else guided.schedule
    config = small_classifier(size, len(names), width, depth, channels)
    held = torch.arange(len(labels)) % 10 == 9
    with _progress(steps) as report:
        trained = train_classifier(
            images[~held], labels[~held], schedule, config,
            steps=steps, batch=batch, lr=lr, seed=seed, names=names, device=device, report=report,
        )  # fmt: skip
    save_classifier(trained, out)
    if held.any():
        levels = [None] if schedule is None else [len(schedule) * quarter // 4 for quarter in range(4)]
        shares = [accuracy(trained, images[held], labels[held], schedule, t, seed=seed) for t in levels]
        said = (f"{share:.3f}" + ("" if t is None else f" at t = {t}") for t, share in zip(levels, shares, strict=True))
        print(f"Accuracy on {int(held.sum())} held-out pictures: {', '.join(said)}")
    print(f"Classifier of {', '.join(names)}: {out}")


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, float, float], None]]:
    """A function to be told step, loss and seconds per step: a bar on a terminal, else a line every half minute."""
    console = Console()
    columns = (TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, said = progress.add_task("", total=steps, loss=float("nan")), 0.0

        def report(step: int, loss: float, seconds: float) -> None:
            nonlocal said
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and (time.monotonic() - said > 30 or step == steps):
                said = time.monotonic()
                console.print(f"step {step}/{steps}  loss {loss:.4f}  {seconds:.2f} s", highlight=False)

        yield report
