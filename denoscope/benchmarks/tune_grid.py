"""The grid that `tune` searches: techniques, sizes and sites, checked and named."""

from collections.abc import Mapping, Sequence
from typing import Any

from denoscope.denoisers.protocol import Denoiser
from denoscope.encoders.protocol import Encoder
from denoscope.errors import InputError
from denoscope.features.prompts import needs_picture
from denoscope.features.recipe import Size
from denoscope.features.sets import attends_words, expand
from denoscope.features.technique import Control, Lora, controls
from denoscope.sites import Watch

_SEARCHED = ("t", "site", "ensemble", "preset")


def checked(techniques: Mapping[str, Mapping[str, Any]], weak: bool) -> dict[str, Mapping[str, Any]]:
    """The techniques, without what is searched. weak: pictures are cut out, which pictures shown to a ControlNet are not."""
    for name, told in techniques.items():
        if wrong := [key for key in told if key in _SEARCHED]:
            raise InputError(
                f"The technique {name!r} says {wrong[0]}, which is searched or the same for all; leave it out."
            )
        shown = [control.image for control in controls(told.get("control"))]
        if weak and (other := [image for image in shown if image != "canny"]):
            raise InputError(
                f"{name!r} shows the ControlNet {other[0]}, which does not fit cut-outs; use canny, or labels."
            )
    return dict(techniques)


def plain_value(value: Any) -> Any:
    """Of settings, as JSON values."""
    return value.described() if isinstance(value, Control | Lora) else str(value)


def unlike_words(
    sites: Mapping[str, Sequence[str]], prompts: Mapping[str, Any], measured: Sequence[Any]
) -> tuple[dict[str, set[str]], list[str]]:
    """By technique the candidates that it cannot be compared at, for their channels are words and its words others; and notes.

    sites: see `candidates`. prompts: of the techniques. measured: those that content shift is measured against, if it is.
    """
    words = [site for site, names in sites.items() if attends_words(names)]
    captioned = [name for name, prompt in prompts.items() if needs_picture(prompt)]
    told = {prompt or "" for prompt in measured}
    others = [name for name in prompts if told and name not in captioned and len(told | {prompts[name] or ""}) > 1]
    reasons = {
        "captions are other words for every picture; give one prompt for all": captioned,
        "content shift is measured against other words (the anchor's prompt is empty); give labels, or no prompt": others,
    }
    notes = []
    for why, names in reasons.items():
        if words and names:
            left = f"{', '.join(map(repr, names))} {'are' if len(names) > 1 else 'is'} left out there"
            notes.append(f"The channels of {', '.join(words)} are the words of the prompt, so {left}: {why}.")
    return {name: set(words) for name in (*captioned, *others)}, notes


def crossed(techniques: Mapping[str, Mapping[str, Any]], sizes: Sequence[Size] | None) -> dict[str, dict[str, Any]]:
    """Techniques at the preset's size and at others."""
    found = {name: dict(told) for name, told in techniques.items()}
    for size in sizes or ():
        text = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
        found |= {f"{name}, size {text}": {**told, "size": size} for name, told in techniques.items()}
    return found


def blocks(model: Denoiser | Encoder) -> list[str]:
    return [site.name for site in model.sites(sizes=False) if site.kind == "block"]


def candidates(model: Denoiser | Encoder, sites: Sequence[str]) -> dict[str, list[str]]:
    """Every candidate and the single sites that it is made of. Raises InputError for those that cannot be read."""
    every = dict.fromkeys(sites)
    if isinstance(model, Denoiser):
        found = {site: expand(model, site) for site in every}
    else:
        found = {site: [site] for site in every}
        Watch(model, every)  # names those that are unknown
    kinds = {site.name: site.kind for site in model.sites(sizes=False)}
    if maps := [name for names in found.values() for name in names if kinds.get(name) == "map"]:
        raise InputError(f"{maps[0]} is no map of features; choose a block, resnet, attention, query, key or value.")
    return found
