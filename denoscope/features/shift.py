"""The content-shift score on a denoiser: techniques compared on the user's own pictures; the math is in `content_shift`.

Reference, anchor and every technique of a picture see the same draws of the noise and go through the network in one batch. The
score is computed for each draw, then averaged over draws, then over pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError
from denoscope.features.bootstrap import LEVEL, RESAMPLES, interval
from denoscope.features.compared import (
    PLAIN,
    SHARED,
    Record,
    Techniques,
    base_recipe,
    choices_of,
    common_settings,
    completed,
    files_of,
    next_ones,
    of_another,
    wrongly,
)
from denoscope.features.content_shift import check_options, defined, difference, normalised, scores, structure
from denoscope.features.dift import member_maps
from denoscope.features.recipe import Recipe, recipe, varied, within_reach
from denoscope.features.sets import check_words, expand
from denoscope.images import Picture, read, save_result
from denoscope.images.draw_shift import bars, curves, stacked


@dataclass(frozen=True)
class ShiftChoices:
    """What is measured, with everything that the paper does not say.

    t: where features are read; techniques are ranked at the first, more make a curve. sites: by default the preset's. ref:
    "plain", or "same": conditioned as the technique is; at `ref_t`. anchor_t, anchor_prompt: the anchor is plain but for these
    ("" is the unconditional prompt). draws: of the noise. neighbours, padding, standardise: see `content_shift.structure`.
    normalise: diff is a share of the reference's structure, so that sites can be compared; scores are the same.
    curve: further timesteps for the curve alone, with the first draw of the noise, of those pictures that `record` is told.
    """

    t: tuple[int, ...] = (50,)
    sites: tuple[str, ...] | None = None
    ref: str = "plain"
    ref_t: int = 0
    anchor_t: int = 500
    anchor_prompt: str | int = ""
    draws: int = 4
    seed: int = 0
    neighbours: int = 4
    padding: str = "replicate"
    standardise: bool = False
    normalise: bool = False
    curve: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        every = [*self.t, *self.curve]
        if not self.t or len(set(every)) < len(every):
            raise InputError(f"Give at least one timestep, and each of them once, not {every}.")
        if self.ref not in ("plain", "same"):
            raise InputError(f'The reference is "plain" or "same" (conditioned as the technique is), not {self.ref!r}.')
        if self.draws < 1:
            raise InputError(f"The score needs at least 1 draw of the noise, not {self.draws}.")
        check_options(self.neighbours, self.padding)

    @property
    def options(self) -> dict[str, Any]:
        """Of `structure`."""
        return {"neighbours": self.neighbours, "padding": self.padding, "standardise": self.standardise}


_Key = tuple[str, int, str]  # role, timestep, technique


class ShiftMeter:
    """Measures pictures one by one: `record` of each, then `ContentShift.of` all records.

    settings: of `features`, common to all techniques (preset, size, resample, adaln, massive). Where the preset joins several
    picture sizes, the last of them is read.

    notes: on techniques that cannot be read at all of the timesteps, see `within_reach`.

    Raises InputError for settings that the model cannot take, before anything is run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        techniques: Techniques,
        choices: ShiftChoices | None = None,
        wrong_control: bool = False,
        **settings: Any,
    ) -> None:
        self.denoiser, self.choices = denoiser, choices or ShiftChoices()
        chosen, own = self.choices, completed(techniques)
        given = {**settings, "t": chosen.t[0], "ensemble": chosen.draws}
        self.base = base_recipe(denoiser, **given, **({"site": "+".join(chosen.sites)} if chosen.sites else {}))
        self.sites = list(expand(denoiser, self.base.site))
        within_reach(denoiser, {PLAIN: own[PLAIN]}, chosen.t[:1])  # all are ranked against it there
        within_reach(denoiser, own, chosen.t)  # what is only in reach of the curve cannot be ranked
        reach, self.notes = within_reach(denoiser, own, (*chosen.t, *chosen.curve))
        refs = own if chosen.ref == "same" else (PLAIN,)
        self._at: dict[int, dict[str, Recipe]] = {}
        for t in (*chosen.t, *chosen.curve, chosen.ref_t):
            there = [name for name in own if t in reach[PLAIN] and t in reach[name]]
            names = [name for name in own if name in there or (t == chosen.ref_t and name in refs)]
            found = {name: self._technique(name, own[name], t) for name in names}
            wrong = wrong_control and any(one.control for one in found.values())
            self._at[t] = {**found, **(wrongly(found) if wrong else {})}
        self.techniques = list(dict.fromkeys(name for t in chosen.t for name in self._at[t]))
        if wrong_control:
            wrongly({name: one for found in self._at.values() for name, one in found.items()})  # is there any?
        plain = self._at[chosen.ref_t][PLAIN]
        told = None if chosen.anchor_prompt == "" else chosen.anchor_prompt
        once = {"t": chosen.anchor_t, "denoise_from": None, "second_t": None}  # read there and nowhere else
        self._anchor = replace(recipe(denoiser, **{**plain.settings(), **once}), prompt=told)
        if chosen.anchor_t == chosen.ref_t and (self._anchor.prompt or "") == (plain.prompt or ""):
            raise InputError(
                f"The score is undefined: the anchor is the reference itself (t = {chosen.anchor_t}, the same prompt); choose "
                "another timestep for the anchor."
            )
        every = [self._anchor, *(one for found in self._at.values() for one in found.values())]
        mend = "give one prompt for all techniques, and the same for the anchor (anchor_prompt)"
        check_words(self.sites, (one.prompt for one in every), mend)

    def _technique(self, name: str, own: Mapping[str, Any], t: int) -> Recipe:
        try:
            return varied(self.denoiser, self.base, {**own, "t": t})
        except InputError as error:
            raise InputError(f"The technique {name!r} at t = {t}: {error}") from None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON values."""
        chosen = self.choices
        recipes = {name: one for t in reversed(chosen.t) for name, one in self._at[t].items()}
        recipes = {name: recipes[name] for name in self.techniques}
        told = {name: {k: v for k, v in one.described().items() if k not in SHARED} for name, one in recipes.items()}
        for name in (name for name, one in told.items() if "denoise_start" in one):
            told[name]["denoise_start"] = {str(t): at[name].denoise_start for t, at in self._at.items() if name in at}
        return {
            **common_settings(self.denoiser, self.base),
            "techniques": told,
            "files": files_of(recipes),
            **{**asdict(chosen), "t": list(chosen.t), "curve": list(chosen.curve), "sites": self.sites},
            "seed": chosen.seed if self.base.seed is None else self.base.seed,
            "noise": "the same draws for reference, anchor and every technique, at every timestep",
            "precision": "Laplacian and sums in float64",
            "averaging": "the score of each draw, then the mean over draws, then over pictures",
            **({"left_out": self.notes} if self.notes else {}),
        }

    def record(
        self,
        source: Any,
        other: Any = None,
        keep: dict[str, dict[str, Tensor]] | None = None,
        curve: bool = True,
    ) -> Record:
        """diff to the reference of every technique, site and timestep, and of the anchor, for each draw; as JSON values.

        other: the picture whose controls are shown in the wrong place. keep: filled with the mean features at the ranking
        timestep, {technique: {site: values}}, "reference" first. curve: also read at the timesteps of the curve.

        Raises InputError where the score is undefined, naming the picture.
        """
        picture, chosen = read(source), self.choices
        times = (*chosen.t, *(chosen.curve if curve else ()))
        ref_of = {name: name if chosen.ref == "same" else PLAIN for name in self.techniques}
        recipes = {("anchor", chosen.anchor_t, PLAIN): self._anchor}
        with TemporaryDirectory() as folder:
            for t, found in self._at.items():
                own = of_another(found, picture, None if other is None else read(other), self.denoiser, Path(folder))
                own = {name: replace(one, ensemble=1) if t in chosen.curve else one for name, one in own.items()}
                recipes |= {("feature", t, name): one for name, one in own.items() if t in times}
                if t == chosen.ref_t:
                    refs = {("reference", t, name): own[name] for name in ref_of.values()}
                    recipes |= {key: replace(one, ensemble=chosen.draws) for key, one in refs.items()}
            maps, means = self._structures(picture, recipes, keep is not None)
        if keep is not None:
            keep["reference"] = means["reference", chosen.ref_t, PLAIN]
            keep.update({name: means["feature", chosen.t[0], name] for name in self._at[chosen.t[0]]})
        rows = []
        for site in self.sites:
            away = maps["anchor", chosen.anchor_t, PLAIN][site]
            for t in times:
                for name in self._at[t]:
                    refs, own = maps["reference", chosen.ref_t, ref_of[name]][site], maps["feature", t, name][site]
                    refs = refs[: len(own)]
                    row = {"technique": name, "site": site, "t": t, "norm": [ref.sum().item() for ref in refs]}
                    row["diff"] = [difference(*pair) for pair in zip(refs, own, strict=True)]
                    row["anchor"] = [difference(*pair) for pair in zip(refs, away, strict=False)]
                    try:
                        defined(row["anchor"], row["norm"])
                        if chosen.normalise:
                            normalised(row["diff"], row["norm"])
                    except InputError as error:
                        raise InputError(f"{picture.path or 'The picture'}, {site}: {error}") from None
                    rows.append(row)
        return {"picture": str(picture.path or picture.name), "size": list(picture.size), "rows": rows}

    def _structures(
        self, picture: Picture, recipes: Mapping[_Key, Recipe], keep: bool
    ) -> tuple[dict[_Key, dict[str, list[Tensor]]], dict[_Key, dict[str, Tensor]]]:
        """|Lap| of every draw, by recipe and site; and the mean features if they are to be kept."""
        named = {f"{role} {t} {name}": (role, t, name) for role, t, name in recipes}
        nothing = torch.zeros(())
        maps = {key: {site: [nothing] * one.ensemble for site in self.sites} for key, one in recipes.items()}
        means: dict[_Key, dict[str, Tensor]] = {key: {} for key in recipes}
        members = member_maps(
            self.denoiser,
            picture,
            {text: recipes[key] for text, key in named.items()},
            sites=self.sites,
            noise="shared",
            seed=self.choices.seed,
        )
        for text, member, values in members:
            key = named[text]
            for site, one in values.items():
                maps[key][site][member] = structure(one, **self.choices.options)
                if keep:
                    means[key][site] = means[key].get(site, nothing) + one.float().cpu() / recipes[key].ensemble
        return maps, means


@dataclass(frozen=True)
class ShiftRow:
    """One technique at a site and timestep, over all pictures; intervals are None for a single picture.

    positive: share of pictures with a score above 0. diff: eq. 1. gain: score minus that of "plain", picture by picture.
    better: share of pictures with a gain. pictures: how many were read there.
    """

    technique: str
    site: str
    t: int
    score: float
    score_interval: tuple[float, float] | None
    positive: float
    diff: float
    diff_interval: tuple[float, float] | None
    gain: float
    gain_interval: tuple[float, float] | None
    better: float
    pictures: int


@dataclass(frozen=True, eq=False)
class ContentShift:
    """rows: see `ShiftRow`. records: see `ShiftMeter.record`, a picture each. settings: everything that was chosen."""

    rows: tuple[ShiftRow, ...]
    records: tuple[Record, ...]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, records: Sequence[Record], settings: Mapping[str, Any], seed: int = 0) -> "ContentShift":
        """Means and bootstrap intervals over the pictures of `records`; seed: of the resampling.

        Raises InputError when there are none, or they are not of the same techniques.
        """
        if not records:
            raise InputError("There are no pictures to measure; give at least one.")
        own_keys = [[_key(row) for row in one["rows"]] for one in records]
        whole, curve = max(own_keys, key=len), settings.get("curve") or ()
        if any(keys not in (whole, [key for key in whole if key[2] not in curve]) for keys in own_keys):
            raise InputError("These records are of different techniques, sites or timesteps; measure them again.")
        table: dict[tuple[str, str, int], list[Any]] = {key: [] for key in whole}
        for one in records:
            for row in one["rows"]:
                table[_key(row)].append(row)
        means = {key: np.array([scores(r["diff"], r["anchor"]).mean() for r in rows]) for key, rows in table.items()}
        rows = []
        for (name, site, t), own in table.items():
            score, plain = means[name, site, t], means[PLAIN, site, t]
            each = [normalised(r["diff"], r["norm"]) if settings.get("normalise") else r["diff"] for r in own]
            diffs, gain = np.array([np.mean(one) for one in each]), score - plain
            spans = [interval(values, seed=seed) for values in (score, diffs, gain)]
            means_of = float(score.mean()), float(diffs.mean()), float(gain.mean())
            share, better = float((score > 0).mean()), float((gain > 0).mean())
            made = (means_of[0], spans[0], share, means_of[1], spans[1], means_of[2], spans[2], better, len(own))
            rows.append(ShiftRow(name, site, t, *made))
        told = {**settings, "interval": {"kind": "bootstrap over pictures, percentiles", "level": LEVEL,
                                         "resamples": RESAMPLES, "seed": seed}}  # fmt: skip
        return cls(tuple(rows), tuple(records), told)

    @property
    def techniques(self) -> list[str]:
        return list(dict.fromkeys(row.technique for row in self.rows))

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(row.site for row in self.rows))

    @property
    def times(self) -> list[int]:
        return list(dict.fromkeys(row.t for row in self.rows))

    def ranking(self, site: str | None = None, t: int | None = None) -> list[ShiftRow]:
        """Rows of a site and timestep (the first, unless said), the highest score first."""
        site, t = site or self.sites[0], self.times[0] if t is None else t
        found = [row for row in self.rows if (row.site, row.t) == (site, t)]
        if not found:
            raise InputError(f"Nothing was measured at {site}, t = {t}; there are {self.sites} at {self.times}.")
        return sorted(found, key=lambda row: -row.score)

    def against(
        self, one: str, other: str, site: str | None = None, t: int | None = None, seed: int = 0
    ) -> tuple[float, tuple[float, float] | None, float]:
        """Score of one technique minus that of another, picture by picture: mean, interval, share of pictures above 0."""
        site, t = site or self.sites[0], self.times[0] if t is None else t
        pair = []
        for name in (one, other):
            own = [row for record in self.records for row in record["rows"] if _key(row) == (name, site, t)]
            if not own:
                raise InputError(
                    f"{name!r} was not measured at {site}, t = {t}; there are {', '.join(self.techniques)}."
                )
            pair.append(np.array([scores(row["diff"], row["anchor"]).mean() for row in own]))
        change = pair[0] - pair[1]
        return float(change.mean()), interval(change, seed=seed), float((change > 0).mean())

    def draw(self) -> Image.Image:
        """Scores as bars with intervals, a panel for each site; below them the curves, if there are several timesteps."""
        order = [row.technique for row in self.ranking()]  # of the first site, for all panels
        panels = {}
        for site in self.sites:
            rows = {row.technique: row for row in self.ranking(site)}
            panels[site] = [(name, rows[name].score, rows[name].score_interval) for name in order]
        chart = bars(panels, f"content-shift score at t = {self.times[0]}")
        return chart if len(self.times) == 1 else stacked([chart, self.draw_curves("score"), self.draw_curves("diff")])

    def draw_curves(self, value: str = "score") -> Image.Image:
        """ "score" or "diff" over timesteps, a panel for each site."""
        if value not in ("score", "diff"):
            raise InputError(f"Curves are of score or diff, not {value!r}.")
        panels: dict[str, dict[str, list[Any]]] = {site: {} for site in self.sites}
        most = max(len(one["rows"]) for one in self.records)
        same = [one for one in self.records if len(one["rows"]) == most]  # every point is of the same pictures
        for row in ContentShift.of(same, self.settings).rows:
            point = (row.t, getattr(row, value), getattr(row, f"{value}_interval"))
            panels[row.site].setdefault(row.technique, []).append(point)
        share = ", share of its structure" if self.settings.get("normalise") else ""
        axis = "content-shift score" if value == "score" else f"diff to the reference{share}"
        few = f" ({len(same)} of {len(self.records)} pictures)" if len(same) < len(self.records) else ""
        return curves(panels, axis + few)

    def lines(self) -> list[dict[str, Any]]:
        """Flat rows, intervals as two numbers each."""
        found = []
        for row in self.rows:
            line = asdict(row)
            for name in ("score", "diff", "gain"):
                low, high = line.pop(f"{name}_interval") or (None, None)
                line |= {f"{name}_low": low, f"{name}_high": high}
            found.append({**line, "pictures": line.pop("pictures")})
        return found

    def save(self, path: str | Path) -> Path:
        """.json (everything), .csv (one line for each technique, site and timestep),
        .npz (every draw; NaN where there is none) or a picture.
        """

        def arrays() -> dict[str, Any]:
            place = {(row.technique, row.site, row.t): i for i, row in enumerate(self.rows)}
            draws = max(len(row["diff"]) for one in self.records for row in one["rows"])
            found = {
                name: np.full((len(self.records), len(place), draws), np.nan) for name in ("diff", "anchor", "norm")
            }
            for i, one in enumerate(self.records):
                for row in one["rows"]:
                    for name, values in found.items():
                        values[i, place[_key(row)], : len(row[name])] = row[name]
            labels = {name: [getattr(row, name) for row in self.rows] for name in ("technique", "site", "t")}
            return {**found, **labels, "picture": [one["picture"] for one in self.records]}

        return save_result(
            path,
            "Content-shift scores",
            lambda: {"settings": dict(self.settings), "rows": self.lines(), "pictures": list(self.records)},
            arrays,
            self.draw,
            lambda: (list(self.lines()[0]), self.lines()),
        )


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["technique"], row["site"], row["t"]


def content_shift(
    denoiser: Denoiser,
    images: Iterable[Any],
    techniques: Techniques,
    *,
    t: int | Sequence[int] = 50,
    sites: str | Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    wrong_control: bool = False,
    **choices: Any,
) -> ContentShift:
    """How far features have drifted from each picture, plain and with each technique: eq. 2 of the paper, see `content_shift`.

    images: pictures or anything that `denoscope.read` takes. techniques: settings of `features` by name; "plain" is always
        among them, and what it sets (a plain prompt) holds for the others too.
    t: one timestep, or several for the curve; techniques are ranked at the first. sites: by default the preset's.
    settings: of `features`, for all (preset, size, resample). choices: see `ShiftChoices`: ref, ref_t, anchor_t, anchor_prompt,
        draws, seed, neighbours, padding, standardise, normalise, curve.
    wrong_control: also show every ControlNet what belongs to the next picture, as "wrong:NAME".

    Raises InputError for settings that do not fit, and where the score is undefined (`ShiftMeter.record`).
    """
    times = (t,) if isinstance(t, int) else tuple(t)
    named = (sites,) if isinstance(sites, str) else None if sites is None else tuple(sites)
    made = choices_of(ShiftChoices, {"t": times, "sites": named, **choices})
    meter = ShiftMeter(denoiser, techniques, made, wrong_control, **(settings or {}))
    pictures = [read(source) for source in images]
    others = next_ones(pictures, wrong_control)
    return ContentShift.of([meter.record(*pair) for pair in zip(pictures, others, strict=True)], meter.settings())
