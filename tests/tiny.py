"""Tiny pipelines with random weights in the layout that `save_pretrained` writes, one for every family; no downloads."""

import json
from pathlib import Path
from typing import Any

import diffusers as df
import torch
import transformers as tf
from conftest import GOLDEN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CLIP_TOKENIZER = GOLDEN / "dift-sd" / "pipeline" / "tokenizer"
WORDS = ("a", "photo", "of", "the", "cat", "dog", "horse", "image", "picture")


def clip_tokenizer() -> Any:
    return tf.CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)


def t5_tokenizer() -> Any:
    """A unigram vocabulary of a few words and letters, in T5's form."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *(("▁" + word, -1.0) for word in WORDS)]
    pieces += [("▁", -3.0), *((letter, -5.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_ids=0, **special)


def clip(width: int = 16, projection: int | None = None) -> Any:
    config = tf.CLIPTextConfig(
        vocab_size=521, hidden_size=width, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=519, eos_token_id=520, projection_dim=projection or 16,
    )  # fmt: skip
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config)


def t5(width: int = 32) -> Any:
    config = tf.T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=4)
    return tf.T5EncoderModel(config)


def vae(channels: int = 4, **options: Any) -> Any:
    return df.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=channels, norm_num_groups=4, layers_per_block=1, **options,
    )  # fmt: skip


def flow(**options: Any) -> Any:
    return df.FlowMatchEulerDiscreteScheduler(**options)


def ddim() -> Any:
    return df.DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=False)


def xl() -> Any:
    unet = df.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=28,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20,
    )  # fmt: skip
    return df.StableDiffusionXLPipeline(
        unet=unet, vae=vae(), scheduler=df.EulerDiscreteScheduler(beta_schedule="scaled_linear"), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), text_encoder=clip(12), text_encoder_2=clip(16, projection=20), add_watermarker=False,
    )  # fmt: skip


def dit() -> Any:
    network = df.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    return df.DiTPipeline(transformer=network, vae=vae(), scheduler=ddim())


def pixart(sigma: bool = False, told_size: bool = False) -> Any:
    network = df.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=24,
        caption_channels=32, sample_size=8, norm_num_groups=4, use_additional_conditions=told_size,
    )  # fmt: skip
    kind = df.PixArtSigmaPipeline if sigma else df.PixArtAlphaPipeline
    return kind(transformer=network, vae=vae(), scheduler=ddim(), tokenizer=t5_tokenizer(), text_encoder=t5())


def sd3(with_t5: bool = True, **options: Any) -> Any:
    network = df.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=26, pos_embed_max_size=16, **options,
    )  # fmt: skip
    return df.StableDiffusion3Pipeline(
        transformer=network, vae=vae(shift_factor=0.06, scaling_factor=1.5), scheduler=flow(shift=3.0),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), text_encoder=clip(12, projection=12),
        text_encoder_2=clip(16, projection=14), tokenizer_3=t5_tokenizer() if with_t5 else None,
        text_encoder_3=t5() if with_t5 else None,
    )  # fmt: skip


def flux(guidance: bool = True) -> Any:
    network = df.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return df.FluxPipeline(
        transformer=network, vae=vae(shift_factor=0.1, scaling_factor=0.4), scheduler=flow(), tokenizer=clip_tokenizer(),
        text_encoder=clip(16), tokenizer_2=t5_tokenizer(), text_encoder_2=t5(),
    )  # fmt: skip


BUILDERS = {"xl": xl, "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}


def shaken(pipe: Any) -> Any:
    """With every zero-initialised weight of the denoising network away from zero, so that each of them matters."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return pipe


def saved(folder: Path, name: str, **options: Any) -> tuple[Any, Path]:
    """The pipeline and the folder that it was saved into."""
    torch.manual_seed(0)
    pipe = shaken(BUILDERS[name](**options))
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.save_pretrained(folder)
    if name == "dit":  # in the published folders, though the pipeline does not write it
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish"}
        (folder / "model_index.json").write_text(json.dumps(index))
    return pipe, folder
