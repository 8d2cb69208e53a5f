"""Names of weights and files, which stored features go by: whatever decides the features changes them."""

import copy
import os
from pathlib import Path

import pytest
import torch
from conftest import smooth_picture
from safetensors.torch import save_file
from torch import nn

from denoscope.benchmarks.running import FeatureStore
from denoscope.denoisers.lora import adapters
from denoscope.features import Dift, recipe
from denoscope.features.weights import path_digest, weights_digest


@pytest.fixture
def model(sd):
    return copy.deepcopy(sd)


def changed(tensor: torch.Tensor, place: int) -> None:
    with torch.no_grad():
        tensor.view(-1)[place] += 1


@pytest.mark.parametrize("part", ["network", "vae", "text"])
@pytest.mark.parametrize("place", [0, 5, -2])
def test_one_value_anywhere_is_another_name(model, part, place):
    module = {"network": model.network, "vae": model.vae, "text": model.text.encoder}[part]
    before = weights_digest(model)
    tensor = next(p for p in module.parameters() if p.ndim > 1)
    own = tensor.detach().clone()
    changed(tensor, place)
    assert weights_digest(model) != before
    with torch.no_grad():
        tensor.copy_(own)
    assert weights_digest(model) == before


def test_what_else_decides_features_is_in_the_name(model):
    names = [weights_digest(model)]
    model.vae.register_to_config(scaling_factor=0.5)
    names.append(weights_digest(model))
    model.schedule.noise[7] += 1e-3
    names.append(weights_digest(model))
    model.vae.encoder.register_buffer("more", torch.ones(3))
    names.append(weights_digest(model))
    assert len(set(names)) == len(names)


def test_the_name_goes_by_values_and_not_by_memory(sd, model):
    assert weights_digest(model) == weights_digest(sd)
    model.network.to(memory_format=torch.channels_last)
    assert weights_digest(model) == weights_digest(sd)
    shifted = torch.zeros(sd.network.conv_in.weight.numel() + 1)[1:].view_as(sd.network.conv_in.weight)
    shifted.copy_(sd.network.conv_in.weight)  # not at a multiple of 8 bytes
    model.network.conv_in.weight.data = shifted
    assert weights_digest(model) == weights_digest(sd)
    model.network.half()
    assert weights_digest(model) != weights_digest(sd)
    with torch.device("meta"):
        assert weights_digest(nn.Linear(2, 3)) == "meta"


def test_changes_behind_the_back_of_autograd_are_seen():
    network = nn.Linear(30, 20)
    names = {weights_digest(network)}
    network.weight.data.mul_(2)  # not counted by PyTorch
    names.add(weights_digest(network))
    network.weight.data = network.weight.data.clone()
    names.add(weights_digest(network))
    assert len(names) == 2
    network.load_state_dict(nn.Linear(30, 20).state_dict())
    names.add(weights_digest(network))
    with torch.inference_mode():
        network.bias = nn.Parameter(torch.arange(20.0))
    names.add(weights_digest(network))
    assert len(names) == 4


def test_loras_for_a_time_have_names_of_their_own(model, tmp_path):
    """One after the other: the second may lie where the first has lain."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = model.network.get_submodule(layer).weight.shape
    for k in range(3):
        down, up = torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)
        down[0, 1], up[1, 0] = 1, k + 1  # one value only, none of those that are looked at first
        save_file(
            {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, tmp_path / f"{k}.safetensors"
        )
    before, names = weights_digest(model), []
    for k in (0, 1, 2, 0, 1, 2):
        with adapters(model, [(tmp_path / f"{k}.safetensors", 1.0)]):
            names.append(weights_digest(model))
        assert weights_digest(model) == before
    assert names[:3] == names[3:]
    assert len({before, *names}) == 4


def test_stored_features_of_another_autoencoder_are_not_taken(model, tmp_path):
    def values() -> torch.Tensor:
        extractor = Dift(model, recipe(model, t=50, site="up.1", ensemble=1, size=64))
        return FeatureStore(extractor, folder=tmp_path)(smooth_picture(0)).values

    one = values()
    assert torch.equal(values(), one)
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        model.vae.quant_conv.weight.mul_(3)
    assert not torch.allclose(values(), one)
    assert len(list(tmp_path.iterdir())) == 2


def test_files_go_by_every_byte(tmp_path):
    def later(path: Path, content: bytes) -> None:
        time = path.stat().st_mtime_ns
        path.write_bytes(content)
        os.utime(path, ns=(time + 1, time + 1))

    folder = tmp_path / "control"
    (folder / "deep").mkdir(parents=True)
    file = folder / "deep" / "weights.safetensors"
    content = bytes(200_000)
    file.write_bytes(content)
    names = [path_digest(folder), path_digest(file)]
    later(file, content[:-3] + b"a" + content[:2])  # as large as before
    names += [path_digest(folder), path_digest(file)]
    file.rename(file.with_name("other.safetensors"))
    names += [path_digest(folder)]
    (folder / "empty").touch()
    names += [path_digest(folder), path_digest(folder / "empty"), path_digest(tmp_path / "none")]
    assert len(set(names)) == len(names)
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "deep").mkdir()
    (copied / "deep" / "other.safetensors").write_bytes(content[:-3] + b"a" + content[:2])
    (copied / "empty").touch()
    assert path_digest(copied) == path_digest(folder)
