"""`Benchmark`: what every evaluation protocol gives to the one harness that runs, resumes, tabulates and draws them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from denoscope.features import FeatureMap
from denoscope.images import Picture

Record = dict[str, Any]  # JSON values
Row = dict[str, Any]  # one line of a table: "category" and numbers
Features = Callable[[Picture, str], FeatureMap]  # of a picture that shows a category ("" where there are none)


@dataclass(frozen=True, eq=False)
class Item:
    """One unit of work: a pair, a video. key: names it for good (resuming goes by it). data: the protocol's own."""

    key: str
    category: str
    data: Any


@runtime_checkable
class Benchmark(Protocol):
    """A data set on disk and its official protocol.

    name: as on the command line. preset: the task whose published settings suit it. columns: what a row holds besides
    "category" and "count", in order; the first is the headline.
    """

    name: str
    preset: str

    @property
    def columns(self) -> Sequence[str]: ...

    def items(self) -> list[Item]:
        """Everything to evaluate, in the official order. Raises MissingError saying what was looked for and where."""
        ...

    def run(self, item: Item, features: Features) -> Record:
        """Predict one item. The record holds enough to compute every metric, and never raises for a failed estimate."""
        ...

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        """The official metrics: the row "all" first, then one for each category. Percentages are 0..100."""
        ...

    def score(self, item: Item, record: Record) -> float:
        """How well one item went (higher is better), for choosing the best and worst pictures."""
        ...

    def draw(self, item: Item, record: Record) -> Image.Image:
        """The prediction beside the truth."""
        ...

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        """Baselines peculiar to the task, which need no features of a picture (copy the first mask, optical flow)."""
        ...
