"""Drawing content shift: features as colours of one basis, where they differ, intervals as bars, curves over timesteps."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from denoscope.errors import InputError
from denoscope.images.chart import LINES, chart
from denoscope.images.draw import DARK, FINE, GREY, WHITE, _fitted, _layer, _write, pca_basis, pca_image
from denoscope.images.picture import Picture

Map = Float[Tensor, "channels height width"]
Bar = tuple[str, float, tuple[float, float] | None]  # label, mean, interval


def pca_strip(picture: Picture, maps: Mapping[str, Map], side: int = 224) -> Image.Image:
    """The picture, then every map in colours of one common basis (see `pca_basis`): equal colours are equal features."""
    basis = pca_basis([values.cpu().float() for values in maps.values()])
    images = [pca_image(values.cpu().float(), basis) for values in maps.values()]
    return strip([picture.image(), *images], [picture.name, *maps], side)


def difference_strip(
    picture: Picture, maps: Mapping[str, Float[Tensor, "height width"]], side: int = 224, note: str = ""
) -> Image.Image:
    """The picture, then non-negative maps in viridis from 0 to their common maximum, which is written below the picture.

    note: written before it. Below each map is its mean.
    """
    top = max(values.max().item() for values in maps.values()) or 1.0
    table = matplotlib.colormaps["viridis"](np.arange(256) / 255, bytes=True)[:, :3]
    images = [
        Image.fromarray(table[(values.cpu().numpy() / top * 255).round().astype(np.uint8)]) for values in maps.values()
    ]
    notes = [
        f"{note}{', ' if note else ''}yellow {top:.3g}",
        *(f"mean {values.mean().item():.3g}" for values in maps.values()),
    ]
    return strip([picture.image(), *images], [picture.name, *maps], side, notes)


def strip(
    images: Sequence[Image.Image], labels: Sequence[str], side: int = 224, notes: Sequence[str] | None = None
) -> Image.Image:
    """One row on white; every image stretched to the shape of the first, cell by cell where it is smaller, its label below."""
    if not images or len(labels) != len(images) or len(notes or labels) != len(images):
        raise InputError(f"A strip needs images and a label for each; there are {len(images)} images.")
    width, height = _fitted(images[0].size, (side, side))
    gutter, size = max(6, side // 24), max(10, side // 18)
    line = round(size * 1.6)
    below = line * (2 if notes else 1)
    sheet = Image.new("RGB", (len(images) * (width + gutter) + gutter, height + 2 * gutter + below), WHITE)
    for index, image in enumerate(images):
        left = gutter + index * (width + gutter)
        small = image.width < width and image.height < height
        kind = Image.Resampling.NEAREST if small and index else Image.Resampling.LANCZOS
        sheet.paste(image.convert("RGB").resize((width, height), kind), (left, gutter))
        with _layer(sheet, (left, gutter + height, left + width, gutter + height + below)) as pen:
            _write(pen, labels[index], (FINE * width / 2, FINE * line * 0.55), FINE * size, DARK, FINE * width)
            if notes:
                middle = FINE * width / 2, FINE * line * 1.5
                _write(pen, notes[index], middle, FINE * size * 0.9, GREY, FINE * width)
    return sheet


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Strips below one another on white, flush left."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), WHITE)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def bars(panels: Mapping[str, Sequence[Bar]], axis: str, margins: Mapping[str, float] | None = None) -> Image.Image:
    """One panel of horizontal bars each, the first bar at the top, with whiskers where there is an interval.

    axis: what a bar's length is; below every panel, or the panel's name where that says so ({panel}). margins: a grey band of
    so much to both sides of 0.
    """
    count = max(len(entries) for entries in panels.values())
    longest = max(len(label) for entries in panels.values() for label, *_ in entries)
    with chart(1 + 0.07 * min(longest, 40) + 3.2 * len(panels), 1.0 + 0.34 * count, len(panels)) as c:
        for index, (axes, (name, entries)) in enumerate(zip(c.panels, panels.items(), strict=True)):
            if margins:
                axes.axvspan(-margins[name], margins[name], color="#999999", alpha=0.25, lw=0)
            for place, (_, mean, span) in enumerate(entries):
                axes.barh(place, mean, 0.62, color=LINES[0] if mean >= 0 else LINES[1], alpha=0.85)
                if span is not None:
                    axes.plot(span, [place, place], color="black", lw=1.4, solid_capstyle="butt")
                    axes.plot(span, [place, place], "|", color="black", ms=7)
            axes.axvline(0, color="black", lw=0.8)
            axes.set_yticks(range(len(entries)), [label if index == 0 else "" for label, *_ in entries])
            axes.set_ylim(len(entries) - 0.4, -0.6)
            axes.grid(False, axis="y")
            axes.locator_params(axis="x", nbins=6)
            axes.set_title(name)
            axes.set_xlabel(axis.format(panel=name))
        return c.image()


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, Any]]]], axis: str) -> Image.Image:
    """One panel each: for every name a line over timesteps through (t, mean, interval or None), the interval as a band.

    The legend is below, where it hides nothing.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    width = 0.8 + 3.6 * len(panels)
    beside = max(1, int(width / (0.6 + 0.075 * max(map(len, names)))))  # entries of the legend in a row
    with chart(width, 3.4 + 0.18 * -(-len(names) // beside), len(panels)) as c:
        for index, (axes, (title, lines)) in enumerate(zip(c.panels, panels.items(), strict=True)):
            for name, points in lines.items():
                points = sorted(points, key=lambda point: point[0])
                times = [t for t, *_ in points]
                (line,) = axes.plot(times, [mean for _, mean, _ in points], marker="o", ms=3.5, label=name)
                if all(span is not None for *_, span in points):
                    low, high = np.array([span for *_, span in points]).T
                    axes.fill_between(times, low, high, color=line.get_color(), alpha=0.15, lw=0)
            axes.set_title(title)
            axes.set_xlabel("timestep t")
            if index == 0:
                axes.set_ylabel(axis)
        shown = {line.get_label(): line for axes in c.panels for line in axes.get_lines()}
        c.figure.legend([shown[name] for name in names], names, loc="outside lower center", ncols=beside, fontsize=8)
        return c.image()
