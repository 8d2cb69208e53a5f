"""Train the techniques that the experiments put on the embedded model: a Canny ControlNet, and LoRAs of thirty pictures each.

python experiments/content-shift/techniques.py canny --data DATA --steps 1200
python experiments/content-shift/techniques.py lora --data DATA --of camvid   (or birds, faces)

Both learn to predict what the frozen embedded model was trained to predict (v), from noise of every timestep. The ControlNet
(Zhang et al., arXiv 2302.05543) starts as a copy of the encoder with layers of zeros behind it; half of the prompts are
dropped. The LoRAs cover attention and convolutions (LoCon), rank 8, alpha 8, on 30 training pictures without words.
"""

import argparse
import io
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import denoscope as ds
from denoscope.training.config import DenoiserConfig, Source
from denoscope.training.data import Draws, random_box

HERE = Path(__file__).parent
SIZES = (32, 48, 64)


def edges(pixels: Tensor) -> Tensor:
    """Canny edges (100, 200) of pixels in [-1, 1], in [0, 1], three channels."""
    images = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    found = np.stack([cv2.Canny(image, 100, 200) for image in images])
    return torch.from_numpy(found)[:, None].float().expand(-1, 3, -1, -1) / 255


def loss_of(denoiser: Any, pixels: Tensor, noise: Tensor, t: Tensor, prompts: list[str], **given: Any) -> Tensor:
    """Mean squared error of the network's output."""
    a, s = denoiser.schedule.at(t, pixels)
    noisy, target = a * pixels + s * noise, a * noise - s * pixels
    tokens = denoiser.condition(prompts).tokens
    if "control" in given:
        shown = {"encoder_hidden_states": tokens, "controlnet_cond": edges(pixels), "return_dict": False}
        down, mid = given["control"](noisy, t, **shown)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    else:
        residuals = {}
    return F.mse_loss(denoiser.network(noisy, t, tokens, return_dict=False, **residuals)[0], target)


def train_canny(data: Path, steps: int, out: Path) -> None:
    denoiser: Any = ds.load("seedling", device="cpu", dtype="float32")
    denoiser.network.requires_grad_(False)
    torch.manual_seed(0)
    config = {"conditioning_channels": 3, "conditioning_embedding_out_channels": (16,)}
    control: Any = ControlNetModel.from_unet(denoiser.network, **config).float().train()
    recipe = tomllib.loads(Path(ds.__file__).with_name("seedling").joinpath("recipe.toml").read_text())
    sources = [Source(**one) for one in recipe.pop("sources")]
    plan = DenoiserConfig(
        **{**recipe, "sources": sources, "steps": steps, "batch": 16, "align": 0.0, "drop": 0.5, "seed": 7}
    )
    draws = Draws(plan, data)
    optimizer = torch.optim.AdamW(control.parameters(), 3e-4, weight_decay=0.01)
    start, kept, mean = 0, out / "training.pt", 0.0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        control.load_state_dict(state["control"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.time()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(1, (step + 1) / 50) * min(1, (steps - step) / (0.3 * steps))
        draws.config = replace(plan, size=SIZES[step % len(SIZES)])
        rows = [draws[step * plan.batch + i] for i in range(plan.batch)]
        pixels, noise = (torch.stack([getattr(row, name) for row in rows]) for name in ("pixels", "noise"))
        t = torch.tensor([row.timestep for row in rows])
        loss = loss_of(denoiser, pixels, noise, t, [row.prompt for row in rows], control=control)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if not mean else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(
                f"step {step + 1} loss {mean:.4f} {(time.time() - began) / (step + 1 - start):.2f} s/step", flush=True
            )
            out.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"control": control.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                out / "part.pt",
            )
            (out / "part.pt").replace(kept)
    control.eval().half().save_pretrained(out)
    kept.unlink()


def pictures(data: Path, of: str, count: int = 30) -> list[Image.Image]:
    """The first `count` training pictures."""
    if of == "camvid":
        files = sorted((data / "camvid" / "train").iterdir())[:count]
        return [ds.read(file).image() for file in files]
    cells = pq.read_table(data / of / "train.parquet", columns=["img"]).slice(0, count)["img"].to_pylist()
    return [ds.read(Image.open(io.BytesIO(cell["bytes"]))).image() for cell in cells]


def train_lora(data: Path, of: str, steps: int, out: Path) -> None:
    from peft import LoraConfig

    denoiser: Any = ds.load("seedling", device="cpu", dtype="float32")
    network = denoiser.network
    network.requires_grad_(False)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]
    network.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian"))
    learned = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-3, weight_decay=0.01)
    images, rng, mean = pictures(data, of), np.random.default_rng(0), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * min(1, (steps - step) / (0.3 * steps))
        size = SIZES[step % len(SIZES)]
        crops = []
        for _ in range(16):
            image = images[rng.integers(len(images))]
            crop = image.resize((size, size), Image.Resampling.BICUBIC, box=random_box(rng, image.size, (0.2, 1.0)))
            crops.append(np.asarray(crop)[:, :: -1 if of != "faces" and rng.random() < 0.5 else 1])
        pixels = torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
        t = torch.from_numpy(rng.integers(0, 1000, 16))
        loss = loss_of(denoiser, pixels, noise, t, [""] * 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.item() if not mean else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"{of} step {step + 1} loss {mean:.4f}", flush=True)
    network.half().save_lora_adapter(out, weight_name=f"lora-{of}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("canny", "lora"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--of", choices=("camvid", "birds", "faces"), default="camvid")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "weights")
    asked = parser.parse_args()
    if asked.what == "canny":
        train_canny(asked.data, asked.steps or 1200, asked.out / "canny")
    else:
        train_lora(asked.data, asked.of, asked.steps or 400, asked.out)


if __name__ == "__main__":
    main()
