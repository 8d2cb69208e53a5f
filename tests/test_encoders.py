"""Encoders on tiny networks with random weights: features equal what the model itself says, reshaped by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import smooth_picture
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import denoscope as ds
from denoscope.denoisers import Denoiser
from denoscope.encoders import Encoder, is_encoder, load_encoder
from denoscope.features import EncoderFeatures, as_extractor, load_extractor, load_model
from denoscope.features.encoding import encoder_recipe
from denoscope.sites import Watch

SHAPE: Any = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
V2: Any = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 28,
    "patch_size": 14,
}
V1: Any = {**SHAPE, "image_size": 32, "patch_size": 8}
SAM: Any = {
    **SHAPE,
    "image_size": 64,
    "output_channels": 12,
    "mlp_dim": 48,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}
MAKE: dict[str, Callable[[], Any]] = {
    "dino": lambda: tf.ViTModel(tf.ViTConfig(**V1), add_pooling_layer=False),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**V2)),
    "dinov2-gated": lambda: tf.Dinov2Model(tf.Dinov2Config(**V2, use_swiglu_ffn=True)),
    "dinov2-registers": lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**V2, num_register_tokens=3)),
    "dinov3": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**V1 | {"patch_size": 16}, num_register_tokens=4)),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(text_config={**SHAPE, "vocab_size": 99}, vision_config=V1, projection_dim=20)
    ),
    "clip-vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**V1)),
    "sam": lambda: tf.SamVisionModel(tf.SamVisionConfig(**SAM)),
    "convnext": lambda: tf.DINOv3ConvNextModel(
        tf.DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1])
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of every family; the weights are large enough that every layer matters."""
    made = {}
    for seed, (name, make) in enumerate(MAKE.items()):
        torch.manual_seed(seed)
        model = make()
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 or "pos" in key:
                torch.nn.init.normal_(parameter, std=0.25)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def opened(folder: Path) -> Encoder:
    return load_encoder(folder, "cpu")


def by_hand(name: str, folder: Path, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states after each block and the final normed ones, from the model's own classes, as [1, C, h, w] maps."""
    kind: Any = {
        "clip": tf.CLIPModel,
        "clip-vision": tf.CLIPVisionModel,
        "sam": tf.SamVisionModel,
    }.get(name, tf.AutoModel)
    model = kind.from_pretrained(folder).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if name.startswith("clip"):
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = ((pixels + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    patch = {"dino": 8, "clip": 8, "clip-vision": 8, "dinov3": 16, "sam": 16, "convnext": 32}.get(name, 14)
    prefix = {"dinov2-registers": 4, "dinov3": 5}.get(name, 1)
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    options = {"output_hidden_states": True}
    with torch.no_grad():
        if name == "sam":
            found = model(F.pad(x, (0, 64 - x.shape[3], 0, 64 - x.shape[2])), **options)
            states = [state.permute(0, 3, 1, 2) for state in found.hidden_states]
            return [state[:, :, :rows, :columns] for state in states], found.last_hidden_state[:, :, :rows, :columns]
        tower = model.vision_model if name == "clip" else model
        if name in ("dino", "clip", "clip-vision"):
            options["interpolate_pos_encoding"] = True
        found = tower(x, **options)
        last = found.last_hidden_state
        if name.startswith("clip"):
            last = tower.post_layernorm(last)
        if name == "clip":
            last = model.visual_projection(last)

    def as_map(tokens: torch.Tensor) -> torch.Tensor:
        kept = tokens[:, prefix:]
        assert kept.shape[1] == rows * columns
        return kept.transpose(1, 2).reshape(1, -1, rows, columns)

    states = list(found.hidden_states)
    return (states if name == "convnext" else [as_map(state) for state in states]), as_map(last)


@pytest.mark.parametrize("name", MAKE)
def test_features_equal_the_models_own(name: str, folders: dict[str, Path]) -> None:
    """Not square, larger than the position embeddings were made for (but for SAM, which is padded), no class or registers."""
    encoder = opened(folders[name])
    picture = smooth_picture(1, 61, 47)
    size = (48, 32) if name == "sam" else (encoder.multiple * 5, encoder.multiple * 3)
    states, last = by_hand(name, folders[name], picture.resized(size)[None])
    blocks = [site.name for site in encoder.sites(sizes=False) if site.name.startswith(("block.", "down."))]
    blocks = [name for name in blocks if name.count(".") == 1]
    assert len(blocks) == 4
    extract = EncoderFeatures(encoder, encoder_recipe(encoder, site="out", size=f"{size[0]}x{size[1]}"))
    found = extract.at([*blocks, "out"], picture)
    for block, expected in zip(blocks, states[-4:], strict=True):
        assert torch.allclose(found[block].values, expected[0], atol=1e-5), block
    assert torch.allclose(found["out"].values, last[0], atol=1e-5)
    assert torch.allclose(extract(picture).values, last[0], atol=1e-5)
    out = encoder.forward(picture.resized(size)[None])
    assert torch.allclose(out[:, :, : last.shape[2], : last.shape[3]], last, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_sites_are_as_they_say_and_nothing_is_left_behind(name: str, folders: dict[str, Path]) -> None:
    encoder = opened(folders[name])
    assert isinstance(encoder, Encoder)
    assert not isinstance(encoder, Denoiser)
    sites = encoder.sites()
    side = encoder.canvas or 4 * encoder.multiple
    with Watch(encoder, [site.name for site in sites]) as seen:
        encoder.forward(smooth_picture(2).resized((side, side))[None])
    for site in sites:
        shape = seen[site.name].shape
        cells = shape[3] if site.kind != "map" else round(shape[3] ** 0.5)
        assert (shape[1], side / cells) == (site.channels, site.stride), site.name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.network.modules())


def test_reading_stops_early(folders: dict[str, Path]) -> None:
    encoder = opened(folders["dinov2"])
    later = []
    handle = encoder.network.get_submodule("encoder.layer.2").register_forward_hook(lambda *_: later.append(1))
    encoder_features = as_extractor(encoder, site="block.1", size="28")
    encoder_features(smooth_picture(0))
    handle.remove()
    assert not later


@pytest.mark.parametrize("name", ["dino", "dinov2-registers", "clip"])
def test_attention_by_hand(name: str, folders: dict[str, Path]) -> None:
    """Keys are the projection of the normed input, per patch; maps are the model's own, without class and register tokens."""
    encoder = opened(folders[name])
    pixels = smooth_picture(3).resized((3 * encoder.multiple, 2 * encoder.multiple))[None]
    with Watch(encoder, ["block.2.query", "block.2.key", "block.2.self_map", "block.2.value"]) as seen:
        encoder.forward(pixels)
    layers: Any = encoder.network.get_submodule(encoder.layout.blocks)  # pyright: ignore[reportAttributeAccessIssue]
    inputs = {}
    norm = getattr(layers[2], {"dino": "layernorm_before", "clip": "layer_norm1"}.get(name, "norm1"))
    handle = norm.register_forward_hook(lambda module, args, output: inputs.update(x=output))
    with torch.no_grad():
        encoder.forward(pixels)
    handle.remove()
    attention = layers[2].self_attn if name == "clip" else layers[2].attention
    tokens = attention.k_proj(inputs["x"])
    assert torch.allclose(seen["block.2.key"], tokens[:, -6:].mT.reshape(1, 32, 2, 3), atol=1e-6)
    q, k = (p(inputs["x"]).view(1, -1, 4, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    maps = (q @ k.mT / 8**0.5).softmax(-1)
    assert torch.allclose(seen["block.2.self_map"], maps[..., -6:, -6:], atol=1e-6)


def test_a_feature_lies_where_its_patch_does(folders: dict[str, Path]) -> None:
    """One bright patch in a network that only sees patches: the cell over it differs, also where SAM pads."""
    for name in ("dinov2", "sam"):
        encoder = opened(folders[name])
        p = encoder.multiple
        pixels = torch.zeros(3, 2 * p, 3 * p)
        changed = pixels.clone()
        changed[:, p:, 2 * p :] = 1
        site = (
            "block.0.value" if name == "dinov2" else "block.0"
        )  # before attention mixes; SAM's windows mix 3 x 3 cells
        extract = as_extractor(encoder, site=site, size="0")
        one, two = (extract(ds.Picture(x)) for x in (pixels, changed))
        differs = (one.values - two.values).abs().amax(0)
        assert one.frame.grid == (3, 2)
        assert differs.argmax() == 5
        centre = torch.tensor([[2.5 * p - 0.5, 1.5 * p - 0.5]], dtype=torch.float64)
        assert torch.allclose(one.frame.to_grid(centre), torch.tensor([[2.0, 1.0]], dtype=torch.float64))


def test_sizes_become_multiples_of_the_patch(folders: dict[str, Path]) -> None:
    picture = smooth_picture(4, 100, 60)
    encoder = opened(folders["dinov2"])
    for size, grid in {"long140": (10, 6), "short56": (6, 4), "28": (2, 2), "long56+long140": (10, 6)}.items():
        assert ds.features(encoder, picture, site="out", size=size).frame.grid == grid
    with pytest.raises(ds.InputError, match="multiples of 14; use size 98x56"):
        ds.features(encoder, picture, size="0")
    with pytest.raises(ds.InputError, match="at most 64x64 pixels, not 96x64; use size long64"):
        ds.features(opened(folders["sam"]), picture, size="96x64")
    with pytest.raises(ds.InputError, match="multiples of its patch of 14"):
        encoder.forward(torch.zeros(1, 3, 30, 28))


def test_presets_name_sites_that_exist(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        encoder = opened(folder)
        names = {site.name for site in encoder.sites(sizes=False)}
        assert set(encoder.presets) == {"semantic", "geometric", "temporal"}
        assert all(preset["site"] in names for preset in encoder.presets.values())
    assert opened(folders["dino"]).presets["semantic"]["site"] == "block.3.key"
    assert opened(folders["dinov2"]).presets["semantic"] == {"site": "block.3", "size": "long840"}


def test_normalisation_is_what_the_folder_says(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["dinov2"]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1]}))
    pixels = smooth_picture(5).resized((28, 28))[None]
    plain, own = opened(source), opened(tmp_path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (plain.mean, plain.std))
    as_own = pixels / 2 / torch.tensor([0.5, 0.25, 1]).view(3, 1, 1)  # what own's network sees …
    same = (as_own * std + mean) * 2 - 1  # … from pixels that the plain one normalises to it
    assert torch.allclose(own.forward(pixels), plain.forward(same), atol=1e-5)
    settings.write_text(json.dumps({"image_mean": [0.5, "a", 0.5]}))
    with pytest.raises(ds.InputError, match="image_mean must be three numbers"):
        opened(tmp_path)
    settings.write_text(json.dumps({"image_std": [0.5, 0, 0.5]}))
    with pytest.raises(ds.InputError, match="image_std must be positive"):
        opened(tmp_path)


def test_what_only_denoisers_have_is_refused(folders: dict[str, Path]) -> None:
    encoder, picture = opened(folders["dino"]), smooth_picture(6)
    for option in ({"t": 1}, {"ensemble": 2}, {"prompt": "a cat"}, {"noise": "none"}, {"adaln": True}):
        with pytest.raises(ds.InputError, match=f"no use for {next(iter(option))}"):
            ds.features(encoder, picture, **option)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ds.InputError, match="no site 'up.1'"):
        ds.features(encoder, picture, site="up.1")
    with pytest.raises(ds.InputError, match="no map of features"):
        ds.features(encoder, picture, site="block.0.self_map")
    with pytest.raises(ds.InputError, match="no preset 'clean'"):
        ds.features(encoder, picture, preset="clean")
    assert as_extractor(encoder, seed=7, size="32")(picture, "a cat").frame.grid == (4, 4)


def test_matching_and_what_is_recorded(folders: dict[str, Path]) -> None:
    encoder, picture = opened(folders["dinov2"]), smooth_picture(7, 84, 56)
    found = ds.match(encoder, picture, picture, [(20, 20), (62, 34)], size="84x56")
    assert (found.points - found.source_points).abs().max() <= 7
    assert found.recipe["site"] == "block.3"
    assert found.recipe["model"] == str(folders["dinov2"])
    json.dumps(found.to_dict())


def test_loading_tells_what_is_wrong(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ds.MissingError, match="no encoder"):
        load_encoder(tmp_path / "none", "cpu")
    with pytest.raises(ds.MissingError, match=r"no config\.json"):
        load_encoder(tmp_path, "cpu")
    diffusion = Path(__file__).parent / "golden" / "dift-sd" / "pipeline"
    with pytest.raises(ds.InputError, match=r"diffusion model; load it with denoscope\.load"):
        load_encoder(diffusion, "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ds.InputError, match="'bert' model; the encoders that can be read are DINO"):
        load_encoder(tmp_path, "cpu")
    (tmp_path / "config.json").write_text((folders["dinov2"] / "config.json").read_text())
    with pytest.raises(ds.MissingError):
        load_encoder(tmp_path, "cpu")
    weights = load_file(folders["dinov2"] / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layernorm" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ds.InputError, match="incomplete"):
        load_encoder(tmp_path, "cpu")
    wrong = {k: v if "layernorm" not in k else torch.zeros(9) for k, v in weights.items()}
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ds.InputError, match=r"do not fit its config\.json"):
        load_encoder(tmp_path, "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ds.InputError):
        load_encoder(tmp_path, "cpu")


def test_one_name_for_every_kind_of_model(folders: dict[str, Path], adm: Any) -> None:
    diffusion = Path(__file__).parent / "golden" / "dift-sd" / "pipeline"
    assert is_encoder(folders["clip"])
    assert not is_encoder(diffusion)
    assert not is_encoder("seedling")
    assert isinstance(load_model(str(folders["clip"]), "cpu"), Encoder)
    assert isinstance(load_model(str(diffusion), "cpu"), Denoiser)
    assert load_extractor("sift-fine", preset="temporal").describe()["size"] == "short480"
    assert load_extractor(str(folders["dino"]), "cpu", site="out", seed=0).describe()["site"] == "out"
    with pytest.raises(ds.MissingError, match="no model 'nowhere'"):
        load_model("nowhere")
    with pytest.raises(ds.InputError, match="no model; give what"):
        as_extractor("dino")


def test_on_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from denoscope.cli.main import app

    def run(*arguments: str) -> str:
        made = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert made.exit_code == 0
        return made.stdout

    assert "encoder in transformers layout" in run("models")
    listed = run("models", str(folders["clip"]), "--sites")
    assert "clip, 0.0 M parameters" in listed
    assert "block.3.self_map" in listed
    assert "block.3.key" not in run("models", str(folders["clip"]))
    assert "a baseline" in run("models", "sift")
    ds.write(smooth_picture(8).image(), tmp_path / "a.png")
    command = ["features", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--model", str(folders["dino"])]
    run(*command, "--size", "32", "--join", f"{folders['dinov2']}@block.1@28@0.5")
    joined = ds.FeatureMap.load(tmp_path / "out" / "a.safetensors")
    assert joined.values.shape == (64, 4, 4)
    assert joined.recipe["site"] == ["block.3.key", "block.1"]
    first = (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns
    run(*command, "--size", "32", "--join", f"{folders['dinov2']}@block.1@28@0.5")
    assert (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns == first
    run(*command, "--size", "32")
    assert ds.FeatureMap.load(tmp_path / "out" / "a.safetensors").values.shape == (32, 4, 4)
