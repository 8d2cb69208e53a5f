"""Grids of timestep x site x ensemble size on any benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoscope.benchmarks.protocol import Benchmark
from denoscope.benchmarks.running import Method, SiteStore, Track, evaluate
from denoscope.errors import InputError
from denoscope.features import Dift
from denoscope.features.joint import takes_prompts
from denoscope.images.chart import chart


def run_sweep(
    benchmark: Benchmark,
    extractor: Dift,
    times: Sequence[int],
    sites: Sequence[str],
    ensembles: Sequence[int],
    prompt: str | None,
    out: Path,
    limit: int | None = None,
    track: Callable[[str], Track] = lambda label: lambda jobs, done: jobs,
) -> list[dict[str, Any]]:
    """One dict for each combination: t, site, ensemble, and the benchmark's row for everything. Resumes as `evaluate` does."""
    found = []
    for t in times:
        extractor.denoiser.schedule.check(t)
    if min(ensembles) < 1:
        raise InputError("An ensemble needs at least 1 member.")
    for members in ensembles:
        for t in times:
            one = replace(extractor, recipe=replace(extractor.recipe, t=t, ensemble=members))
            store = SiteStore(one, sites, prompt if takes_prompts(extractor) else None)
            compared = [_method(benchmark, store, site) for site in sites]
            report = evaluate(benchmark, compared, out, limit, tables=False, track=track(f"t {t}, ensemble {members}"))
            found += [{"t": t, "site": site, "ensemble": members, **report.rows[site][0]} for site in sites]
    return found


def _method(benchmark: Benchmark, store: SiteStore, site: str) -> Method:
    features = store.at(site)
    settings = {**store.extractor.describe(), "site": site, "template": store.prompt}
    return Method(site, lambda item: benchmark.run(item, features), settings)


def sweep_image(cells: Sequence[dict[str, Any]], column: str) -> Image.Image:
    """Timestep across, site down, one panel for each ensemble size."""
    times, sites, ensembles = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("t", "site", "ensemble"))
    value = {(cell["t"], cell["site"], cell["ensemble"]): cell[column] for cell in cells}
    top = max(value.values()) or 1
    width = 1.4 + (0.8 + 0.55 * len(times)) * len(ensembles)
    with chart(max(4, width), 1.2 + 0.3 * len(sites), len(ensembles)) as c:
        for axes, members in zip(c.panels, ensembles, strict=True):
            grid = np.array([[value[t, site, members] for t in times] for site in sites])
            axes.imshow(grid, vmin=0, vmax=top, cmap="viridis", aspect="auto")
            axes.grid(False)
            axes.set_title(f"{column}, ensemble {members}")
            axes.set_xticks(range(len(times)), times)
            axes.set_yticks(range(len(sites)), sites if members == ensembles[0] else [""] * len(sites))
            axes.set_xlabel("timestep t")
            for y, x in np.ndindex(*grid.shape):
                ink = "black" if grid[y, x] > 0.6 * top else "white"
                axes.text(x, y, f"{grid[y, x]:.1f}", ha="center", va="center", color=ink, fontsize=8)
        return c.image()
