"""Parity with the published Compress Guidance code: schedules, classifier guidance, two-network CFG, DiT composition."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn
from torch.nn import functional as F

from denoscope.denoisers import Condition, NoiseSchedule
from denoscope.denoisers.classifiers import Classifier
from denoscope.sampling import ClassifierFree, ClassifierGuidance, GuidanceSchedule, Respaced, trajectory

FOLDER = GOLDEN / "compress-guidance"
SCHEDULES = np.load(FOLDER / "schedules.npz")
LINEAR = NoiseSchedule.from_config({"beta_schedule": "linear"})


class Tiny:
    """The recordings' network: conv, tanh with time and label terms, conv. What sampling does not need is left out."""

    name, family, presets, multiple, minimum = "tiny", "pixel", {}, 1, 1
    schedule, device, dtype = LINEAR, torch.device("cpu"), torch.float32
    posterior = encode = predict = sites = staticmethod(NotImplemented.__class__)

    def __init__(self, weights: dict[str, Tensor], classes: int):
        self.w, self.classes, self.calls, self.network = weights, classes, 0, nn.Identity()

    def condition(self, prompts: Any, batch: int = 1) -> Condition:
        labels = [self.classes] * batch if prompts is None else list(prompts)
        return Condition(extra={"labels": torch.tensor(labels)})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        return (self.w["W1"].shape[1], 8, 8)

    def output(self, noisy: Tensor, t: Any, condition: Condition) -> Tensor:
        self.calls += len(noisy)
        w, labels = self.w, condition.expand(len(noisy)).extra["labels"]
        h = F.conv2d(noisy, w["W1"], w["b1"], padding=1) + (float(t) / 1000) * w["a"][None, :, None, None]
        return F.conv2d((h + w["E"][labels][:, :, None, None]).tanh(), w["W2"], w["b2"], padding=1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class TinyClassifier(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.w, self.calls = weights, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        w = self.w
        h = F.conv2d(x, w["V1"], w["c1"], padding=1) + (t[:, None, None, None] / 1000) * w["d"][None, :, None, None]
        return h.tanh().mean((2, 3)) @ w["U"].T + w["u"]


def tensors(file: str, prefix: str) -> dict[str, Tensor]:
    data = np.load(FOLDER / file)
    return {k[len(prefix) :]: torch.from_numpy(data[k]) for k in data if k.startswith(prefix)}


def through(steps: Any) -> Tensor:
    """The whole trajectory, initial noise first."""
    found = list(steps)
    return torch.stack([found[0].latents, *(step.after for step in found)])


def test_schedules_are_exact() -> None:
    checked = 0
    for key in SCHEDULES:
        match = re.fullmatch(r"(\w+)/n(\d+)_skip(\d+)(?:_k([\d.]+))?", key)
        if match is None:
            continue
        kind, n, rate, k = match[1], int(match[2]), int(match[3]), float(match[4] or 1)
        recorded = SCHEDULES[key][::-1].astype(int)  # the code counts from the cleanest step
        power, uniform = GuidanceSchedule.power(n, rate, k), GuidanceSchedule.uniform(n, rate)
        if kind == "autos_weight":  # what acts is mask * weight
            assert list(recorded * np.array(power.mask)) == list(power.weights("gap")), key
        else:
            ours = {"general": power.counts, "autos_mask": power.mask}.get(kind, uniform.counts)
            assert list(recorded) == list(map(int, ours)), key
        checked += 1
    assert checked > 60


@pytest.mark.parametrize("n", [250, 50, 20])
def test_official_lookup_is_the_published_index(n: int) -> None:
    timesteps = SCHEDULES[f"timestep_map/n{n}"][::-1].tolist()
    counts = tuple(range(1, n + 1))  # tell every slot apart
    for code, key in (("dit", "index_dit_glide"), ("classifier", "index_classifier")):
        looked = GuidanceSchedule(counts).official_lookup(timesteps, code)
        slots = SCHEDULES[f"{key}/n{n}"][::-1]
        assert looked.counts == tuple(counts[::-1][slot] for slot in slots)


def test_respaced_timesteps_are_those_of_guided_diffusion() -> None:
    for n in (250, 50, 20):
        evaluations = Respaced(LINEAR).begin(n, torch.device("cpu"))
        assert [int(e.timestep) for e in evaluations] == SCHEDULES[f"timestep_map/n{n}"][::-1].tolist()


def classifier_run(
    variance: str, run: str, seen: list[Any] | None = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor], Any, Any]:
    g = tensors("classifier_guided.npz", f"{variance}/")
    denoiser = Tiny({k[4:]: v for k, v in g.items() if k.startswith("eps.")}, 5)
    module = TinyClassifier({k[4:]: v for k, v in g.items() if k.startswith("cls.")})
    guidance = None
    schedule, rule = {
        "full": (GuidanceSchedule.all(20), "mask"),
        "uniform4": (GuidanceSchedule.uniform(20, 4), "mask"),
        "general_s4_k2": (GuidanceSchedule.power(20, 4, 2), "multiplicity"),
        "general_s4_k5": (GuidanceSchedule.power(20, 4, 5), "multiplicity"),
        "autos_s4_k2": (GuidanceSchedule.power(20, 4, 2), "gap"),
        "reuse": (GuidanceSchedule.power(20, 4, 2), "reuse"),
        "unguided": (GuidanceSchedule.none(20), "mask"),
    }[run.removeprefix("ddim_")]
    guidance = ClassifierGuidance(Classifier(module, noise_aware=True, classes=5), 1.5, schedule, rule, **options)
    solver = Respaced(LINEAR, method="ddim" if run.startswith("ddim_") else "ddpm", variance=variance)  # type: ignore[arg-type]
    tape = torch.cat([g["xT"][None], g["noise"]])
    steps = []
    for step in trajectory(
        denoiser, g["y"].tolist(), steps=20, classifier=guidance, labels=g["y"].tolist(), solver=solver, noise=tape
    ):
        steps.append(step)
    if seen is not None:
        seen += steps
    return through(steps), g, denoiser, module


RUNS = ["unguided", "full", "uniform4", "general_s4_k2", "general_s4_k5", "autos_s4_k2", "ddim_full"]


@pytest.mark.parametrize("variance", ["small", "learned"])
@pytest.mark.parametrize("run", [*RUNS, "ddim_general_s4_k2", "ddim_autos_s4_k2"])
def test_classifier_guidance(variance: str, run: str) -> None:
    steps: list[Any] = []
    x, g, denoiser, module = classifier_run(variance, run, steps)
    assert (x - g[f"{run}/x"]).abs().max() < 1e-4
    assert denoiser.calls == 20 * 2
    assert module.calls == sum(step.guided for step in steps)
    if f"{run}/grad" in g:
        for step, grad in zip(steps, g[f"{run}/grad"], strict=True):
            ours = torch.zeros_like(grad) if step.gradient is None else step.gradient
            assert (ours - grad).abs().max() < 1e-4
    if f"{run}/pred_xstart" in g:
        for step, x0 in zip(steps, g[f"{run}/pred_xstart"], strict=True):
            assert (step.x0.clamp(-1, 1) - x0).abs().max() < 1e-4


@pytest.mark.parametrize("variance", ["small", "learned"])
def test_reuse_is_the_papers_first_equation(variance: str) -> None:
    x, _, _, module = classifier_run(variance, "reuse")
    reference = torch.from_numpy(np.load(FOLDER / "reuse_reference_f64.npz")[f"{variance}/x"])
    assert (x - reference).abs().max() < 1e-4
    assert module.calls == len(GuidanceSchedule.power(20, 4, 2).positions)


@pytest.mark.parametrize("variance", ["small", "learned"])
@pytest.mark.parametrize("run", ["full_w1.5", "s4_k2_w1.5", "s4_k5_w4", "uniform"])
def test_two_network_cfg(variance: str, run: str) -> None:
    g = tensors("cfg_guided.npz", f"{variance}/")
    cond, uncond = (Tiny({k[len(p) :]: v for k, v in g.items() if k.startswith(p)}, 5) for p in ("cond.", "uncond."))
    n = 20
    schedule = {"full": GuidanceSchedule.all(n), "unif": GuidanceSchedule.uniform(n, 4)}.get(run[:4])
    if schedule is None:
        schedule = GuidanceSchedule.power(n, 4, float(run[4]))
    w = 1.5 if run == "uniform" else float(run.split("_w")[1])
    guidance = ClassifierFree(1 + w, schedule, space="x0", network=uncond)
    tape = torch.cat([g["xT"][None], g["noise"]])
    solver = Respaced(LINEAR, variance=variance)  # type: ignore[arg-type]
    x = through(trajectory(cond, g["y"].tolist(), steps=n, guidance=guidance, solver=solver, noise=tape))
    assert (x - g[f"{run}/x"]).abs().max() < 1e-4
    assert (cond.calls, uncond.calls) == (2 * n, 2 * len(schedule.positions))


def test_dit_composition() -> None:
    g = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "dit_compact.npz").items()}
    denoiser = Tiny({k[4:]: v for k, v in g.items() if k.startswith("dit.")}, 5)
    timesteps = g["timestep_map"].flip(0).tolist()
    wanted = GuidanceSchedule(tuple(g["guidance_steps"].flip(0).tolist()))
    assert wanted.counts == GuidanceSchedule.uniform(20, 4).counts
    schedule = wanted.official_lookup(timesteps, "dit")
    guidance = ClassifierFree(float(g["cfg_scale"]), schedule, channels=3)
    tape = torch.cat([g["xT"][None], g["noise"]])
    solver = Respaced(LINEAR, clip=False)
    steps = list(
        trajectory(denoiser, g["y"].tolist(), steps=20, guidance=guidance, solver=solver, noise=tape, clip=False)
    )
    x, recorded = through(steps), g["x"]
    assert (x - recorded).abs().max() < 2e-3
    assert [step.guided for step in steps] == list(schedule.mask)
