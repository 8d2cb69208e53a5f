"""The sampler: parity with diffusers' own pipelines, what is computed and what is not, and the rules of guidance."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import GOLDEN, relative, smooth_picture
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.guiders import ClassifierFreeZeroStarGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from denoscope.denoisers import NoiseSchedule
from denoscope.denoisers.classifiers import Classifier
from denoscope.denoisers.schedule import Prediction
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import InputError
from denoscope.sampling import (
    APG,
    CFGZeroStar,
    ClassifierFree,
    ClassifierGuidance,
    GuidanceSchedule,
    Respaced,
    sample,
    trajectory,
)
from denoscope.sampling.schedules import RULES
from denoscope.sampling.solvers import SCHEDULERS, outer_step

PROMPTS = ["a cat", "a dog"]


def last(steps: Any) -> Tensor:
    return list(steps)[-1].after


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    pipe = StableDiffusionPipeline.from_pretrained(GOLDEN / "dift-sd" / "pipeline", safety_checker=None)
    return pipe.components


def pipeline(kind: Any, components: dict[str, Any], scheduler: str = "DDIMScheduler") -> Any:
    made = getattr(diffusers, scheduler).from_config(components["scheduler"].config)
    parts = {k: v for k, v in components.items() if v is not None} | {"scheduler": made, "safety_checker": None}
    parts |= {"feature_extractor": None, "image_encoder": None}
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pixel() -> UNetDenoiser:
    """A small unconditional pixel-space model."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return UNetDenoiser(unet.requires_grad_(False).eval(), NoiseSchedule.from_config({"clip_sample": True}))


class Counted:
    """Forward passes of a network: rows, and whether a graph was being built."""

    def __init__(self, network: nn.Module):
        self.rows: list[int] = []
        self.graphs: list[bool] = []
        self.handle = network.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.rows.append(len(args[0]))
        self.graphs.append(torch.is_grad_enabled())

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


class Linear(nn.Module):
    """log p(y | x) with gradient exactly `a` for class 0: far from saturation's bend."""

    def __init__(self, a: Tensor):
        super().__init__()
        self.a, self.calls = a, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        score = (x * self.a).flatten(1).sum(1) - 1e4
        return torch.stack([score, torch.zeros_like(score)], 1)


def judge(seed: int = 0, scale: float = 1.0, **options: Any) -> ClassifierGuidance:
    """Guidance by a fixed small non-linear classifier of two classes."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 2)).requires_grad_(
        False
    )

    class Aware(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return module(x) * (1 + t[:, None] / 1000)

    return ClassifierGuidance(Classifier(Aware().eval(), noise_aware=True, classes=2), scale, **options)


# ---- parity with diffusers


@pytest.mark.parametrize("solver", sorted(set(SCHEDULERS) - {"flow-euler"}))
def test_same_seed_same_latents_as_the_pipeline(solver: str, sd: Any, components: dict[str, Any]) -> None:
    pipe = pipeline(StableDiffusionPipeline, components, SCHEDULERS[solver])
    theirs = pipe(
        PROMPTS, num_inference_steps=6, guidance_scale=5.0, generator=seeds(3, 4), output_type="latent"
    ).images
    steps = list(trajectory(sd, PROMPTS, steps=6, guidance=ClassifierFree(5.0), solver=solver, seed=3))
    assert len(steps) == 6
    assert (steps[-1].after - theirs).abs().max() < 1e-4


def test_pictures_are_the_pipelines(sd: Any, components: dict[str, Any]) -> None:
    pipe = pipeline(StableDiffusionPipeline, components)
    options = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "negative_prompt": ["grey"] * 2,
        "guidance_rescale": 0.6,
    }
    theirs = pipe(PROMPTS, generator=seeds(0, 1), output_type="np", height=64, width=96, **options).images
    ours = sample(sd, PROMPTS, steps=3, guidance=ClassifierFree(3.0, rescale=0.6), negative=["grey"], size=(96, 64))
    assert ours.pictures[0].size == (96, 64)
    for picture, image in zip(ours.pictures, theirs, strict=True):
        assert np.abs(picture.pixels.permute(1, 2, 0).numpy() - image).max() < 1e-4


def test_image_to_image(sd: Any, components: dict[str, Any]) -> None:
    start = smooth_picture(1, 64, 64)
    pipe = pipeline(StableDiffusionImg2ImgPipeline, components, "EulerDiscreteScheduler")
    options = {"num_inference_steps": 10, "strength": 0.55, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = pipe(["a cat"], image=start.image(), generator=seeds(7), **options).images
    steps = list(
        trajectory(
            sd, ["a cat"], steps=10, strength=0.55, start=start, guidance=ClassifierFree(4.0), solver="euler", seed=7
        )
    )
    assert len(steps) == 5
    assert (steps[-1].after - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting(strength: float, sd: Any, components: dict[str, Any]) -> None:
    start, mask = smooth_picture(2, 64, 64), torch.zeros(64, 64)
    mask[16:48, 16:64] = 1
    pipe = pipeline(StableDiffusionInpaintPipeline, components)
    white = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
    options = {"num_inference_steps": 5, "strength": strength, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = pipe(
        ["a cat"], image=start.image(), mask_image=white, height=64, width=64, generator=seeds(7), **options
    ).images
    ours = last(
        trajectory(
            sd, ["a cat"], steps=5, strength=strength, start=start, mask=mask, guidance=ClassifierFree(4.0), seed=7
        )
    )
    assert (ours - theirs).abs().max() < 1e-4


def test_ancestral_sampling_is_ddpm(pixel: UNetDenoiser) -> None:
    pipe = DDPMPipeline(pixel.unet, DDPMScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=2, generator=seeds(0, 1), num_inference_steps=20, output_type="np").images
    ours = sample(pixel, batch=2, steps=20, solver=Respaced(pixel.schedule, spacing="leading"))
    for picture, image in zip(ours.pictures, theirs, strict=True):
        assert np.abs(picture.pixels.permute(1, 2, 0).numpy() - image).max() < 1e-4


def test_ddim_of_respaced_is_the_schedulers(pixel: UNetDenoiser) -> None:
    """On evenly spaced timesteps, with clipped x0 and eps recomputed from it (`use_clipped_model_output`)."""
    respaced = Respaced(pixel.schedule, method="ddim", spacing="leading")
    ours = last(trajectory(pixel, batch=2, steps=20, solver=respaced))
    scheduler = diffusers.DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(20)
    x = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in seeds(0, 1)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pixel.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    assert (ours - x).abs().max() < 1e-4


def test_a_rectified_flow(pixel: UNetDenoiser) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    flow = UNetDenoiser(pixel.unet, NoiseSchedule.from_config(config))
    steps = list(trajectory(flow, batch=2, steps=8))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in seeds(0, 1)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pixel.unet(x, t).sample, t, x).prev_sample
    assert (steps[-1].after - x).abs().max() < 1e-5
    for step, sigma in zip(steps, scheduler.sigmas.tolist(), strict=False):
        rebuilt = (1 - sigma) * step.x0 + sigma * step.prediction.eps
        assert (rebuilt - step.latents).abs().max() < 1e-5
    with pytest.raises(InputError, match="rectified flow"):
        next(trajectory(flow, solver="ddim"))


def test_steps_describe_the_same_point(sd: Any) -> None:
    """Whatever scale a solver keeps x in: noisy = a x0 + s eps, and the last x0 estimates agree with where the run ends."""
    for solver in ("ddim", "euler", "heun", "dpm++2m"):
        for step in trajectory(sd, PROMPTS, steps=5, solver=solver, guidance=ClassifierFree(2.0)):
            p = step.prediction
            assert abs(p.a**2 + p.s**2 - 1) < 1e-6
            assert relative(p.a * p.x0 + p.s * p.eps, p.x) < 1e-5


# ---- determinism


def test_a_sample_depends_on_its_seed_alone(sd: Any) -> None:
    options = {
        "steps": 4,
        "guidance": ClassifierFree(3.0, partial(GuidanceSchedule.power, rate=2)),
        "solver": "euler-ancestral",
    }
    together = sample(sd, [*PROMPTS, "a bird"], seed=[5, 6, 7], **options).latents
    apart = sample(sd, [*PROMPTS, "a bird"], seed=[5, 6, 7], at_once=1, **options).latents
    turned = sample(sd, ["a bird", *PROMPTS], seed=[7, 5, 6], **options).latents
    assert (together - apart).abs().max() < 1e-4
    assert (together - turned[[1, 2, 0]]).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.1


def test_two_passes_equal_one(sd: Any) -> None:
    guidance = ClassifierFree(3.0)
    one, two = (last(trajectory(sd, PROMPTS, steps=3, guidance=guidance, together=b)) for b in (True, False))
    assert (one - two).abs().max() < 1e-4


# ---- what is computed


@pytest.mark.parametrize("together", [True, False])
def test_skipped_steps_cost_one_pass(together: bool, sd: Any) -> None:
    schedule = GuidanceSchedule.power(10, 5)
    with Counted(sd.unet) as counted:
        steps = list(trajectory(sd, PROMPTS, steps=10, guidance=ClassifierFree(3.0, schedule), together=together))
    assert sum(counted.rows) == 2 * schedule.nfe() == 2 * sum(step.denoiser_calls for step in steps)
    assert tuple(step.index for step in steps if step.guided) == schedule.positions
    assert not any(counted.graphs)


def test_compute_falls_with_the_network_calls(sd: Any) -> None:
    def flops(schedule: GuidanceSchedule) -> int:
        with FlopCounterMode(display=False) as counter:
            list(trajectory(sd, ["a cat"], steps=10, guidance=ClassifierFree(3.0, schedule)))
        return counter.get_total_flops()

    schedule = GuidanceSchedule.power(10, 5, always_last=0)
    ratio = flops(schedule) / flops(GuidanceSchedule.all(10))
    assert ratio < 0.601  # 10 + 2 of 20 passes, and nothing beside them


def test_breaking_off_runs_nothing_more(sd: Any) -> None:
    with Counted(sd.unet) as counted:
        for step in trajectory(sd, PROMPTS, steps=50, guidance=ClassifierFree(3.0)):
            if step.index == 1:
                break
    assert counted.rows == [4, 4]
    with Counted(sd.unet) as counted:
        trajectory(sd, PROMPTS, steps=50)  # nothing runs until asked
    assert counted.rows == []


def test_watching_every_step(sd: Any) -> None:
    schedule = GuidanceSchedule.explicit(4, [0, 2])
    options = {"steps": 4, "guidance": ClassifierFree(3.0, schedule), "watch": ["up.1", "mid"]}
    for together in (True, False):
        for step in trajectory(sd, PROMPTS, together=together, **options):
            assert set(step.watched) == {"up.1", "mid"}
            assert step.watched["mid"].shape[0] == 2
            assert bool(step.watched_unconditional) == step.guided
    assert not any(module._forward_hooks for module in sd.unet.modules())
    plain = last(trajectory(sd, PROMPTS, steps=4, guidance=ClassifierFree(3.0, schedule)))
    assert torch.equal(plain, last(trajectory(sd, PROMPTS, **options)))


@pytest.mark.parametrize("at", ["noisy", "x0", "x0-through"])
def test_a_graph_is_built_only_where_it_is_needed(at: Any, pixel: UNetDenoiser) -> None:
    schedule = GuidanceSchedule.explicit(5, [1, 4])
    guidance = judge(at=at, schedule=schedule)
    with Counted(pixel.unet) as counted:
        steps = list(trajectory(pixel, steps=5, classifier=guidance, labels=[1]))
    assert counted.graphs == [at == "x0-through" and step in (1, 4) for step in range(5)]
    assert [step.classifier_calls for step in steps] == [0, 1, 0, 0, 1]
    assert not any(step.after.requires_grad or step.x0.requires_grad for step in steps)


def test_second_order_solvers_decide_once_a_step(sd: Any) -> None:
    with Counted(sd.unet) as counted:
        schedule = GuidanceSchedule.explicit(4, [1])
        steps = list(trajectory(sd, ["a cat"], steps=4, solver="heun", guidance=ClassifierFree(3.0, schedule)))
    assert counted.rows == [1, 1, 2, 2, 1, 1, 1]
    assert [step.denoiser_calls for step in steps] == [2, 4, 2, 1]


def test_outer_steps_of_runge_kutta() -> None:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=False)
    scheduler.set_timesteps(10)
    positions = [outer_step(scheduler, e) for e in range(len(scheduler.timesteps))]
    assert positions[:12] == [0] * 4 + [1] * 4 + [2] * 4
    assert positions[12:] == list(range(3, 10))


# ---- rules


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("combine", [None, APG(), CFGZeroStar()])
def test_rate_one_is_full_guidance(rule: Any, combine: Any, sd: Any) -> None:
    options = {"steps": 3, "seed": 1}
    every = GuidanceSchedule.power(3, 1)
    full = last(trajectory(sd, PROMPTS, guidance=ClassifierFree(3.0, combine=combine), **options))
    ours = last(trajectory(sd, PROMPTS, guidance=ClassifierFree(3.0, every, rule, combine), **options))
    assert torch.equal(full, ours)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_rate_one_is_full_classifier_guidance(rule: Any, solver: str, pixel: UNetDenoiser) -> None:
    options = {"steps": 4, "labels": [0, 1], "solver": solver}
    full = last(trajectory(pixel, classifier=judge(scale=3.0), **options))
    every = judge(scale=3.0, schedule=GuidanceSchedule.power(4, 1), rule=rule)
    assert torch.equal(full, last(trajectory(pixel, classifier=every, **options)))


def test_any_score_of_the_logits_can_lead(pixel: UNetDenoiser) -> None:
    """CLIP guidance raises the similarity itself rather than its log-softmax."""
    guidance = judge(score=lambda logits, labels: logits.gather(1, labels[:, None])[:, 0])
    step = next(trajectory(pixel, steps=3, classifier=guidance, labels=[1]))
    x = step.latents.clone().requires_grad_()
    expected = torch.autograd.grad(guidance.classifier.logits(x, torch.tensor([int(step.timestep)]))[0, 1], x)[0]
    assert step.gradient is not None
    assert torch.allclose(step.gradient, expected)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_guided_is_unguided(rule: Any, sd: Any, pixel: UNetDenoiser) -> None:
    plain = last(trajectory(sd, PROMPTS, steps=3))
    assert torch.equal(
        plain, last(trajectory(sd, PROMPTS, steps=3, guidance=ClassifierFree(9.0, GuidanceSchedule.none(3), rule)))
    )
    with pytest.warns(UserWarning, match="nothing to guide"):
        assert torch.equal(plain, last(trajectory(sd, PROMPTS, steps=3, guidance=ClassifierFree(1))))
    free = last(trajectory(pixel, steps=3, batch=2))
    for guidance in (judge(scale=0.0, rule=rule), judge(schedule=GuidanceSchedule.none(3), rule=rule)):
        with Counted(guidance.classifier.module) as counted:
            assert torch.equal(free, last(trajectory(pixel, steps=3, classifier=guidance, labels=[0, 1])))
        assert not counted.rows


def test_gap_keeps_the_summed_guidance(sd: Any) -> None:
    schedule = GuidanceSchedule.explicit(6, [0, 2, 5])
    by_hand = ClassifierFree(lambda j: 1 + {0: 2, 2: 3, 5: 1}.get(j, 0) * 2.0)
    ours = last(trajectory(sd, PROMPTS, steps=6, guidance=ClassifierFree(3.0, schedule, "gap")))
    assert torch.equal(ours, last(trajectory(sd, PROMPTS, steps=6, guidance=by_hand)))
    twice = GuidanceSchedule.explicit(6, [0, 0, 2, 5])
    counted = ClassifierFree(lambda j: {0: 5.0, 2: 3.0, 5: 3.0}.get(j, 1.0))
    ours = last(trajectory(sd, PROMPTS, steps=6, guidance=ClassifierFree(3.0, twice, "multiplicity")))
    assert torch.equal(ours, last(trajectory(sd, PROMPTS, steps=6, guidance=counted)))


def test_reuse_adds_the_last_guidance_again(sd: Any) -> None:
    guidance = ClassifierFree(3.0, GuidanceSchedule.explicit(4, [1, 3]), "reuse")
    steps = list(trajectory(sd, PROMPTS, steps=4, guidance=guidance))
    assert torch.equal(steps[0].prediction.value, steps[0].conditional.value)  # nothing to use again yet
    delta = steps[1].prediction.value - steps[1].conditional.value
    assert torch.equal(steps[2].prediction.value, steps[2].conditional.value + delta)
    assert steps[2].unconditional is None


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_reuse_of_a_constant_gradient_is_full_guidance(method: Any, pixel: UNetDenoiser) -> None:
    module = Linear(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    classifier = Classifier(module, noise_aware=True, classes=2)
    solver = Respaced(pixel.schedule, method=method)

    def run(**options: Any) -> Tensor:
        guidance = ClassifierGuidance(classifier, 0.3, **options)
        return last(trajectory(pixel, steps=10, classifier=guidance, labels=[0, 0], solver=solver))

    full, calls = run(), module.calls
    reused = run(schedule=GuidanceSchedule.power(10, 5), rule="reuse")
    assert torch.equal(full, reused)
    assert (calls, module.calls - calls) == (10, len(GuidanceSchedule.power(10, 5).positions))
    assert not torch.equal(full, run(schedule=GuidanceSchedule.power(10, 5), rule="mask"))


def test_variance_summed_over_the_gap(pixel: UNetDenoiser) -> None:
    """The literal reading of the paper's sum: gradient times the sum of S over the steps until the next guided one."""
    a = torch.ones(3, 8, 8)
    classifier = Classifier(Linear(a), noise_aware=True, classes=2)
    schedule = GuidanceSchedule.explicit(6, [1, 4])
    solver = Respaced(pixel.schedule, variance="large")
    solver.begin(6, torch.device("cpu"))
    S = solver.large[::-1]  # execution order
    guidance = ClassifierGuidance(classifier, 2.0, schedule, "gap", gap_variance="sum")
    steps = list(trajectory(pixel, steps=6, classifier=guidance, labels=[0], solver=solver))
    for j, gap in ((1, 3), (4, 2)):
        gradient = steps[j].gradient
        assert gradient is not None
        assert torch.allclose(gradient * S[j], 2.0 * a * float(S[j : j + gap].sum()), rtol=1e-5)
    full = list(trajectory(pixel, steps=6, classifier=ClassifierGuidance(classifier, 2.0), labels=[0], solver=solver))

    def moved(steps: list[Any], first: int) -> Tensor:  # by the classifier, from the first guided step on
        return sum(
            (step.gradient * S[step.index] for step in steps[first:] if step.gradient is not None), torch.zeros(())
        )

    assert torch.allclose(moved(steps, 1), moved(full, 1), rtol=1e-5)
    with pytest.raises(InputError, match="ddpm"):
        next(trajectory(pixel, steps=6, classifier=guidance, labels=[0], solver="ddim"))


def test_score_guidance_moves_every_kind_of_prediction_alike() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps, gradient = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    for a, s in ((0.8, 0.6), (0.3, 0.7)):
        x = a * x0 + s * eps
        for kind in ("epsilon", "sample", *(["v_prediction"] if a == 0.8 else ["flow"])):
            value = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[kind]
            moved = Prediction(value, kind, x, a, s).moved(gradient)
            assert torch.allclose(moved.eps, eps - s * gradient)
            assert torch.allclose(moved.x0, x0 + s**2 / a * gradient)


def test_gradient_through_the_denoiser_is_the_true_one(pixel: UNetDenoiser) -> None:
    guidance = judge(at="x0-through", scale=1.5)
    step = next(trajectory(pixel, steps=5, classifier=guidance, labels=[1], clip=False, seed=3))

    def log_p(x: Tensor) -> Tensor:
        x0 = (x - step.prediction.s * pixel.unet(x, int(step.timestep)).sample) / step.prediction.a
        logits = guidance.classifier.module(x0.clamp(-1, 1), torch.zeros(1))
        return 1.5 * logits.log_softmax(1)[0, 1]

    x = step.latents.clone().requires_grad_()
    expected = torch.autograd.grad(log_p(x), x)[0]
    assert step.gradient is not None
    assert relative(step.gradient, expected) < 1e-5


def test_guidance_raises_what_it_is_meant_to_raise(pixel: UNetDenoiser) -> None:
    """log p of the wanted class, on what the classifier looks at, against the unguided run; every way to look."""
    for at in ("noisy", "x0", "x0-through"):
        guidance = judge(at=at, scale=20.0)

        def log_p(x: Tensor, guidance: ClassifierGuidance = guidance) -> float:
            return guidance.classifier.logits(x, torch.zeros(4, dtype=torch.long)).log_softmax(1)[:, 1].mean().item()

        free = last(trajectory(pixel, steps=10, batch=4, solver="ddpm"))
        led = last(trajectory(pixel, steps=10, classifier=guidance, labels=[1] * 4, solver="ddpm"))
        assert log_p(led) > log_p(free) + 0.1


# ---- other formulas


def pair(seed: int = 0) -> tuple[Prediction, Prediction]:
    g = torch.Generator().manual_seed(seed)
    c, u, x = (torch.randn(2, 4, 5, 5, generator=g) for _ in range(3))
    return Prediction(c, "epsilon", x, 0.8, 0.6), Prediction(u, "epsilon", x, 0.8, 0.6)


def test_apg_is_the_papers_formula() -> None:
    run = ClassifierFree(4.0, combine=APG(0.3, 2.0, -0.5)).begin(3)
    momentum = MomentumBuffer(-0.5)
    for j in range(3):
        c, u = pair(j)
        theirs = normalized_guidance(c.value, u.value, 3.0, momentum, 0.3, 2.0, use_original_formulation=True)
        assert torch.allclose(run.combine(j, c, u, False).value, theirs, atol=1e-5)


def test_apg_momentum_sleeps_on_skipped_steps() -> None:
    run, other = (ClassifierFree(4.0, s, combine=APG()).begin(3) for s in (None, GuidanceSchedule.explicit(3, [0, 2])))
    run.combine(0, *pair(0), False)
    other.combine(0, *pair(0), False)
    skipped = other.combine(1, pair(1)[0], None, False)
    assert torch.equal(skipped.value, pair(1)[0].value)
    assert torch.equal(run.combine(1, *pair(2), False).value, other.combine(2, *pair(2), False).value)


def test_cfg_zero_star() -> None:
    guider = ClassifierFreeZeroStarGuidance(4.0)
    run = ClassifierFree(4.0, combine=CFGZeroStar()).begin(5)
    for j in range(3):
        c, u = pair(j)
        guider.set_state(j, 5, torch.tensor(0))
        theirs: Any = guider.forward(c.value, u.value)
        assert torch.allclose(run.combine(j, c, u, False).value, theirs.pred, atol=1e-5)
    skipping = ClassifierFree(4.0, GuidanceSchedule.none(5), combine=CFGZeroStar()).begin(5)
    assert not skipping.combine(0, pair()[0], None, False).value.any()


def test_rescale_and_channels() -> None:
    c, u = pair()
    plain = ClassifierFree(4.0).begin(2).combine(0, c, u, False).value
    rescaled = ClassifierFree(4.0, rescale=0.7).begin(2).combine(0, c, u, False).value
    assert torch.allclose(rescaled, rescale_noise_cfg(plain, c.value, 0.7), atol=1e-5)
    some = ClassifierFree(4.0, channels=3).begin(2).combine(0, c, u, False).value
    assert torch.equal(some[:, :3], plain[:, :3])
    assert torch.equal(some[:, 3:], c.value[:, 3:])


def test_x0_space_is_the_same_without_clipping() -> None:
    c, u = pair()
    x0 = ClassifierFree(4.0, space="x0").begin(2).combine(0, c, u, False)
    plain = ClassifierFree(4.0).begin(2).combine(0, c, u, False)
    assert torch.allclose(x0.x0, plain.x0, atol=1e-4)
    clipped = ClassifierFree(4.0, space="x0").begin(2).combine(0, c, u, True).value
    assert torch.allclose(clipped, 4 * c.x0.clamp(-1, 1) - 3 * u.x0.clamp(-1, 1), atol=1e-5)


def test_another_network_can_guide(sd: Any, pixel: UNetDenoiser) -> None:
    """AutoGuidance with the model itself, told the same, leads nowhere; told nothing, it is plain guidance."""
    plain = last(trajectory(sd, PROMPTS, steps=3))
    same = ClassifierFree(4.0, network=sd, same_condition=True)
    assert (last(trajectory(sd, PROMPTS, steps=3, guidance=same)) - plain).abs().max() < 1e-4
    told = last(trajectory(sd, PROMPTS, steps=3, guidance=ClassifierFree(4.0, network=sd)))
    assert (told - last(trajectory(sd, PROMPTS, steps=3, guidance=ClassifierFree(4.0)))).abs().max() < 1e-4


# ---- schedules


@given(st.integers(2, 300), st.floats(1, 20), st.floats(0.2, 6))
@settings(max_examples=200, deadline=None)
def test_power_law(n: int, rate: float, k: float) -> None:
    if rate > n:
        with pytest.raises(InputError, match="rate"):
            GuidanceSchedule.power(n, rate, k)
        return
    schedule = GuidanceSchedule.power(n, rate, k)
    assert len(schedule) == n
    assert {0, n - 1, n - 2} <= set(schedule.positions)
    assert sum(schedule.weights("gap")) == n
    assert schedule.nfe() == n + len(schedule.positions)
    bare = GuidanceSchedule.power(n, rate, k, always_last=0)
    later = GuidanceSchedule.power(n, rate, k + 1, always_last=0)
    assert sum(bare.counts) == sum(later.counts) == int(n / rate)

    def chosen(schedule: GuidanceSchedule) -> list[int]:
        return [j for j, count in enumerate(schedule.counts) for _ in range(count)]

    assert all(two <= one for one, two in zip(chosen(bare), chosen(later), strict=True))


@given(st.integers(1, 40), st.integers(2, 12))
def test_uniform_power_law_hits_multiples(m: int, rate: int) -> None:
    n = m * rate
    assert set(GuidanceSchedule.power(n, rate, 1).positions) == set(range(0, n, rate)) | {n - 2, n - 1}


def test_published_counts_of_guided_steps() -> None:
    """Distinct steps at n = 250, r = 5, and examples of the specification."""
    found = {k: len(GuidanceSchedule.power(250, 5, k).positions) for k in (0.5, 1, 1.5, 2, 3, 4, 5, 6)}
    assert found == {0.5: 52, 1: 52, 1.5: 51, 2: 49, 3: 43, 4: 38, 5: 34, 6: 30}
    assert GuidanceSchedule.power(50, 5, 5).positions == (0, 1, 3, 8, 16, 29, 48, 49)
    assert len(GuidanceSchedule.early_stop(250).positions) == 51
    assert GuidanceSchedule.power(50, 5).relative_cost() == 0.62
    for n, k in ((50, 1), (99, 1), (100, 2), (250, 2)):  # even for short samplers, the published default for long ones
        assert GuidanceSchedule.power(n, 5) == GuidanceSchedule.power(n, 5, k)


def test_rival_schedules() -> None:
    assert GuidanceSchedule.first(10, 0.3).positions == (0, 1, 2)
    assert GuidanceSchedule.interval(10, 0.3, 0.8).positions == (3, 4, 5, 6, 7)
    assert GuidanceSchedule.interval(10, 3, 8, "index").positions == (3, 4, 5, 6, 7)
    assert GuidanceSchedule.interval(4, 0.28, 5.42, "sigma", [14, 5.42, 1, 0.28]).positions == (1, 2)
    random = GuidanceSchedule.random(20, 5, seed=1)
    assert len(random.positions) == 5
    assert random == GuidanceSchedule.random(20, 5, seed=1) != GuidanceSchedule.random(20, 5, seed=2)
    assert GuidanceSchedule.explicit(5, [4, 0, 4]).counts == (1, 0, 0, 0, 2)
    image = random.plot()
    assert image.mode == "RGB"
    assert len(image.getcolors(1 << 16) or []) > 5


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: GuidanceSchedule.power(1), "steps is 1"),
    (lambda: GuidanceSchedule.power(10, 0.5), "rate is 0.5"),
    (lambda: GuidanceSchedule.power(10, 11), "rate is 11"),
    (lambda: GuidanceSchedule.power(10, 2, 0.0), "k is 0"),
    (lambda: GuidanceSchedule.power(10, 2, float("nan")), "k is nan"),
    (lambda: GuidanceSchedule.power(10, float("nan")), "rate is nan"),
    (lambda: GuidanceSchedule.power(10, 2, always_last=11), "always_last"),
    (lambda: GuidanceSchedule.explicit(5, [5]), "Position 5"),
    (lambda: GuidanceSchedule.random(5, 6), "count is 6"),
    (lambda: GuidanceSchedule.interval(5, 0.8, 0.2), "empty"),
    (lambda: GuidanceSchedule.interval(5, 0.3, 1.2), "stop is 1.2"),
    (lambda: GuidanceSchedule.interval(5, 0.1, 1, "sigma"), "needs sigmas"),
    (lambda: GuidanceSchedule.first(5, 2.0), "fraction is 2"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD)
def test_wrong_schedules(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        wrong()


# ---- mistakes


def test_mistakes_are_explained(sd: Any, pixel: UNetDenoiser) -> None:
    def wrong(words: str, denoiser: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(InputError, match=words):
            next(trajectory(denoiser, *args, **options))

    cfg = ClassifierFree(3.0)
    wrong(
        "schedule is for 5 steps, but the run has 6",
        sd,
        PROMPTS,
        steps=6,
        guidance=ClassifierFree(3.0, GuidanceSchedule.all(5)),
    )
    wrong("something to guide towards", sd, guidance=cfg)
    wrong("needs labels", pixel, classifier=judge())
    wrong("no class 5", pixel, labels=[0, 5], classifier=judge())
    wrong("3 seeds for 2", sd, PROMPTS, seed=[1, 2, 3])
    wrong("steps is 0", sd, PROMPTS, steps=0)
    wrong("from 1 to 1000", sd, PROMPTS, steps=5000)
    wrong("unknown; use auto", sd, PROMPTS, solver="magic")
    wrong("multiples of 8", sd, PROMPTS, size=65)
    wrong("picture to start from", sd, PROMPTS, mask=torch.ones(64, 64))
    wrong("leaves none", sd, PROMPTS, start=smooth_picture(0, 64, 64), strength=0.01)
    wrong("explicit noise", pixel, noise=torch.zeros(1, 1, 3, 4, 4))
    wrong("takes explicit noise", pixel, steps=3, noise=torch.zeros(4, 1, 3, 8, 8), solver="ddim")
    wrong("negative prompts", sd, PROMPTS, guidance=cfg, negative=["a"] * 3)
    wrong("no site", sd, PROMPTS, watch=["up.9"])


def test_scales_must_be_finite() -> None:
    for wrong in (lambda: ClassifierFree(float("nan")), lambda: judge(scale=float("inf"))):
        with pytest.raises(InputError, match="finite number"):
            wrong()


def test_a_gradient_that_is_not_finite_names_its_step(pixel: UNetDenoiser) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] * torch.where(t[:, None] < 500, torch.nan, 1.0)

    classifier = Classifier(Broken(), noise_aware=True, classes=2)
    with pytest.raises(InputError, match="not finite at step 2"):
        list(trajectory(pixel, steps=5, classifier=ClassifierGuidance(classifier), labels=[0]))
    steps = list(trajectory(pixel, steps=5, classifier=ClassifierGuidance(classifier, nonfinite="zero"), labels=[0]))
    assert steps[-1].after.isfinite().all()


def test_multistep_solvers_and_blind_classifiers_are_warned_of(sd: Any, pixel: UNetDenoiser) -> None:
    guidance = ClassifierFree(3.0, partial(GuidanceSchedule.power, rate=2), "gap")
    with pytest.warns(UserWarning, match="multistep"):
        next(trajectory(sd, PROMPTS, steps=4, guidance=guidance, solver="dpm++2m"))
    blind = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval(), noise_aware=False, classes=2)
    with pytest.warns(UserWarning, match="not trained on noise"):
        next(trajectory(pixel, steps=4, classifier=ClassifierGuidance(blind), labels=[0]))
