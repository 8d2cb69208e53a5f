"""Guidance on chosen steps only, in tiny random pipelines of every family of diffusers, against a plain reference."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers as df
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn

from denoscope.errors import InputError
from denoscope.sampling.pipelines import Savings, compress_guidance
from denoscope.sampling.schedules import GuidanceSchedule

BATCH = 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeddings(length: int, width: int) -> dict[str, Tensor]:
    return {
        "prompt_embeds": noise(BATCH, length, width, seed=1),
        "negative_prompt_embeds": noise(BATCH, length, width, seed=2),
    }


def masks(length: int, dtype: torch.dtype = torch.int64, name: str = "attention_mask") -> dict[str, Tensor]:
    ones = torch.ones(BATCH, length, dtype=dtype)
    ones[1, -1] = 0
    return {f"prompt_{name}": ones, f"negative_prompt_{name}": torch.ones_like(ones)}


def pooled(width: int) -> dict[str, Tensor]:
    return {
        "pooled_prompt_embeds": noise(BATCH, width, seed=3),
        "negative_pooled_prompt_embeds": noise(BATCH, width, seed=4),
    }


def unet(**settings: Any) -> df.UNet2DConditionModel:
    return df.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **settings,
    )


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


ENCODERS = without("text_encoder", "tokenizer")
TWO_ENCODERS = ENCODERS | without("text_encoder_2", "tokenizer_2")
SD_PARTS = ENCODERS | without("vae", "safety_checker", "feature_extractor") | {"requires_safety_checker": False}


def ddim() -> df.DDIMScheduler:
    return df.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def flow() -> df.FlowMatchEulerDiscreteScheduler:
    return df.FlowMatchEulerDiscreteScheduler()


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    pipe = df.StableDiffusionPipeline(unet=unet(), scheduler=ddim(), **SD_PARTS)
    return pipe, {**embeddings(7, 16), "height": 64, "width": 64}


def stable_diffusion_xl() -> tuple[Any, dict[str, Any]]:
    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10
    )
    pipe = df.StableDiffusionXLPipeline(vae=None, unet=network, scheduler=df.EulerDiscreteScheduler(), **TWO_ENCODERS)
    return pipe, {**embeddings(7, 16), **pooled(10), "height": 64, "width": 64}


def stable_diffusion_3(layers: int = 2) -> tuple[Any, dict[str, Any]]:
    network = df.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=10,
    )
    encoders = TWO_ENCODERS | without("text_encoder_3", "tokenizer_3")
    pipe = df.StableDiffusion3Pipeline(vae=None, transformer=network, scheduler=flow(), **encoders)
    return pipe, {**embeddings(7, 16), **pooled(10), "height": 64, "width": 64}


def animatediff() -> tuple[Any, dict[str, Any]]:
    adapter = df.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        use_motion_mid_block=False,
    )
    pipe = df.AnimateDiffPipeline(vae=None, unet=unet(), motion_adapter=adapter, scheduler=ddim(), **ENCODERS)
    return pipe, {**embeddings(7, 16), "height": 64, "width": 64, "num_frames": 2}


def ltx() -> tuple[Any, dict[str, Any]]:
    network = df.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    pipe = df.LTXPipeline(vae=None, transformer=network, scheduler=flow(), **ENCODERS)
    size = {"height": 64, "width": 64, "num_frames": 9}
    return pipe, {**embeddings(7, 16), **masks(7, torch.bool), **size}


def sana() -> tuple[Any, dict[str, Any]]:
    network = df.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    pipe = df.SanaPipeline(vae=None, transformer=network, scheduler=flow(), **ENCODERS)
    call = {**embeddings(7, 16), **masks(7), "height": 64, "width": 64, "use_resolution_binning": False}
    return pipe, {**call, "negative_prompt": None}


def pixart(kind: Any = None) -> tuple[Any, dict[str, Any]]:
    network = df.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    pipe = (kind or df.PixArtAlphaPipeline)(vae=None, transformer=network, scheduler=ddim(), **ENCODERS)
    call = {**embeddings(7, 16), **masks(7), "height": 64, "width": 64, "use_resolution_binning": False}
    return pipe, {**call, "negative_prompt": None}


def cogvideox() -> tuple[Any, dict[str, Any]]:
    network = df.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    pipe = df.CogVideoXPipeline(vae=None, transformer=network, scheduler=df.CogVideoXDDIMScheduler(), **ENCODERS)
    return pipe, {**embeddings(6, 16), "height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 6}


def text_to_video() -> tuple[Any, dict[str, Any]]:
    network = df.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    pipe = df.TextToVideoSDPipeline(vae=None, unet=network, scheduler=ddim(), **ENCODERS)
    return pipe, {**embeddings(7, 16), "height": 64, "width": 64, "num_frames": 2}


def dit() -> tuple[Any, dict[str, Any]]:
    network = df.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
    )
    vae = df.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    return df.DiTPipeline(transformer=network, vae=vae, scheduler=ddim()), {"class_labels": [5, 7, 9]}


def lumina() -> tuple[Any, dict[str, Any]]:
    network = df.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    vae = df.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    pipe = df.LuminaPipeline(vae=vae, transformer=network, scheduler=flow(), **ENCODERS)
    return pipe, {**embeddings(7, 16), **masks(7), "height": 16, "width": 16}


def wan(**settings: Any) -> tuple[Any, dict[str, Any]]:
    def network() -> df.WanTransformer3DModel:
        return df.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=8,
            ffn_dim=16,
            num_layers=1,
        )

    second = network() if settings else None
    pipe = df.WanPipeline(
        vae=None, transformer=network(), transformer_2=second, scheduler=flow(), **settings, **ENCODERS
    )
    return pipe, {**embeddings(7, 16), "height": 64, "width": 64, "num_frames": 5}


def lumina2() -> tuple[Any, dict[str, Any]]:
    network = df.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=16,
    )
    pipe = df.Lumina2Pipeline(vae=None, transformer=network, scheduler=flow(), **ENCODERS)
    return pipe, {**embeddings(7, 16), **masks(7), "height": 64, "width": 64}


def flux() -> tuple[Any, dict[str, Any]]:
    network = df.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=True,
    )
    pipe = df.FluxPipeline(vae=None, transformer=network, scheduler=flow(), **TWO_ENCODERS)
    return pipe, {**embeddings(7, 16), **pooled(10), "height": 64, "width": 64, "true_cfg_scale": 4.0}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    network = df.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = df.QwenImagePipeline(vae=None, transformer=network, scheduler=flow(), **ENCODERS)
    return pipe, {**embeddings(7, 16), **masks(7, name="embeds_mask"), "height": 64, "width": 64}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    network = df.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=10,
        rope_axes_dim=(2, 2, 4),
    )
    pipe = df.HunyuanVideoPipeline(vae=None, transformer=network, scheduler=flow(), **TWO_ENCODERS)
    call = {**embeddings(7, 16), **pooled(10), **masks(7), "height": 64, "width": 64, "num_frames": 5}
    return pipe, {**call, "true_cfg_scale": 4.0}


def control_net(**settings: Any) -> df.ControlNetModel:
    net = df.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
        **settings,
    )
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # a new ControlNet is silent
        nn.init.normal_(block.weight, std=0.5)
    return net


def stable_diffusion_control(many: bool = False) -> tuple[Any, dict[str, Any]]:
    nets = [control_net(), control_net()] if many else control_net()
    pipe = df.StableDiffusionControlNetPipeline(unet=unet(), controlnet=nets, scheduler=ddim(), **SD_PARTS)
    image = noise(BATCH, 3, 64, 64, seed=5).sigmoid()
    call = {**embeddings(7, 16), "image": [image, 1 - image] if many else image}
    return pipe, call | ({"controlnet_conditioning_scale": [1.0, 0.5]} if many else {})


def animatediff_control() -> tuple[Any, dict[str, Any]]:
    plain, call = animatediff()
    pipe = df.AnimateDiffControlNetPipeline(**plain.components, controlnet=control_net())
    frames = [noise(1, 3, 64, 64, seed=seed).sigmoid() for seed in (5, 6)]
    one = {
        key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()
    }  # diffusers takes no more
    return pipe, {**one, "conditioning_frames": frames}


def stable_diffusion_3_control() -> tuple[Any, dict[str, Any]]:
    plain, call = stable_diffusion_3()
    net = df.SD3ControlNetModel.from_transformer(plain.transformer, num_extra_conditioning_channels=0, num_layers=1)
    for block in net.controlnet_blocks:
        nn.init.normal_(block.weight, std=0.5)
    parts = plain.components | {"vae": df.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, shift_factor=0.0)}
    pipe = df.StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    return pipe, {**call, "height": 8, "width": 8, "control_image": noise(BATCH, 3, 8, 8, seed=5).sigmoid()}


FAMILIES: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], str]] = {
    "StableDiffusion": (stable_diffusion, "uc"),  # one call with the halves u, c
    "StableDiffusionXL": (stable_diffusion_xl, "uc"),
    "StableDiffusion3": (stable_diffusion_3, "uc"),
    "AnimateDiff": (animatediff, "uc"),
    "LTX": (ltx, "uc"),
    "Sana": (sana, "uc"),
    "PixArtAlpha": (pixart, "uc"),
    "PixArtSigma": (functools.partial(pixart, df.PixArtSigmaPipeline), "uc"),
    "CogVideoX": (cogvideox, "uc"),
    "TextToVideoSD": (text_to_video, "uc"),
    "DiT": (dit, "cu"),
    "Lumina": (lumina, "cu"),
    "Wan": (wan, "c,u"),  # a call for c, a call for u
    "Wan 2.2": (functools.partial(wan, boundary_ratio=0.5), "c,u"),
    "Lumina2": (lumina2, "c,u"),
    "Flux": (flux, "c,u"),
    "QwenImage": (qwen_image, "c,u"),
    "HunyuanVideo": (hunyuan_video, "c,u"),
    "ControlNet": (stable_diffusion_control, "uc"),
    "2 ControlNets": (functools.partial(stable_diffusion_control, many=True), "uc"),
    "ControlNet of StableDiffusion3": (stable_diffusion_3_control, "uc"),
    "ControlNet of AnimateDiff": (animatediff_control, "uc"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def built(family: str) -> tuple[Any, dict[str, Any], str]:
    build, layout = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    for network in networks(pipe):
        network.eval()
    return pipe, call, layout


def networks(pipe: Any) -> list[nn.Module]:
    names = ("unet", "transformer", "transformer_2")
    return [part for name in names if isinstance(part := getattr(pipe, name, None), nn.Module)]


def run(pipe: Any, call: dict[str, Any], steps: int = 5, **settings: Any) -> Tensor:
    kind = "np" if isinstance(pipe, df.DiTPipeline) else "latent"
    seeded = {"generator": torch.Generator().manual_seed(0), "output_type": kind, "return_dict": False}
    return torch.as_tensor(pipe(**{**call, "num_inference_steps": steps, **seeded, **settings})[0])


def noisy(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[int]]:
    """The rows of every batch that reaches the modules."""
    rows: list[int] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows.append(len(noisy(args, kwargs)))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(
    pipe: Any, layout: str, u_for: Callable[[int, Tensor, Tensor], Tensor], steps: Iterable[int] | None = None
) -> Iterator[None]:
    """The reference: everything is computed, and the pipeline is given u_for(step, c, u) for u.

    steps: the sampling step of every evaluation, if these are not the same.
    """
    order, calls, conditional = list(steps or range(1000)), 0, torch.empty(0)

    def patched(forward: Callable[..., Any]) -> Callable[..., Any]:
        def plain(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, conditional
            output = forward(*args, **kwargs)
            value, step = output[0], order[calls // (2 if layout == "c,u" else 1)]
            calls += 1
            if layout == "uc":
                u, c = value.chunk(2)
                value = torch.cat([u_for(step, c, u), c])
            elif layout == "cu":
                c, u = value.chunk(2)
                value = torch.cat([c, u_for(step, c, u)])
            elif calls % 2:
                conditional = value
            else:
                value = u_for(step, conditional, value)
            return (value, *output[1:]) if isinstance(output, tuple) else type(output)(sample=value)

        return plain

    for network in networks(pipe):
        network.forward = patched(network.forward)
    try:
        yield
    finally:
        for network in networks(pipe):
            del network.forward
    assert calls  # else the reference checks nothing


def masked(*guided: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    return lambda step, c, u: u if step in guided else c


def explicit(steps: int, *guided: int) -> GuidanceSchedule:
    return GuidanceSchedule.explicit(steps, guided)


def state(pipe: Any) -> list[Any]:
    """Of every part: its class and attributes, with what they are for modules (the scheduler moves on)."""
    parts = [part for part in pipe.components.values() if part is not None and hasattr(part, "config")]
    return [
        (type(part), set(vars(part)), [id(v) for v in vars(part).values()] * isinstance(part, nn.Module))
        for part in parts
    ]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * max(1.0, other.abs().max().item()))


@every_family
def test_skipped_steps_cost_half_and_give_the_conditional_prediction(family: str) -> None:
    pipe, call, layout = built(family)
    batch = len(call.get("prompt_embeds", call.get("class_labels")))
    with replaced(pipe, layout, masked(1, 3)):
        expected = run(pipe, call, 4)
    with counted(*networks(pipe)) as rows, compress_guidance(pipe, explicit(4, 1, 3)) as saved:
        found = run(pipe, call, 4)
    assert close(found, expected)
    assert not close(run(pipe, call, 4), expected)  # guidance on the other steps would be seen
    assert sum(rows) == saved.samples == (4 + 2) * batch
    assert saved.full_samples == 8 * batch
    assert saved.runs[0].guided == [1, 3]
    assert saved.ratio == saved.runs[0].ratio == 0.75


@every_family
def test_guidance_on_all_steps_changes_nothing(family: str) -> None:
    pipe, call, _ = built(family)
    expected = run(pipe, call, 3)
    before = state(pipe)
    with compress_guidance(pipe, GuidanceSchedule.all, rule="reuse") as saved:
        assert torch.equal(run(pipe, call, 3), expected)
        assert state(pipe) != before
    assert state(pipe) == before
    assert saved.ratio == 1
    assert torch.equal(run(pipe, call, 3), expected)


@every_family
def test_an_exception_in_the_loop_leaves_the_pipeline_as_it_was(family: str) -> None:
    pipe, call, _ = built(family)
    expected, before, calls = run(pipe, call, 3), state(pipe), 0

    def fail(module: nn.Module, args: tuple) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no more memory")

    handles = [network.register_forward_pre_hook(fail) for network in networks(pipe)]
    with pytest.raises(RuntimeError, match="no more memory"), compress_guidance(pipe, explicit(3, 0)):
        run(pipe, call, 3)
    for handle in handles:
        handle.remove()
    assert state(pipe) == before
    assert torch.equal(run(pipe, call, 3), expected)


def weighted(weights: dict[int, int]) -> Callable[[int, Tensor, Tensor], Tensor]:
    return lambda step, c, u: c - weights.get(step, 0) * (c - u)


def repeated(*guided: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    kept: list[Tensor] = []

    def u_for(step: int, c: Tensor, u: Tensor) -> Tensor:
        if step in guided:
            kept.append(c - u)
            return u
        return c - kept[-1] if kept else c

    return u_for


@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusion3", "DiT", "Wan 2.2", "QwenImage"])
def test_rules(family: str) -> None:
    pipe, call, layout = built(family)
    schedule = explicit(6, 0, 2, 2, 3)
    references = {
        "gap": weighted({0: 2, 2: 1, 3: 3}),
        "multiplicity": weighted({0: 1, 2: 2, 3: 1}),
        "reuse": repeated(0, 2, 3),
    }
    for rule, u_for in references.items():
        with replaced(pipe, layout, u_for):
            expected = run(pipe, call, 6)
        with counted(*networks(pipe)) as rows, compress_guidance(pipe, schedule, rule=rule):
            assert close(run(pipe, call, 6), expected), rule
        assert sum(rows) == (6 + 3) * BATCH


def test_a_gap_weight_multiplies_the_scale_above_1() -> None:
    """c + m (w - 1)(c - u), written out for one step of DDIM."""
    pipe, call, _ = built("StableDiffusion")
    with compress_guidance(pipe, explicit(2, 0), rule="gap"):
        found = run(pipe, call, 2, guidance_scale=3.0)
    one = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 4, 8, 8, generator=one)
    scheduler = ddim()
    scheduler.set_timesteps(2)
    for t, scale in zip(scheduler.timesteps, (1 + 2 * (3.0 - 1), 1), strict=True):
        with torch.no_grad():
            u = pipe.unet(latents, t, encoder_hidden_states=call["negative_prompt_embeds"]).sample
            c = pipe.unet(latents, t, encoder_hidden_states=call["prompt_embeds"]).sample
        latents = scheduler.step(u + scale * (c - u), t, latents).prev_sample
    assert close(found, latents)


def test_reuse_begins_with_the_first_guided_step() -> None:
    pipe, call, layout = built("StableDiffusion")
    with replaced(pipe, layout, repeated(1)):
        expected = run(pipe, call, 4)
    with compress_guidance(pipe, explicit(4, 1), rule="reuse"):
        assert close(run(pipe, call, 4), expected)
        assert close(run(pipe, call, 4), expected)  # nothing is left from the run before


@functools.cache
def golden() -> Any:
    """A stored tiny Stable Diffusion with tokenizer, text encoder and VAE."""
    pipe = df.StableDiffusionPipeline.from_pretrained(GOLDEN / "dift-sd" / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_several_pictures_each_and_runs_of_different_length() -> None:
    pipe = golden()
    call = {
        "prompt": ["a cat", "a dog"],
        "negative_prompt": ["grey", "dark"],
        "num_images_per_prompt": 2,
        "height": 32,
        "width": 32,
    }
    with compress_guidance(pipe, rate=3) as saved, counted(pipe.unet) as rows:
        first = run(pipe, call, 6)
        run(pipe, call, 9)
    assert [one.guided for one in saved.runs] == [[0, 3, 4, 5], [0, 3, 6, 7, 8]]
    assert [one.samples for one in saved.runs] == [(6 + 4) * 4, (9 + 5) * 4]
    assert sum(rows) == saved.samples
    assert str(saved) == "2 runs, guided 9 of 15 steps: 96 network samples instead of 120 (80 %)"
    assert saved.schedule is not None
    assert len(saved.schedule) == 9
    with replaced(pipe, "uc", masked(0, 3, 4, 5)):
        assert close(first, run(pipe, call, 6))


def test_savings_read_well() -> None:
    pipe, call, _ = built("StableDiffusion3")
    one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in call.items()}
    with compress_guidance(pipe) as saved:
        run(pipe, one, 50)
    assert repr(saved) == "Savings(guided 12 of 50 steps: 62 network samples instead of 100 (62 %))"


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (df.HeunDiscreteScheduler(), [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (df.KDPM2DiscreteScheduler(), [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (df.PNDMScheduler(skip_prk_steps=True), [0, 0, 1, 2, 3, 4]),
        (df.PNDMScheduler(skip_prk_steps=False), [0] * 4 + [1] * 4 + [2] * 4 + [3, 4]),
        (df.DPMSolverMultistepScheduler(), [0, 1, 2, 3, 4]),
        (df.EulerAncestralDiscreteScheduler(), [0, 1, 2, 3, 4]),
        (df.EulerDiscreteScheduler.from_config(df.PNDMScheduler(skip_prk_steps=True).config), [0, 1, 2, 3, 4]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_evaluation_of_a_step_is_decided_alike(scheduler: Any, steps: list[int]) -> None:
    plain, call, layout = built("StableDiffusion")
    pipe = with_scheduler(plain, scheduler)
    with replaced(pipe, layout, masked(0, 3), steps):
        expected = run(pipe, call)
    with counted(pipe.unet) as rows, compress_guidance(pipe, explicit(5, 0, 3)) as saved:
        assert close(run(pipe, call), expected)
    assert rows == [BATCH * (1 + (step in (0, 3))) for step in steps]
    assert saved.runs[0].guided == [0, 3]


def with_scheduler(pipe: Any, scheduler: Any, kind: Any = None) -> Any:
    parts = {**pipe.components, "scheduler": scheduler}
    checks = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    made = (kind or type(pipe))(**parts, **checks)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (ddim(), [0, 1, 2]),
        (df.HeunDiscreteScheduler(), [0, 0, 1, 1, 2]),
        (df.PNDMScheduler(skip_prk_steps=True), [0, 0, 1, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_image_to_image_counts_the_steps_that_it_runs(scheduler: Any, steps: list[int]) -> None:
    pipe = with_scheduler(golden(), scheduler, df.StableDiffusionImg2ImgPipeline)
    call = {"prompt": ["a cat"] * BATCH, "image": noise(BATCH, 4, 8, 8, seed=5), "strength": 0.5}
    with replaced(pipe, "uc", masked(0), steps):
        expected = run(pipe, call, 6)
    with counted(pipe.unet) as rows, compress_guidance(pipe, explicit(3, 0)):
        assert close(run(pipe, call, 6), expected)
    assert rows == [BATCH * (1 + (step == 0)) for step in steps]


def test_a_run_from_the_middle_that_is_not_announced() -> None:
    """DeepFloyd's image-to-image pipeline says nowhere how many steps it runs."""
    network = unet(in_channels=3, out_channels=6)
    scheduler = df.DDPMScheduler(variance_type="learned_range")
    parts = without("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    pipe = df.IFImg2ImgPipeline(unet=network, scheduler=scheduler, **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {**embeddings(7, 16), "image": noise(BATCH, 3, 8, 8, seed=5).clamp(-1, 1), "strength": 0.5}
    with replaced(pipe, "uc", masked(1)):
        expected = run(pipe, call, 8, output_type="pt")
    with compress_guidance(pipe, explicit(4, 1)) as saved:
        assert close(run(pipe, call, 8, output_type="pt"), expected)
    assert saved.samples == 5 * BATCH


def test_a_run_that_ends_early() -> None:
    pipe, call, layout = built("StableDiffusionXL")
    with replaced(pipe, layout, masked(0)):
        expected = run(pipe, call, 6, denoising_end=0.5)
    with compress_guidance(pipe, explicit(3, 0)) as saved:
        assert close(run(pipe, call, 6, denoising_end=0.5), expected)
    assert saved.samples == 4 * BATCH


@pytest.mark.parametrize(
    "family", ["ControlNet", "2 ControlNets", "ControlNet of StableDiffusion3", "ControlNet of AnimateDiff"]
)
def test_skipped_steps_halve_the_controlnet_too(family: str) -> None:
    pipe, call, _ = built(family)
    nets = list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))
    with counted(*nets) as full:
        run(pipe, call, 4)
    with counted(*nets) as rows, compress_guidance(pipe, explicit(4, 0, 2)):
        run(pipe, call, 4)
    assert sum(rows) == sum(full) * 6 / 8


@pytest.mark.parametrize("family", ["ControlNet", "2 ControlNets"])
def test_a_controlnet_in_guess_mode_sees_only_the_conditional_half(family: str) -> None:
    pipe, call, layout = built(family)
    call = {**call, "guess_mode": True}
    with replaced(pipe, layout, masked(1)):
        expected = run(pipe, call, 3)
    nets = list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))
    with counted(*nets) as rows, compress_guidance(pipe, explicit(3, 1)) as saved:
        assert close(run(pipe, call, 3), expected)
    assert rows == [BATCH] * 3 * len(nets)
    assert saved.samples == 4 * BATCH


def test_image_prompts() -> None:
    """An IP-Adapter hands its embeddings over in a list inside a dictionary."""
    pipe = with_scheduler(built("StableDiffusion")[0], ddim())
    pipe.unet = copy.deepcopy(pipe.unet)
    weights: dict[str, Tensor] = {}
    for index, name in enumerate(name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights[f"{2 * index + 1}.to_k_ip.weight"] = noise(width, 16, seed=2 * index)
        weights[f"{2 * index + 1}.to_v_ip.weight"] = noise(width, 16, seed=2 * index + 1)
    projection = {
        "proj.weight": noise(4 * 16, 8),
        "proj.bias": noise(4 * 16),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    image = noise(2, 1, 8, seed=6)  # without and with the image, for every sample
    call = {**built("StableDiffusion")[1], "ip_adapter_image_embeds": [image]}
    with replaced(pipe, "uc", masked(0)):
        expected = run(pipe, call, 3)
    with compress_guidance(pipe, explicit(3, 0)):
        assert close(run(pipe, call, 3), expected)
    assert not close(run(pipe, {**call, "ip_adapter_image_embeds": [-image]}, 3), run(pipe, call, 3))


def test_offloading_hooks_that_are_renewed_after_every_run() -> None:
    pipe = golden()
    call = {"prompt": ["a cat"] * BATCH, "height": 32, "width": 32}
    with replaced(pipe, "uc", masked(0, 2)):
        expected = run(pipe, call, 4)
    plain = state(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        with counted(pipe.unet) as rows, compress_guidance(pipe, explicit(4, 0, 2)) as saved:
            for _ in range(2):
                assert close(run(pipe, call, 4), expected)
        assert sum(rows) == saved.samples == 2 * (4 + 2) * BATCH
        assert hasattr(pipe.unet, "_hf_hook")
    finally:
        pipe.remove_all_hooks()
        del pipe._all_hooks
    assert [kind for kind, *_ in state(pipe)] == [kind for kind, *_ in plain]
    assert "forward" not in vars(pipe.unet) or pipe.unet.forward.__func__ is type(pipe.unet).forward


@pytest.mark.parametrize(
    ("in_place", "build", "layout"),
    [(True, functools.partial(stable_diffusion_3, layers=1), "uc"), (False, wan, "c,u")],
)
def test_compiled_networks_stay_compiled(in_place: bool, build: Callable[[], Any], layout: str) -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    with replaced(pipe, layout, masked(1)):
        expected = run(pipe, call, 3)
    if in_place:
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    kind = type(pipe.transformer)
    run(pipe, call, 1)
    run(pipe, call, 1, guidance_scale=1.0)
    known = graphs
    assert known > 0
    with compress_guidance(pipe, explicit(3, 1)) as saved:
        assert close(run(pipe, call, 3), expected)
    assert saved.samples == 4 * BATCH
    assert type(pipe.transformer) is kind
    assert graphs == known
    torch._dynamo.reset()


def test_pipelines_can_still_read_the_schedulers_signature() -> None:
    pipe, call, _ = built("StableDiffusion")
    expected = run(pipe, call, 3, eta=1.0)
    before = inspect.signature(pipe.scheduler.step), inspect.signature(pipe.scheduler.set_timesteps)
    with compress_guidance(pipe, GuidanceSchedule.all):
        assert (inspect.signature(pipe.scheduler.step), inspect.signature(pipe.scheduler.set_timesteps)) == before
        assert isinstance(pipe.scheduler, df.DDIMScheduler)
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        assert torch.equal(run(pipe, call, 3, eta=1.0), expected)


def test_copies_of_the_scheduler_do_not_count() -> None:
    """Pipelines of sound and video step a copy beside the scheduler itself."""
    pipe, call, layout = built("StableDiffusion")

    def step_copy(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        other = copy.deepcopy(pipe.scheduler)
        other.step(tensors["latents"], t, tensors["latents"])
        other.set_timesteps(7)
        return tensors

    with replaced(pipe, layout, masked(0)):
        expected = run(pipe, call, 3)
    with compress_guidance(pipe, explicit(3, 0)) as saved:
        assert close(run(pipe, call, 3, callback_on_step_end=step_copy), expected)
    assert saved.samples == 4 * BATCH


def test_every_setting_of_timesteps_begins_a_run() -> None:
    pipe, call, _ = built("AnimateDiff")
    pipe.enable_free_init(num_iters=2)
    try:
        with compress_guidance(pipe, explicit(2, 0)) as saved:
            run(pipe, call, 2)
    finally:
        pipe.disable_free_init()
    assert [one.samples for one in saved.runs] == [3 * BATCH] * 2


def test_a_callback_may_end_guidance_within_the_run() -> None:
    pipe, call, _ = built("StableDiffusion")

    def cut(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    settings = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with compress_guidance(pipe, explicit(4, 0, 3)) as saved, counted(pipe.unet) as rows:
        run(pipe, call, 4, **settings)
    assert rows == [2 * BATCH, BATCH, BATCH, BATCH]
    assert (saved.samples, saved.full_samples, saved.runs[0].guided) == (5 * BATCH, 6 * BATCH, [0])


@pytest.mark.parametrize("family", ["StableDiffusion", "DiT", "Lumina2"])
def test_unguided_runs_are_unchanged(family: str) -> None:
    pipe, call, _ = built(family)
    expected = run(pipe, call, 3, guidance_scale=1.0)
    with compress_guidance(pipe) as saved:
        with pytest.warns(UserWarning, match="nothing to skip"):
            found = run(pipe, call, 3, guidance_scale=1.0)  # shorter than the default rate, too
        again = run(pipe, call, 3, guidance_scale=1.0)  # warns no more
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert (saved.samples, saved.full_samples, saved.runs[0].guided) == (6 * BATCH, 6 * BATCH, [])


def test_distilled_models_without_negative_prompt_are_unchanged() -> None:
    pipe, call, _ = built("Flux")
    call = {name: value for name, value in call.items() if not name.startswith("negative")}
    expected = run(pipe, call, 3)
    with compress_guidance(pipe, explicit(3, 1)), pytest.warns(UserWarning, match="nothing to skip"):
        assert torch.equal(run(pipe, call, 3), expected)


def test_samples_that_begin_with_the_same_noise() -> None:
    """Equal halves of a batch need not be u and c."""
    pipe, call, layout = built("Lumina2")
    call = {name: value[:2] if isinstance(value, Tensor) else value for name, value in call.items()}
    call["latents"] = noise(1, 4, 8, 8).repeat(2, 1, 1, 1)
    with replaced(pipe, layout, masked(0, 2)):
        expected = run(pipe, call, 4)
    with compress_guidance(pipe, explicit(4, 0, 2)):
        assert close(run(pipe, call, 4), expected)
    with compress_guidance(pipe, explicit(4, 1)), pytest.raises(InputError, match="only after its first step"):
        run(pipe, call, 4)
    pipe, call, _ = built("StableDiffusion")
    call = {name: value[:2] if isinstance(value, Tensor) else value for name, value in call.items()}
    settings = {"latents": noise(1, 4, 8, 8).repeat(2, 1, 1, 1), "guidance_scale": 1.0}
    expected = run(pipe, call, 3, **settings)
    with compress_guidance(pipe, explicit(3, 1)), pytest.warns(UserWarning, match="nothing to skip"):
        assert torch.equal(run(pipe, call, 3, **settings), expected)


def test_schedules_of_another_length() -> None:
    pipe, call, _ = built("StableDiffusion")
    before = state(pipe)
    with (
        pytest.raises(InputError, match="has 7 steps but this run has 4") as raised,
        compress_guidance(pipe, explicit(7, 0)),
    ):
        run(pipe, call, 4)
    assert isinstance(raised.value, ValueError)
    with pytest.raises(InputError, match="rate is 5"), compress_guidance(pipe, rate=5):
        run(pipe, call, 4)
    assert state(pipe) == before


class Renamed(df.StableDiffusionInstructPix2PixPipeline):
    """A pipeline whose name tells nothing."""


def test_pipelines_with_other_guidance_are_refused() -> None:
    parts = built("StableDiffusion")[0].components | {
        "vae": df.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    }
    call = {name: value for name, value in built("StableDiffusion")[1].items() if "embeds" in name}
    for schedule in (explicit(3, 1), explicit(3, 0)):
        pipe = Renamed(**{**parts, "unet": unet(in_channels=8)}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(InputError, match="combines other passes"), compress_guidance(pipe, schedule):
            run(pipe, {**call, "image": noise(BATCH, 4, 8, 8, seed=5)}, 3)
    perturbed = df.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(InputError, match="PAG"), compress_guidance(perturbed):
        pass
    pipe, call, _ = built("StableDiffusion3")
    layers = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    with pytest.raises(InputError, match="combines other passes"), compress_guidance(pipe, explicit(4, 0)):
        run(pipe, call, 4, **layers)


def test_what_cannot_be_compressed() -> None:
    pipe, call, _ = built("StableDiffusion")
    before = state(pipe)
    with pytest.raises(InputError, match="no classic diffusers pipeline"), compress_guidance(pipe.unet):
        pass
    with pytest.raises(InputError, match="already"), compress_guidance(pipe), compress_guidance(pipe):
        pass
    assert state(pipe) == before
    other = with_scheduler(pipe, ddim())
    with compress_guidance(other):
        other.scheduler = ddim()
        with pytest.raises(InputError, match="exchanged"):
            run(other, call, 3)
    cached = built("Flux")[0]
    cached.transformer.enable_cache(df.FirstBlockCacheConfig())
    try:
        with pytest.raises(InputError, match="disable_cache"), compress_guidance(cached):
            pass
    finally:
        cached.transformer.disable_cache()


def test_weights_are_advised_against_with_multistep_solvers() -> None:
    pipe = with_scheduler(built("StableDiffusion")[0], df.UniPCMultistepScheduler())
    with pytest.warns(UserWarning, match="UniPCMultistepScheduler"), compress_guidance(pipe, rule="gap"):
        pass
    with compress_guidance(pipe, rule="reuse"):  # warnings are errors here
        pass


def test_savings_before_any_run() -> None:
    assert Savings().schedule is None
    assert Savings().ratio == 1
