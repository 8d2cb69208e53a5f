"""Scores of settings on items for `tune`: what is on disk is not made again, and one batch reads a picture for all settings."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from denoscope.benchmarks.protocol import Item, Record
from denoscope.benchmarks.running import Records, Track, fingerprint
from denoscope.benchmarks.tune_reading import Arm, Reader
from denoscope.benchmarks.tune_tasks import OWN, Task

Wanted = Sequence[tuple[Arm, Sequence[int]]]  # arms, each with sizes of its ensemble


class Scores:
    """Records of every setting, one file each, one line an item.

    companions: arms that the first picture of an item is read under too. first: the smallest ensemble, for which companions
    are used. plain: by timestep, the arm without a technique. apart: by technique, sites that it is not scored at.
    """

    def __init__(
        self,
        task: Task,
        reader: Reader,
        companions: Mapping[str, Arm],
        first: int,
        plain: Mapping[int | None, Arm],
        folder: Path,
        apart: Mapping[str, Set[str]],
    ):
        self.task, self.reader, self.companions, self.first, self.plain = task, reader, companions, first, plain
        self.folder, self.apart = folder, apart
        self._told = task.describe()
        self._files: dict[Any, Records] = {}

    def add(self, wanted: Wanted, items: Sequence[Item], track: Track, sites: Sequence[str] = ()) -> None:
        """Score arms on items at all sites, or at some."""
        left = [item for item in items if not self._whole(wanted, item, sites)]
        for item in items:
            if item not in left:
                self._count(wanted, self.task.pictures(item))
        jobs: Any = [(item, None) for item in left]
        for item, _ in track(jobs, len(items) - len(left)):
            pictures = self.task.pictures(item)
            missing = [(arm, sizes) for arm, sizes in wanted if not self._whole([(arm, sizes)], item, sites)]
            for place, picture in enumerate(pictures):
                self.reader.read(picture, [*missing, *(self._beside(missing) if place == 0 else [])])
            self._count(wanted, pictures)
            for arm, sizes in missing:
                for ensemble in sizes:
                    for site in self._sites(arm, sites):
                        self._evaluate(arm, ensemble, site, item)

    def values(self, arm: Arm, ensemble: int, site: str, items: Sequence[Item]) -> np.ndarray | None:
        """What is compared, of every item; None unless all of them are scored."""
        file = self._file(arm, ensemble, site)
        if not self._sites(arm, [site]) or any(item.key not in file for item in items):
            return None
        return np.array([self._value(arm, site, item, file[item]) for item in items])

    def _value(self, arm: Arm, site: str, item: Item, record: Record) -> float:
        if not self.companions:
            return self.task.value(record, None)
        own, plain = (self._file(one, self.first, site) for one in (arm, self.plain[arm.t]))
        shift = own[item].get("shift") if item.key in own else None
        return self.task.value({**record, "shift": shift}, plain[item] if item.key in plain else None)

    def _file(self, arm: Arm, ensemble: int, site: str) -> Records:
        name = (arm.name, ensemble, site)
        if name not in self._files:
            made = [self._told, arm.fingerprint, ensemble, self.reader.sites[site], self.reader.noise]
            made += [[one.fingerprint for one in self.companions.values()]] if ensemble == self.first else []
            made += ["each draw is scored"] if self.companions and ensemble == self.first > 1 else []
            self._files[name] = Records(self.folder / f"tune-{fingerprint(made)}.jsonl")
        return self._files[name]

    def _whole(self, wanted: Wanted, item: Item, sites: Sequence[str]) -> bool:
        return all(
            item.key in self._file(arm, ensemble, site)
            for arm, sizes in wanted
            for ensemble in sizes
            for site in self._sites(arm, sites)
        )

    def _sites(self, arm: Arm, sites: Sequence[str]) -> list[str]:
        """Those (or all) that an arm is scored at."""
        return [site for site in sites or self.reader.sites if site not in self.apart.get(arm.technique, ())]

    def _beside(self, wanted: Wanted) -> list[tuple[Arm, Sequence[int]]]:
        needed = any(self.first in sizes for _, sizes in wanted)
        return [(one, [self.first]) for one in self.companions.values()] if needed else []

    def _count(self, wanted: Wanted, pictures: Sequence[Any]) -> None:
        for place, picture in enumerate(pictures):
            for arm, sizes in [*wanted, *(self._beside(wanted) if place == 0 else [])]:
                self.reader.count(picture, arm, max(sizes))

    def _evaluate(self, arm: Arm, ensemble: int, site: str, item: Item) -> None:
        file = self._file(arm, ensemble, site)
        if item.key in file:
            return
        compared = {**self.companions, OWN: arm} if self.companions and ensemble == self.first else {}
        beside = {
            name: lambda picture, one=one: self.reader.members(one, ensemble, picture, site)
            for name, one in compared.items()
        }
        file.add(item, self.task.evaluate(item, lambda picture: self.reader.at(arm, ensemble, picture, site), beside))
