"""Shared fixtures: recorded models, synthetic pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import denoscope as ds
from denoscope.cli.main import main
from denoscope.denoisers.adm import ADMConfig, ADMDenoiser

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)  # tests run in parallel processes


@pytest.fixture(scope="session")
def sd() -> Any:
    """A tiny Stable-Diffusion-shaped pipeline with random weights."""
    return ds.load(GOLDEN / "dift-sd" / "pipeline", device="cpu")


@pytest.fixture(scope="session")
def adm() -> Any:
    """A tiny guided-diffusion model with random weights."""
    given = json.loads((GOLDEN / "dift-adm" / "cases.json").read_text())["unet_config"]
    names = ADMConfig.__dataclass_fields__
    shape = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}
    return ADMDenoiser.from_state_dict(load_file(GOLDEN / "dift-adm" / "unet.safetensors"), ADMConfig(**shape))


@pytest.fixture(scope="session")
def seedling() -> Any:
    return ds.load("seedling", device="cpu")


def relative(one: Tensor, other: Tensor) -> float:
    """Frobenius norm of the difference relative to the second."""
    return ((one - other).norm() / other.norm()).item()


def smooth_picture(seed: int, width: int = 72, height: int = 56) -> ds.Picture:
    """A deterministic smooth colour picture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 20
    phases, turns = rng.uniform(0, 6, (3, 4)), rng.uniform(0.3, 2, (3, 4))
    planes = [
        sum(np.sin(turns[c, k] * (x * np.cos(k) + y * np.sin(k)) + phases[c, k]) for k in range(4)) for c in range(3)
    ]
    image = np.stack(planes, -1)
    image = (image - image.min()) / (image.max() - image.min())
    return ds.read((image * 255).round().astype(np.uint8))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["denoscope", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
