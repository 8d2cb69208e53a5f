"""`tune`: search timestep x site x technique x ensemble within a stated number of rows of the network.

The search is successive halving (Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943) over what forward passes differ in,
timestep and technique; all sites come from the same passes and are free. Every round scores what is left on more of the same
pairs or pictures (on all of them from the start where the budget allows) and keeps the better half. Ensembles come last, for
the two best. The choice among all that was scored on everything is the best mean; but what differs from it by no more than
chance (a bootstrap interval of the paired differences contains 0) and costs less is preferred, and against the model's own
preset the same has to be shown.
"""

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from denoscope.benchmarks.protocol import Item
from denoscope.benchmarks.running import Track
from denoscope.benchmarks.tune_grid import blocks, candidates, checked, crossed, plain_value, unlike_words
from denoscope.benchmarks.tune_reading import Arm, Reader
from denoscope.benchmarks.tune_scoring import Scores
from denoscope.benchmarks.tune_tasks import Task
from denoscope.benchmarks.tuned import FEWEST, PLAIN, Setting, Tuned, choose
from denoscope.denoisers.protocol import Denoiser
from denoscope.encoders.protocol import Encoder
from denoscope.errors import InputError, counted
from denoscope.features.bootstrap import interval
from denoscope.features.joint import takes_prompts
from denoscope.features.recipe import Size, within_reach
from denoscope.features.weights import versions

TIMES = (0, 51, 101, 261)  # tried unless others are given, beside the preset's
FINALISTS = 2  # arms that are left when ensembles are compared


def tune(
    model: Any,
    task: Task,
    *,
    budget: int,
    times: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    techniques: Mapping[str, Mapping[str, Any]] | None = None,
    ensembles: Sequence[int] = (1,),
    sizes: Sequence[Size] | None = None,
    preset: str | None = None,
    prompt: str | int | None = None,
    seed: int = 0,
    holdout: int | float = 0.0,
    exhaustive: bool = False,
    out: str | Path | None = None,
    track: Callable[[str], Track] = lambda label: lambda jobs, done: jobs,
) -> Tuned:
    """Search settings of `features` for a task.

    model: a diffusion model or an encoder.
    budget: rows of the network (forward passes of one member of one picture) that the search may take; it stops before more.
        `exhaustive` and what a repeated run finds on disk are not held to it. A ControlNet's own passes are not counted.
    times: timesteps, by default 0, 51, 101 and 261. sites: names, sets or several joined by "+"; by default every block.
    techniques: settings of `features` by name; none at all ("plain") is always among them, and settings under that name hold
        for the others too, and for the preset. ensembles: sizes.
    sizes: of the picture, each with every technique. preset, prompt: what all are compared with and start from; its timestep
        and site are always tried. An encoder has sites and sizes only.
    holdout: share of the items kept aside, on which the choice and the preset are scored once, at the end.
    exhaustive: score the whole grid too, on the same items, and report how the choice compares.
    out: folder for records and, while it runs, features: a run that was stopped goes on where it was. track: shows progress.

    The value of the choice on the items it was chosen on is optimistic, the more so the fewer items and the more settings.

    Raises InputError for an empty grid, unknown sites and settings, and budgets that are too small (saying what is needed).
    """
    with tempfile.TemporaryDirectory() as scratch:
        search = _Search(
            model, task, Path(out or scratch), times, sites, techniques, ensembles, sizes, preset, prompt, seed
        )
        return search.run(budget, holdout, exhaustive, track)


class _Search:
    def __init__(
        self,
        model: Any,
        task: Task,
        out: Path,
        times: Sequence[int] | None,
        sites: Sequence[str] | None,
        techniques: Mapping[str, Mapping[str, Any]] | None,
        ensembles: Sequence[int],
        sizes: Sequence[Size] | None,
        preset: str | None,
        prompt: str | int | None,
        seed: int,
    ):
        if not isinstance(model, Denoiser | Encoder):
            raise InputError(
                f"{getattr(model, 'name', model)} has no settings to search; give a diffusion model or an encoder."
            )
        self.model, self.task, self.out, self.seed, self.preset_name = model, task, out, seed, preset or "semantic"
        diffusion = isinstance(model, Denoiser)
        if not diffusion and (times or techniques or prompt is not None or set(ensembles) - {1}):
            raise InputError(f"{model.name} is an encoder, which has sites and sizes only; leave the rest out.")
        if not ensembles or any(isinstance(e, bool) or not isinstance(e, int) or e < 1 for e in ensembles):
            raise InputError("Ensemble sizes are whole numbers from 1; give at least one.")
        if (times is not None and not times) or (sites is not None and not sites):
            raise InputError("The grid is empty; give at least one timestep and one site.")
        named = checked(techniques or {}, task.weak)
        self.base = {
            "preset": self.preset_name,
            **({} if prompt is None else {"prompt": prompt}),
            **named.pop(PLAIN, {}),
        }
        anywhere = {name: value for name, value in self.base.items() if name != "denoise_from"}
        own: Any = Arm.of(model, PLAIN, None, seed, **anywhere).extractor.recipe
        self.techniques = crossed({PLAIN: {}, **named}, sizes)
        self.times: list[int | None] = [None]
        self.left_out: list[str] = []
        reach: dict[str, Any] = dict.fromkeys(self.techniques, self.times)
        if isinstance(model, Denoiser):
            tried = [t for t in TIMES if t < len(model.schedule)] if times is None else times
            tried = list(dict.fromkeys([*tried, own.t]))
            within_reach(model, {PLAIN: self.base}, [own.t])  # the preset is what all are compared with
            given = {PLAIN: self.base, **{name: {**self.base, **told} for name, told in named.items()}}
            self.left_out = within_reach(model, given, tried)[1]
            given = {name: {**self.base, **told} for name, told in self.techniques.items()}
            reach = dict(within_reach(model, given, tried)[0])
            self.times = reach[PLAIN]
        self.ensembles = sorted(set(ensembles))
        self.sites = candidates(model, [*(sites or blocks(model)), own.site])
        self.preset_site = own.site
        self.preset_ensemble: int = own.ensemble if diffusion else 1
        self.arms = [self._arm(name, t) for t in self.times for name in self.techniques if t in reach[name]]
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise InputError("Two techniques have the same name.")
        self.preset_arm = next(
            arm for arm in self.arms if (arm.technique, arm.t) == (PLAIN, own.t if diffusion else None)
        )
        companions = task.companions(len(self.techniques)) if diffusion else {}
        self.companions = {name: self._companion(name, told) for name, told in companions.items()}
        apart = self._apart() if diffusion else {}
        noise = "shared" if self.companions else None  # a score compares features made with the same draws
        singly = self.ensembles[0] if self.companions and self.ensembles[0] > 1 else 0  # and is that of every draw
        self.reader = Reader(model, self.sites, out / "features", noise, seed, singly)
        plain = {arm.t: arm for arm in self.arms if arm.technique == PLAIN}
        self.scores = Scores(task, self.reader, self.companions, self.ensembles[0], plain, out / "records", apart)

    def _arm(self, technique: str, t: int | None) -> Arm:
        try:
            return Arm.of(self.model, technique, t, self.seed, **{**self.base, **self.techniques[technique]})
        except InputError as error:
            at = "" if t is None else f" at t = {t}"
            raise InputError(f"The technique {technique!r}{at}: {error}") from None

    def _apart(self) -> dict[str, set[str]]:
        """Sites that techniques are not scored at, see `unlike_words`; those that none is scored at are not read."""
        told: dict[str, Any] = {arm.technique: arm.extractor.recipe for arm in self.arms}
        prompts = {name: chosen.prompt for name, chosen in told.items()}
        shift: list[Any] = [arm.extractor.recipe for arm in self.companions.values()]
        apart, notes = unlike_words(self.sites, prompts, [chosen.prompt for chosen in shift])
        self.left_out += notes
        for name, sites in apart.items():
            if sites >= self.sites.keys() or (name == PLAIN and self.preset_site in sites):
                raise InputError(f"{notes[0]} Nothing is left to read {name!r} at; choose other sites.")
        nowhere = set.intersection(*(apart.get(name, set()) for name in prompts))
        self.sites = {site: names for site, names in self.sites.items() if site not in nowhere}
        return apart

    def _companion(self, name: str, told: Mapping[str, Any]) -> Arm:
        assert isinstance(self.model, Denoiser)
        settings = {**self.base, **told}
        if "prompt" in told and not takes_prompts(self.preset_arm.extractor):
            settings.pop("prompt")  # class numbers have no empty one
        t = min(settings.pop("t"), len(self.model.schedule) - 1)
        return Arm.of(self.model, f"companion {name}", t, self.seed, **settings)

    # what it costs ------------------------------------------------------------------------------------------------------

    def _pictures(self, chosen: Sequence[int]) -> int:
        return len({name for item in self.task.items(chosen) for name in self.task.names(item)})

    def _rounds(self, items: int, growth: float) -> list[tuple[int, int]]:
        """(arms, items) of every round: half of the arms go from one to the next, and `growth` times the items come."""
        arms = [len(self.arms)]
        while arms[-1] > FINALISTS:
            arms.append(max(FINALISTS, -(-arms[-1] // 2)))
        last = len(arms) - 1
        return [(count, max(min(2, items), ceil(items / growth ** (last - i)))) for i, count in enumerate(arms)]

    def _most(self, order: Sequence[int], held: Sequence[int], items: int, growth: float = 2) -> int:
        """Rows that a search over the first `items` units takes at most."""
        costs = sorted((arm.rows for arm in self.arms), reverse=True)
        plain, first, last = self.preset_arm.rows, self.ensembles[0], self.ensembles[-1]
        total, before = 0, 0
        for count, some in self._rounds(items, growth):
            pictures = self._pictures(order[:some])
            forced = 1 + (min(count, len(self.times)) if self.companions else 0)
            total += min(sum(costs), sum(costs[:count]) + forced * plain) * first * (pictures - before)
            before = pictures
        total += sum(arm.rows for arm in self.companions.values()) * first * len(self.task.items(order[:items]))
        total += sum(costs[:FINALISTS]) * last * before if last > first else 0
        preset = plain * self.preset_ensemble if self.preset_ensemble != first else 0
        return total + preset * before + (costs[0] * last + plain * self.preset_ensemble) * self._pictures(held)

    def _affordable(self, order: Sequence[int], held: Sequence[int], budget: int) -> tuple[int, float]:
        """The most units whose search stays within the budget, and the slowest growth that it then allows."""
        low, high = min(2, len(order)), len(order)
        if (needed := self._most(order, held, low)) > budget:
            raise InputError(
                f"The budget of {budget} rows does not reach for one search over {len(self.arms)} combinations of timestep and "
                f"technique, which takes {needed} on {counted(low, 'item')}{' and those kept aside' if held else ''}; "
                "give at least that, or fewer timesteps, techniques or members."
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._most(order, held, middle) <= budget else (low, middle - 1)
        return low, next(growth for growth in (1.0, 1.25, 1.5, 2.0) if self._most(order, held, low, growth) <= budget)

    # the search ---------------------------------------------------------------------------------------------------------

    def run(self, budget: int, holdout: int | float, exhaustive: bool, track: Callable[[str], Track]) -> Tuned:
        if not 0 <= holdout < 1:
            raise InputError(f"The share kept aside lies between 0 and 1, not at {holdout}.")
        if holdout and self.task.weak:
            raise InputError("Only labelled items are worth keeping aside; leave out the holdout, or give labels.")
        order = list(range(self.task.units))
        random.Random(f"tune/{self.seed}").shuffle(order)
        kept = round(holdout * len(order)) if holdout else 0
        if holdout and (kept < 2 or len(order) - kept < 2):
            raise InputError(
                f"A holdout of {holdout:g} keeps {kept} of {counted(len(order), 'item')} aside; at least 2 are needed on "
                f"either side{', as with 0.5' if len(order) > 3 else ' (4 items in all)'}, or a holdout of 0."
            )
        order, held = order[: len(order) - kept], order[len(order) - kept :]
        units, growth = self._affordable(order, held, budget)
        items = self.task.items(order[:units])
        finalists = self._halve(order, units, growth, track)
        self.scores.add([(arm, self.ensembles) for arm in finalists], items, track("ensembles"))
        preset = [(self.preset_arm, [self.preset_ensemble])]
        ensembles = self.ensembles if self.preset_arm in finalists else self.ensembles[:1]
        if self.preset_ensemble not in ensembles:
            self.scores.add(preset, items, track("the preset"), [self.preset_site])
        values = self._table(items)
        own = self._setting(self.preset_arm, self.preset_ensemble, self.preset_site)
        choice = choose(values, self.seed)
        scored = items
        if held and choice != own:
            scored = self.task.items(held)
            arm = self._arm_of(choice)
            self.scores.add([(arm, [choice.ensemble])], scored, track("kept aside"), [choice.site])
            self.scores.add(preset, scored, track("kept aside, the preset"), [self.preset_site])
        spent = self.reader.spent
        gain, verdict = self._judged(choice, own, scored)
        told = None
        if scored is not items:
            means = {s.name: float(self._scores(s, scored).mean()) for s in (choice, own)}
            told = {"items": len(scored), "shared": self._shared(order[:units], held), "values": means}
        choice = own if verdict == "keep" else choice
        compared = self._exhaust(items, choice, spent, scored is not items, track) if exhaustive else None
        for arm in (*self.arms, *self.companions.values()):
            self.reader.drop(arm)
        return Tuned(
            model=self.model.name,
            task=self.task.describe(),
            metric=self.task.metric + (" and content shift" if self.companions else ""),
            weak=self.task.weak,
            choice=choice,
            settings=self._settings(choice),
            preset=own,
            value=float(values[choice].mean()),
            preset_value=float(values[own].mean()),
            gain=gain,
            verdict=verdict,
            items=len(items),
            rows=spent,
            budget=budget,
            cells=self._cells(order, units, growth),
            notes=self._notes(items, told),
            recipe=self._made(self._arm_of(choice)),
            holdout=told,
            exhaustive=compared,
        )

    def _halve(self, order: Sequence[int], units: int, growth: float, track: Callable[[str], Track]) -> list[Arm]:
        alive, first = list(self.arms), self.ensembles[0]
        rounds = self._rounds(units, growth)
        for number, (count, some) in enumerate(rounds, 1):
            items, alive = self.task.items(order[:some]), alive[:count]
            with_controls = self._with_controls(alive)
            for arm in self.arms:
                if arm not in with_controls:
                    self.reader.drop(arm)
            label = f"{counted(len(with_controls), 'combination')} on {counted(len(items), 'item')}"
            label = f"round {number} of {len(rounds)}, {label}"
            self.scores.add([(arm, [first]) for arm in with_controls], items, track(label))
            reached = {arm.name: self._best(arm, first, items) for arm in alive}
            alive.sort(key=lambda arm: -reached[arm.name])
        return alive[:FINALISTS]

    def _with_controls(self, alive: Sequence[Arm]) -> list[Arm]:
        """With the preset's and, where content shift is scored, the plain features of the same timesteps."""
        times = {arm.t for arm in alive} if self.companions else set()
        return [
            arm
            for arm in self.arms
            if arm in alive or arm is self.preset_arm or (arm.technique == PLAIN and arm.t in times)
        ]

    def _best(self, arm: Arm, ensemble: int, items: Sequence[Item]) -> float:
        every = [self.scores.values(arm, ensemble, site, items) for site in self.sites]
        return max(float(values.mean()) for values in every if values is not None)

    def _table(self, items: Sequence[Item]) -> dict[Setting, np.ndarray]:
        """Everything that is scored on all of the items."""
        found = {}
        for arm in self.arms:
            sizes = {*self.ensembles, self.preset_ensemble} if arm is self.preset_arm else self.ensembles
            for ensemble in sizes:
                for site in self.sites:
                    values = self.scores.values(arm, ensemble, site, items)
                    if values is not None:
                        found[self._setting(arm, ensemble, site)] = values
        return found

    def _setting(self, arm: Arm, ensemble: int, site: str) -> Setting:
        return Setting(arm.technique, arm.t, site, ensemble, arm.rows * ensemble)

    def _arm_of(self, setting: Setting) -> Arm:
        return next(arm for arm in self.arms if (arm.technique, arm.t) == (setting.technique, setting.t))

    def _scores(self, setting: Setting, items: Sequence[Item]) -> np.ndarray:
        values = self.scores.values(self._arm_of(setting), setting.ensemble, setting.site, items)
        assert values is not None
        return values

    def _judged(
        self, choice: Setting, own: Setting, items: Sequence[Item]
    ) -> tuple[tuple[float, float | None, float | None], str]:
        """The gain over the preset with its interval, and the verdict."""
        if choice == own:
            return (0.0, None, None), "keep"
        change = self._scores(choice, items) - self._scores(own, items)
        low, high = interval(change, seed=self.seed) or (None, None)
        better = low is not None and low > 0 and len(change) >= FEWEST
        worse = high is not None and high < 0
        cheaper = choice.rows < own.rows and not worse
        return (float(change.mean()), low, high), "better" if better else "cheaper" if cheaper else "keep"

    def _shared(self, used: Sequence[int], held: Sequence[int]) -> int:
        """How many of the items kept aside show a picture that was searched with."""
        seen = self._seen(self.task.items(used))
        return sum(not seen.isdisjoint(self._seen([item])) for item in self.task.items(held))

    def _seen(self, items: Sequence[Item]) -> set[int]:
        """What the pictures show. Names do not tell: those of drawn pairs are other ones for every pair."""
        return {picture.digest for item in items for picture in self.task.pictures(item)}

    def _exhaust(
        self, items: Sequence[Item], choice: Setting, spent: int, kept_aside: bool, track: Callable[[str], Track]
    ) -> dict[str, Any]:
        """The whole grid on the same items: how far the choice is from its best, and what that would have taken.

        "besides": what the search read that is not of the grid.
        """
        for number, arm in enumerate(self.arms, 1):
            self.scores.add(
                [(arm, self.ensembles)], items, track(f"exhaustive, {number} of {len(self.arms)}: {arm.name}")
            )
            if arm is not self.preset_arm:
                self.reader.drop(arm)
        values = self._table(items)
        means = {setting: float(scored.mean()) for setting, scored in values.items()}
        best = max(means, key=lambda setting: means[setting])
        rows = sum(arm.rows * self.ensembles[-1] for arm in self.arms) * len(self._seen(items))
        behind = interval(values[best] - values[choice], seed=self.seed)
        beyond = {
            f"the preset with its ensemble of {self.preset_ensemble}": self.preset_ensemble not in self.ensembles,
            "the last two at every ensemble size": len(self.ensembles) > 1,
            "what content shift is compared with": bool(self.companions),
            "items kept aside": kept_aside,
        }
        return {
            "best": asdict(best),
            "best_value": means[best],
            "value": means[choice],
            "regret": means[best] - means[choice],
            "regret_interval": None if behind is None else list(behind),
            "rank": 1 + sum(mean > means[choice] for mean in means.values()),
            "settings": len(means),
            "rows": rows,
            "cost_ratio": spent / rows,
            "besides": [what for what, took in beyond.items() if took],
        }

    # what is told -------------------------------------------------------------------------------------------------------

    def _settings(self, choice: Setting) -> dict[str, Any]:
        """Arguments of `features`, as plain values."""
        told = {**self.base, **self.techniques[choice.technique], "site": choice.site}
        told |= {} if choice.t is None else {"t": choice.t, "ensemble": choice.ensemble}
        told |= {"seed": self.seed} if self.seed and choice.t is not None else {}
        return json.loads(json.dumps(told, default=plain_value))

    def _cells(self, order: Sequence[int], units: int, growth: float) -> list[dict[str, Any]]:
        """Everything that was scored, on the most items that it was scored on."""
        found: dict[Setting, dict[str, Any]] = {}
        for some in sorted({some for _, some in self._rounds(units, growth)}, reverse=True):
            for setting, values in self._table(self.task.items(order[:some])).items():
                cell = {**asdict(setting), "value": float(values.mean()), "items": len(values)}
                found.setdefault(setting, cell)
        return list(found.values())

    def _notes(self, items: Sequence[Item], told: Mapping[str, Any] | None) -> list[str]:
        notes = [*self.left_out]
        judged = len(items) if told is None else told["items"]
        if judged < FEWEST:
            notes.append(
                f"{counted(judged, 'item')} cannot show that anything is better; that takes at least {FEWEST}."
            )
        elif judged < 10:
            notes.append(f"{judged} items are few: intervals from fewer than about 10 are too narrow.")
        if self.companions:
            notes.append(
                "Between techniques content shift decides, for which all that a prompt or a ControlNet changes is shift: "
                "annotate a few pairs before you trust that."
            )
        if told is None:
            notes.append("The value of the choice is optimistic: it was chosen on the items that it was scored on.")
        elif told["shared"]:
            notes.append(
                f"{told['shared']} of the {told['items']} items kept aside show pictures that were searched with."
            )
        return notes

    def _made(self, arm: Arm) -> dict[str, Any]:
        """How this can be made again."""
        own = {key: value for key, value in arm.extractor.describe().items() if key not in ("site", "ensemble")}
        return {
            **own,
            "seed": self.seed,
            "search": {
                "times": self.times,
                "sites": list(self.sites),
                "techniques": json.loads(json.dumps(self.techniques, default=plain_value)),
                "ensembles": self.ensembles,
                "draws": "shared between timesteps" if self.reader.noise else "of each timestep",
                **({"content shift": "the score of each draw, then the mean over draws"} if self.companions else {}),
            },
            "versions": dict(versions()),
        }
