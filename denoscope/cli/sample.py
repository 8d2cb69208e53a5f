"""`denoscope sample`: pictures, with guidance on every step or on a few."""

import json
import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from denoscope.cli import guidance as shared
from denoscope.cli import options
from denoscope.cli.control import controlled
from denoscope.cli.guidance import RULES, SEEN, one_of
from denoscope.errors import InputError

COMBINE = ("cfg", "apg", "cfg-zero*", "cfg-zero")  # the last is for shells that take the star for file names
OWN_SCALE = {"stable-diffusion": 7.5}  # default --guidance of a family; of others 3
SHOWN, COLUMNS = 64, 8  # samples of the grid


def sample(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to show: prompts, or class numbers for models that take those; with --classifier, classes of it by "
            "number or name. Without any the model is told nothing.",
            metavar="PROMPT...",
        ),
    ] = None,
    model: options.Model = "seedling",
    recipe: options.SamplingRecipe = None,
    count: Annotated[int, typer.Option(help="Samples of each PROMPT.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Scale w of classifier-free guidance, 1 is none; by default 7.5 for prompts to Stable Diffusion, 3 for "
            "prompts to other models, else none."
        ),
    ] = None,
    rate: shared.Rate = None,
    k: shared.K = None,
    always_last: shared.AlwaysLast = None,
    schedule: shared.Schedule = None,
    rule: shared.Rule = None,
    combine: Annotated[str, typer.Option(help="Formula of --guidance: cfg, apg or cfg-zero*.")] = "cfg",
    rescale: Annotated[float, typer.Option(help="Share of --guidance's result brought back to the old contrast.")] = 0,
    negative: Annotated[str | None, typer.Option(help="Prompt of the second prediction.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="Classifier to guide by: a file or a folder.")] = None,
    scale: Annotated[float | None, typer.Option(help="Scale of the classifier's gradient; by default 1.")] = None,
    guide_at: Annotated[
        str | None,
        typer.Option(help="What the classifier sees: noisy, x0 or x0-through; by default what it was trained on."),
    ] = None,
    prompt: shared.Told = None,
    solver: Annotated[
        str, typer.Option(help="auto, ddim, ddpm, euler, euler-ancestral, heun, dpm++2m, unipc, pndm, flow-euler.")
    ] = "auto",
    size: shared.PictureSize = None,
    start: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --start is replaced, 0 to 1; by default 0.8, and 1 with --mask.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Repaint --start only where this image is white.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="ControlNet, FOLDER@SCALE, that sees the picture of --control-image; again for more."),
    ] = None,
    control_image: Annotated[
        list[str] | None,
        typer.Option(help="Picture for --control, FILE, or canny:FILE for its edges; one for all, or one for each."),
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help="LoRA, FILE@SCALE; again for more, which add up.")] = None,
    seed: options.Seed = 0,
    at_once: shared.AtOnce = 16,
    report: Annotated[
        bool, typer.Option("--report", help="Also sample with guidance on every step, and compare.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for 000000.png …, grid.png and samples.json.")] = Path("out"),
) -> None:
    """Sample pictures; the same command again goes on where it stopped."""
    import denoscope as ds
    from denoscope.denoisers.lora import adapters
    from denoscope.denoisers.text import long_prompts
    from denoscope.features.technique import contents, loras
    from denoscope.sampling import APG, CFGZeroStar

    asked: dict[str, Any] = {"control": control, "lora": lora, "guidance": guidance, "seed": seed, "img2img": strength}
    asked |= {"prompt": None, "size": None, "long_prompts": None}
    model, asked = options.asked_sampling(model, recipe, **asked)
    seed, chunks = asked["seed"], asked["long_prompts"] == "chunks"
    if count < 1 or at_once < 1:
        raise InputError("--count and --at-once must be at least 1.")
    if not 0 <= seed < 1 << 62:
        raise InputError(f"--seed is {seed}; it must be a whole number from 0 to 2^62.")
    one_of("--rule", rule, RULES)
    one_of("--guide-at", guide_at, SEEN)
    one_of("--combine", combine, COMBINE)
    words = list(prompts or [])
    denoiser = ds.load(model, device, dtype)
    shared.check_steps(steps, denoiser)
    picture = None if start is None else ds.read(start)
    large = shared.parse_size(size, denoiser) if size else shared.recipe_size(asked["size"], denoiser, picture)
    given: dict[str, Any] = {"steps": steps, "solver": solver, "size": large}
    strength = strength if picture is None else asked["img2img"]  # there is nothing to repaint
    pictures = _start(given, denoiser, picture, strength, mask)
    pictures |= controlled(
        given, denoiser, asked["control"], control_image, recipe is not None and not control, picture
    )
    weights = loras(asked["lora"])
    said = None if (words if classifier is None else prompt) else shared.recipe_prompt(asked["prompt"], picture)
    if classifier is not None:
        prompt = prompt if said is None else said if isinstance(said, str) else None  # classes are the classifier's
    elif said is not None:
        words = [str(said)]
    n, sigmas = _levels(denoiser, given)
    partly = any(value is not None for value in (schedule, rate, k, always_last))
    chosen = shared.placement(n, schedule, rate, k, always_last, sigmas) if partly else None

    judge = None if classifier is None else ds.load_classifier(classifier, denoiser.device)
    told: Any = None
    labels: list[int] | None = None
    if judge is not None:
        if not words:
            raise InputError("Name the classes to guide towards, by number or name.")
        labels = shared.class_numbers(judge, words)
        with long_prompts(denoiser, chunks):
            told = shared.told(denoiser, judge, labels, prompt)
    elif words:
        with long_prompts(denoiser, chunks):
            told = _told(denoiser, words)
    prompted = judge is None and told is not None and isinstance(told[0], str)
    guidance = guidance if told is None else asked["guidance"]  # a recipe's, if there is something to guide towards
    w = guidance if guidance is not None else OWN_SCALE.get(denoiser.family, 3.0) if prompted else 1.0

    if not all(math.isfinite(value) for value in (w, rescale, scale or 0)):
        raise InputError("--guidance, --scale and --rescale must be finite numbers.")
    by_classifier = {"--prompt": prompt, "--scale": scale, "--guide-at": guide_at}
    _not_idle(by_classifier, judge is not None, "belongs to guidance by a classifier; give --classifier")
    classifier_free = {"--combine": combine != "cfg", "--rescale": rescale, "--negative": negative}
    _not_idle(classifier_free, w != 1, "belongs to classifier-free guidance; give PROMPTs, or --guidance other than 1")
    _not_idle({"--rule": rule, "--report": report}, partly, "is about skipped steps; give --rate or --schedule")
    _not_idle(
        {"--schedule" if schedule else "--rate": partly},
        w != 1 or judge is not None,
        "skips guidance and there is none; give --guidance",
    )
    if w != 1 and judge is not None and told is None:
        raise InputError("--guidance needs to know what the model is to be told; give --prompt, e.g. 'a {}'.")
    if w != 1:
        formula = None if combine == "cfg" else APG() if combine == "apg" else CFGZeroStar()
        how: Any = rule or "mask"
        given["guidance"] = ds.ClassifierFree(w, chosen, how, formula, rescale=rescale)
        given["negative"] = None if negative is None else [negative]
    if judge is not None:
        at: Any = guide_at or ("noisy" if judge.noise_aware else "x0")
        how = rule or "gap"
        given["classifier"] = ds.ClassifierGuidance(judge, 1.0 if scale is None else scale, chosen, how, at)

    settings = {
        "model": model, "prompts": words, "told": told, "steps": steps, "guidance": w, "rule": rule, "combine": combine,
        "schedule": None if chosen is None else list(chosen.counts), "rescale": rescale, "negative": negative,
        "classifier": None if classifier is None else str(classifier), "scale": scale, "guide_at": guide_at,
        "solver": solver, "size": given["size"], **pictures, "seed": seed, "dtype": str(denoiser.dtype),
        "lora": [[one.path, one.scale, contents(None, (), [one]).get(one.path)] for one in weights] or None,
    }  # fmt: skip
    settings |= {"long_prompts": "chunks"} if chunks else {}
    given |= {"together": False} if chunks else {}  # a prompt in pieces is longer than the empty one
    variants = {"": given}
    if report:
        on_every_step = {key: replace(given[key], schedule=None) for key in ("guidance", "classifier") if key in given}
        variants["full"] = {**given, **on_every_step}
    options.folder(out)
    state = _recorded(out, settings)
    total = count * max(len(words), 1)
    _not_fewer(out, variants, total, max(len(words), 1))
    with long_prompts(denoiser, chunks), adapters(denoiser, [(one.path, one.scale) for one in weights]):
        _make(denoiser, out, total, variants, told, labels, seed, at_once, state)
    captions = [words[i % len(words)] if words else "" for i in range(total)]
    state["samples"] = [{"file": f"{i:06d}.png", "prompt": captions[i], "seed": seed + i} for i in range(total)]
    state.pop("report", None)
    if report:
        state["report"] = _report(out, state)
    _save(out, state)
    guided = {name: f"{len(run['guided_steps'])} of {run['steps']}" for name, run in state["runs"].items()}
    notes = {"": f", {guided['asked']} steps", "full": f", {guided['full']} steps"} if report else {"": ""}
    _grid(out, captions, notes, max(len(words), 1))
    run = state["runs"]["asked"]
    calls = sum(run["network_calls"].values())
    print(
        f"{total} pictures; {guided['asked']} steps guided, {calls} network calls and "
        f"{run['seconds'] / run['samples']:.2f} s a sample."
    )
    print(f"Pictures: {out}/000000.png …, {out / 'grid.png'}\nRecord: {out / 'samples.json'}")


def _told(denoiser: Any, words: list[str]) -> Any:
    """What the model is told: whole numbers as class numbers if it takes those, else the words."""
    if all(word.isdecimal() for word in words):
        with suppress(InputError):
            denoiser.condition([int(word) for word in words])
            return [int(word) for word in words]
    denoiser.condition(words)
    return words


def _start(
    given: dict[str, Any], denoiser: Any, picture: Any, strength: float | None, mask: Path | None
) -> dict[str, Any]:
    """Put the picture to start from into `given`; returns what names it in the record."""
    import torch

    import denoscope as ds
    from denoscope.images import read_mask

    if picture is None:
        _not_idle({"--mask": mask, "--strength": strength is not None}, False, "belongs to a picture; give --start")
        return {}
    strength = (0.8 if mask is None else 1.0) if strength is None else strength
    if not 0 < strength <= 1:
        raise InputError(f"--strength is {strength:g}; it must be above 0 and at most 1.")
    start, own = picture.path, f"{picture.width}x{picture.height}"
    if mask is not None and (found := ds.read(mask)).size != picture.size:
        raise InputError(
            f"--mask {mask} is {found.width}x{found.height} but --start {start} is {own}; resize the mask to {own}."
        )
    inside = None if mask is None else torch.from_numpy(read_mask(mask, picture.size))
    try:
        size: Any = given["size"] or shared.parse_size(own, denoiser)
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('.')}; {start} is {own}, so give --size.") from None
    resized = ds.Picture((picture.resized(size) + 1) / 2)
    given |= {"start": resized, "strength": strength, "mask": inside, "size": size}
    painted = None if inside is None else sha256(inside.numpy().tobytes()).hexdigest()[:16]
    return {"start": picture.digest, "strength": strength, "mask": painted}


def _levels(denoiser: Any, given: dict[str, Any]) -> tuple[int, list[float]]:
    """How many steps the run has, and the noise-to-signal ratio of each."""
    import torch

    from denoscope.sampling.solvers import make_solver

    solver = make_solver(given["solver"], denoiser.schedule, clip=True)
    evaluations = solver.begin(given["steps"], torch.device("cpu"), given.get("strength", 1.0))
    levels = {one.position: one.s / one.a if one.a else math.inf for one in reversed(evaluations)}
    return len(levels), [levels[j] for j in range(len(levels))]


def _not_idle(values: dict[str, Any], used: bool, sentence: str) -> None:
    """An option that would do nothing is a mistake."""
    for name, value in values.items():
        if value and not used:
            raise InputError(f"{name} {sentence}.")


def _recorded(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record in `out`: that of an earlier run of the same command, or a new one."""
    file, settings = out / "samples.json", json.loads(json.dumps(settings))
    if not file.is_file():
        if any(out.glob(6 * "[0-9]" + ".png")):
            raise InputError(f"--out {out} holds pictures of unknown settings; name another folder.")
        return {"settings": settings, "runs": {}}
    try:
        found = json.loads(file.read_text())
    except ValueError:
        raise InputError(
            f"{file} is damaged, so that the settings of the pictures are not known; delete all of them, or name another --out."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("settings", "runs")):
        raise InputError(f"--out {out} holds a samples.json of something else; name another folder.")
    before = found["settings"]
    if changed := [key for key in settings | before if settings.get(key) != before.get(key)]:
        raise InputError(f"--out {out} holds samples with other settings ({', '.join(changed)}); name another folder.")
    return found


def _not_fewer(out: Path, variants: Iterable[str], total: int, prompts: int) -> None:
    """A smaller --count would leave pictures without a record."""
    stems = (file.stem for variant in variants for file in (out / variant).glob("*.png"))
    numbers = [int(stem) for stem in stems if stem.isdecimal()]
    if numbers and max(numbers) >= total:
        raise InputError(
            f"--out {out} holds {max(numbers):06d}.png, more than --count asks for; give --count "
            f"{max(numbers) // prompts + 1} or more, or name another folder."
        )


def _read(file: Path) -> Any:
    """A picture that this or an earlier run made."""
    import denoscope as ds

    try:
        return ds.read(file)
    except InputError:
        raise InputError(f"{file} is damaged; delete it and run the same command again.") from None


def _make(
    denoiser: Any,
    out: Path,
    total: int,
    variants: dict[str, dict[str, Any]],
    told: Any,
    labels: list[int] | None,
    seed: int,
    at_once: int,
    state: dict[str, Any],
) -> None:
    """Sample what is not there yet, a batch at a time, every variant into its own folder."""
    import denoscope as ds
    from denoscope.images import write

    def files(i: int) -> list[Path]:
        return [out / variant / f"{i:06d}.png" for variant in variants]

    def given(part: list[int]) -> dict[str, Any]:
        rows = {"prompts": told, "labels": labels}
        return {key: v and [v[i % len(v)] for i in part] for key, v in rows.items()} | {
            "seed": [seed + i for i in part]
        }

    todo = [i for i in range(total) if not all(file.is_file() for file in files(i))]
    if todo and len(variants) > 1:  # what a library does only the first time is not timed
        with warnings.catch_warnings(action="ignore"):
            for how in variants.values():
                next(ds.trajectory(denoiser, **given(todo[:at_once]), **how))
    with shared.progress(len(todo) * len(variants)) as tell, warnings.catch_warnings():
        for low in range(0, len(todo), at_once):
            part = todo[low : low + at_once]
            for number, how in enumerate(variants.values()):
                done = low * len(variants) + number * len(part)
                made = ds.sample(
                    denoiser, **given(part), **how, at_once=at_once,
                    report=lambda x, of, done=done, many=len(part): tell(done + many * x / of, len(todo) * len(variants)),
                )  # fmt: skip
                _note(state, list(variants)[number], made.record, low == 0, len(part))
                if low == 0:
                    _save(out, state)  # before the first picture
                for i, picture in zip(part, made.pictures, strict=True):
                    write(picture, files(i)[number])
            warnings.simplefilter("ignore")  # said once is enough


def _note(state: dict[str, Any], variant: str, record: dict[str, Any], first: bool, many: int) -> None:
    """Add a batch to what is recorded; times are those of the last run that made pictures."""
    run = state["runs"].setdefault(variant or "asked", {})
    run |= {key: record[key] for key in ("guided_steps", "network_calls", "steps")}
    run["samples"], run["seconds"] = (0, 0.0) if first else (run["samples"], run["seconds"])
    run["samples"] += many
    run["seconds"] = round(run["seconds"] + record["seconds"], 3)
    state |= {key: record[key] for key in ("device", "versions")}


def _save(out: Path, state: dict[str, Any]) -> None:
    from denoscope.images import atomically

    atomically(out / "samples.json", lambda part: part.write_text(json.dumps(state, indent=1) + "\n"))


def _report(out: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Print costs and times beside those of guidance on every step, and how much the pictures differ."""
    files = [row["file"] for row in state["samples"]]
    pairs = ((_read(out / file).pixels, _read(out / "full" / file).pixels) for file in files)
    difference = 255 * sum(float((one - other).abs().mean()) for one, other in pairs) / len(files)
    runs = {name: state["runs"][name] for name in ("asked", "full")}
    calls = {name: sum(run["network_calls"].values()) for name, run in runs.items()}
    seconds = {name: run["seconds"] / run["samples"] for name, run in runs.items()}
    table = Table(box=None, pad_edge=False)
    for column in ("", "guided steps", "denoiser calls", "classifier calls", "relative cost", "s a sample", "time"):
        table.add_column(column, justify="right" if column else "left")
    for name, run in runs.items():
        told = [f"{len(run['guided_steps'])} of {run['steps']}", *map(str, run["network_calls"].values())]
        told += [f"{calls[name] / calls['full']:.2f}", f"{seconds[name]:.3f}", f"{seconds[name] / seconds['full']:.2f}"]
        table.add_row(name, *told)
    Console().print(table)
    print(f"Mean difference of the pictures: {difference:.1f} of 255")
    cost, time = (values["asked"] / values["full"] for values in (calls, seconds))
    return {"relative_cost": cost, "relative_time": time, "mean_difference": difference}


def _grid(out: Path, captions: list[str], notes: dict[str, str], prompts: int) -> None:
    """A contact sheet of the first samples; below each row of them the same of other variants, told apart by notes."""
    from PIL import Image

    from denoscope.images import write
    from denoscope.images.draw import contact_sheet

    captions = captions[: SHOWN // len(notes)]
    columns = prompts if 1 < prompts <= COLUMNS else min(COLUMNS, len(captions))
    images: list[Image.Image] = []
    labels: list[str] = []
    for low in range(0, len(captions), columns):
        row = range(low, min(low + columns, len(captions)))
        for variant, note in notes.items():
            images += [_read(out / variant / f"{i:06d}.png").image() for i in row]
            labels += [(captions[i] + note).removeprefix(", ") for i in row]
            images += [Image.new("RGB", images[-1].size, "white")] * (columns - len(row))
            labels += [""] * (columns - len(row))
    side = min(max(*images[0].size, 128), 256)
    write(contact_sheet(images, labels if any(labels) else None, columns, side), out / "grid.png")
