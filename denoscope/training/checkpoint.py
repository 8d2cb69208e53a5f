"""Going on where a training was stopped, by Ctrl-C, `kill -9` or a power cut."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from denoscope.benchmarks.running import fingerprint
from denoscope.errors import InputError
from denoscope.images import atomically

_SHARE = 0.05  # of the time, at most, goes into writing checkpoints


@dataclass(eq=False)
class Checkpoint:
    """Everything that a training needs to go on, in one file beside its result, written beside and renamed.

    Trainers whose n-th step draws its random numbers from (seed, n) and nothing else keep no state of a generator: weights,
    optimiser and the number of steps are enough to end in the same weights, bit for bit, as without the stop.

    result: what the training makes. resumed: called with the steps that were done before when a run goes on. seconds: of work
    between two checkpoints, more where writing takes long; 0 for one after every step.
    """

    result: Path
    resumed: Callable[[int], None] = lambda step: None
    seconds: float = 30.0
    _print: str = field(default="", init=False)
    _due: float = field(default=0.0, init=False)

    @property
    def path(self) -> Path:
        return self.result.with_name(f"{self.result.stem}.checkpoint.pt")

    def resume(self, settings: Any, steps: int, device: torch.device) -> dict[str, Any] | None:
        """What an earlier run kept, or None when there is nothing; a damaged file is warned about and not used.

        settings: JSON values that decide the training. steps: that are asked for.

        Raises InputError when it is of a training with other settings, has done more steps, or is damaged beside a result.
        """
        self._print, self._due = fingerprint(settings), time.monotonic() + self.seconds
        if not self.path.is_file():
            return None
        try:
            held = torch.load(self.path, map_location=device, weights_only=True)
            same, done = held["print"] == self._print, held["step"]
        except Exception:  # whichever way it is damaged
            if self.result.exists():  # it may be finished
                raise InputError(f"{self.path} is damaged and {self.result} is there; delete one of them.") from None
            warnings.warn(f"{self.path} is damaged; the training begins anew.", stacklevel=2)
            return None
        if not same:
            raise InputError(f"{self.path} is of a training with other settings; choose another file or delete it.")
        if done > steps:
            raise InputError(f"{self.path} has done {done} steps; ask for as many or more, or delete it.")
        self.resumed(done)
        return held

    def keep(self, step: int, state: Callable[[], Mapping[str, Any]], now: bool = False) -> None:
        """Write what `state` returns if it is time to, or `now`. It is asked for after a whole step, never within one."""
        started = time.monotonic()
        if now or started >= self._due:
            held = {**state(), "print": self._print, "step": step}
            atomically(self.path, lambda path: torch.save(held, path))
            ended = time.monotonic()
            self._due = ended + (self.seconds and max(self.seconds, (ended - started) / _SHARE))

    def remove(self) -> None:
        """When the result is written."""
        self.path.unlink(missing_ok=True)
