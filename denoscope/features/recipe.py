"""`Recipe`: what is read from a denoiser and how it is told, all decided; and the sizes that pictures are resized to."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError
from denoscope.features import ditf
from denoscope.features.presets import NAMES, PRESETS
from denoscope.features.prompts import check_prompt, needs_picture
from denoscope.features.sets import attends_words, expand
from denoscope.features.technique import Control, Lora, check_kinds, controls, loras
from denoscope.images.picture import MAX_PIXELS, Resample

Size = int | str | tuple[int, int]
_TECHNIQUES = 10  # fields of Recipe before its techniques
_NUMBER, _WHOLE, _TEXT = (int, float), (int,), (str,)
_KINDS: dict[tuple[type, ...], tuple[str, tuple[str, ...]]] = {
    _WHOLE: ("a whole number", ("t", "ensemble", "seed", "second_t", "pool")),
    _NUMBER: ("a number", ("img2img", "guidance")),
    _TEXT: ("text", ("site", "noise", "massive", "resample", "timestep_mode", "long_prompts")),
    (str, int): ("text or a class number", ("prompt",)),
    (int, str): ('a timestep, or text such as "+10" (10 above t)', ("denoise_from",)),
}
_ABOVE = re.compile(r"\+[0-9]{1,9}")  # of denoise_from: timesteps above t


@dataclass(frozen=True)
class Recipe:
    """What to read: timestep, site, ensemble size, prompt (or class number), picture size and filter, all decided.

    site: one, several joined by "+", a published set or a pseudo-site, see `sets`. prompt: text, class number, or where texts
    are found, see `prompts`. noise: "drawn", or "none" for clean latents. adaln, massive: see `features`.

    The rest are techniques (Meng et al., arXiv 2410.06719), which compose:
    control, lora: see `technique`. seed: of the draws, in the place of the caller's. denoise_from: the noise of this timestep
    ("+10": of that 10 above t) is added and sampled away down to t before reading ("short denoising"). img2img: strength with
    which the picture is repainted, as the model is told, before it is noised and read. second_t: read there too, and average.
    guidance: s of f_uncond + s (f_cond - f_uncond), for the features and for the steps of denoise_from and img2img.
    timestep_mode: "exact", or "gdf" for the timesteps that the published code reaches when it is asked for t.
    pool: maps are averaged down to h // pool. long_prompts: "cut" to the tokens that fit, or "chunks" of them.
    """

    t: int
    site: str
    ensemble: int
    size: Size
    prompt: str | int | None = None
    preset: str | None = None
    resample: Resample = "bicubic"
    noise: str = "drawn"
    adaln: bool = False
    massive: str = "keep"
    control: tuple[Control, ...] = ()
    lora: tuple[Lora, ...] = ()
    seed: int | None = None
    denoise_from: int | str | None = None
    img2img: int | float | None = None
    second_t: int | None = None
    guidance: int | float | None = None
    timestep_mode: str = "exact"
    pool: int = 1
    long_prompts: str = "cut"

    @property
    def denoise_start(self) -> int | None:
        """The timestep that `denoise_from` means."""
        return start_of(self.denoise_from, self.t)

    def settings(self) -> dict[str, Any]:
        """Its fields; techniques that are not used are left out."""
        return {
            field.name: getattr(self, field.name)
            for i, field in enumerate(fields(self))
            if i < _TECHNIQUES or getattr(self, field.name) != field.default
        }

    def described(self) -> dict[str, Any]:
        """`settings` as JSON values; and `denoise_start`, where `denoise_from` does not say it."""
        told = self.settings()
        told |= {"denoise_start": self.denoise_start} if isinstance(self.denoise_from, str) else {}
        lists = {name: [one.described() for one in told[name]] for name in ("control", "lora") if name in told}
        return {**told, **lists, "size": list(self.size) if isinstance(self.size, tuple) else self.size}


def recipe(
    denoiser: Denoiser,
    preset: str | None = None,
    t: int | None = None,
    site: str | None = None,
    ensemble: int | None = None,
    prompt: str | int | None = None,
    size: Size | list[int] | None = None,
    resample: Resample | None = None,
    noise: str | None = None,
    adaln: bool | None = None,
    massive: str | None = None,
    **technique: Any,
) -> Recipe:
    """The denoiser's preset ("semantic" unless said) with whatever is given put in its place.

    Clean latents (`noise="none"`) are all alike, so their ensemble is 1 unless said. Without a word about `adaln` and
    `massive`, outputs of transformer blocks are modulated and lose their massive channels, and other sites are left alone.
    technique: the other fields of `Recipe`; ControlNets and LoRAs also as text or tables, see `technique`.

    Raises InputError for unknown presets and sites, timesteps outside the schedule, empty ensembles, a treatment of
    transformer blocks where there is none, techniques that contradict each other, and prompts that no picture can have;
    MissingError when their file or captioning model is not there.
    """
    presets: Mapping[str, Any] = {**PRESETS.get(denoiser.family, {}), **denoiser.presets}
    name = preset or "semantic"
    if name not in presets:
        raise InputError(
            f"There is no preset {name!r} for {denoiser.name}; choose one of {', '.join(presets or NAMES)}."
        )
    given = {"t": t, "site": site, "ensemble": ensemble, "prompt": prompt, "size": size, "resample": resample}
    given |= {"noise": noise, "adaln": adaln, "massive": massive}
    known = [field.name for field in fields(Recipe)]
    if unknown := sorted(set(technique) - set(known)):
        raise InputError(f"There is no setting {unknown[0]!r} of features; known are {', '.join(known)}.")
    given |= technique
    own = presets[name] if noise != "none" else {**presets[name], "ensemble": 1}
    settings = {**own, **{k: v for k, v in given.items() if v is not None}}
    settings.pop("propagation", None)  # what tracking does with the features, see `propagation_settings`
    for key in ("t", "site", "ensemble", "size"):
        if key not in settings:
            raise InputError(f"The preset {name!r} of {denoiser.name} does not say {key}; complete its denoscope.json.")
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(f"The preset {name!r} of {denoiser.name} has an unknown key {unknown[0]!r}.")
    check_kinds(settings, _KINDS)
    streams = [ditf.applies(denoiser, one) for one in expand(denoiser, settings["site"])]
    block = all(streams)
    if not block and (adaln or massive not in (None, "keep")):
        raise InputError(
            f"adaln and massive are for outputs of transformer blocks (block.N of DiT, PixArt, SD3, Flux), not for "
            f"{settings['site']} of {denoiser.name}."
        )
    settings |= {} if block else {"adaln": False, "massive": "keep"}
    settings |= {"control": controls(settings.get("control")), "lora": loras(settings.get("lora"))}
    if isinstance(settings["size"], list):  # as JSON and TOML have it
        settings["size"] = tuple(settings["size"])
    if needs_picture(settings.get("prompt")) and (words := attends_words(expand(denoiser, settings["site"]))):
        raise InputError(
            f"The channels of {words[0]} are the words of the prompt, and captions have other words for every picture; give "
            "one prompt for all."
        )
    chosen = Recipe(**{"adaln": block, "massive": "zero" if block else "keep", **settings, "preset": name})
    if chosen.noise not in ("drawn", "none"):
        raise InputError(f'noise is "drawn" or "none", not {chosen.noise!r}.')
    for timestep in (chosen.t, chosen.denoise_start, chosen.second_t):
        if timestep is not None:
            denoiser.schedule.check(timestep)
    if not isinstance(chosen.ensemble, int) or chosen.ensemble < 1:
        raise InputError(f"The ensemble needs at least 1 member, not {chosen.ensemble}.")
    _check_techniques(chosen)
    check_prompt(chosen.prompt)
    return chosen


def check_settings(settings: Mapping[str, Any], where: str = "") -> None:
    """InputError, beginning with `where`, for settings of a wrong kind, and for techniques that there are not."""
    check_kinds(settings, _KINDS, where)
    strength, long_prompts = settings.get("img2img"), settings.get("long_prompts")
    if strength is not None and not 0 < strength <= 1:
        raise InputError(f"{where}The strength of img2img lies between 0 and 1, not at {strength}.")
    if long_prompts not in (None, "cut", "chunks"):
        raise InputError(f"{where}long_prompts is cut or chunks, not {long_prompts!r}.")


def _check_techniques(chosen: Recipe) -> None:
    for name, choices in (("timestep_mode", ("exact", "gdf")), ("long_prompts", ("cut", "chunks"))):
        if getattr(chosen, name) not in choices:
            raise InputError(f"{name} is {' or '.join(choices)}, not {getattr(chosen, name)!r}.")
    if isinstance(chosen.pool, bool) or not isinstance(chosen.pool, int) or chosen.pool < 1:
        raise InputError(f"pool is a whole number from 1, not {chosen.pool!r}.")
    if chosen.img2img is not None and not 0 < chosen.img2img <= 1:
        raise InputError(f"The strength of img2img lies between 0 and 1, not at {chosen.img2img}.")
    if chosen.guidance is not None and not 0 <= chosen.guidance < float("inf"):
        raise InputError(f"The guidance scale is a number from 0, not {chosen.guidance}.")
    if chosen.denoise_start is not None:
        if chosen.denoise_start < chosen.t:
            raise InputError(
                f"denoise_from = {chosen.denoise_from} lies below t = {chosen.t}, and denoising goes down; start higher, or "
                'relative to t, as text: "+10".'
            )
        if chosen.second_t is not None:
            raise InputError("denoise_from ends at one timestep; leave out second_t.")
    if chosen.noise == "none" and (chosen.denoise_from, chosen.second_t, chosen.img2img) != (None, None, None):
        raise InputError('noise="none" reads clean latents; leave out denoise_from, second_t and img2img.')


def start_of(denoise_from: int | str | None, t: int) -> int | None:
    """The timestep where short denoising down to t starts: "+10" is 10 above it.

    Raises InputError for other texts.
    """
    if not isinstance(denoise_from, str):
        return denoise_from
    if not _ABOVE.fullmatch(denoise_from):
        raise InputError(
            f'denoise_from is a timestep, or text such as "+10" for 10 timesteps above t, not {denoise_from!r}.'
        )
    return t + int(denoise_from)


def within_reach(
    denoiser: Denoiser, techniques: Mapping[str, Mapping[str, Any]], times: Sequence[int]
) -> tuple[dict[str, list[int]], list[str]]:
    """Those of the timesteps that each technique can be read at, and a note on each that cannot at all of them.

    Short denoising goes down: it cannot start below a timestep, nor beyond the last one of the schedule.
    techniques: settings by name. Only `denoise_from` is looked at; what else is wrong `recipe` says.

    Raises InputError for a technique that is left with no timestep.
    """
    found, notes = {}, []
    for name, told in techniques.items():
        asked, top = told.get("denoise_from"), max(times)
        if relative := isinstance(asked, str):
            top = len(denoiser.schedule) - 1 - int(asked) if _ABOVE.fullmatch(asked) else top
        elif isinstance(asked, int) and not isinstance(asked, bool):
            top = asked
        found[name] = [t for t in times if t <= top]
        if away := [str(t) for t in times if t > top]:
            where = f"t = {', '.join(away[:-1])} and {away[-1]}" if len(away) > 1 else f"t = {away[0]}"
            why = "which would start beyond the last timestep" if relative else f"which starts below {where}"
            mend = "start nearer to t" if relative else 'start higher, or relative to t: denoise_from = "+10"'
            if not found[name]:
                raise InputError(f"The technique {name!r} has denoise_from = {asked}, {why}; {mend}.")
            at = f" at {where}" if relative else " there"
            notes.append(f"{name!r} has denoise_from = {asked}, {why}, and is left out{at}; {mend}.")
    return found, notes


def varied(denoiser: Denoiser, base: Recipe, technique: Mapping[str, Any]) -> Recipe:
    """A recipe with a technique's settings in the place of its own.

    Raises InputError as `recipe` does.
    """
    own = base.settings()
    if "site" in technique:  # what is done to transformer blocks depends on it
        own = {name: value for name, value in own.items() if name not in ("adaln", "massive")}
    return recipe(denoiser, **{**own, **technique})


def resolve_size(size: Size, picture: tuple[int, int], multiple: int = 1, minimum: int = 1) -> tuple[int, int]:
    """(width, height) that a picture of (width, height) is resized to.

    size: (width, height), "WxH", N or "N" (a square, as the published code has it), "shortN" (short side N, long side
        rounded down to a multiple of 32, as the published video code has it), "longN" (long side N, both sides rounded to
        multiples of 8 and at least the model's minimum), or 0 (no resizing). Where `multiple` asks for others than 32 and 8
        (14, the patch of DINOv2), it takes their place.
        `features` also takes several joined by "+": "long48+long96".

    Raises InputError when it cannot be understood, or the model cannot take the result.
    """
    w, h = picture
    text = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        target = int(found[1]), int(found[2])
    elif found := re.fullmatch(r"short(\d+)", text):
        short, step = int(found[1]), multiple if 32 % multiple else 32
        target = tuple(short if side == min(w, h) else side * short // min(w, h) // step * step for side in (w, h))
    elif found := re.fullmatch(r"long(\d+)", text):
        if int(found[1]) < minimum:
            raise InputError(f"{text} is too small; this model needs sides of at least {minimum} pixels.")
        scale, step = int(found[1]) / max(w, h), -(-8 // multiple) * multiple
        target = tuple(max(minimum, step, round(side * scale / step) * step) for side in (w, h))
    elif text.isdecimal():
        target = (int(text), int(text)) if int(text) else (w, h)
    else:
        raise InputError(
            f"Size {text!r} is not understood; write 768, 768x512, short480, long512, 0 or several joined by +."
        )
    if min(target) < minimum:
        raise InputError(f"{target[0]}x{target[1]} pixels is too small; this model needs sides of at least {minimum}.")
    if target[0] * target[1] > MAX_PIXELS:
        raise InputError(
            f"{target[0]}x{target[1]} is more than {MAX_PIXELS // 1_000_000} megapixels; use a smaller size."
        )
    if any(side % multiple for side in target):
        nearest = "x".join(str(max(1, int(side / multiple + 0.5)) * multiple) for side in target)
        raise InputError(f"This model needs sides that are multiples of {multiple}; use size {nearest}.")
    return target[0], target[1]
