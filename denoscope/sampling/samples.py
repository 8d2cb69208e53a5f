"""`sample`: pictures from a Denoiser, with the record of how they were made."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError
from denoscope.images import Picture, atomically, write
from denoscope.images.draw import contact_sheet
from denoscope.sampling.guidance import ClassifierFree, ClassifierGuidance, describe
from denoscope.sampling.sampler import Prompts, trajectory


@dataclass(frozen=True, eq=False)
class Samples:
    """Pictures and how they were made.

    pictures: one a sample, in the order of prompts. latents: [batch, channels, *size], the end of the trajectory.
    labels: class numbers, -1 where there is none. record: model, solver, settings, seeds, guided positions, network calls a
    sample, seconds, versions.
    """

    pictures: list[Picture]
    latents: torch.Tensor
    labels: list[int]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pictures)

    def draw(self, columns: int | None = None) -> Image.Image:
        """A contact sheet with the prompts below."""
        captions = [str(prompt) for prompt in self.record["prompts"]]
        columns = columns or min(len(self), 8)
        return contact_sheet([picture.image() for picture in self.pictures], captions, columns)

    def uint8(self) -> np.ndarray:
        """[batch, height, width, 3], cut off at whole numbers as guided-diffusion stores its samples."""
        pixels = torch.stack([picture.pixels for picture in self.pictures])
        return (pixels * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def save(self, path: str | Path) -> None:
        """By suffix: .png (contact sheet), .json (record), .npz (`arr_0` pictures, `arr_1` labels, as evaluators read)."""
        path = Path(path)
        match path.suffix.lower():
            case ".png":
                write(self.draw(), path)
            case ".json":
                atomically(path, lambda part: part.write_text(json.dumps(self.record, indent=2) + "\n"))
            case ".npz":
                pictures, labels = self.uint8(), np.array(self.labels)
                atomically(path, lambda part: np.savez(part, arr_0=pictures, arr_1=labels))
            case other:
                raise InputError(f"Samples are saved as .png, .json or .npz, not {other or 'without a suffix'}.")


def sample(
    denoiser: Denoiser,
    prompts: Prompts = None,
    *,
    seed: int | list[int] = 0,
    batch: int | None = None,
    at_once: int = 16,
    guidance: ClassifierFree | None = None,
    classifier: ClassifierGuidance | None = None,
    labels: list[int] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Samples:
    """Sample pictures; see `trajectory` for everything that can be asked for.

    at_once: samples in one forward pass (memory), which changes nothing else. report(done, total): called after every
    step, in sample steps.
    """
    given = next((list(v) for v in (prompts, labels, None if isinstance(seed, int) else seed) if v is not None), None)
    n = len(given) if given is not None else batch or 1
    seeds = [seed + i for i in range(n)] if isinstance(seed, int) else seed
    if n < 1 or at_once < 1:
        raise InputError(
            "There is nothing to sample; give at least one prompt, label or seed, and at_once of 1 or more."
        )
    began, rows, total = time.perf_counter(), [], 0
    guided: list[int] = []
    calls = {"denoiser": 0, "classifier": 0}
    for low in range(0, n, at_once):
        part = slice(low, low + at_once)
        shared = {k: _part(v, part, n) for k, v in options.items() if k != "control"}
        control = options.get("control", ())
        shared["control"] = [shown if shown.image.shape[0] == 1 else shown.rows(part) for shown in control]
        own = {"prompts": prompts, "labels": labels, "seed": seeds}
        own = {name: None if value is None else value[part] for name, value in own.items()}
        run = trajectory(denoiser, guidance=guidance, classifier=classifier, **own, **shared)
        step = None
        with warnings.catch_warnings():
            if low:  # said once is enough
                warnings.simplefilter("ignore")
            for step in run:
                total = step.steps
                if not low:
                    guided += [step.index] if step.guided else []
                    calls["denoiser"] += step.denoiser_calls
                    calls["classifier"] += step.classifier_calls
                many = len(step.latents)
                report(low * total + (step.index + 1) * many, n * total)
        assert step is not None
        rows.append(step.after)
    latents = torch.cat(rows).cpu()
    with torch.no_grad():
        pixels = torch.cat([denoiser.decode(row).float().cpu() for row in rows])
    name = str(options.get("solver", "auto"))
    record = {
        "model": denoiser.name,
        "solver": name if name.isidentifier() or "<" not in name else type(options["solver"]).__name__,
        "steps": total,
        "prompts": list(prompts) if prompts is not None else labels or [""] * n,
        "labels": labels,
        "seeds": seeds,
        "guidance": describe(guidance),
        "classifier": describe(classifier),
        "guided_steps": guided,
        "network_calls": calls,
        "seconds": round(time.perf_counter() - began, 3),
        "device": str(denoiser.device),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    numbers = labels or (prompts if prompts is not None and not isinstance(prompts[0], str) else [-1] * n)
    pictures = [Picture(((row + 1) / 2).clamp(0, 1)) for row in pixels]
    return Samples(pictures, latents, [int(label) for label in numbers], record)


def _part(value: Any, part: slice, n: int) -> Any:
    """The rows of an option that has one for every sample."""
    if isinstance(value, torch.Tensor) and value.ndim == 5 and value.shape[1] == n:  # explicit noise: steps come first
        return value[:, part]
    own = isinstance(value, torch.Tensor) and value.ndim == 4 and len(value) == n
    return value[part] if own or (isinstance(value, list) and len(value) == n and n > 1) else value
