"""`denoscope shift`: how far features drift from the pictures, and which techniques bring them closer."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoscope.cli import options
from denoscope.cli.bench import numbers, tracked
from denoscope.cli.features import _names
from denoscope.errors import DenoscopeError, InputError

CURVE = (100, 200, 300)  # timesteps that are read by themselves; at 500 the anchor's score is 0
QUALITY = "high quality, best quality, highly realistic, masterpiece, high resolution"


def shift(
    model: Annotated[
        str, typer.Argument(help="A diffusion model, as for --model elsewhere: 'seedling', a folder, a hub id.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", metavar="IMAGE...")],
    techniques: Annotated[
        Path | None,
        typer.Option(
            help='TOML or JSON file, a table of settings for each technique: \\[label] and prompt = "a bird".'
        ),
    ] = None,
    preset: options.Preset = None,
    site: Annotated[list[str] | None, typer.Option("--site", help="Where to read; again for more sites.")] = None,
    t: Annotated[int | None, typer.Option("--t", help="Timestep that techniques are ranked at (default 50).")] = None,
    curve: Annotated[
        str | None,
        typer.Option(
            help="Further timesteps, for the curve: '0,100,300' or '0:500:100'. By default 100,200,300, of the pictures that "
            "are drawn, with one draw of the noise."
        ),
    ] = None,
    no_curve: Annotated[bool, typer.Option("--no-curve", help="Read at --t alone.")] = False,
    size: options.Size = None,
    prompt: Annotated[
        str | None, typer.Option(help="The plain prompt, which techniques keep unless they have their own.")
    ] = None,
    feature: options.Feature = None,
    recipe: options.Recipe = None,
    draws: Annotated[int, typer.Option(help="Draws of the noise for the score.")] = 4,
    ref: Annotated[
        str, typer.Option(help="Reference at t = 0: 'plain', or 'same', conditioned as each technique is.")
    ] = "plain",
    anchor_t: Annotated[int, typer.Option(help="Timestep of the anchor, whose score is 0.")] = 500,
    anchor_prompt: Annotated[str, typer.Option(help="Prompt (or class number) of the anchor.")] = "",
    neighbours: Annotated[int, typer.Option(help="Neighbours of the Laplacian, 4 or 8.")] = 4,
    padding: Annotated[str, typer.Option(help="Border of the Laplacian, 'replicate' or 'zero'.")] = "replicate",
    standardise: Annotated[bool, typer.Option("--standardise", help="Let all channels weigh alike.")] = False,
    normalise: Annotated[
        bool,
        typer.Option("--normalise", help="diff as a share of the reference's structure, comparable between sites."),
    ] = False,
    wrong_control: Annotated[
        bool, typer.Option("--wrong-control", help="Also show each ControlNet what belongs to the next picture.")
    ] = False,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Check by image-to-image too, which takes longest.")
    ] = True,
    strength: Annotated[float, typer.Option(help="Strength of the image-to-image check.")] = 0.7,
    seeds: Annotated[int, typer.Option(help="Seeds of the image-to-image check.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the whole schedule, of which STRENGTH are taken.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance of the image-to-image check (default none).")
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="How many pictures to draw, and to read for the curve.")] = 4,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and records.")] = Path("out/shift"),
) -> None:
    """Rank TECHNIQUES by the content-shift score of the features of IMAGES, and check them by image-to-image."""
    from denoscope.features import Amalgam, Dift
    from denoscope.features.compared import PLAIN, SHARED
    from denoscope.features.gate import Gate, GateChoices, Gatekeeper
    from denoscope.features.joint import takes_prompts
    from denoscope.features.recipes import read_techniques
    from denoscope.features.shift import ContentShift, ShiftChoices, ShiftMeter

    if curve and no_curve:
        raise InputError("--no-curve leaves out what --curve asks for; give one of them.")
    files = image_files(images)
    given = read_techniques(techniques) if techniques else None
    further = numbers(curve, "--curve") if curve else []
    asked = {"preset": preset, "size": size, "prompt": prompt, "feature": feature, "recipe": recipe}
    extract = options.load_extractor(model, device, dtype, **asked)
    if isinstance(extract, Amalgam):
        raise InputError(f"{recipe} amalgamates several techniques; compare them one by one with --techniques.")
    if not isinstance(extract, Dift):
        raise InputError(f"{model} is no diffusion model, whose features could drift from the picture.")
    denoiser, own = extract.denoiser, extract.recipe.settings()
    common = {name: own[name] for name in ("preset", "size", "resample", "adaln", "massive", "pool") if name in own}
    plain = {name: value for name, value in own.items() if name not in SHARED and value not in (None, ())}
    console = Console()
    if given is None:
        given = built_in(extract, plain.get("prompt"))
    compared = {**given, PLAIN: {**plain, **given.get(PLAIN, {})}}
    first = t if t is not None else own["t"] if recipe else 50
    times = tuple(dict.fromkeys([first, *further]))
    sites = tuple(dict.fromkeys(site or [own["site"]]))
    number = int(anchor_prompt) if anchor_prompt.isdecimal() and not takes_prompts(extract) else anchor_prompt
    few = () if curve or no_curve or not pictures else CURVE
    shift_choices = ShiftChoices(
        times, sites, ref, 0, anchor_t, number, draws, seed, neighbours, padding, standardise, normalise,
        tuple(one for one in few if one not in times and one < len(denoiser.schedule)),
    )  # fmt: skip
    meter = ShiftMeter(denoiser, compared, shift_choices, wrong_control, **common)
    for note in meter.notes:
        console.print(note, highlight=False, markup=False)
    gate_choices = GateChoices(strength, seeds, steps, guidance, seed)
    place = {"site": "+".join(sites)}  # the check reads nothing, but a preset's site need not be there
    keeper = Gatekeeper(denoiser, compared, gate_choices, wrong_control, **common, **place) if gate else None
    options.folder(out)
    run = _Run(files, _names(files), wrong_control, out, pictures)
    if techniques is None:
        console.print(
            "No --techniques: the prompt alone is varied (plain, words for quality, words for its lack).",
            highlight=False,
        )
    measured = run.records("shift", meter, _draw_features, curve=bool(shift_choices.curve))
    result = ContentShift.of(measured, meter.settings())
    saved = [result.save(out / "shift.json"), result.save(out / "shift.csv"), result.save(out / "shift.png")]
    print_ranking(result, console)
    saved += run.sheets("shift", ("features", "differences"))
    if keeper is not None:
        if keeper.skipped:
            print(f"Image-to-image cannot tell: {', '.join(keeper.skipped)} (as plain but for how features are read).")
        checked = run.records("gate", keeper, _draw_repainted)
        verdicts = Gate.of(checked, keeper.settings())
        saved += [verdicts.save(out / "gate.json"), verdicts.save(out / "gate.csv")]
        if len(verdicts.rows) > 1:
            saved.append(verdicts.save(out / "gate.png"))
        print_gate(verdicts, console)
        saved += run.sheets("gate", ("repainted",))
    print(f"Files: {', '.join(map(str, saved))}")
    if run.failed:
        raise InputError(f"{len(run.failed)} of {len(files)} pictures failed: {' '.join(run.failed.values())}")


def image_files(images: Sequence[Path]) -> list[Path]:
    """The files that paths name; folders are searched. Raises InputError for folders without any."""
    from denoscope.images.picture import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in images:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no images.")
        files += inside
    return files


def built_in(extract: Any, prompt: Any) -> dict[str, dict[str, Any]]:
    """What is compared when nobody says: the prompt with words for good and for poor quality (Meng et al., appendix)."""
    from denoscope.features.joint import takes_prompts
    from denoscope.features.prompts import PROMPTS

    if not takes_prompts(extract):
        raise InputError(
            f"{extract.name} takes no prompts, so there is nothing to vary by itself; give --techniques FILE."
        )
    plain = prompt or PROMPTS["correspondence-plain"]
    words = {"quality": QUALITY, "low-quality": PROMPTS["low-quality"]}
    found = {name: f"{plain}, {text}" for name, text in words.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = (extract.denoiser.condition([prompt]).tokens for prompt in found.values())
    if one.equal(two):
        raise InputError(
            f"{extract.name} does not know the words for good and poor quality that are compared by themselves; give "
            "--techniques FILE."
        )
    return {"plain": {"prompt": plain}, **{name: {"prompt": prompt} for name, prompt in found.items()}}


@dataclass
class _Run:
    """Pictures measured one after the other; records and drawings are kept as they are made, and used again."""

    files: Sequence[Path]
    names: Sequence[str]
    wrong_control: bool
    out: Path
    drawn: int

    def __post_init__(self) -> None:
        self.failed: dict[str, str] = {}
        self._folders: dict[str, Path] = {}

    def records(
        self, verb: str, meter: Any, draw: Callable[[Any, dict[str, Any], dict[str, Any]], None], curve: bool = False
    ) -> list[Any]:
        """A record of every picture that can be read; `draw` of the first few makes {kind: image} of what a meter keeps.

        curve: those few are also read at the timesteps of the meter's curve.
        """
        import denoscope as ds
        from denoscope.benchmarks.protocol import Item
        from denoscope.benchmarks.running import Records, fingerprint
        from denoscope.images import write

        print_ = fingerprint([meter.settings(), self.wrong_control])
        folder = self._folders[verb] = self.out / "records" / f"{verb}-{print_}"
        kept, found, jobs = Records(folder.with_suffix(".jsonl")), {}, []
        for place, (file, name) in enumerate(zip(self.files, self.names, strict=True)):
            try:
                picture, other = ds.read(file), self._other(place)
                text = f"{picture.digest}" + (f"/{other.digest}" if other else "")
                longer = f"{text}/curve"  # a record that holds more than the other, and serves where that does
                of_curve = curve and (place < self.drawn or longer in kept)
                key = Item(longer if of_curve else text, "", None)
                if other and other.digest == picture.digest:
                    raise InputError(
                        f"{file} and the picture after it are the same; one's control is not wrong for the other."
                    )
            except DenoscopeError as error:
                self.failed[name] = str(error)
                continue
            wanted = place < self.drawn and not list(folder.glob(f"{name}.*.png"))
            if key.key in kept and not wanted:
                found[name] = kept[key]
            else:
                jobs.append((name, place, key, place < self.drawn))
        for name, place, key, wanted in tracked(verb)(jobs, len(found)):
            picture, images, keep = ds.read(self.files[place]), {}, {} if wanted else None
            told = {"curve": key.key.endswith("/curve")} if curve else {}
            try:
                record = meter.record(picture, self._other(place), keep=keep, **told)
            except InputError as error:
                self.failed[name] = str(error)
                continue
            if keep is not None:
                draw(picture, keep, images)
                for kind, image in images.items():
                    write(image, folder / f"{name}.{kind}.png")
            if key.key not in kept:
                kept.add(key, record)
            found[name] = kept[key]
        if not found:
            raise InputError(f"No picture could be measured: {' '.join(self.failed.values())}")
        return [found[name] for name in self.names if name in found]

    def _other(self, place: int) -> Any:
        import denoscope as ds

        if not self.wrong_control:
            return None
        if len(self.files) < 2:
            raise InputError("--wrong-control needs at least two pictures.")
        return ds.read(self.files[(place + 1) % len(self.files)])

    def sheets(self, verb: str, kinds: Sequence[str]) -> list[Path]:
        """OUT/KIND.png of the drawings of the first few pictures, below one another."""
        from PIL import Image

        from denoscope.images import write
        from denoscope.images.draw_shift import stacked

        saved = []
        for kind in kinds:
            rows = []
            for name in self.names[: self.drawn]:
                path = self._folders[verb] / f"{name}.{kind}.png"
                if path.is_file():
                    with Image.open(path) as image:
                        rows.append(image.convert("RGB"))
            if rows:
                saved.append(write(stacked(rows), self.out / f"{kind}.png"))
        return saved


def _draw_features(picture: Any, keep: dict[str, Any], images: dict[str, Any]) -> None:
    """A row for each site: features as colours, and where |Lap| differs from the reference's."""
    from denoscope.features.content_shift import structure
    from denoscope.images.draw_shift import difference_strip, pca_strip, stacked

    strips: dict[Literal["features", "differences"], list[Any]] = {"features": [], "differences": []}
    for site, ref in keep["reference"].items():
        maps = {f"{name}, {site}" if name == "reference" else name: values[site] for name, values in keep.items()}
        apart = {
            name: (structure(values[site]) - structure(ref)).abs()
            for name, values in keep.items()
            if name != "reference"
        }
        strips["features"].append(pca_strip(picture, maps))
        strips["differences"].append(difference_strip(picture, apart, note=site))
    images |= {kind: stacked(rows) for kind, rows in strips.items()}


def _draw_repainted(picture: Any, keep: dict[str, Any], images: dict[str, Any]) -> None:
    """The input and, of the first seed, what became of it."""
    from denoscope.features.likeness import psnr
    from denoscope.images import Picture
    from denoscope.images.draw_shift import strip

    panels = {name: Picture(pixels[0]).image() for name, pixels in keep.items()}
    notes = [
        "input",
        *(f"{psnr(keep['input'][0], seeds[0]):.1f} dB" for name, seeds in keep.items() if name != "input"),
    ]
    labels = [picture.name, *(name for name in panels if name != "input")]
    images["repainted"] = strip(list(panels.values()), labels, notes=notes)


def print_ranking(result: Any, console: Console) -> None:
    """One table a site, and controls against wrong ones."""
    from denoscope.features.compared import WRONG

    for site in result.sites:
        table = Table(title=f"{site} at t = {result.times[0]}", title_justify="left", box=None, pad_edge=False)
        diff = "diff / norm" if result.settings.get("normalise") else "diff"
        for column in ("technique", "score", "> 0", diff, "over plain", "> plain"):
            table.add_column(column, justify="left" if column == "technique" else "right")
        for row in result.ranking(site):
            over = with_interval(row.gain, row.gain_interval, "+.3f"), f"{row.better:.0%}"
            own = with_interval(row.score, row.score_interval, ".2f"), f"{row.positive:.0%}", f"{row.diff:.4g}"
            table.add_row(escape(row.technique), *own, *(over if row.technique != "plain" else ()))
        console.print(table)
        for name in (row.technique for row in result.rows if (row.site, row.t) == (site, result.times[0])):
            if name.startswith(WRONG):
                own = name.removeprefix(WRONG)
                mean, ends, share = result.against(own, name, site)
                text = f"{own} over {name}: {with_interval(mean, ends, '+.3f')}, in {share:.0%} of the pictures."
                console.print(text, highlight=False, markup=False)
    count = len(result.records)
    console.print(
        f"Score 1 is the reference at t = {result.settings['ref_t']}, 0 the anchor at t = {result.settings['anchor_t']}.",
        highlight=False,
    )
    if count == 1:
        print("One picture: no interval; give more to know whether a difference would be found again.")
    else:
        narrow = "; intervals from so few are too narrow" if count < 8 else ""
        print(f"{count} pictures, 95 % intervals by bootstrap{narrow}.")


def print_gate(result: Any, console: Console) -> None:
    """Verdicts and changes against plain."""
    from denoscope.features.likeness import FEWEST

    table = Table(
        title=f"image-to-image at strength {result.settings['strength']:g}, change against plain",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    titles = {"psnr": ("PSNR, dB", "+.2f"), "ssim": ("SSIM", "+.3f"), "edge_f1": ("edge F1", "+.3f")}
    for column in ("technique", "verdict", *(title for title, _ in titles.values())):
        table.add_column(column, justify="left" if column in ("technique", "verdict") else "right")
    for row in result.rows:
        if row.verdict:
            cells = [with_interval(row.changes[name], row.intervals[name], form) for name, (_, form) in titles.items()]
            table.add_row(escape(row.technique), row.verdict, *cells)
    console.print(table)
    if (count := len(result.records)) < FEWEST and len(result.rows) > 1:
        number = "One picture tells" if count == 1 else f"{count} pictures tell"
        print(f"{number} too little of others for a verdict; give at least {FEWEST}.")


def with_interval(mean: float, ends: tuple[float, float] | None, form: str) -> str:
    return f"{mean:{form}}" + ("" if ends is None else f" ({ends[0]:{form}} to {ends[1]:{form}})")
