"""Charts: matplotlib figures without its global state, as Pillow images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, the dark ones first, so that lines show on white
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "axes.titlesize": 10,
}


class Chart:
    """A figure being drawn: `axes` to draw on, then `image()`."""

    def __init__(self, width: float, height: float, columns: int = 1, rows: int = 1):
        self.figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.panels: list[Any] = list(np.ravel(self.figure.subplots(rows, columns)))
        self.axes = self.panels[0]
        for axes in self.panels:
            axes.set_prop_cycle(color=LINES)

    def image(self) -> Image.Image:
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


@contextmanager
def chart(width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[Chart]:
    """A chart of `width` x `height` inches, with `rows` x `columns` panels (`.panels`; `.axes` is the first)."""
    with rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        yield Chart(width, height, columns, rows)
