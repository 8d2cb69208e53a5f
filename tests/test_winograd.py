"""Convolutions by Winograd's algorithm: the same outcome for fewer operations, and left alone where it is not for them."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import relative, smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import denoscope as ds
from denoscope.denoisers import winograd as module
from denoscope.denoisers.winograd import convolved

PHOTOS = Path(ds.__file__).parent / "photos"


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 9), outputs=st.integers(1, 9), height=st.integers(3, 30),
    width=st.integers(3, 30), padding=st.integers(0, 1), at_once=st.sampled_from([1, 2000, 20000, 1 << 23]),
)  # fmt: skip
def test_the_sums_are_those_of_a_convolution(batch, channels, outputs, height, width, padding, at_once):
    """In any number of parts, for sides that no tile fits into, and in float32 to a few units of its precision."""
    generator = torch.Generator().manual_seed(height * 31 + width)
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight, bias = torch.randn(outputs, channels, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    true = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    kept, module._VALUES_AT_ONCE = module._VALUES_AT_ONCE, at_once
    try:
        found = convolved(x, weight, bias, padding)
    finally:
        module._VALUES_AT_ONCE = kept
    assert found.shape == true.shape
    assert found.dtype == torch.float32
    assert relative(found, true.float()) < 2e-5


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=2),
        nn.Conv2d(128, 128, 5, padding=2),
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(128, 128, 3, padding=1).double(),
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(layer):
    torch.manual_seed(0)
    x = torch.randn(1, layer.in_channels, 32, 32, dtype=layer.weight.dtype)
    with torch.no_grad():
        plain = layer(x)
        with ds.winograd():
            found = layer(x)
    if layer.padding_mode == "circular":  # padded beforehand, then a convolution like any other
        assert relative(found, plain) < 1e-5
    else:
        assert torch.equal(found, plain)


@pytest.mark.parametrize("padding", [1, (1, 1), "same", 0])
def test_operations_are_fewer_until_the_context_ends(padding):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(256, 256, 3, padding=padding), torch.randn(2, 256, 33, 18)
    with torch.no_grad():
        with FlopCounterMode(display=False) as direct:
            plain = layer(x)
        with ds.winograd(), FlopCounterMode(display=False) as fewer:
            found = layer(x)
        assert torch.equal(layer(x), plain)
    assert 0 < relative(found, plain) < 1e-5
    assert fewer.get_total_flops() < 0.5 * direct.get_total_flops()


def test_what_pytorch_refuses_is_refused():
    x, weight = torch.randn(2, 320, 32, 32), torch.randn(320, 160, 3, 3)
    with torch.no_grad(), ds.winograd(), pytest.raises(RuntimeError, match="channels"):
        F.conv2d(x, weight, padding=1)


def test_other_number_formats_are_left_alone():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with ds.winograd():
            assert torch.equal(layer(x), plain)


def test_gradients_are_those_of_pytorch():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 32, 32, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    with ds.winograd():
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(found, plain)


def test_features_are_the_same_and_say_how_they_were_made(seedling):
    picture, flops, found = smooth_picture(3, 128, 96), [], []
    for context in (nullcontext(), ds.winograd()):
        with context, FlopCounterMode(display=False) as counter:
            found.append(ds.features(seedling, picture, ensemble=2))
        flops.append(counter.get_total_flops())
    plain, fast = found
    assert 0 < relative(fast.values, plain.values) < 1e-5
    assert flops[1] < flops[0]
    assert fast.recipe["convolutions"] == "winograd"
    assert "convolutions" not in plain.recipe
    extractor = ds.as_extractor(seedling)
    apart = [extractor.describe()]
    with ds.winograd():
        apart.append(extractor.describe())  # what stored features go by
    assert apart[0] != apart[1]


def test_the_command_line_has_it_for_every_verb(run, tmp_path):
    made = {}
    for name, options in {"plain": (), "fast": ("--winograd",)}.items():
        settings = ("--ensemble", "4", "--out", tmp_path / name)
        status, _, err = run(*options, "features", PHOTOS / "chelsea.jpg", *settings)
        assert status == 0, err
        made[name] = ds.FeatureMap.load(tmp_path / name / "chelsea.safetensors").values
    assert 0 < relative(made["fast"], made["plain"]) < 1e-2  # stored in half precision


def test_the_published_bucket_costs_less_than_half_of_the_published_sequence():
    """Six maps of Stable Diffusion 1.5's shape at 512 x 512, no weights needed. The published extractor encodes for each (1117
    GFLOP), runs the U-Net whole (803) and for two of them a ControlNet (283)."""
    path = Path(__file__).parent.parent / "benchmarks" / "techniques.py"
    spec = importlib.util.spec_from_file_location("techniques", path)
    assert spec is not None
    assert spec.loader is not None
    techniques = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(techniques)
    denoiser, control = techniques.model("meta")
    recipes = techniques.plan("legacy", denoiser, control, 512)
    published = (6 * (1117 + 803) + 2 * 283) / 1000
    spent = techniques.counted(lambda: techniques.winograd(denoiser, techniques.picture_of(512), recipes))
    assert 0.25 * published < spent < 0.4 * published
