"""Noise schedules: the published ones, and conversions between what networks predict."""

import diffusers
import pytest
import torch

import denoscope as ds

CONFIGS = [
    (diffusers.DDIMScheduler, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    (diffusers.DDPMScheduler, {"beta_schedule": "linear"}),
    (diffusers.DDPMScheduler, {"beta_schedule": "squaredcos_cap_v2"}),
    (diffusers.DDPMScheduler, {"beta_schedule": "sigmoid"}),
    (diffusers.DDIMScheduler, {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
    (diffusers.PNDMScheduler, {"trained_betas": [0.01, 0.02, 0.05], "num_train_timesteps": 3}),
]


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_schedules_are_those_of_diffusers(kind, config):
    scheduler = kind(**config)
    schedule = ds.NoiseSchedule.from_config(scheduler.config)
    assert schedule.signal.dtype == torch.float64
    assert torch.allclose(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, atol=2e-6)
    x, e = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1])
    assert torch.allclose(schedule.add_noise(x, e, 1), scheduler.add_noise(x, e, t), atol=1e-5)


def test_stable_diffusion_still_adds_noise_at_zero():
    schedule = ds.NoiseSchedule.from_config(CONFIGS[0][1])
    assert schedule.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, abs=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_conversions_recover_noise_and_picture(prediction):
    schedule = ds.NoiseSchedule.from_config({"beta_schedule": "linear", "prediction_type": prediction})
    if prediction == "flow":
        schedule = ds.NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
        assert torch.allclose(schedule.signal + schedule.noise, torch.ones(1000, dtype=torch.float64))
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 10, 400, 700, 990])
    x_t = schedule.add_noise(x0, eps, t)
    a, s = schedule.at(t, x_t)
    output = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0, "flow": eps - x0}[prediction]
    assert torch.allclose(schedule.eps(output, x_t, t), eps, atol=1e-9)
    assert torch.allclose(schedule.x0(eps, x_t, t), x0, atol=1e-9)
    assert torch.allclose(schedule.output(eps, x_t, t), output, atol=1e-9)
    assert torch.allclose(schedule.add_noise(x0, eps, 400)[2], x_t[2])


def test_unknown_settings_are_named():
    with pytest.raises(ds.InputError, match="beta schedule 'cubic'"):
        ds.NoiseSchedule.from_config({"beta_schedule": "cubic"})
    with pytest.raises(ds.InputError, match="prediction type 'score'"):
        ds.NoiseSchedule.from_config({"prediction_type": "score"})
