"""`Tuned`: what `tune` found, what it is worth, and its heat map."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

from denoscope.errors import counted
from denoscope.features.bootstrap import interval
from denoscope.images import save_result
from denoscope.images.chart import chart

PLAIN = "plain"
FEWEST = 6  # items: by a sign test fewer cannot show a difference at 95 %, even when all of them agree (2 / 2^5 > 0.05)


@dataclass(frozen=True)
class Setting:
    """One cell of the grid. rows: of the network for each picture."""

    technique: str
    t: int | None
    site: str
    ensemble: int
    rows: int

    @property
    def name(self) -> str:
        parts = [] if self.t is None else [f"t {self.t}"]
        parts += [self.site] + ([f"ensemble {self.ensemble}"] if self.t is not None else [])
        return ", ".join(parts + ([] if self.technique == PLAIN else [self.technique]))


@dataclass(frozen=True, eq=False)
class Tuned:
    """What `tune` found.

    settings: those of `features` for the choice, which is the preset where nothing was shown to be better. gain: mean
    difference to the preset and its bootstrap interval (None from a single item). verdict: "better", "cheaper" (not worse as
    far as can be told, for fewer rows) or "keep" (the preset). cells: all that was scored, and on how many items.
    rows, budget: of the network. exhaustive: how the choice compares with the whole grid on the same items.
    holdout: the choice on items that were kept aside; the verdict is then from these.
    """

    model: str
    task: Mapping[str, Any]
    metric: str
    weak: bool
    choice: Setting
    settings: Mapping[str, Any]
    preset: Setting
    value: float
    preset_value: float
    gain: tuple[float, float | None, float | None]
    verdict: str
    items: int
    rows: int
    budget: int
    cells: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    recipe: Mapping[str, Any]
    holdout: Mapping[str, Any] | None = None
    exhaustive: Mapping[str, Any] | None = None

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        change = _interval_text(*self.gain)
        seen = counted(self.items, "item")
        where = f"on {self.holdout['items']} items kept aside" if self.holdout else f"on {seen}"
        caution = " This was measured without labels, which only stand in for what you want." if self.weak else ""
        match self.verdict:
            case "better":
                text = f"{self.choice.name} is better than the preset ({self.preset.name}): {change} {self.metric} {where}."
            case "cheaper":
                text = (
                    f"{self.choice.name} is no worse than the preset ({self.preset.name}) as far as {seen} can tell "
                    f"({change} {self.metric} {where}), for {self.choice.rows} instead of {self.preset.rows} rows a picture."
                )
            case _:
                text = f"Keep the preset ({self.preset.name}): nothing that was tried is better {where} by more than chance."
        return text + caution

    @property
    def comparison(self) -> str:
        """How the choice compares with the whole grid, in words; nothing where that was not scored."""
        if not (told := self.exhaustive):
            return ""
        behind = f", {told['regret']:.1f} below the best ({told['best_value']:.1f})" if told["regret"] else ""
        text = (
            f"Of {counted(told['settings'], 'setting')} on the same items the choice has rank {told['rank']}{behind}. "
            f"The search took {counted(self.rows, 'row')}; the grid alone takes {told['rows']}."
        )
        if self.rows > told["rows"] and told["besides"]:
            text += f" The search took more because it also read {', and '.join(told['besides'])}."
        return text

    def rows_of_table(self) -> list[dict[str, Any]]:
        """The cells, best first; those scored on all items before the others."""
        return sorted((dict(cell) for cell in self.cells), key=lambda cell: (-cell["items"], -cell["value"]))

    def to_dict(self) -> dict[str, Any]:
        made = asdict(replace(self, cells=[], task={}))
        return {**made, "sentence": self.sentence, "task": dict(self.task), "cells": self.rows_of_table()}

    def draw(self) -> Image.Image:
        return tuned_image(self)

    def save(self, path: str | Path) -> Path:
        """Write by suffix: .json (everything), .csv (the cells), .npz (the cells as arrays) or the heat map as an image."""
        cells = self.rows_of_table()
        return save_result(
            path,
            "Results of tuning",
            self.to_dict,
            lambda: {
                **{
                    key: np.array([cell[key] for cell in cells])
                    for key in ("technique", "site", "ensemble", "value", "items")
                },
                "t": np.array([-1 if cell["t"] is None else cell["t"] for cell in cells]),
                "choice": json.dumps(asdict(self.choice)),
            },
            self.draw,
            lambda: (list(cells[0]), cells),
        )


def choose(values: Mapping[Setting, np.ndarray], seed: int = 0) -> Setting:
    """Of paired values [items] by setting: the best of the cheapest among those that chance does not tell from the best mean.

    Chance: the bootstrap interval of the paired differences contains 0, or there are fewer than `FEWEST` of them.
    """
    means = {setting: float(scored.mean()) for setting, scored in values.items()}
    best = max(means, key=lambda setting: means[setting])

    def tied(setting: Setting) -> bool:
        found = interval(values[best] - values[setting], seed=seed)
        return found is None or len(values[best]) < FEWEST or found[0] <= 0

    equal = [s for s in values if s == best or (s.rows < best.rows and tied(s))]
    fewest = min(setting.rows for setting in equal)
    return max((s for s in equal if s.rows == fewest), key=lambda setting: means[setting])


def _interval_text(change: float, low: float | None, high: float | None) -> str:
    return f"{change:+.1f}" if low is None or high is None else f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"


def tuned_image(tuned: Tuned) -> Image.Image:
    """Timestep across, site down, a panel for each technique and ensemble; smaller figures where fewer items were scored."""
    cells = tuned.cells
    times, sites = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("t", "site"))
    times.sort(key=lambda t: -1 if t is None else t)
    given = list(tuned.recipe["search"]["techniques"])
    panels = sorted(
        {(cell["technique"], cell["ensemble"]) for cell in cells}, key=lambda panel: (given.index(panel[0]), panel[1])
    )
    value = {tuple(cell[key] for key in ("technique", "ensemble", "t", "site")): cell for cell in cells}
    top = max(cell["value"] for cell in cells)
    low = (
        0.0 if top > 0 else min(cell["value"] for cell in cells) - 1e-9
    )  # a technique far below 0 must not take all colours
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    label, panel = 0.09 * max(len(str(site)) for site in sites), 0.9 + 0.6 * len(times)
    width = label + panel * columns + 1
    titles = [_wrapped(name if times == [None] else f"{name}, ensemble {ensemble}", panel) for name, ensemble in panels]
    below = tuned.metric, counted(tuned.items, "item")
    headline = _wrapped("{}, {} (small: fewer); framed: the choice, dotted: the preset".format(*below), width)
    lines = [1 + text.count("\n") for text in (headline, *titles)]
    height = (0.95 + 0.15 * max(lines[1:]) + 0.3 * len(sites)) * rows + 0.25 + 0.15 * lines[0]
    with chart(width, height, columns, rows) as c:
        for place, axes in enumerate(c.panels):
            axes.grid(False)
            if place >= len(panels):
                axes.axis("off")
                continue
            technique, ensemble = panels[place]
            found = [[value.get((technique, ensemble, t, site)) for t in times] for site in sites]
            grid = np.array([[np.nan if cell is None else cell["value"] for cell in row] for row in found])
            axes.imshow(grid, vmin=low, vmax=top, cmap="viridis", aspect="auto")
            axes.set_title(titles[place], fontsize=9)
            axes.set_xticks(range(len(times)), ["" if t is None else t for t in times])
            axes.set_yticks(range(len(sites)), sites if place % columns == 0 else [""] * len(sites))
            if times != [None]:
                axes.set_xlabel("timestep t")
            for y, x in np.ndindex(*grid.shape):
                if (cell := found[y][x]) is not None:
                    bright = grid[y, x] > low + 0.6 * (top - low)
                    axes.text(
                        x, y, f"{grid[y, x]:.1f}", ha="center", va="center", color="black" if bright else "white",
                        fontsize=8 if cell["items"] == tuned.items else 6,
                    )  # fmt: skip
            for setting, style in ((tuned.preset, ":"), (tuned.choice, "-")):
                if (setting.technique, setting.ensemble) == (technique, ensemble) and setting.site in sites:
                    x, y = times.index(setting.t) - 0.5, sites.index(setting.site) - 0.5
                    frame = axes.add_patch(Rectangle((x, y), 1, 1))
                    frame.set(linestyle=style, edgecolor="#D55E00", fill=False, linewidth=2, clip_on=False, zorder=3)
        c.figure.suptitle(headline, fontsize=9)
        return c.image()


def _wrapped(text: str, width: float) -> str:
    """Lines that are at most so many inches long in letters of 9 points."""
    return textwrap.fill(text, max(12, int(width / 0.075)))
