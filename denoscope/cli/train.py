"""`denoscope train`: small trainers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from denoscope.cli import options
from denoscope.errors import InputError, counted

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
    with options.resumable("train"), _progress(settings.steps) as report:
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
    """Train a classifier that guides a model's samples, by the noise levels of --model, or (--clean) judges them.

    A run that was stopped goes on when it is called again.
    """
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
    checkpoint = _checkpoint(out, ".json")
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
    with options.resumable("train"), _progress(steps) as report:
        trained = train_classifier(
            images[~held], labels[~held], schedule, config,
            steps=steps, batch=batch, lr=lr, seed=seed, names=names, device=device, report=report, checkpoint=checkpoint,
        )  # fmt: skip
    save_classifier(trained, out)
    checkpoint.remove()
    if held.any():
        levels = [None] if schedule is None else [len(schedule) * quarter // 4 for quarter in range(4)]
        shares = [accuracy(trained, images[held], labels[held], schedule, t, seed=seed) for t in levels]
        said = (f"{share:.3f}" + ("" if t is None else f" at t = {t}") for t, share in zip(levels, shares, strict=True))
        print(f"Accuracy on {counted(int(held.sum()), 'held-out picture')}: {', '.join(said)}")
    print(f"Classifier of {', '.join(names)}: {out}")


@app.command()
def amalgam(
    techniques: Annotated[Path, typer.Option(help="TOML or JSON file with a table of settings for each technique.")],
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs to learn from: a JSON list, a parquet of key points, or a folder like SPair-71k."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="Instead of pairs: a folder of pictures with masks; learns weights for every pixel."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Pairs or examples that choose the best weights; by default some photos are held out."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Pairs that the chosen weights are measured on once, at the end.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that the paths in JSON lists of pairs start from; by default the list's own."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File for the weights; a recipe (.toml) and a report (.json) lie beside it.")
    ] = Path("runs/amalgam.safetensors"),
    model: options.Model = "seedling",
    preset: options.Preset = None,
    t: options.T = None,
    site: options.SiteName = None,
    ensemble: options.Ensemble = None,
    size: options.Size = None,
    prompt: options.Prompt = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    steps: Annotated[
        int, typer.Option(help="Steps, a pair each (or a batch of pixels). Published: 10000 pairs.")
    ] = 2000,
    every: Annotated[int, typer.Option(help="Steps between looks at the validation pairs.")] = 250,
    limit: Annotated[int | None, typer.Option(help="At most so many pairs of each list, spread evenly.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default 5e-4 for pairs, 1e-3 for pixels.")] = None,
    head: Annotated[
        str, typer.Option(help="conv (a 3x3 convolution after the weights) or nn (none); pixels have none.")
    ] = "conv",
    weights: Annotated[
        str, typer.Option(help="channel (a weight for every channel) or scalar (one for a map).")
    ] = "channel",
    count: Annotated[int, typer.Option(help="Number of assigners.")] = 1,
    gamma1: Annotated[float, typer.Option(help="Weight of sparsity in the paper's loss.")] = 0.0,
    gamma2: Annotated[
        float, typer.Option(help="Weight of diversity in the paper's loss, for several assigners.")
    ] = 0.0,
    official: Annotated[
        bool, typer.Option("--official", help="Loss, cells and PCK (512 x 512, rounded) as in the released code.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder for the pictures' maps; by default beside --out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Learn how to weigh the features of several techniques; a run that was stopped goes on when it is called again."""
    from denoscope.features.amalgam import Amalgam
    from denoscope.features.extractor import Dift
    from denoscope.features.loading import load_extractor
    from denoscope.features.recipes import read_techniques, write_recipe

    if (pairs is None) == (examples is None):
        raise InputError("Give either --pairs or --examples to learn from.")
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors.")
    if not 0 <= seed < 1 << 62:
        raise InputError(f"--seed is {seed}; it must be a whole number from 0 to 2^62.")
    if examples is not None and test is not None:
        raise InputError("--test is for pairs; measure weights of pixels with 'denoscope segment' or 'bench'.")
    checkpoint = _checkpoint(out, ".json", ".toml")
    wanted = read_techniques(techniques)
    rate = {} if lr is None else {"lr": lr}
    shared = {"steps": steps, "every": every, "weights": weights, "count": count, "gamma1": gamma1, "gamma2": gamma2}
    shared |= {"official": official, "seed": seed, **rate}
    cache = cache or out.with_name(f"{out.stem}-features")
    asked = {"preset": preset, "t": t, "site": site, "ensemble": ensemble, "size": size, "prompt": prompt, "seed": seed}
    source, settings = options.asked_features(model, feature=feature, recipe=recipe, **asked)

    def extractor() -> Amalgam:
        base = load_extractor(source, device, dtype, **settings)
        if not isinstance(base, Dift):
            raise InputError(f"{source} is read as {base.name}; techniques are for a diffusion model by itself.")
        return Amalgam(base, wanted)

    if pairs is not None:
        from denoscope.training.amalgam import AmalgamConfig, train_amalgam
        from denoscope.training.pairs import read_training_pairs

        config = AmalgamConfig(**shared, head=head)
        data, *lists = read_training_pairs(pairs, validation, test, images, limit, seed, official)
        chosen = extractor()
        with options.resumable("train"), _preparing() as prepared, _progress(steps) as report:
            made = train_amalgam(
                chosen,
                data,
                lists[0],
                lists[1],
                out,
                cache,
                test=lists[2],
                config=config,
                report=report,
                prepared=prepared,
                checkpoint=checkpoint,
            )
        _amalgam_table(made.columns, counted(len(lists[1]), "validation pair"), made.validation)
        if made.test:
            _amalgam_table(made.columns, counted(len(lists[2]), "test pair"), made.test)
        _amalgam_verdict(made.columns[int(official)], made.best, made.validation, head)
    else:
        from denoscope.segmentation import read_examples
        from denoscope.training.pixel_amalgam import PixelAmalgamConfig, split_examples, train_pixel_amalgam

        assert examples is not None
        config = PixelAmalgamConfig(**shared)
        labelled = read_examples(examples)
        parts = split_examples(labelled, seed=seed) if validation is None else (labelled, read_examples(validation))
        chosen = extractor()
        with options.resumable("train"), _preparing() as prepared, _progress(steps) as report:
            told = train_pixel_amalgam(
                chosen, *parts, out, cache, config=config, report=report, prepared=prepared, checkpoint=checkpoint
            )
        right = max(look["right"] for look in told["looks"])
        shown = counted(len(parts[1]), "validation picture")
        print(f"{100 * right:.1f} % of the pixels of {shown} right, at step {told['best']}.")
    given = {name: one for name, one in settings.items() if name not in ("amalgamate", "techniques")}
    made_recipe = write_recipe(out.with_suffix(".toml"), source, given, {"trained": out.name}, out.name, wanted)
    checkpoint.remove()
    print(f"Weights: {out} (use them with --recipe {made_recipe})")


def _checkpoint(out: Path, *beside: str) -> Any:
    """Where a training is kept until all its files are written. Raises InputError when they are there and it is finished."""
    from denoscope.training.checkpoint import Checkpoint

    options.file(out, "--out")

    def resumed(step: int) -> None:
        print(f"Goes on at step {step}, which {found.path} holds.")

    found = Checkpoint(out, resumed)
    for there in (out, *map(out.with_suffix, beside)):
        if there.exists() and not found.path.exists():
            raise InputError(f"--out {out}: {there} is already there; choose another --out or delete it.")
    return found


def _amalgam_verdict(column: str, best: int, rows: Mapping[str, Mapping[str, Any]], head: str) -> None:
    others = {name: row[column] for name, row in rows.items() if name != "trained"}
    name, reached = max(others.items(), key=lambda other: other[1])
    print(f"Best at step {best}: {column} {rows['trained'][column]:.1f} (chosen on these pairs, so a little too good).")
    if reached >= rows["trained"][column]:
        said = 'amalgamate = "mean"' if name == "mean" else f"the technique {name!r} alone"
        instead = "Use that, more pairs, or --head nn." if head == "conv" else "Use that, or more pairs."
        print(f"Training did not help: {said} reaches {reached:.1f}. {instead}")


def _amalgam_table(columns: Sequence[str], title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.1f}" for column in columns))
    Console().print(table)


@contextmanager
def _preparing() -> Iterator[Callable[[int, int], None]]:
    """A function to be told how many pictures of how many are read: a line every half minute, and the last."""
    console, said = Console(), time.monotonic()

    def told(made: int, pictures: int) -> None:
        nonlocal said
        if time.monotonic() - said > 30 or made == pictures:
            said = time.monotonic()
            console.print(f"features of {made}/{counted(pictures, 'picture')}", highlight=False)

    yield told


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
