"""The one harness: runs a benchmark over its items, keeps features and records on disk, resumes, tabulates, draws."""

import csv
import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from denoscope.benchmarks.protocol import Benchmark, Item, Record, Row
from denoscope.errors import DenoscopeError, InputError
from denoscope.features import Dift, Extractor, FeatureMap
from denoscope.images import Picture, atomically, write

_MEMORY = 1 << 30  # bytes of features kept in memory


class FeatureStore:
    """Features of pictures, made once: kept in memory as far as they fit and, with a folder, on disk.

    prompt: with "{category}" in it, filled in for every picture; None leaves the extractor's own.
    folder: one .safetensors file a picture, named by everything that decides the features, so that nothing stale is ever read.
    """

    def __init__(self, extractor: Extractor, prompt: str | None = None, folder: Path | None = None):
        self.extractor, self.prompt, self.folder = extractor, prompt, folder
        self.settings = {**extractor.describe(), **({"prompt": prompt} if prompt is not None else {})}
        self._kept: OrderedDict[str, FeatureMap] = OrderedDict()

    def __call__(self, picture: Picture, category: str = "") -> FeatureMap:
        prompt = None if self.prompt is None else self.prompt.replace("{category}", category)
        key = fingerprint({**self.settings, "prompt": prompt or self.settings.get("prompt"), "of": picture.digest})
        if key not in self._kept:
            self._kept[key] = self._stored(key) or self._make(key, picture, prompt)
            while len(self._kept) > 1 and sum(_bytes(fm) for fm in self._kept.values()) > _MEMORY:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _stored(self, key: str) -> FeatureMap | None:
        path = self.folder and self.folder / f"{key}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            return FeatureMap.load(path)
        except DenoscopeError:  # damaged: made again
            return None

    def _make(self, key: str, picture: Picture, prompt: str | None) -> FeatureMap:
        fm = self.extractor(picture, prompt)
        if self.folder is not None:
            fm.save(self.folder / f"{key}.safetensors")
        return fm


def _bytes(fm: FeatureMap) -> int:
    return fm.values.numel() * fm.values.element_size()


def fingerprint(values: Any) -> str:
    """16 hexadecimal digits that name JSON values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Method:
    """One line of a table. settings: JSON values that decide its records; when they change, the records are made anew."""

    name: str
    run: Callable[[Item], Record]
    settings: Mapping[str, Any]


Job = tuple[Item, Method]
Track = Callable[[Sequence[Job], int], Iterable[Job]]


def methods(benchmark: Benchmark, stores: Iterable[FeatureStore], baselines: bool = False) -> list[Method]:
    """The features of each store on a benchmark and, if asked for, the task's own baselines."""

    def of(store: FeatureStore) -> Callable[[Item], Record]:
        return lambda item: benchmark.run(item, store)

    found = [Method(store.extractor.name, of(store), store.settings) for store in stores]
    if baselines:
        found += [Method(name, run, {"baseline": name}) for name, run in benchmark.baselines().items()]
    return found


@dataclass(frozen=True, eq=False)
class Report:
    """rows: for each method the row of everything, then one a category; columns: what they hold, the headline first."""

    benchmark: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Row]]
    settings: Mapping[str, Any]

    def save(self, folder: str | Path) -> list[Path]:
        """BENCHMARK.json (everything) and BENCHMARK.csv (one line for each method and category)."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["method", "category", "count", *self.columns], extrasaction="ignore")
        writer.writeheader()
        for name, rows in self.rows.items():
            writer.writerows({"method": name, **row} for row in rows)
        values = json.dumps({**asdict(self), "rows": {k: list(v) for k, v in self.rows.items()}}, indent=2, default=str)
        return [
            atomically(Path(folder) / f"{self.benchmark}.json", lambda path: path.write_text(values + "\n")),
            atomically(Path(folder) / f"{self.benchmark}.csv", lambda path: path.write_bytes(text.getvalue().encode())),
        ]


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spread over the list, so that every category keeps its share."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise InputError(f"The limit must be at least 1, not {limit}.")
    return [items[i * len(items) // limit] for i in range(limit)]


def options_of(benchmark: Benchmark) -> dict[str, Any]:
    """The protocol's own settings, as JSON values; of a data set in one file its digest too, since it may be corrected."""
    if not is_dataclass(benchmark):
        return {}
    told = json.loads(json.dumps(asdict(benchmark), default=str))
    if (file := Path(str(told.get("root", "")))).is_file():
        told["digest"] = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    return told


def evaluate(
    benchmark: Benchmark,
    compared: Sequence[Method],
    out: str | Path,
    limit: int | None = None,
    pictures: int = 0,
    tables: bool = True,
    track: Track = lambda jobs, done: jobs,
) -> Report:
    """Run every method on every item; what `out` holds already is not run again.

    Records are kept as `out/records/BENCHMARK-METHOD-SETTINGS.jsonl`, one line an item, written when it is done: a run that
    was killed goes on where it stopped. pictures: how many of the worst and of the best items of the first method to draw,
    into `out/pictures`. tables: also save the report there. track: shows progress over the jobs that are left (an item and a
    method each); it is told how many were done before.

    Raises InputError when there is nothing to evaluate or two methods share a name, and what reading the data raises.
    """
    items = spread(benchmark.items(), limit)
    if not items:
        raise InputError(f"There is nothing to evaluate for {benchmark.name}; look at the folder and the settings.")
    if len({method.name for method in compared}) < len(compared):
        raise InputError("Two methods have the same name; compare models with different names.")
    out, options = Path(out), options_of(benchmark)
    files = {method.name: Records(_record_file(out, benchmark, method, options)) for method in compared}
    jobs = [(item, method) for item in items for method in compared if item.key not in files[method.name]]
    for item, method in track(jobs, len(items) * len(compared) - len(jobs)):
        files[method.name].add(item, method.run(item))
    records = {name: [file[item] for item in items] for name, file in files.items()}
    rows = {name: benchmark.rows(items, found) for name, found in records.items()}
    settings = {method.name: dict(method.settings) for method in compared}
    if pictures:
        _draw_extremes(benchmark, items, records[compared[0].name], out / "pictures", pictures)
    report = Report(benchmark.name, benchmark.columns, rows, {"protocol": options, "limit": limit, "methods": settings})
    if tables:
        report.save(out)
    return report


def _record_file(out: Path, benchmark: Benchmark, method: Method, options: dict[str, Any]) -> Path:
    name = "".join(c if c.isalnum() or c in "-.@" else "_" for c in method.name)[-60:].strip("._")
    print_ = fingerprint([options, dict(method.settings)])
    return out / "records" / f"{benchmark.name}-{name}-{print_}.jsonl"


class Records:
    """A file of records that is only ever added to; half a last line, left by a kill, is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    if not line.endswith(b"\n"):
                        break
                    self._found[entry["key"]] = entry["record"]
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                    break
                whole += len(line)
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, item: Item) -> Record:
        return self._found[item.key]

    def add(self, item: Item, record: Record) -> None:
        line = json.dumps({"key": item.key, "category": item.category, "record": record}) + "\n"
        with self.path.open("a") as file:
            file.write(line)
        self._found[item.key] = json.loads(line)["record"]


def _draw_extremes(
    benchmark: Benchmark, items: Sequence[Item], records: Sequence[Record], folder: Path, count: int
) -> None:
    order = sorted(range(len(items)), key=lambda i: benchmark.score(items[i], records[i]))
    chosen = {"worst": order[:count], "best": order[::-1][: min(count, len(order) - min(count, len(order)))]}
    for kind, indices in chosen.items():
        for place, i in enumerate(indices, 1):
            key = "".join(c if c.isalnum() or c in "-." else "_" for c in items[i].key)[:80]
            write(benchmark.draw(items[i], records[i]), folder / f"{benchmark.name}-{kind}-{place}-{key}.png")


class SiteStore:
    """Several sites of a denoiser from the same forward passes, for sweeps: `at(site)` is the Features of one of them."""

    def __init__(self, extractor: Dift, sites: Sequence[str], prompt: str | None = None):
        self.extractor, self.sites, self.prompt = extractor, list(sites), prompt
        self._kept: OrderedDict[tuple[int, str | None], dict[str, FeatureMap]] = OrderedDict()

    def __call__(self, picture: Picture, category: str) -> dict[str, FeatureMap]:
        prompt = None if self.prompt is None else self.prompt.replace("{category}", category)
        key = (picture.digest, prompt)
        if key not in self._kept:
            self._kept[key] = self.extractor.at(self.sites, picture, prompt)
            while (
                len(self._kept) > 1 and sum(_bytes(fm) for one in self._kept.values() for fm in one.values()) > _MEMORY
            ):
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def at(self, site: str) -> "OneSite":
        return OneSite(self, site)


@dataclass(frozen=True, eq=False)
class OneSite:
    """The Features of one site of a `SiteStore`."""

    store: SiteStore
    site: str

    @property
    def extractor(self) -> Extractor:
        return self.store.extractor

    def __call__(self, picture: Picture, category: str = "") -> FeatureMap:
        return self.store(picture, category)[self.site]
