"""Train a text-conditioned pixel-space denoiser and store it as an ordinary diffusers folder.

The model is a `UNet2DConditionModel` with three input channels, cross-attending to a small `CLIPTextModel` over a
vocabulary of whole words (Ho et al., arXiv 2006.11239, with v-prediction of Salimans and Ho, arXiv 2202.00512; dropped
prompts for classifier-free guidance, Ho and Salimans, arXiv 2207.12598). The text encoder is trained with the U-Net.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from denoscope.denoisers import NoiseSchedule
from denoscope.denoisers.loading import resolve_device
from denoscope.denoisers.text import TextEncoder
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.errors import InputError
from denoscope.sampling import ClassifierFree, sample
from denoscope.sites import Skeleton, Watch, unet_sites
from denoscope.training.config import DenoiserConfig
from denoscope.training.data import Draws


class Denoising(nn.Module):
    """U-Net and text encoder as one module, so that they share optimizer, average and checkpoint."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def word_tokenizer(words: list[str], length: int) -> PreTrainedTokenizerFast:
    """Lower-cased whole words, start and end token, padded to `length`. A word outside the list becomes `<unk>`."""
    special = ["<pad>", "<start>", "<end>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
    )


def build(config: DenoiserConfig, words: list[str]) -> tuple[Denoising, PreTrainedTokenizerFast, DDIMScheduler]:
    """An untrained model, its tokenizer and its scheduler (also the place where a larger model is only numbers)."""
    tokenizer = word_tokenizer(words, config.tokens)
    levels = range(len(config.channels))
    attends = [level in config.attention_levels for level in levels]
    unet = UNet2DConditionModel(
        sample_size=config.size,
        in_channels=3,
        out_channels=3,
        layers_per_block=config.layers,
        block_out_channels=config.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        # diffusers reads attention_head_dim as the number of heads per level
        attention_head_dim=tuple(max(1, channels // config.head_dim) for channels in config.channels),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=config.text_dim,
        norm_num_groups=min(32, min(config.channels) // 2),
        use_linear_projection=True,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_dim,
            intermediate_size=2 * config.text_dim,
            projection_dim=config.text_dim,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=config.tokens,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction,  # pyright: ignore[reportArgumentType]
        clip_sample=True,
        set_alpha_to_one=True,
        steps_offset=0,
    )
    return Denoising(unet, text_encoder), tokenizer, scheduler


def loss(
    model: nn.Module,
    scheduler: DDIMScheduler,
    pixels: Float[Tensor, "batch 3 size size"],
    noise: Float[Tensor, "batch 3 size size"],
    timesteps: Tensor,
    tokens: Tensor,
) -> Float[Tensor, ""]:
    """Mean squared error of what the network is trained to predict (epsilon or v)."""
    noisy = scheduler.add_noise(pixels, noise, timesteps)  # pyright: ignore[reportArgumentType]
    v = scheduler.config["prediction_type"] == "v_prediction"
    target = scheduler.get_velocity(pixels, noise, timesteps) if v else noise  # pyright: ignore[reportArgumentType]
    return nn.functional.mse_loss(model(noisy, timesteps, tokens).float(), target)


def alignment(
    features: Float[Tensor, "views channels height width"],
    points: Float[Tensor, "views points 2"],
    kinds: Sequence[str],
    temperature: float = 0.07,
    sigma: float = 0.12,
) -> Float[Tensor, ""]:
    """How badly points are found again between two views of a picture, directly and by way of another picture.

    Views 2i and 2i + 1 show one picture; `points` are the same places in both. Every point of the first view must be nearest,
    by cosine, to itself in the second, among all points there and those of pictures of other kinds (cross-entropy;
    neighbours within about `sigma` share the target). In half of the loss the feature is first replaced by what answers to
    it in another picture of the same kind (descriptor vector exchange, Thewlis, Albanie, Bilen and Vedaldi, arXiv
    1908.06427), so that it must mean the same there.
    """
    unit = nn.functional.normalize(features.float(), dim=1)
    at = nn.functional.grid_sample(features.float(), points[:, None], align_corners=False, padding_mode="border")
    a, b = nn.functional.normalize(at[:, :, 0].mT, dim=2).unflatten(0, (-1, 2)).unbind(1)  # [pairs, points, channels]
    places = points[1::2]
    target = (-(torch.cdist(places, places) ** 2) / (2 * sigma**2)).softmax(-1)

    strangers = torch.tensor([[one != other for other in kinds[::2]] for one in kinds[::2]], device=a.device)

    def found(query: Tensor, key: Tensor, target: Tensor, rows: list[int]) -> Tensor:
        own = query @ key[rows].mT / temperature
        other = (query @ key.flatten(0, 1).mT / temperature).unflatten(2, (len(key), -1))
        other = other.masked_fill(~strangers[rows][:, None, :, None], -torch.inf).flatten(2)
        return -(target * torch.cat([own, other], 2).log_softmax(2)[..., : own.shape[2]]).sum(2).mean()

    everyone = list(range(len(a)))
    back = target.mT / target.mT.sum(-1, keepdim=True)
    value = (found(a, b, target, everyone) + found(b, a, back, everyone)) / 2
    answers = [next((j for j in everyone[i + 1 :] + everyone[:i] if not strangers[i, j]), -1) for i in everyone]
    exchanged = [i for i in everyone if answers[i] >= 0]
    if not exchanged:
        return value
    cells = unit[0::2][[answers[i] for i in exchanged]].flatten(2)  # [pairs, channels, cells] of the other picture
    weights = (a[exchanged] @ cells / temperature).softmax(-1)
    swapped = nn.functional.normalize(weights @ cells.mT, dim=2)
    return (value + found(swapped, b, target[exchanged], exchanged)) / 2


def rate(config: DenoiserConfig) -> Callable[[int], float]:
    """Share of the learning rate at a step: linear warm-up, constant, linear decay over the last `decay` of the steps."""
    decay_from = config.steps * (1 - config.decay)

    def at(step: int) -> float:
        falling = (config.steps - step) / max(config.steps - decay_from, 1)
        return max(0.0, min((step + 1) / max(config.warmup, 1), 1.0, falling if config.decay else 1.0))

    return at


def samples(
    model: Denoising, tokenizer: PreTrainedTokenizerFast, scheduler: DDIMScheduler, prompts: Sequence[str], size: int
) -> Image.Image:
    """A contact sheet of four samples a prompt (rows), by 25 DDIM steps with classifier-free guidance of scale 3."""
    text = TextEncoder(tokenizer, model.text_encoder)
    denoiser = UNetDenoiser(model.unet, NoiseSchedule.from_config(dict(scheduler.config)), text=text)
    rows = [prompt for prompt in prompts for _ in range(4)]
    x = sample(denoiser, rows, steps=25, guidance=ClassifierFree(3.0), size=(size, size)).latents.clamp(-1, 1)
    sheet = x.unflatten(0, (-1, 4)).permute(0, 3, 1, 4, 2).reshape(-1, 4 * size, 3)
    return Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy())


def save(folder: Path, model: Denoising, tokenizer: PreTrainedTokenizerFast, scheduler: DDIMScheduler) -> None:
    """Write a diffusers folder: safetensors in files of at most 16 MB, the U-Net in fp16, beside and then renamed."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    half = UNet2DConditionModel(**model.unet.config)
    half.load_state_dict(model.unet.state_dict())
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    half.half().save_pretrained(beside / "unet", max_shard_size="15MB")
    # float32, because transformers loads what is stored and diffusers float32 unless told otherwise
    model.text_encoder.float().save_pretrained(beside / "text_encoder")
    tokenizer.save_pretrained(beside / "tokenizer")
    scheduler.save_pretrained(beside / "scheduler")
    index = {
        "_class_name": "DiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (beside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Keep exactly one complete checkpoint: `checkpoint-STEP` is renamed into place before the older one goes."""
    part, final = out / "checkpoint.part", out / f"checkpoint-{step:07d}"
    shutil.rmtree(part, ignore_errors=True)
    accelerator.save_state(str(part))
    if final.exists():  # a run resumed at its very end
        shutil.rmtree(final)
    os.replace(part, final)
    for old in out.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)


def train_denoiser(
    config: DenoiserConfig,
    out: str | Path,
    data: str | Path = ".",
    *,
    device: str = "auto",
    mixed_precision: str = "auto",
    report: Callable[[int, float, float], None] = lambda step, value, seconds: None,
) -> Path:
    """Train until `config.steps` and return the diffusers folder `out/model` (averaged weights).

    A run that was stopped continues from its last checkpoint in `out`: the n-th example ever drawn is a pure function of
    (seed, n), so nothing is repeated or lost. `report(step, loss, seconds per step)` is called once a step.

    Raises InputError when `out` holds another configuration, MissingError when images are missing.
    """
    out = Path(out)
    _same_config(config, out)
    set_seed(config.seed)
    cpu = resolve_device(device).type == "cpu"
    if mixed_precision not in ("auto", "no", "bf16", "fp16"):
        raise InputError(f"Precision {mixed_precision!r} is unknown; use auto, no, bf16 or fp16.")
    precision = ("no" if cpu else "bf16") if mixed_precision == "auto" else mixed_precision
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    draws = Draws(config, data)
    model, tokenizer, scheduler = build(config, draws.words())
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, (0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(config))
    average = EMAModel(model.parameters(), decay=config.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer = accelerator.prepare(model, optimizer)
    average.to(accelerator.device)
    for state in (average, schedule):
        accelerator.register_for_checkpointing(state)
    step = 0
    if found := sorted(out.glob("checkpoint-*")):
        accelerator.load_state(str(found[-1]))
        step = int(found[-1].name.rpartition("-")[2])
        schedule.lr_lambdas = [rate(config)]
    out.mkdir(parents=True, exist_ok=True)
    _remember_config(config, out)  # only now: a run that cannot start must not claim the folder
    _forget_after(step, out / "loss.csv")

    def tokens(prompts: list[str]) -> Tensor:
        encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return encoded.input_ids.to(accelerator.device)

    loader = DataLoader(
        draws,
        batch_size=config.batch,
        sampler=range(step * config.batch, config.steps * config.batch),
        num_workers=config.workers,
        collate_fn=lambda batch: list(zip(*batch, strict=True)),
        persistent_workers=False,
    )
    bare = accelerator.unwrap_model(model)
    watched = Skeleton(bare.unet, unet_sites(bare.unet))
    started = time.perf_counter()
    for pixels, noise, timesteps, prompts, points, kinds in loader:
        x, e, t = (v.to(accelerator.device) for v in (torch.stack(pixels), torch.stack(noise), torch.tensor(timesteps)))
        views = [i for i, some in enumerate(points) if len(some)]  # both views of a pair, or neither
        with Watch(watched, [config.align_site], stop=False) if views else nullcontext() as seen:
            value = loss(model, scheduler, x, e, t, tokens(list(prompts)))
        if views and seen is not None:
            where = torch.stack([points[i] for i in views]).to(accelerator.device)
            value = value + config.align * alignment(seen[config.align_site][views], where, [kinds[i] for i in views])
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average.step(model.parameters())
        step += 1
        value = value.item()
        if not math.isfinite(value):
            raise InputError(
                f"The loss is {value} at step {step}; lower lr, the last checkpoint in {out} is still good."
            )
        seconds, started = time.perf_counter() - started, time.perf_counter()
        report(step, value, seconds)
        with (out / "loss.csv").open("a") as log:
            log.write(f"{step},{value:.5f},{schedule.get_last_lr()[0]:.3g},{seconds:.3f}\n")
        last = step == config.steps
        if last or step % config.sample_every == 0:
            average.store(model.parameters())
            average.copy_to(model.parameters())
            sheet = samples(bare, tokenizer, scheduler, config.sample_prompts, config.size)
            sheet.save(out / f"samples-{step:07d}.png")
            save(out / "model", bare, tokenizer, scheduler)
            average.restore(model.parameters())
        if last or step % config.checkpoint_every == 0:
            _checkpoint(accelerator, out, step)
    return out / "model"


def _forget_after(step: int, log: Path) -> None:
    """Drop the rows of steps that were taken after the checkpoint and will be taken again."""
    if log.exists():
        kept = [row for row in log.read_text().splitlines(True) if int(row.split(",")[0]) <= step]
        beside = log.with_suffix(".part")
        beside.write_text("".join(kept))
        beside.rename(log)


def _same_config(config: DenoiserConfig, out: Path) -> None:
    """More steps may be added to a run; anything that changes the model or the draws may not."""
    file = out / "config.json"
    free = {"steps", "decay", "workers", "checkpoint_every", "sample_every", "sample_prompts", "lr", "warmup"}
    if file.exists():
        now, before = json.loads(json.dumps(asdict(config))), json.loads(file.read_text())
        changed = [key for key in now if key not in free and key in before and now[key] != before[key]]
        if changed:
            raise InputError(f"{out} holds a run with another {changed[0]!r}; choose another --out or delete it.")


def _remember_config(config: DenoiserConfig, out: Path) -> None:
    beside = out / "config.part"
    beside.write_text(json.dumps(asdict(config), indent=2) + "\n")
    beside.rename(out / "config.json")
