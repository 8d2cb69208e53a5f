"""`denoscope guidance`: which steps a schedule guides and what that costs, and whether samples only please their guide."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from denoscope.cli import options
from denoscope.errors import DenoscopeError, InputError

app = typer.Typer(help="Guidance on a few steps: schedules and diagnosis.", no_args_is_help=True)

RULES = ("mask", "gap", "multiplicity", "reuse")
SEEN = ("noisy", "x0", "x0-through")
LARGEST = 1 << 14  # pixels of a side

Rate = Annotated[float | None, typer.Option(help="Guide about one step in RATE (power, uniform; by default 5).")]
K = Annotated[
    float | None,
    typer.Option(
        help="power: 1 spreads guidance evenly, 2 puts it early, 0.5 late; by default 1, from 100 steps on 2."
    ),
]
AlwaysLast = Annotated[int | None, typer.Option(help="power: also guide this many last steps; by default 2.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="power, uniform, interval:0.3-0.8 or first:0.4 (of the run), sigma:0.28-5.42, early-stop:0.2, random:10, "
        "steps:0,5,10, all or none. By default power if --rate is given, else all."
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        help="How skipped steps are made up for: mask (not), gap (longer gaps weigh more), multiplicity, reuse. By "
        "default mask for --guidance and gap for --classifier."
    ),
]
AtOnce = Annotated[int, typer.Option(help="Samples in one forward pass (memory); changes nothing else.")]
PictureSize = Annotated[str | None, typer.Option(help="Size of the pictures, 64 or 96x64; by default the model's own.")]
Told = Annotated[
    str | None, typer.Option(help="What a text model is told besides; {} stands for the name of the class.")
]


@app.callback()
def front() -> None:
    """Guidance on a few steps: schedules and diagnosis."""


@app.command()
def schedule(
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    rate: Rate = None,
    k: K = None,
    always_last: AlwaysLast = None,
    schedule: Schedule = "power",
    rule: Annotated[str, typer.Option(help="Rule whose weights are shown: mask, gap, multiplicity, reuse.")] = "gap",
    kind: Annotated[str, typer.Option(help="Whose cost: cfg or classifier.")] = "cfg",
    classifier_cost: Annotated[
        float, typer.Option(help="Classifier forward and backward, in passes of the denoiser.")
    ] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, e.g. schedule.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON object.")] = False,
) -> None:
    """Say which steps are guided, how strongly, and what that costs."""
    from denoscope.images import write

    one_of("--rule", rule, RULES)
    one_of("--kind", kind, ("cfg", "classifier"))
    if not 0 <= classifier_cost < math.inf:
        raise InputError(f"--classifier-cost is {classifier_cost:g}; it must be 0 or more.")
    chosen: Any = placement(steps, schedule, rate, k, always_last)
    calls, cost, weights = chosen.nfe(kind), chosen.relative_cost(kind, classifier_cost), chosen.weights(rule)
    if plot is not None:
        write(chosen.plot(rule), options.file(plot, "--plot"))
    if as_json:
        name = (schedule or "power").partition(":")[0]
        told = {"positions": list(chosen.positions), "weights": list(weights), "network_calls": calls}
        told |= {"relative_cost": cost, "steps": steps, "rule": rule, "schedule": chosen.name, "kind": kind}
        told["rate"] = (5 if rate is None else rate) if name in ("power", "uniform") else None
        told["k"] = (float(chosen.name.rpartition(" k")[2]) if k is None else k) if name == "power" else None
        print(json.dumps(told))
        return
    positions = chosen.positions
    print(
        f"{chosen.name}: {len(positions)} of {steps} steps guided, {calls} of {2 * steps} network calls, "
        f"relative cost {cost:.3g}"
    )
    print("guided steps:", *positions)
    print(f"weights ({rule}):", *(weights[j] for j in positions))
    if plot is not None:
        print(f"Picture: {plot}")


@app.command()
def diagnose(
    on: Annotated[Path, typer.Option(help="Classifier that guides.")],
    off: Annotated[list[Path], typer.Option(help="Classifier that only judges; may be repeated.")],
    model: options.Model = "seedling",
    recipe: options.SamplingRecipe = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes to sample, numbers or names: 0,3,face; by default all of them.")
    ] = None,
    count: Annotated[int, typer.Option(help="Samples of each class.")] = 8,
    prompt: Told = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    scale: Annotated[float, typer.Option(help="Scale of the classifier's gradient.")] = 1.0,
    rates: Annotated[str, typer.Option(help="Rates to compare; 1 guides every step.")] = "1,5",
    k: K = None,
    baselines: Annotated[
        bool, typer.Option(help="Also UG (uniform skipping) and ES (early stopping), both with the scale unchanged.")
    ] = True,
    guide_at: Annotated[
        str | None, typer.Option(help="What guides: noisy, x0 or x0-through; by default what the classifier knows.")
    ] = None,
    solver: Annotated[str, typer.Option(help="Solver; ddpm is the ancestral sampler of the papers.")] = "ddpm",
    size: PictureSize = None,
    seed: options.Seed = 0,
    at_once: AtOnce = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for diagnosis.json, .csv and .png.")] = Path("out"),
) -> None:
    """Compare guidance schedules by a classifier that guides and others that do not: is the guide merely fitted?"""
    import denoscope as ds
    from denoscope.cli.control import controlled
    from denoscope.denoisers.lora import adapters
    from denoscope.denoisers.text import long_prompts
    from denoscope.features.technique import contents, loras

    if min(count, at_once) < 1:
        raise InputError("--count and --at-once must be at least 1.")
    if not math.isfinite(scale):
        raise InputError(f"--scale is {scale}; it must be a finite number.")
    one_of("--guide-at", guide_at, SEEN)
    _distinct(on, off)
    asked: dict[str, Any] = {"prompt": prompt, "size": size, "seed": seed}
    asked |= {"control": None, "lora": None, "long_prompts": None}
    model, asked = options.asked_sampling(model, recipe, **asked)
    denoiser = ds.load(model, device, dtype)
    check_steps(steps, denoiser)
    guide = ds.load_classifier(on, denoiser.device)
    judges: dict[str, Any] = {}
    for path in off:
        judges[path.stem if path.stem not in {"on", *judges} else str(path)] = ds.load_classifier(path, denoiser.device)
    words = (labels or ",".join(map(str, range(guide.classes)))).split(",")
    numbers = class_numbers(guide, [word.strip() for word in words]) * count
    runs = _runs(guide, steps, scale, rates, k, baselines, guide_at)
    given: dict[str, Any] = {"size": parse_size(size, denoiser) if size else recipe_size(asked["size"], denoiser)}
    named = controlled(given, denoiser, asked["control"], None, own=True)
    said = prompt if prompt is not None else recipe_prompt(asked["prompt"])
    weights = loras(asked["lora"])
    options.folder(out)
    chunks, pairs = asked["long_prompts"] == "chunks", [(one.path, one.scale) for one in weights]
    with progress(len(runs) * len(numbers)) as tell, long_prompts(denoiser, chunks), adapters(denoiser, pairs):
        found = ds.diagnose(
            denoiser, runs, labels=numbers, on=guide, off=judges, steps=steps, seed=asked["seed"], at_once=at_once,
            prompts=told(denoiser, guide, numbers, said if isinstance(said, str) else None), solver=solver, **given,
            report=tell,
        )  # fmt: skip
    used = [[one.path, one.scale, contents(None, (), [one]).get(one.path)] for one in weights]
    found.record.update(named, **({"lora": used} if used else {}))
    for suffix in ("json", "csv", "png"):
        found.save(out / f"diagnosis.{suffix}")
    table = Table(box=None, pad_edge=False)
    heads = ["guided", "calls", "seconds", *(f"{judge}, %" for judge in found.judges)]
    heads += [f"{what} {judge}" for judge in found.off for what in ("gap to", "CE ratio")]
    table.add_column("run")
    for head in heads:
        table.add_column(head, justify="right")
    for row in found.table():
        cells = [f"{row['guided_steps']} of {steps}", str(row["network_calls"]), f"{row['seconds']:.1f}"]
        cells += [f"{100 * row[f'accuracy {judge}']:.1f}" for judge in found.judges]
        for judge in found.off:
            cells += [f"{100 * row[f'gap {judge}']:.1f} ± {100 * row[f'gap error {judge}']:.1f}"]
            cells += [f"{row[f'ratio {judge}']:.2f}"]
        table.add_row(row["run"], *cells)
    Console().print(table)
    print("calls: networks a sample; gap: points that on is above; CE ratio: cross-entropy over that of on")
    print(found.recommendation)
    print(f"Picture: {out / 'diagnosis.png'}\nNumbers: {out / 'diagnosis.json'}, {out / 'diagnosis.csv'}")


def _distinct(on: Path, off: Sequence[Path]) -> None:
    """A classifier that judges itself, or that judges twice, tells nothing."""
    seen = {on.expanduser().resolve(): "--on"}
    for path in off:
        if earlier := seen.get(place := path.expanduser().resolve()):
            raise InputError(f"--off {path} is also given as {earlier}; name a classifier that was trained separately.")
        seen[place] = "--off"


def _runs(
    guide: Any, steps: int, scale: float, rates: str, k: float | None, baselines: bool, guide_at: str | None
) -> dict[str, Any]:
    """Guidance on every step, compressed guidance at every other rate, and the paper's two straw baselines."""
    import denoscope as ds

    try:
        asked = [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise InputError(f"--rates {rates!r} are not understood; write them as 1,5.") from None
    if wrong := [rate for rate in asked if not 1 <= rate <= steps]:
        raise InputError(
            f"--rates {rates} (by default 1,5) holds {wrong[0]:g}; rates go from 1 (every step) to {steps}, the --steps."
        )
    at: Any = guide_at or ("noisy" if guide.noise_aware else "x0")
    guided = partial(ds.ClassifierGuidance, guide, scale, at=at)
    power, skew = partial(ds.GuidanceSchedule.power, steps, k=k), "" if k is None else f" k{k:g}"
    runs = {
        "full" if rate == 1 else f"compressed r{rate:g}{skew}": None if rate == 1 else power(rate) for rate in asked
    }
    found = {name: guided(schedule, rule="gap") for name, schedule in runs.items()}
    if baselines and max(asked) > 1:
        most = round(max(asked))
        found[f"UG r{most}"] = guided(ds.GuidanceSchedule.uniform(steps, most), rule="mask")
        found["ES"] = guided(ds.GuidanceSchedule.early_stop(steps), rule="mask")
    return found


def placement(
    n: int,
    schedule: str | None,
    rate: float | None,
    k: float | None,
    always_last: int | None,
    sigmas: Sequence[float] | None = None,
) -> Any:
    """The GuidanceSchedule that the options describe; None for all steps."""
    from denoscope.sampling.schedules import GuidanceSchedule

    given = {"rate": rate, "k": k, "always_last": always_last}
    given = {name: value for name, value in given.items() if value is not None}
    name, _, value = (schedule or ("power" if given else "all")).partition(":")
    allowed = {"power": ("rate", "k", "always_last"), "uniform": ("rate",)}.get(name, ())
    if other := [f"--{option.replace('_', '-')}" for option in given if option not in allowed]:
        raise InputError(f"{other[0]} has no meaning for the schedule {name}; leave it out.")
    try:
        match name, value:
            case "power", "":
                return GuidanceSchedule.power(n, **given)
            case "uniform", "":
                return GuidanceSchedule.uniform(n, **{key: _whole(value) for key, value in given.items()})
            case (("all" | "none"), ""):
                return GuidanceSchedule.all(n) if name == "all" else GuidanceSchedule.none(n)
            case "interval", _:
                return GuidanceSchedule.interval(n, *_ends(value))
            case "sigma", _ if sigmas is None:
                raise InputError("An interval of sigma needs a model's noise levels; give it to 'denoscope sample'.")
            case "sigma", _:
                return GuidanceSchedule.interval(n, *_ends(value), unit="sigma", sigmas=sigmas)
            case "first", _:
                return GuidanceSchedule.first(n, float(value))
            case "early-stop", _:
                return GuidanceSchedule.early_stop(n, float(value or 0.2))
            case "random", _:
                return GuidanceSchedule.random(n, int(value))
            case "steps", _:
                return GuidanceSchedule.explicit(n, [int(step) for step in value.split(",")])
    except DenoscopeError as error:
        raise InputError(f"--schedule {schedule}: {error}" if value else str(error)) from None
    except ValueError:
        pass
    raise InputError(
        f"Schedule {schedule!r} is not understood; use power, uniform, interval:0.3-0.8, sigma:0.28-5.42, first:0.4, "
        "early-stop:0.2, random:10, steps:0,5,10, all or none."
    )


def _whole(value: float) -> Any:
    return int(value) if value.is_integer() else value


def _ends(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    return float(low), float(high)


def one_of(option: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise InputError(f"{option} {value!r} is unknown; use {', '.join(known)}.")


def check_steps(steps: int, denoiser: Any) -> None:
    most = len(denoiser.schedule)
    if not 2 <= steps <= most:
        raise InputError(f"--steps is {steps}; it must be from 2 to {most}, the steps that the model was trained with.")


def class_numbers(classifier: Any, words: Sequence[str]) -> list[int]:
    """Numbers of classes that are given by number or name."""
    given = [int(word) if word.isdecimal() and word not in classifier.names else word for word in words]
    return classifier.check_labels(given, len(given)).tolist()


def told(denoiser: Any, classifier: Any, numbers: list[int], prompt: str | None) -> Any:
    """What the model is told of classes: its own class number, a prompt, or nothing."""
    if prompt is not None:
        names = classifier.names or [str(number) for number in range(classifier.classes)]
        prompts = [prompt.replace("{}", names[number]) for number in numbers]
        denoiser.condition(prompts)
        return prompts
    try:
        denoiser.condition(numbers)
        return numbers
    except InputError:
        return None


def parse_size(text: str | None, denoiser: Any, name: str = "--size") -> tuple[int, int] | None:
    """(width, height) from 64 or 96x64, of which the model can make pictures. name: what is said to be wrong."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"{name} {text!r} is not understood; write it as 64 or 96x64, in pixels.")
    if any(len(side) > 9 or int(side) > LARGEST for side in sides):
        raise InputError(f"{name} {text} is too large; sides have at most {LARGEST} pixels.")
    width, height = int(sides[0]), int(sides[-1])
    if min(width, height) < denoiser.minimum:
        raise InputError(f"{name} {text} is too small; {denoiser.name} needs sides of {denoiser.minimum} pixels.")
    denoiser.latent_shape(height, width)
    return width, height


def recipe_size(size: Any, denoiser: Any, picture: Any = None) -> tuple[int, int] | None:
    """(width, height) of pictures that are made as large as a recipe reads them; None where that depends on a picture that is
    not there, or it reads several sizes."""
    from denoscope.features.recipe import resolve_size

    if size is None:
        return None
    text = "x".join(map(str, size)) if isinstance(size, list | tuple) else str(size)
    for part in text.split("+"):
        resolve_size(part, (64, 64))  # raises what is no size
    if "+" in text:
        return None
    if picture is not None:
        text = "x".join(map(str, resolve_size(text, picture.size, denoiser.multiple, denoiser.minimum)))
    return parse_size(text, denoiser, "The recipe's size") if text[0].isdecimal() and text != "0" else None


def recipe_prompt(prompt: Any, picture: Any = None) -> str | int | None:
    """What a recipe's prompt says, of a picture where it is another one for each."""
    from denoscope.features.prompts import needs_picture, resolve

    if needs_picture(prompt) and picture is None:
        warnings.warn(
            f"The prompt {prompt} is another one for each picture that is read, and here there is none; it is left out.",
            stacklevel=2,
        )
        return None
    return resolve(prompt, picture)


@contextmanager
def progress(samples: int) -> Iterator[Callable[[float, float], None]]:
    """A function to be told (done, total): a bar on a terminal, else a line every half minute."""
    console = Console()
    columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total} samples"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, said = bar.add_task("", total=samples), time.monotonic()

        def tell(done: float, total: float) -> None:
            nonlocal said
            bar.update(task, completed=samples * done / total)
            if not console.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                console.print(f"{samples * done / total:.0f} of {samples} samples", highlight=False)

        yield tell
