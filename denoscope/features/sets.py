"""Which activations make a feature: single sites, published sets of them, and attention maps averaged over layers.

The sets are those of Meng et al., "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features", NeurIPS
2024 (arXiv 2410.03558), and "Suppress Content Shift", NeurIPS 2024 (arXiv 2410.06719), by our names; `gdf_of` says theirs. The
attention feature is that of their code (after VPD, arXiv 2303.02153).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError
from denoscope.features.gdf import is_gdf, site_of
from denoscope.sites import Site

# by family, each in the order of the forward pass (in which the published code concatenates)
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "stable-diffusion": {  # chosen on version 1.5
        "legacy": ("up.0", "up.1", "up.2", "up.3.attn.2"),
        "practical": ("up.1.attn.1.cross_query", "up.1.resnet.2", "up.2.attn.1.cross_query", "up.3.attn.0.key"),
        # published with attention.up_cross beside it
        "amalgamation": ("up.1.attn.1.cross_query", "up.2.attn.1.cross_query", "up.2", "up.3.attn.0.key"),
    },
    "stable-diffusion-xl": {
        "legacy": ("up.0", "up.1", "up.2.resnet.2"),
        "practical": (
            "up.0.attn.0.block.5", "up.0.attn.0.block.7", "up.1.attn.0.block.0.cross_query", "up.1.attn.0.block.0",
        ),
        "playground": ("up.0.attn.0.block.3",),  # chosen on Playground v2
    },
}  # fmt: skip

_ATTENTION = "attention."
_COARSEST, _FINEST = (
    4,
    2,
)  # latent cells per token side: (S/32)^2 to (S/16)^2 tokens where the latents have S/8 cells a side


@dataclass(frozen=True, eq=False)
class Reading:
    """A feature that is made of watched sites.

    values(seen, latent): the feature `[batch, channels, rows, columns]`, from what a `Watch` saw at the sites `watch` and the
    (height, width) of the latents.
    """

    name: str
    watch: tuple[str, ...]
    values: Callable[[Mapping[str, Tensor], tuple[int, int]], Tensor]


def expand(denoiser: Denoiser, site: str) -> list[str]:
    """The single sites and attention features that a setting `site` names, in the order it is written, each once.

    site: names joined by "+": our site names, published sets ("legacy", "practical", "amalgamation", "playground"), GDF's names
        ("up-level1-repeat1-vit-block0-cross-q"), and attention features ("attention.up_cross", see `readings`).

    Raises InputError for names that the model does not have (listing the nearest) and for sets that nobody published for it.
    """
    known = [one.name for one in denoiser.sites(sizes=False)]
    every = set(known)
    found: list[str] = []
    for name in (part.strip() for part in site.split("+")):
        if name in every:
            found.append(name)
        elif any(name in sets for sets in SETS.values()):
            found += _members(denoiser, name, every)
        elif name.startswith(_ATTENTION):
            _places(denoiser, name)
            found.append(name)
        else:
            ours = site_of(name, every) if is_gdf(name) else re.sub(r"\.block\.0(?=\.\w)", "", name)
            if ours not in every:
                raise InputError(f"{denoiser.name} has no site {name!r}; {_nearest(ours, known)}.")
            found.append(ours)
    return list(dict.fromkeys(found))


def _members(denoiser: Denoiser, name: str, known: set[str]) -> tuple[str, ...]:
    sets = SETS.get(denoiser.family, {})
    if name not in sets:
        published = f"there are {', '.join(sets)}" if sets else "none are published for it; name its sites, joined by +"
        raise InputError(f"There is no set {name!r} for {denoiser.name} ({denoiser.family}); {published}.")
    if missing := [site for site in sets[name] if site not in known]:
        raise InputError(
            f"{denoiser.name} has no {missing[0]}, of the set {name!r}; the set was made for a network of another shape, name "
            "sites instead, joined by +."
        )
    return sets[name]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    listing = "denoscope models NAME --sites lists all"
    return f"the nearest are {', '.join(near)} ({listing})" if near else listing


def readings(denoiser: Denoiser, names: Sequence[str]) -> list[Reading]:
    """How the features `names` (see `expand`) are read.

    A site is its own activation. "attention.PLACES" are softmax maps averaged over heads and layers, with the tokens that are
    attended to as channels; PLACES are up_cross, mid_cross, down_cross, up_self, … of U-Nets, cross and self of transformers
    (there "up_cross" is "cross", as in the published code), several separated by commas. Of the layers at a place those count
    whose tokens have a side of 2 to 4 latent cells; layers of one size are averaged, each size is enlarged to the latents
    (nearest), and sizes are concatenated in the order of the pass: 2 x 77 channels for up_cross of Stable Diffusion.

    Raises InputError for unknown names, for attention maps of single layers, and for places without a map of such a size.
    """
    kinds = {site.name: site.kind for site in denoiser.sites(sizes=False)}

    def plain(name: str) -> Reading:
        if name not in kinds:
            raise InputError(f"{denoiser.name} has no site {name!r}; {_nearest(name, list(kinds))}.")
        if kinds[name] == "map":
            raise InputError(
                f"{name} is no map of features; choose a block, resnet, attention, query, key or value, or attention maps "
                "averaged over layers such as attention.up_cross."
            )
        return Reading(name, (name,), lambda seen, latent: seen[name])

    return [_attention(denoiser, name) if name.startswith(_ATTENTION) else plain(name) for name in names]


def attends_words(names: Sequence[str]) -> list[str]:
    """Those of the features (see `expand`) whose channels are words of the prompt."""
    return [name for name in names if name.startswith(_ATTENTION) and "cross" in name]


def worded(recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(attention feature, prompt whose words are its channels) of a `FeatureMap.recipe`, in the order of the channels."""
    inner = recipe.get("parts")
    if "members" in recipe:
        inner = [*recipe["members"], *([recipe["attention"]] if recipe.get("attention") else [])]
    if inner is not None:
        return [pair for one in inner for pair in worded(one)]
    names = attends_words(str(recipe.get("site")).split("+"))
    return [(name, recipe.get("prompt") or "") for name in names]


def check_words(names: Sequence[str], prompts: Iterable[Any], mend: str = "give one prompt for all") -> None:
    """InputError where features (see `expand`) whose channels are words are to be compared under prompts that differ."""
    told = list(dict.fromkeys(prompt or "" for prompt in prompts))
    if (words := attends_words(names)) and len(told) > 1:
        raise InputError(
            f"The channels of {words[0]} are the words of the prompt, so it cannot be compared under {told[0]!r} and "
            f"{told[1]!r}; {mend}."
        )


def attention_places(denoiser: Denoiser) -> dict[str, list[Site]]:
    """Attention maps by the place of their layers, in the order of the forward pass: "up_cross", or "cross" of transformers."""
    places: dict[str, list[Site]] = {}
    for site in denoiser.sites(sizes=False):
        if site.kind == "map":
            stage, kind = site.name.split(".")[0], site.name.rpartition(".")[2].removesuffix("_map")
            places.setdefault(kind if stage == "block" else f"{stage}_{kind}", []).append(site)
    return places


def _places(denoiser: Denoiser, name: str) -> list[list[Site]]:
    """The maps of every place that an attention feature's name lists."""
    available = attention_places(denoiser)
    asked = [place.strip() for place in name.removeprefix(_ATTENTION).split(",")]
    if available.keys() <= {"cross", "self"}:
        asked = [place.removeprefix("up_") for place in asked]
    for place in asked:
        if place not in available:
            known = f"it has {', '.join(available)}" if available else "it has no attention layers that can be read"
            raise InputError(f"{denoiser.name} has no attention at {place!r}, of {name!r}; {known}.")
    return [available[place] for place in dict.fromkeys(asked)]


def _attention(denoiser: Denoiser, name: str) -> Reading:
    stride = getattr(denoiser, "stride", 1)
    ratios = {site.name: site.stride / stride for site in denoiser.sites() if site.kind == "map"}
    groups: dict[tuple[int, float], list[str]] = {}  # by place, then size
    for number, place in enumerate(_places(denoiser, name)):
        for site in place:
            if _FINEST <= ratios[site.name] <= _COARSEST:
                groups.setdefault((number, ratios[site.name]), []).append(site.name)
    if not groups:
        there = sorted({ratios[site.name] for place in _places(denoiser, name) for site in place})
        raise InputError(
            f"{name} keeps attention maps whose tokens have a side of {_FINEST} to {_COARSEST} latent cells; those of "
            f"{denoiser.name} have {', '.join(f'{ratio:g}' for ratio in there)}. Choose another place, or sites."
        )

    def values(seen: Mapping[str, Tensor], latent: tuple[int, int]) -> Tensor:
        parts = []
        for (_, ratio), sites in groups.items():
            maps = [by_place(seen[site], grid(latent, ratio)) for site in sites]
            parts.append(F.interpolate(torch.stack(maps).mean(0), latent, mode="nearest"))
        return torch.cat(parts, 1)

    return Reading(name, tuple(site for sites in groups.values() for site in sites), values)


def grid(latent: tuple[int, int], ratio: int | float) -> tuple[int, int]:
    """(rows, columns) of tokens of `ratio` latent cells a side; what is left over at the end has tokens of its own."""
    return -int(-latent[0] // ratio), -int(-latent[1] // ratio)


def by_place(
    attention: Float[Tensor, "batch heads tokens keys"], size: tuple[int, int]
) -> Float[Tensor, "batch keys rows columns"]:
    """Attention maps averaged over heads, as maps of the places that attend, with what is attended to as channels."""
    return attention.mean(1).mT.unflatten(-1, size)
