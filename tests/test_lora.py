"""LoRA against diffusers' own loading with peft, and the model afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as df
import peft
import pytest
import tiny
import torch
from conftest import GOLDEN, relative
from safetensors.torch import save_file
from torch import Tensor, nn

import denoscope as ds
from denoscope.denoisers.lora import adapters
from denoscope.errors import InputError, MissingError
from denoscope.features.weights import weights_digest
from denoscope.sites import Watch

SD = GOLDEN / "dift-sd" / "pipeline"
LOCON = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv",
    "time_emb_proj",
)


def pairs(root: nn.Module, ends: tuple[str, ...], seed: int = 0, rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for the layers whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in root.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(ends):
            out, into, *kernel = layer.weight.shape
            down = torch.randn(rank, into, *kernel, generator=generator) * 0.2
            up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * 0.2
            found[name] = down, up
    assert found
    return found


def kohya(
    root: nn.Module, prefix: str = "lora_unet_", ends: tuple[str, ...] = LOCON, **options: Any
) -> dict[str, Tensor]:
    state = {}
    for name, (down, up) in pairs(root, ends, **options).items():
        key = prefix + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.5)}
    return state


def a_b(root: nn.Module, prefix: str, ends: tuple[str, ...] = LOCON, **options: Any) -> dict[str, Tensor]:
    both = pairs(root, ends, **options).items()
    return {f"{prefix}{name}.lora_{'AB'[k]}.weight": pair[k] for name, pair in both for k in range(2)}


def saved(folder: Path, state: dict[str, Tensor], name: str = "lora.safetensors", **metadata: str) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, metadata or None)
    return folder / name


def noise(denoiser: Any, *loras: tuple[Path, float], prompt: str | None = "a photo of a cat", t: int = 261) -> Tensor:
    x = torch.randn(2, *denoiser.latent_shape(), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), adapters(denoiser, loras):
        return denoiser.output(x, t, denoiser.condition([prompt]))


def plain_sd() -> Any:
    return df.StableDiffusionPipeline.from_pretrained(SD, safety_checker=None)


def reference(pipe: Any, t: int = 261) -> Tensor:
    x = torch.randn(
        2, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2, generator=torch.Generator().manual_seed(9)
    )
    tokens, _ = pipe.encode_prompt("a photo of a cat", "cpu", 2, False)
    with torch.no_grad():
        return pipe.unet(x, t, tokens).sample


def test_a_locon_file_of_kohya_acts_as_in_diffusers(sd, tmp_path):
    pipe = plain_sd()
    state = kohya(pipe.unet) | kohya(pipe.text_encoder, "lora_te_text_model_", ("q_proj", "out_proj", "fc1"), seed=1)
    file = saved(tmp_path, state)
    before = noise(sd)
    assert relative(reference(pipe), before) < 1e-6
    pipe.load_lora_weights(str(file))
    for scale in (1.0, 0.3):
        pipe.set_adapters(pipe.get_active_adapters(), scale)
        expected = reference(pipe)
        assert relative(before, expected) > 0.01
        assert relative(noise(sd, (file, scale)), expected) < 1e-5
    assert torch.equal(noise(sd), before)


@pytest.mark.parametrize("name", ["xl", "sd3", "flux"])
def test_every_family_acts_as_its_pipeline(name, tmp_path):
    pipe, folder = tiny.saved(tmp_path / name, name)
    denoiser = ds.load(folder, device="cpu")
    part = "unet" if name == "xl" else "transformer"
    state = a_b(getattr(pipe, part), f"{part}.", ("to_q", "to_k", "to_out.0", "ff.net.2", "proj_mlp", "conv1"))
    older = "" if hasattr(pipe.text_encoder, "text_model") else "text_model."  # the level that transformers 5 removed
    state |= a_b(pipe.text_encoder, f"text_encoder.{older}", ("q_proj", "fc2"), seed=1)
    file = saved(tmp_path, state)
    before = noise(denoiser)
    pipe.load_lora_weights(str(file))
    pipe.set_adapters(pipe.get_active_adapters(), 0.7)
    own: Any = ds.load(folder, device="cpu")  # the same reading, of the pipeline's parts wrapped by peft
    if name == "flux":
        own._network, own._packed.transformer, own.clip.encoder = pipe.transformer, pipe.transformer, pipe.text_encoder
    elif name == "sd3":
        own._network, own.clip[0].encoder = pipe.transformer, pipe.text_encoder
    else:
        own.unet, own.texts[0].encoder = pipe.unet, pipe.text_encoder
    expected = noise(own)
    assert relative(before, expected) > 1e-3
    assert relative(noise(denoiser, (file, 0.7)), expected) < 1e-5
    assert torch.equal(noise(denoiser), before)


def test_block_numbers_of_the_original_sdxl_are_known(tmp_path):
    _, folder = tiny.saved(tmp_path / "xl", "xl")
    denoiser = ds.load(folder, device="cpu")
    names = {
        "attn1.to_q": "attn1_to_q",
        "ff.net.2": "ff_net_2",
    }  # input block 3: after the first layer, block and downsampler
    plain = a_b(
        denoiser.network, "unet.", tuple(f"down_blocks.1.attentions.0.transformer_blocks.1.{one}" for one in names)
    )
    original = {}
    for key, value in plain.items():
        module, half, _ = key.removeprefix("unet.down_blocks.1.attentions.0.").rsplit(".", 2)
        name = f"lora_unet_input_blocks_3_1_{module.replace('.', '_')}"
        original[f"{name}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = value
    assert len(original) == 4
    one, two = (saved(tmp_path, state, file) for state, file in ((plain, "a.safetensors"), (original, "b.safetensors")))
    assert torch.equal(noise(denoiser, (one, 1.0)), noise(denoiser, (two, 1.0)))
    assert relative(noise(denoiser, (one, 1.0)), noise(denoiser)) > 1e-4


def test_joined_projections_of_the_original_flux_are_split(tmp_path):
    _, folder = tiny.saved(tmp_path / "flux", "flux")
    denoiser = ds.load(folder, device="cpu")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(96, 2, generator=generator)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    file = saved(
        tmp_path, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    )
    attention = denoiser.network.transformer.transformer_blocks[0].attn
    before = [attention.to_q.weight.clone(), attention.to_v.weight.clone()]
    with adapters(denoiser, [(file, 1.0)]):
        assert torch.allclose(attention.to_q.weight - before[0], up[:32] @ down / 2, atol=1e-5)
        assert torch.allclose(attention.to_v.weight - before[1], up[64:] @ down / 2, atol=1e-5)


def test_a_folder_of_peft_acts_as_peft_itself(sd, tmp_path):
    options = {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"to_k": 7}, "rank_pattern": {"to_v": 2}}
    config = peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False, **options)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(plain_sd().unet, config)
    wrapped.save_pretrained(tmp_path)
    pipe = plain_sd()
    before, pipe.unet = reference(pipe), wrapped.eval()
    assert relative(before, reference(pipe)) > 0.01
    assert relative(noise(sd, (tmp_path, 1.0)), reference(pipe)) < 1e-5


def test_a_folder_of_diffusers_says_its_alpha_in_the_header(sd, tmp_path):
    pipe = plain_sd()
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=9, target_modules=["to_q", "conv2"], init_lora_weights=False))
    pipe.unet.save_lora_adapter(tmp_path)
    assert relative(noise(sd, (tmp_path, 1.0)), reference(pipe)) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.4, -1.5])
def test_dora_acts_as_in_peft(sd, tmp_path, scale):
    ends = ["to_q", "to_out.0", "conv1", "conv_shortcut", "time_emb_proj"]
    config = peft.LoraConfig(target_modules=ends, use_dora=True, r=3, lora_alpha=2, init_lora_weights=False)
    torch.manual_seed(0)
    wrapped: Any = peft.get_peft_model(plain_sd().unet, config).eval()
    shapes = set()
    for name, value in wrapped.named_parameters():
        if "magnitude" in name:
            value.data = value.data * torch.empty_like(value).uniform_(0.5, 1.5)
            shapes.add(value.dim())
    assert shapes == {1, 4}  # linear layers and convolutions
    wrapped.save_pretrained(tmp_path)
    before = noise(sd)
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    pipe = plain_sd()
    pipe.unet = wrapped
    assert relative(before, reference(pipe)) > 0.05
    assert relative(noise(sd, (tmp_path, scale)), reference(pipe)) < 1e-5
    assert torch.equal(noise(sd), before)


def magnitudes(root: nn.Module, ends: tuple[str, ...] = LOCON, axis: int = 0) -> dict[str, Tensor]:
    """Norms of the weights' slices, changed, in the shapes of LyCORIS: [out, 1, ...], or [1, in, ...]."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name in pairs(root, ends):
        weight: Any = root.get_submodule(name).weight
        norms = weight.detach().transpose(0, axis).flatten(1).norm(dim=1)
        norms = norms * torch.empty_like(norms).uniform_(0.5, 1.5, generator=generator)
        found[name] = norms.view(-1, *[1] * (weight.dim() - 1)).transpose(0, axis)
    return found


def test_dora_of_diffusers_and_of_kohya(sd, tmp_path):
    pipe, own = plain_sd(), magnitudes(sd.network)
    plain = a_b(sd.network, "unet.")
    as_peft = {
        f"unet.{name}.lora_magnitude_vector": value.flatten() if value.dim() == 2 else value.transpose(0, 1)
        for name, value in own.items()
    }
    file = saved(tmp_path, plain | as_peft, "diffusers.safetensors")
    as_kohya = {f"lora_unet_{name.replace('.', '_')}.dora_scale": value for name, value in own.items()}
    state = {key: value for key, value in kohya(sd.network).items() if not key.endswith(".alpha")}
    other = saved(tmp_path, state | as_kohya, "kohya.safetensors")
    pipe.load_lora_weights(str(file))
    for scale in (1.0, 0.3):
        pipe.set_adapters(pipe.get_active_adapters(), scale)
        expected = reference(pipe)
        assert relative(noise(sd, (saved(tmp_path, plain), scale)), expected) > 0.01  # not that of the pairs alone
        assert relative(noise(sd, (file, scale)), expected) < 1e-5
        assert relative(noise(sd, (other, scale)), expected) < 1e-5
    assert torch.equal(noise(sd, (file, 0.0)), noise(sd))


def test_dora_along_inputs_as_lycoris_had_it_first(sd, tmp_path):
    own = magnitudes(sd.network, ("to_q", "conv1"), axis=1)
    state = kohya(sd.network, ends=("to_q", "conv1"))
    plain = saved(tmp_path, state, "plain.safetensors")
    file = saved(tmp_path, state | {f"lora_unet_{k.replace('.', '_')}.dora_scale": v for k, v in own.items()})
    kinds = set()
    for name, wanted in own.items():
        layer = sd.network.get_submodule(name)
        with adapters(sd, [(plain, 0.7)]):
            summed = layer.weight.detach().double()
        with adapters(sd, [(file, 0.7)]):
            made = layer.weight.detach().double()
        norms = summed.square().sum(dim=[d for d in range(summed.dim()) if d != 1], keepdim=True).sqrt()
        assert torch.allclose(made, wanted * summed / norms, atol=1e-5)
        kinds.add(made.dim())
    assert kinds == {2, 4}


def test_several_doras_change_the_models_own_weights(sd, tmp_path):
    own = magnitudes(sd.network)
    scales = {f"lora_unet_{name.replace('.', '_')}.dora_scale": value for name, value in own.items()}
    one = saved(tmp_path, kohya(sd.network) | scales, "one.safetensors")
    two = saved(tmp_path, kohya(sd.network, seed=1), "two.safetensors")
    layer = sd.network.mid_block.resnets[0].conv1
    before = layer.weight.clone()

    def change(*loras: tuple[Path, float]) -> Tensor:
        with adapters(sd, loras):
            return layer.weight - before

    parts = change((one, 0.5)) + change((two, -2.0))
    assert torch.allclose(change((one, 0.5), (two, -2.0)), parts, atol=1e-6)
    assert torch.allclose(change((two, -2.0), (one, 0.5)), parts, atol=1e-6)  # in either order


def test_dora_with_block_numbers_of_the_original_sdxl(tmp_path):
    _, folder = tiny.saved(tmp_path / "xl", "xl")
    denoiser = ds.load(folder, device="cpu")
    block = "down_blocks.1.attentions.0.transformer_blocks.1."
    ends = tuple(block + one for one in ("attn1.to_q", "ff.net.2"))
    plain, own = a_b(denoiser.network, "unet.", ends), magnitudes(denoiser.network, ends)
    original = {}
    for key, value in plain.items():
        module, half, _ = key.removeprefix("unet.down_blocks.1.attentions.0.").rsplit(".", 2)
        name = f"lora_unet_input_blocks_3_1_{module.replace('.', '_')}"
        original[f"{name}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = value
        original[f"{name}.dora_scale"] = own[f"down_blocks.1.attentions.0.{module}"]
    direct = plain | {f"unet.{name}.lora_magnitude_vector": value.flatten() for name, value in own.items()}
    one, two = (
        saved(tmp_path, state, file) for state, file in ((direct, "a.safetensors"), (original, "b.safetensors"))
    )
    assert torch.equal(noise(denoiser, (one, 1.0)), noise(denoiser, (two, 1.0)))
    without = saved(tmp_path, plain)
    assert relative(noise(denoiser, (one, 1.0)), noise(denoiser, (without, 1.0))) > 1e-4


def test_dora_of_joined_projections_is_refused(tmp_path):
    _, folder = tiny.saved(tmp_path / "flux", "flux")
    denoiser = ds.load(folder, device="cpu")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(96, 2)}
    file = saved(tmp_path, state | {f"{key}.dora_scale": torch.ones(1, 32)})
    with pytest.raises(InputError, match="3 of 3 weights of .* match nothing"), adapters(denoiser, [(file, 1.0)]):
        pass


def test_names_of_older_diffusers(sd, tmp_path):
    state = a_b(sd.network, "unet.", ("attn1.to_q", "attn1.to_out.0"))
    old = {}
    for key, value in state.items():
        module, half, _ = key.rsplit(".", 2)
        module = module.replace("attn1.", "attn1.processor.").removesuffix(".0")
        old[f"{module}_lora.{'down' if half == 'lora_A' else 'up'}.weight"] = value
    one, two = saved(tmp_path, state, "new.safetensors"), saved(tmp_path, old, "old.safetensors")
    assert torch.equal(noise(sd, (one, 1.0)), noise(sd, (two, 1.0)))


def test_several_add_up_and_nest(sd, tmp_path):
    one = saved(tmp_path, kohya(sd.network), "one.safetensors")
    two = saved(tmp_path, kohya(sd.network, seed=1), "two.safetensors")
    layer = sd.network.mid_block.resnets[0].conv1
    own = layer.weight.clone()

    def change(*loras: tuple[Path, float]) -> Tensor:
        with adapters(sd, loras):
            return layer.weight - own

    together = change((one, 0.5), (two, -2.0))
    assert torch.allclose(together, change((one, 0.5)) + change((two, -2.0)), atol=1e-6)
    with adapters(sd, [(one, 0.5)]), adapters(sd, [(two, -2.0)]):
        assert torch.allclose(layer.weight - own, together, atol=1e-6)
    assert torch.equal(layer.weight, own)


def test_the_model_is_what_it_was(sd, tmp_path):
    file = saved(tmp_path, kohya(sd.network) | kohya(sd.text.encoder, "lora_te_text_model_", ("q_proj",)))
    weights = {name: value.clone() for name, value in sd.network.state_dict().items()}
    digest, tokens = weights_digest(sd.network), sd.condition(["a cat"]).tokens

    def interrupted() -> None:
        with adapters(sd, [(file, 1.0)]):
            assert not torch.equal(sd.condition(["a cat"]).tokens, tokens)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert weights_digest(sd.network) == digest
    assert all(torch.equal(value, weights[name]) for name, value in sd.network.state_dict().items())
    assert torch.equal(sd.condition(["a cat"]).tokens, tokens)
    assert torch.equal(noise(sd, (file, 0.0)), noise(sd))


def test_sites_are_where_they_were(seedling, tmp_path):
    file = saved(tmp_path, kohya(seedling.network, ends=("to_q", "conv1")))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    site = next(s for s in seedling.sites(sizes=False) if s.name.endswith("attn.0.query"))
    layer: Any = seedling.network.get_submodule(site.module)
    inputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad(), adapters(seedling, [(file, 1.0)]):
        with Watch(seedling, [site.name], stop=False) as seen:
            seedling.output(x, 51, seedling.condition(None))
        expected = inputs[0] @ layer.weight.mT
    handle.remove()
    assert torch.allclose(seen[site.name].flatten(2).mT, expected, atol=1e-5)


def test_files_are_read_again_when_they_change(sd, tmp_path):
    file = saved(tmp_path, kohya(sd.network))
    first = noise(sd, (file, 1.0))
    saved(tmp_path, kohya(sd.network, seed=5))
    assert relative(noise(sd, (file, 1.0)), first) > 1e-3


def wrong_base(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:, :5] if key.endswith("attn2_to_k.lora_down.weight") else value for key, value in state.items()}


def not_finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * float("nan") if "conv1.lora_up" in key else value for key, value in state.items()}


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("conv1.lora_up.weight")}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("to_q", "to_z"): value for key, value in state.items()}


def lokr(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("lora_down.weight", "lokr_w1"): value for key, value in state.items()}


def wrong_magnitudes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {key.replace("alpha", "dora_scale"): torch.ones(7, 1) for key in state if key.endswith("to_k.alpha")}


def endless_magnitudes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    norms = {key: len(value) for key, value in state.items() if key.endswith("lora_up.weight")}
    return state | {
        k.replace("lora_up.weight", "dora_scale"): torch.full((n, 1), float("inf")) for k, n in norms.items()
    }


def magnitudes_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("alpha", "dora_scale"): torch.ones(7, 1) for key in state if key.endswith("to_k.alpha")}


def loha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("lora_down.weight", "hada_w1_a"): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_base, r"another base .* shape \[\d+, 5\] there .* and \[\d+, \d+\] here"),
        (not_finite, "not finite"),
        (half, "incomplete.*has alpha and down only"),
        (renamed, r"\d+ of \d+ weights of .* match nothing .*to_z"),
        (loha, r"\d+ of \d+ weights of .* match nothing .*hada_w1_a"),
        (lokr, r"\d+ of \d+ weights of .* match nothing .*lokr_w1"),
        (wrong_magnitudes, r"another base .* has 7 magnitudes there, and a weight of the shape \[\d+, \d+\] here"),
        (endless_magnitudes, "not finite"),
        (magnitudes_alone, "incomplete.*has dora_scale only"),
        (lambda state: {}, "0 of 0 weights"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(sd, tmp_path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message):
    file = saved(tmp_path, spoil(kohya(sd.network)))
    digest = weights_digest(sd.network)
    with pytest.raises(InputError, match=message), adapters(sd, [(file, 1.0)]):
        pass
    assert weights_digest(sd.network) == digest


def test_files_that_are_none(sd, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\0\0\0")
    header = saved(tmp_path, kohya(sd.network), lora_adapter_metadata="{not json")
    config = tmp_path / "folder"
    config.mkdir()
    saved(config, a_b(sd.network, "base_model.model."), "adapter_model.safetensors")
    (config / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1})[:-2])
    for path in (damaged, header, config):
        with pytest.raises(InputError), adapters(sd, [(path, 1.0)]):
            pass
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(MissingError), adapters(sd, [(path, 1.0)]):
            pass
    with pytest.raises(InputError, match="finite"), adapters(sd, [(damaged, float("nan"))]):
        pass
