"""ControlNets: the recording, diffusers' own pipelines, rows with and without, and what does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as df
import numpy as np
import pytest
import tiny
import torch
from conftest import GOLDEN, relative, smooth_picture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import denoscope as ds
from denoscope.denoisers.control import canny, control_input, load_control
from denoscope.denoisers.lora import adapters
from denoscope.denoisers.protocol import Condition, ControlInput
from denoscope.errors import InputError, MissingError
from denoscope.sampling import ClassifierFree, trajectory
from denoscope.sites import Watch

RECORDED = GOLDEN / "content-shift-features"
PROMPT = "a photo of a cat"


def shaken(network: Any, seed: int = 0) -> Any:
    """Away from zero, where every ControlNet starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def sd3_control(pipe: Any, **options: Any) -> Any:
    config = pipe.transformer.config
    given = {name: config[name] for name in ("sample_size", "in_channels", "attention_head_dim", "num_attention_heads")}
    given |= {name: config[name] for name in ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim")}
    given |= {"out_channels": 4, "pos_embed_max_size": config.pos_embed_max_size, "num_layers": 2, **options}
    return df.SD3ControlNetModel(**given)


def flux_control(pipe: Any, **options: Any) -> Any:
    given = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    given |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), **options}
    return df.FluxControlNetModel(**given)


class Models:
    """Tiny pipelines, their denoisers and ControlNets, made when first asked for."""

    def __init__(self, folder: Path):
        self.folder, self.kept = folder, {}

    def __call__(self, name: str) -> tuple[Any, Any, list[Any]]:
        if name not in self.kept:
            torch.manual_seed(1)
            if name == "sd":
                pipe = df.StableDiffusionPipeline.from_pretrained(RECORDED / "pipeline", safety_checker=None)
                pipe.scheduler = df.DDIMScheduler.from_config(pipe.scheduler.config)
                denoiser = ds.load(RECORDED / "pipeline", device="cpu")
                nets = [
                    df.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
                    for _ in "ab"
                ]
            else:
                pipe, folder = tiny.saved(self.folder / name, name)
                denoiser = ds.load(folder, device="cpu")
                if name == "xl":
                    nets = [
                        df.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
                        for _ in "ab"
                    ]
                elif name == "sd3":
                    nets = [sd3_control(pipe), sd3_control(pipe, num_layers=1)]
                else:
                    nets = [flux_control(pipe, num_layers=2), flux_control(pipe, guidance_embeds=True)]
            pipe.vae.quant_conv.weight.data[pipe.vae.config.latent_channels :] = (
                0  # its pipelines sample the posterior,
            )
            pipe.vae.quant_conv.bias.data[pipe.vae.config.latent_channels :] = -30  # which is a point now
            pipe.set_progress_bar_config(disable=True)
            self.kept[name] = pipe, denoiser, [shaken(net, seed) for seed, net in enumerate(nets)]
        return self.kept[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def edges(width: int, height: int, seed: int = 3) -> ds.Picture:
    return ds.read(canny(np.array(smooth_picture(seed, width, height).image()), 10, 30))


def output(
    denoiser: Any, condition: Condition, rows: int = 1, size: tuple[int, int] = (64, 64), t: Any = 261
) -> Tensor:
    shape = denoiser.latent_shape(size[1], size[0])
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return denoiser.output(x, t, condition)


def told(denoiser: Any, *inputs: ControlInput, prompt: str = PROMPT) -> Condition:
    return replace(denoiser.condition([prompt]), controls=tuple(inputs))


def test_the_recorded_features_and_edges(models: Models) -> None:
    recorded = load_file(RECORDED / "fixture.safetensors")
    denoiser = ds.load(RECORDED / "pipeline", device="cpu")
    network = load_control(RECORDED / "controlnet", denoiser)
    assert load_control(str(RECORDED / "controlnet"), denoiser) is network
    found = canny(np.array(ds.read(RECORDED / "im0.png").image().resize((128, 128))))
    assert torch.equal(torch.from_numpy(found), recorded["canny"].to(torch.uint8))
    condition = told(denoiser, control_input(denoiser, network, ds.read(found), (128, 128)))
    sites = {"up-level0-upsampler-out": "up.0", "up-level1-upsampler-out": "up.1", "up-level2-upsampler-out": "up.2"}
    with torch.no_grad(), Watch(denoiser, sites.values()) as seen:
        denoiser.output(recorded["legacy_canny.unet_input"], 51, condition)
    for name, site in sites.items():
        assert relative(seen[site], recorded[f"legacy_canny/{name}"]) < 1e-5


PIPELINES = {
    "sd": df.StableDiffusionControlNetPipeline,
    "xl": df.StableDiffusionXLControlNetPipeline,
    "sd3": df.StableDiffusion3ControlNetPipeline,
    "flux": df.FluxControlNetPipeline,
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_samples_are_those_of_the_pipeline(name: str, several: bool, models: Models) -> None:
    pipe, denoiser, nets = models(name)
    used, scales = (nets, [0.7, 1.2]) if several else (nets[:1], [0.8])
    if name == "sd3" and several:  # diffusers adds their residuals one by one, so that they must be as many
        used = [nets[0], shaken(sd3_control(pipe), 7)]
    if name == "flux" and several:  # and asks the first alone whether it is told the guidance
        used = [nets[0], shaken(flux_control(pipe, num_layers=2), 7)]
    width, height = (64, 96)
    pictures = [edges(width, height, seed).image() for seed in (3, 4)][: len(used)]
    parts = {"vae": pipe.vae, **pipe.components, "controlnet": used if several else used[0]}
    whole = PIPELINES[name](**parts)
    whole.set_progress_bar_config(disable=True)
    shape = (1, *denoiser.latent_shape(height, width))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"latents": x, "guidance_scale": 4.0}
    if name == "flux":
        given = {"latents": pipe._pack_latents(x, 1, 4, *shape[2:]), "guidance_scale": 3.5}
    key = "image" if name in ("sd", "xl") else "control_image"
    made = whole(
        PROMPT, width=width, height=height, num_inference_steps=3, output_type="latent",
        controlnet_conditioning_scale=scales if several else scales[0], **{key: pictures if several else pictures[0]}, **given,
    ).images  # fmt: skip
    if name == "flux":
        made = pipe._unpack_latents(made, height, width, 8)
    control = [
        control_input(denoiser, load_control(net, denoiser), ds.read(picture), (width, height), scale)
        for net, picture, scale in zip(used, pictures, scales, strict=True)
    ]
    guidance = None if name == "flux" else ClassifierFree(4.0)
    options: dict[str, Any] = {"steps": 3, "guidance": guidance, "size": (width, height), "noise": x[None]}
    options |= {"solver": "euler"} if name == "xl" else {}
    *_, step = trajectory(denoiser, [PROMPT], control=control, **options)
    assert relative(step.after, made) < 1e-4
    *_, plain = trajectory(denoiser, [PROMPT], **options)
    assert relative(plain.after, made) > 1e-3


@pytest.mark.parametrize("name", PIPELINES)
def test_rows_with_and_without_in_one_pass(name: str, models: Models) -> None:
    _, denoiser, nets = models(name)
    one, two = (
        control_input(denoiser, load_control(net, denoiser), edges(64, 64, seed), (64, 64), 0.5)
        for seed, net in enumerate(nets)
    )
    conditions = [told(denoiser), told(denoiser, one), told(denoiser, two, one), told(denoiser, prompt="a dog")]
    stacked = Condition.stack(conditions)
    assert [control.scale.tolist() for control in stacked.controls] == [[0, 0.5, 0.5, 0], [0, 0, 0.5, 0]]
    times = torch.tensor([261, 51, 101, 3])
    together = output(denoiser, stacked, 4, t=denoiser.schedule.timestep(times))
    plain = output(denoiser, replace(stacked, controls=()), 4, t=denoiser.schedule.timestep(times))
    assert torch.equal(together[[0, 3]], plain[[0, 3]])
    x = torch.randn(4, *denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    for row, condition in enumerate(conditions):
        with torch.no_grad():
            alone = denoiser.output(x[row : row + 1], denoiser.schedule.timestep(times[row]), condition)
        assert relative(together[row : row + 1], alone) < 1e-5
    assert relative(together[[1, 2]], plain[[1, 2]]) > 1e-3
    silent = told(denoiser, replace(one, scale=torch.zeros(1)))
    assert torch.equal(output(denoiser, silent), output(denoiser, told(denoiser)))


@pytest.mark.parametrize("name", ["sd", "xl", "dit", "pixart", "sd3", "flux", "seedling", "adm"])
def test_every_row_has_its_own_timestep(
    name: str, models: Models, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if name in PIPELINES:
        denoiser = models(name)[1]
    elif name in ("seedling", "adm"):
        denoiser = request.getfixturevalue(name)
    else:
        denoiser = ds.load(tiny.saved(tmp_path, name)[1], device="cpu")
    asked: Any = [1, 0] if name == "dit" else None if name == "adm" else ["a photo", PROMPT]
    condition, times = denoiser.condition(asked, 2), torch.tensor([101, 7])
    x = torch.randn(2, *denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together = denoiser.predict(x, times, condition)
        for i in range(2):
            alone = denoiser.predict(x[i : i + 1], int(times[i]), condition.rows(slice(i, i + 1)))
            assert relative(together[i : i + 1], alone) < 1e-5


def test_conditions_stack_and_select() -> None:
    network, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def condition(value: float, *controls: tuple[nn.Module, float], rows: int = 1, length: int = 3) -> Condition:
        tokens = torch.full((rows, length, 2), float(value))
        shown = tuple(
            ControlInput(net, torch.full((rows, 3, 4, 4), scale), torch.full((rows,), scale)) for net, scale in controls
        )
        return Condition(tokens, {"pooled": tokens[:, 0]}, shown)

    both = condition(1, (network, 0.5), (network, 0.25)).beside(condition(2, (other, 2.0), (network, 0.75), rows=2))
    assert both.batch == 3
    table = [(control.network, control.scale.tolist(), control.image[:, 0, 0, 0].tolist()) for control in both.controls]
    assert table == [
        (network, [0.5, 0.75, 0.75], [0.5, 0.75, 0.75]),
        (network, [0.25, 0, 0], [0.25, 0, 0]),
        (other, [0, 2, 2], [0, 2, 2]),
    ]
    back = both.rows([2, 0])
    assert back.extra["pooled"][:, 0].tolist() == [2, 1]
    assert [control.scale.tolist() for control in back.controls] == [[0.75, 0.5], [0, 0.25], [2, 0]]
    assert condition(1, (network, 0.5)).expand(3).controls[0].image.shape == (3, 3, 4, 4)
    with pytest.raises(InputError, match="different forms"):
        Condition.stack([condition(1), condition(1, length=4)])
    small = ControlInput(network, torch.zeros(1, 3, 2, 2), torch.ones(1))
    with pytest.raises(InputError, match="different sizes"):
        Condition.stack([condition(1, (network, 0.5)), replace(condition(1), controls=(small,))])
    with pytest.raises(InputError, match="no conditions"):
        Condition.stack([])


def test_flux_networks_that_look_at_pixels_repeat_their_residuals(models: Models) -> None:
    pipe, denoiser, _ = models("flux")
    net = shaken(flux_control(pipe, patch_size=2, conditioning_embedding_channels=4), 2)
    whole = df.FluxControlNetPipeline(**pipe.components, controlnet=net)
    whole.set_progress_bar_config(disable=True)
    x = torch.randn(1, *denoiser.latent_shape(64, 96), generator=torch.Generator().manual_seed(0))
    picture = edges(96, 64)
    made = whole(
        PROMPT, control_image=picture.image(), width=96, height=64, num_inference_steps=2, output_type="latent",
        latents=pipe._pack_latents(x, 1, 4, 8, 12), guidance_scale=3.5,
    ).images  # fmt: skip
    control = [control_input(denoiser, load_control(net, denoiser), picture, (96, 64))]
    *_, step = trajectory(denoiser, [PROMPT], steps=2, size=(96, 64), noise=x[None], control=control)
    assert relative(step.after, pipe._unpack_latents(made, 64, 96, 8)) < 1e-4


def test_networks_of_sd35_borrow_the_places(models: Models) -> None:
    pipe, denoiser, _ = models("sd3")
    net = shaken(
        sd3_control(pipe, joint_attention_dim=None, use_pos_embed=False, force_zeros_for_pooled_projection=False)
    )
    whole = df.StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net)
    whole.set_progress_bar_config(disable=True)
    x = torch.randn(1, *denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    picture, given = edges(64, 64), {"width": 64, "height": 64, "guidance_scale": 1.0, "output_type": "latent"}
    made = whole(PROMPT, control_image=picture.image(), num_inference_steps=2, latents=x, **given).images
    net.pos_embed = None
    control = [control_input(denoiser, load_control(net, denoiser), picture, (64, 64))]
    *_, step = trajectory(denoiser, [PROMPT], steps=2, size=64, noise=x[None], control=control)
    assert relative(step.after, made) < 1e-4


@pytest.mark.parametrize("size", [(72, 56), (100, 76), (40, 120)])
def test_any_aspect_ratio(size: tuple[int, int], models: Models) -> None:
    _, denoiser, nets = models("sd")
    shown = control_input(denoiser, load_control(nets[0], denoiser), smooth_picture(1, 90, 50), size)
    latents = denoiser.encode(smooth_picture(0).resized(size)[None])
    assert shown.image.shape[2:] == latents.shape[2:]
    with torch.no_grad():
        assert (
            relative(denoiser.output(latents, 1, told(denoiser, shown)), denoiser.output(latents, 1, told(denoiser)))
            > 1e-4
        )


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_picture_is_embedded_once(models: Models, order: str) -> None:
    """As if the network embedded its pixels in every pass; where it turns their channels around, it does."""
    pipe, denoiser, _ = models("sd")
    options = {"conditioning_embedding_out_channels": (4, 8, 8, 8), "controlnet_conditioning_channel_order": order}
    net = shaken(df.ControlNetModel.from_unet(pipe.unet, **options), 6)
    picture, passes = smooth_picture(1, 64, 64), []
    net.controlnet_cond_embedding.register_forward_hook(lambda *_: passes.append(1))
    shown = control_input(denoiser, load_control(net, denoiser), picture, (64, 64))
    found = [output(denoiser, told(denoiser, shown), t=t) for t in (1, 261)]
    assert len(passes) == (1 if order == "rgb" else 2)
    pixels = ControlInput(net, picture.pixels[None], torch.ones(1))
    for t, one in zip((1, 261), found, strict=True):
        assert relative(one, output(denoiser, told(denoiser, pixels), t=t)) < 1e-6
        assert relative(one, output(denoiser, told(denoiser), t=t)) > 1e-4


@pytest.mark.parametrize("steps", [0, 2])
def test_pixel_space(seedling: Any, steps: int) -> None:
    """The picture's size is such that the network's own embedding shrinks it to that of the latents."""
    widths = (4,) * (steps + 1)
    torch.manual_seed(0)
    net = shaken(df.ControlNetModel.from_unet(seedling.network, conditioning_embedding_out_channels=widths))
    shown = control_input(seedling, load_control(net, seedling), edges(48, 32), (48, 32))
    assert shown.image.shape[2:] == (32, 48)
    with_edges, without = (output(seedling, told(seedling, *c), size=(48, 32)) for c in ([shown], []))
    assert relative(with_edges, without) > 1e-4


def test_pooling_networks_act_on_the_condition_alone(models: Models) -> None:
    pipe, denoiser, _ = models("sd")
    options = {"conditioning_embedding_out_channels": (4, 8, 8, 8)}
    net = shaken(df.ControlNetModel.from_unet(pipe.unet, **options), 4)
    net.register_to_config(global_pool_conditions=True)
    whole = df.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    whole.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0, "width": 64, "height": 64}
    made = whole(PROMPT, image=edges(64, 64).image(), latents=x, **given).images
    control = [control_input(denoiser, load_control(net, denoiser), edges(64, 64), (64, 64))]
    *_, step = trajectory(
        denoiser, [PROMPT], steps=2, guidance=ClassifierFree(4.0), size=64, noise=x[None], control=control
    )
    assert relative(step.after, made) < 1e-4


def test_pictures_without_edges() -> None:
    flat = np.full((32, 48, 3), 120, np.uint8)
    with pytest.warns(UserWarning, match="no edges"):
        assert not canny(flat).any()
    for low, high in ((200, 100), (-1, 5), (0, float("nan"))):
        with pytest.raises(InputError, match="thresholds"):
            canny(flat, low, high)


def test_networks_of_another_base(models: Models, adm: Any, tmp_path: Path) -> None:
    pipe, denoiser, nets = models("sd")
    options: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8, 8, 8)}
    wider = df.UNet2DConditionModel.from_config({**pipe.unet.config, "block_out_channels": (16, 16, 16, 16)})
    with pytest.raises(InputError, match=r"another base .* residual channels \[16, .* where \[8, "):
        load_control(df.ControlNetModel.from_unet(wider, load_weights_from_unet=False, **options), denoiser)
    told_more = df.UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 24})
    with pytest.raises(InputError, match="prompt width 24, where 16"):
        load_control(df.ControlNetModel.from_unet(told_more, load_weights_from_unet=False, **options), denoiser)
    with pytest.raises(InputError, match="shown 4 channels"):
        load_control(df.ControlNetModel.from_unet(pipe.unet, conditioning_channels=4, **options), denoiser)
    xl, xl_nets = models("xl")[1:]
    with pytest.raises(InputError, match="another base"):
        load_control(xl_nets[0], denoiser)
    with pytest.raises(InputError, match="SD3ControlNetModel; .* takes a ControlNetModel"):
        load_control(models("sd3")[2][0], xl)
    with pytest.raises(InputError, match="pooled width 14, where 26|residual channels"):
        load_control(sd3_control(models("sd3")[0], pooled_projection_dim=14), models("sd3")[1])
    with pytest.raises(InputError, match="modes"):
        load_control(flux_control(models("flux")[0], num_mode=4), models("flux")[1])
    for none in (adm, ds.load(tiny.saved(tmp_path, "pixart")[1], device="cpu")):
        with pytest.raises(InputError, match="no ControlNets for"):
            load_control(nets[0], none)


def test_folders_that_hold_none(models: Models, tmp_path: Path) -> None:
    _, denoiser, _ = models("sd")
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(MissingError):
            load_control(missing, denoiser)
    with pytest.raises(InputError, match="UNet2DConditionModel"):
        load_control(RECORDED / "pipeline" / "unet", denoiser)
    with pytest.raises(InputError, match="is a file"):
        load_control(RECORDED / "im0.png", denoiser)
    for name, spoil in (("cut", lambda data: data[: len(data) // 2]), ("short", None)):
        folder = tmp_path / name
        shutil.copytree(RECORDED / "controlnet", folder)
        weights = folder / "diffusion_pytorch_model.safetensors"
        if spoil is not None:
            weights.write_bytes(spoil(weights.read_bytes()))
        else:
            save_file({k: v for k, v in load_file(weights).items() if "controlnet_mid_block" not in k}, weights)
        with pytest.raises(InputError, match="damaged|incomplete"):
            load_control(folder, denoiser)
    config = json.loads((RECORDED / "controlnet" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config)[:-9])
    with pytest.raises(InputError, match="not valid JSON"):
        load_control(tmp_path / "cut", denoiser)


def test_what_cannot_be_sampled(models: Models) -> None:
    _, denoiser, nets = models("sd")
    shown = control_input(denoiser, load_control(nets[0], denoiser), edges(64, 64), (64, 64))
    with pytest.raises(InputError, match="shown 3 pictures for 2 samples"):
        next(trajectory(denoiser, [PROMPT] * 2, steps=2, control=[shown.expand(3)]))
    with pytest.raises(InputError, match="second network"):
        next(trajectory(denoiser, [PROMPT], steps=2, control=[shown], guidance=ClassifierFree(2.0, network=denoiser)))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite"):
            control_input(denoiser, nets[0], edges(64, 64), (64, 64), scale)


def test_control_changes_rows_of_samples_made_in_parts(models: Models) -> None:
    _, denoiser, nets = models("sd")
    network = load_control(nets[0], denoiser)
    shown = [control_input(denoiser, network, edges(64, 64, seed), (64, 64)) for seed in (1, 2)]
    both = Condition.stack([told(denoiser, one) for one in shown]).controls
    given: dict[str, Any] = {"steps": 2, "size": 64}
    whole = ds.sample(denoiser, [PROMPT] * 2, seed=4, at_once=1, control=list(both), **given)
    for i in range(2):
        alone = ds.sample(denoiser, [PROMPT], seed=4 + i, control=[shown[i]], **given)
        assert relative(whole.latents[i : i + 1], alone.latents) < 1e-5


def test_the_command(run: Any, tmp_path: Path) -> None:
    pipeline, control = RECORDED / "pipeline", RECORDED / "controlnet"
    denoiser = ds.load(pipeline, device="cpu")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    key = "unet.down_blocks.0.attentions.0.proj_in"
    lora = tmp_path / "lora.safetensors"
    save_file({f"{key}.lora_A.weight": down[..., None, None], f"{key}.lora_B.weight": up[..., None, None]}, lora)
    image = f"canny:{RECORDED / 'im0.png'}"
    asked = ["sample", PROMPT, "--model", pipeline, "--steps", 2, "--size", "64x96", "--guidance", 1]
    techniques = ["--control", f"{control}@0.5", "--control-image", image, "--lora", f"{lora}@0.7"]
    assert run(*asked, *techniques, "--out", tmp_path / "made")[0] == 0
    picture = np.array(ds.read(RECORDED / "im0.png").image().resize((64, 96)))
    shown = control_input(denoiser, load_control(control, denoiser), ds.read(canny(picture)), (64, 96), 0.5)
    with adapters(denoiser, [(lora, 0.7)]):
        expected = ds.sample(denoiser, [PROMPT], steps=2, size=(64, 96), control=[shown]).pictures[0]
    made = ds.read(tmp_path / "made" / "000000.png")
    assert (made.pixels - expected.pixels).abs().max() < 1 / 255
    status, _, told_why = run(*asked, *techniques[:-1], f"{lora}@0.3", "--out", tmp_path / "made")
    assert status == 2
    assert "(lora)" in told_why
    for wrong, sentence in ((techniques[:2], "give one for each"), (techniques[2:4], "give --control")):
        status, _, told_why = run(*asked, *wrong, "--out", tmp_path / "other")
        assert status == 2
        assert sentence in " ".join(told_why.split())
