"""The embedded model: small, ordinary, told by prompts, and better than chance at its job."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

import denoscope as ds
from denoscope.cli.demo import PHOTOS
from denoscope.denoisers.loading import SEEDLING
from denoscope.images import as_points


def test_it_is_small_and_any_diffusers_user_can_load_it(seedling):
    assert all(path.stat().st_size <= 16e6 for path in SEEDLING.rglob("*"))
    unet = UNet2DConditionModel.from_pretrained(SEEDLING, subfolder="unet")
    text = CLIPTextModel.from_pretrained(SEEDLING, subfolder="text_encoder")
    assert sum(p.numel() for module in (unet, text) for p in module.parameters()) <= 15e6
    assert unet.config["in_channels"] == 3
    tokenizer = AutoTokenizer.from_pretrained(SEEDLING, subfolder="tokenizer")
    scheduler = DDIMScheduler.from_pretrained(SEEDLING, subfolder="scheduler")
    ids = tokenizer("a photo of a bird", padding="max_length", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert (ids == tokenizer.eos_token_id).sum() == 1
    noisy = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = unet(noisy, 400, text(ids).last_hidden_state).sample
        eps = seedling.predict(noisy, 400, seedling.condition(["a photo of a bird"]))
    alpha = scheduler.alphas_cumprod[400]
    assert torch.allclose(eps, (1 - alpha).sqrt() * noisy + alpha.sqrt() * v, atol=1e-4)


def test_it_denoises(seedling):
    """On photos it never saw, its estimate of the clean picture is far closer than the noisy picture is."""
    for name in ("collins.jpg", "chelsea.jpg"):
        clean = seedling.encode(ds.read(PHOTOS / name).resized((32, 32))[None])
        eps = torch.randn(8, *clean.shape[1:], generator=torch.Generator().manual_seed(1))
        noisy = seedling.schedule.add_noise(clean, eps, 300)
        with torch.no_grad():
            guess = seedling.schedule.x0(seedling.predict(noisy, 300, seedling.condition([""])), noisy, 300)
        assert ((guess - clean) ** 2).mean() < 0.25 * ((noisy - clean) ** 2).mean()


def test_prompts_matter(seedling):
    """A cat is better denoised as a cat than as a face."""
    clean = seedling.encode(ds.read(PHOTOS / "chelsea.jpg").resized((32, 32))[None])
    eps = torch.randn(32, *clean.shape[1:], generator=torch.Generator().manual_seed(2))
    noisy = seedling.schedule.add_noise(clean, eps, 800)
    with torch.no_grad():
        losses = [
            ((seedling.predict(noisy, 800, seedling.condition([prompt])) - eps) ** 2).mean().item()
            for prompt in ("a photo of a cat", "a photo of a face")
        ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("size", [96, 160, "250x188", 512])
def test_it_runs_on_photos_of_many_sizes(seedling, size):
    fm = ds.features(seedling, PHOTOS / "chelsea.jpg", size=size, ensemble=1, site="up.0")
    assert fm.values.isfinite().all()


def test_presets_can_be_used(seedling):
    sites = {site.name for site in seedling.sites(sizes=False)}
    for name in ("semantic", "geometric", "temporal"):
        assert seedling.presets[name]["site"] in sites
        assert (
            ds.features(seedling, PHOTOS / "hopper.jpg", preset=name, ensemble=1).recipe["t"]
            == seedling.presets[name]["t"]
        )


def test_it_finds_points_of_a_photo_seen_again(seedling):
    """A grid over the middle of the cat, under a known perspective map and another light."""
    pair = next(p for p in json.loads((PHOTOS / "pairs.json").read_text()) if p["name"] == "cat")
    found = ds.match(
        seedling, PHOTOS / pair["source"], PHOTOS / pair["target"], pair["source_points"], preset="geometric"
    )
    errors = (found.points - as_points(pair["target_points"])).norm(dim=1)
    assert errors.median() < 20  # pixels of a 400 x 340 picture, where chance gives about 190


def test_card_and_recipe_lie_beside_the_weights():
    folder = Path(SEEDLING).parent
    assert "research" in (folder / "README.md").read_text()
    assert "[[sources]]" in (folder / "recipe.toml").read_text()
