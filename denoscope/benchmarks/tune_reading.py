"""Reading features for `tune`: many settings of one picture in one batch, every row of the network counted, nothing twice."""

import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoscope.benchmarks.protocol import Item
from denoscope.benchmarks.running import Records, fingerprint
from denoscope.denoisers.protocol import Denoiser
from denoscope.encoders.protocol import Encoder
from denoscope.errors import DenoscopeError, InputError
from denoscope.features import Dift, EncoderFeatures, FeatureMap, as_extractor
from denoscope.features.amalgamation import aggregate
from denoscope.features.dift import ensemble_maps
from denoscope.features.fusing import concatenate
from denoscope.features.recipe import Recipe, resolve_size
from denoscope.images import Frame, Picture

_MEMORY = 1 << 29  # bytes of features kept in memory
Maps = dict[str, FeatureMap]  # by site


@dataclass(frozen=True, eq=False)
class Arm:
    """What the same forward passes serve: a technique at a timestep, whatever the sites and the ensemble.

    rows: rows of the network for each member of an ensemble; exact, but for techniques that sample before they are read
    (`samples`), where it is the most that they can take.
    """

    technique: str
    t: int | None
    extractor: Dift | EncoderFeatures
    rows: int

    @property
    def name(self) -> str:
        return self.technique if self.t is None else f"{self.technique}, t {self.t}"

    @property
    def samples(self) -> bool:
        chosen = self.extractor.recipe
        return isinstance(chosen, Recipe) and not (chosen.denoise_from is None and chosen.img2img is None)

    @property
    def parts(self) -> list[Any]:
        """Sizes that the picture is read at, to be concatenated."""
        size = self.extractor.recipe.size
        return list(size.split("+")) if isinstance(size, str) else [size]

    @cached_property
    def fingerprint(self) -> str:
        """Of everything but sites and ensemble."""
        told = self.extractor.describe()
        return fingerprint({key: value for key, value in told.items() if key not in ("site", "ensemble")})

    @classmethod
    def of(cls, model: Denoiser | Encoder, technique: str, t: int | None, seed: int, **settings: Any) -> "Arm":
        options: dict[str, Any] = dict(settings)
        options |= {"seed": seed} if isinstance(model, Denoiser) else {}
        options |= {} if t is None else {"t": t, "ensemble": 1}
        made = as_extractor(model, **options)
        assert isinstance(made, Dift | EncoderFeatures)
        one = cls(technique, t, made, 1)
        return replace(one, rows=len(one.parts) * _rows(made.recipe))


def _rows(chosen: Any) -> int:
    if not isinstance(chosen, Recipe):
        return 1
    guided = 1 if chosen.guidance in (None, 0, 1) else 2
    rows = (2 if chosen.second_t not in (None, chosen.t) else 1) * guided
    sampled = 1 if chosen.guidance is None else 2
    if chosen.denoise_start is not None:
        rows += (chosen.denoise_start - chosen.t + 3) * sampled
    if chosen.img2img is not None:
        steps = max(50, int(2 / chosen.img2img))
        rows += (ceil(chosen.img2img * steps) + 2) * sampled
    return rows


class Reader:
    """Features of pictures under arms, kept on disk until an arm is dropped.

    sites: candidates, each with the sites that it is made of (several are aggregated as published). spent: rows of the network
    that everything counted so far takes, also what a run that was stopped had read. noise: see `feature_sets`.
    singly: of ensembles of this size every member is kept too.
    """

    def __init__(
        self,
        model: Denoiser | Encoder,
        sites: Mapping[str, Sequence[str]],
        folder: Path,
        noise: Any = None,
        seed: int = 0,
        singly: int = 0,
    ):
        self.model, self.sites, self.folder, self.noise, self.seed = model, sites, folder, noise, seed
        self.singly = singly
        self.single = list(dict.fromkeys(one for names in sites.values() for one in names))
        self.spent = 0
        self._ledger = Records(folder / "rows.jsonl")
        self._counted: set[str] = set()
        self._kept: OrderedDict[tuple[str | int, ...], Maps] = OrderedDict()

    def read(self, picture: Picture, wanted: Sequence[tuple[Arm, Sequence[int]]]) -> None:
        """Features of a picture under arms, each with the sizes of its ensembles: what is missing is read, in one batch."""
        missing = [(arm, [e for e in sizes if self._stored(arm, e, picture) is None]) for arm, sizes in wanted]
        missing = [(arm, sorted(lacking)) for arm, lacking in missing if lacking]
        together = [one for one in missing if not one[0].samples]
        for group in ([together] if together else []) + [[one] for one in missing if one[0].samples]:
            with counted_rows(self.model) as counter:
                found = self._run(picture, group)
            for arm, lacking in group:
                self._keep(arm, picture, found[arm.name])
                entry = self._entry(arm, lacking[-1], picture)
                if entry.key not in self._ledger:
                    self._ledger.add(entry, {"rows": counter.rows if arm.samples else arm.rows * lacking[-1]})

    def count(self, picture: Picture, arm: Arm, ensemble: int) -> None:
        """Add to `spent` what an ensemble of a picture takes, once, and whether or not this run had to read it."""
        entry = self._entry(arm, ensemble, picture)
        if entry.key not in self._counted:
            self._counted.add(entry.key)
            self.spent += self._ledger[entry]["rows"] if entry.key in self._ledger else arm.rows * ensemble

    def at(self, arm: Arm, ensemble: int, picture: Picture, site: str) -> FeatureMap:
        """Features at a candidate, read before or now."""
        return self._at(arm, ensemble, picture, site)

    def members(self, arm: Arm, ensemble: int, picture: Picture, site: str) -> list[FeatureMap]:
        """As `at`, of every member by itself; ensembles of 1 and of `singly` have them."""
        if ensemble == 1:
            return [self.at(arm, ensemble, picture, site)]
        return [self._at(arm, ensemble, picture, site, _member(k)) for k in range(ensemble)]

    def _at(self, arm: Arm, ensemble: int, picture: Picture, site: str, member: str = "") -> FeatureMap:
        maps = self._stored(arm, ensemble, picture)
        if maps is None:
            self.read(picture, [(arm, [ensemble])])
            maps = self._kept[arm.name, ensemble, picture.digest]
        names = [name + member for name in self.sites[site]]
        if len(names) == 1:
            return maps[names[0]]
        key = (arm.name, ensemble, picture.digest, site + member)
        if key not in self._kept:
            self._remember(key, {site: aggregate([maps[name] for name in names])})
        return self._kept[key][site]

    def drop(self, arm: Arm) -> None:
        """Forget an arm's features."""
        for key in [key for key in self._kept if key[0] == arm.name]:
            del self._kept[key]
        shutil.rmtree(self.folder / arm.fingerprint, ignore_errors=True)

    def _entry(self, arm: Arm, ensemble: int, picture: Picture) -> Item:
        return Item(fingerprint([arm.fingerprint, self.noise, ensemble, picture.digest]), arm.name, None)

    def _path(self, arm: Arm, ensemble: int, picture: Picture, site: str) -> Path:
        name = fingerprint([self.noise, ensemble, picture.digest, site])
        return self.folder / arm.fingerprint / f"{name}.safetensors"

    def _stored(self, arm: Arm, ensemble: int, picture: Picture) -> Maps | None:
        key = (arm.name, ensemble, picture.digest)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        members = [_member(k) for k in range(ensemble)] if ensemble == self.singly else []
        names = [site + member for member in ["", *members] for site in self.single]
        paths = {site: self._path(arm, ensemble, picture, site) for site in names}
        try:
            maps = {site: FeatureMap.load(path) for site, path in paths.items()}
        except DenoscopeError:  # missing or damaged
            return None
        self._remember(key, maps)
        return maps

    def _keep(self, arm: Arm, picture: Picture, found: Mapping[int, Maps]) -> None:
        for ensemble, maps in found.items():
            for site, fm in maps.items():
                fm.save(self._path(arm, ensemble, picture, site))
            self._remember((arm.name, ensemble, picture.digest), maps)

    def _remember(self, key: tuple[str | int, ...], maps: Maps) -> None:
        self._kept[key] = maps
        while len(self._kept) > 1 and self._bytes() > _MEMORY:
            self._kept.popitem(last=False)

    def _bytes(self) -> int:
        every = (fm.values for maps in self._kept.values() for fm in maps.values())
        return sum(values.numel() * values.element_size() for values in every)

    def _run(self, picture: Picture, group: Sequence[tuple[Arm, list[int]]]) -> dict[str, dict[int, Maps]]:
        """By the arm's name, the size of the ensemble and the site."""
        if not isinstance(self.model, Denoiser):
            return {arm.name: {1: arm.extractor.at(self.single, picture)} for arm, _ in group}
        wanted = {arm.name: ensembles for arm, ensembles in group}
        made: dict[str, tuple[str, int]] = {}  # names of recipes: the arm's, and which of its sizes
        recipes: dict[str, Recipe] = {}
        for arm, ensembles in group:
            chosen: Any = arm.extractor.recipe
            for k, size in enumerate(arm.parts):
                made[f"{arm.name}/{k}"] = arm.name, k
                recipes[f"{arm.name}/{k}"] = replace(chosen, size=size, ensemble=ensembles[-1])
        parts: dict[tuple[str, int], dict[int, Maps]] = {}
        members: dict[str, Maps] = {}
        for key, member, own, values in ensemble_maps(
            self.model, picture, recipes, sites=self.single, noise=self.noise, seed=self.seed
        ):
            (name, k), frame = made[key], self._frame(picture, recipes[key])
            if member < self.singly and self.singly in wanted[name]:
                kept = members.setdefault(key, {})
                kept |= {s + _member(member): self._map(picture, recipes[key], frame, s, v) for s, v in own.items()}
            if member + 1 in wanted[name]:
                maps = {s: self._map(picture, recipes[key], frame, s, v) for s, v in values.items()}
                maps |= members.pop(key, {}) if member + 1 == self.singly else {}
                parts.setdefault((name, member + 1), {})[k] = maps
        found: dict[str, dict[int, Maps]] = {}
        for (name, ensemble), maps in parts.items():
            every = [maps[k] for k in sorted(maps)]
            joined = {s: concatenate([one[s] for one in every]) if len(every) > 1 else every[0][s] for s in every[0]}
            found.setdefault(name, {})[ensemble] = joined
        return found

    def _frame(self, picture: Picture, chosen: Recipe) -> Frame:
        size = resolve_size(chosen.size, picture.size, self.model.multiple, self.model.minimum)
        return Frame.of(picture.size).resize(size)

    def _map(self, picture: Picture, chosen: Recipe, frame: Frame, site: str, values: Tensor) -> FeatureMap:
        if not values.isfinite().all():
            raise InputError("The features are not finite; load the model in bfloat16 or float32.")
        made = {"model": self.model.name, "t": chosen.t, "site": site, "prompt": chosen.prompt}
        made |= {"picture": str(picture.path) if picture.path else None}
        return FeatureMap(values, frame.resize((values.shape[2], values.shape[1])), made, picture)


def _member(k: int) -> str:
    """What is put behind a site's name for the features of a member."""
    return f"/{k}"


class _Counter:
    rows = 0


@contextmanager
def counted_rows(model: Denoiser | Encoder) -> Iterator[_Counter]:
    """Counts the rows of every batch that a model's network is given in the context (a ControlNet's own are not among them)."""
    counter = _Counter()

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counter.rows += next(v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    handle = model.network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()
