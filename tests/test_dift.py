"""DIFT features: parity with recordings of the official code, and the properties that any implementation has."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, relative, smooth_picture
from safetensors.torch import load_file

import denoscope as ds
from denoscope.features import concatenate, feature_maps, recipe, resolve_size

SD_CASES = json.loads((GOLDEN / "dift-sd" / "cases.json").read_text())
ADM_CASES = json.loads((GOLDEN / "dift-adm" / "cases.json").read_text())["cases"]


@pytest.mark.parametrize("case", [c for c in SD_CASES if c["name"].startswith("c")], ids=lambda c: c["name"])
def test_stable_diffusion_parity(sd, case):
    recorded, name = load_file(GOLDEN / "dift-sd" / "fixture.safetensors"), case["name"]
    picture, size = ds.read(GOLDEN / "dift-sd" / case["image"]), tuple(case["img_size_wh"])
    pixels = picture.resized(size)
    assert torch.equal(pixels, recorded[f"{name}.img_tensor"])
    assert sd.text.ids(case["prompt"])[0].tolist() == case["input_ids"]
    assert relative(sd.condition([case["prompt"]]).tokens, recorded[f"{name}.prompt_embeds"]) < 1e-5
    posterior = sd.posterior(pixels[None])
    scale = sd.vae.config.scaling_factor
    assert relative(posterior.mean, scale * recorded[f"{name}.posterior_mean"]) < 1e-5
    assert relative(posterior.std, scale * recorded[f"{name}.posterior_std"]) < 1e-5
    noise = ds.Noise(recorded[f"{name}.noise"], recorded[f"{name}.posterior_noise"])
    noisy = sd.schedule.add_noise(posterior.sample(noise.posterior), noise.diffusion, case["t"])
    assert relative(noisy, recorded[f"{name}.latents_noisy"]) < 1e-5
    options = {"t": case["t"], "site": f"up.{case['up_ft_index']}", "prompt": case["prompt"], "size": size}
    fm = ds.features(sd, picture, noise=noise, **options)
    assert relative(fm.values, recorded[f"{name}.dift"][0]) < 1e-5
    member = ds.features(sd, picture, noise=ds.Noise(noise.diffusion[:1], noise.posterior[:1]), **options)
    assert relative(member.values, recorded[f"{name}.up_ft_members"][0]) < 1e-4


@pytest.mark.parametrize("case", [c for c in SD_CASES if c["name"].startswith("eval")], ids=lambda c: c["name"])
def test_evaluation_class_parity(sd, case):
    """`SDFeaturizer4Eval`, whose noise is known only through its seed and memory layout."""
    picture = ds.read(GOLDEN / "dift-sd" / case["image"])
    size = tuple(case["img_size_wh"] or picture.size)
    shape = (case["ensemble_size"], *sd.posterior(picture.resized(size)[None]).mean.shape[1:])
    torch.manual_seed(case["seed"])
    posterior = torch.randn(shape)
    layout = torch.channels_last if shape[0] > 1 else torch.contiguous_format
    diffusion = torch.empty(shape, memory_format=layout).normal_().contiguous()
    prompt = f"a photo of a {case['category']}" if case["category"] in ("cat", "dog") else ""
    fm = ds.features(
        sd, picture, t=case["t"], site=f"up.{case['up_ft_index']}", prompt=prompt,
        size=size if case["img_size_wh"] else 0, noise=ds.Noise(diffusion, posterior),
    )  # fmt: skip
    recorded = load_file(GOLDEN / "dift-sd" / "fixture.safetensors")[f"{case['name']}.dift"][0]
    assert relative(fm.values, recorded) < 1e-5


@pytest.mark.parametrize("case", ADM_CASES, ids=lambda c: c["name"])
def test_adm_parity(adm, case):
    recorded, name = load_file(GOLDEN / "dift-adm" / "fixture.safetensors"), case["name"]
    picture, size = ds.read(GOLDEN / "dift-adm" / case["image"]), tuple(case["img_size_wh"])
    assert torch.allclose(picture.resized(size), recorded[f"{name}.img_tensor"], atol=1e-6)
    noise = ds.Noise(recorded[f"{name}.noise"])
    fm = ds.features(adm, picture, t=case["t"], site=f"out.{case['up_ft_index']}", size=size, noise=noise)
    assert relative(fm.values, recorded[f"{name}.dift"][0]) < 1e-5
    if name == "c0":
        noisy = adm.schedule.add_noise(picture.resized(size), noise.diffusion, case["t"])
        assert relative(noisy, recorded["c0.x_t"]) < 1e-6
        assert relative(adm.schedule.signal.float(), recorded["sqrt_alphas_cumprod"]) < 1e-6
        assert relative(adm.schedule.noise.float(), recorded["sqrt_one_minus_alphas_cumprod"]) < 1e-6


def test_ensemble_is_mean_of_members_in_any_chunks(sd):
    """Spec 7a.2, 7a.3: encoding once and chunking change nothing."""
    picture = smooth_picture(1)
    noise = ds.Noise.draw((4, 8, 8), 3, 0, 261, 4, posterior=True)
    whole = ds.features(sd, picture, size=64, noise=noise)
    singles = [
        ds.features(sd, picture, size=64, noise=ds.Noise(noise.diffusion[i : i + 1], noise.posterior[i : i + 1]))
        for i in range(4)
    ]
    assert relative(whole.values, torch.stack([fm.values for fm in singles]).mean(0)) < 1e-6
    for chunk in (1, 3):
        assert relative(ds.features(sd, picture, size=64, noise=noise, chunk=chunk).values, whole.values) < 1e-6


def test_encoding_once_equals_encoding_copies(sd):
    pixels = smooth_picture(1).resized((64, 64))[None]
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    once = sd.posterior(pixels).sample(noise)
    assert relative(once, sd.posterior(pixels.expand(3, -1, -1, -1)).sample(noise)) < 2e-6


def test_noise_depends_on_content_and_seed_alone():
    a = ds.Noise.draw((4, 8, 8), 0, 7, 261, 3, posterior=True)
    b = ds.Noise.draw((4, 8, 8), 0, 7, 261, 5, posterior=False)
    assert torch.equal(a.diffusion, b.diffusion[:3])
    assert b.posterior is None
    for key in ((1, 7, 261), (0, 8, 261), (0, 7, 260)):
        assert not torch.equal(a.diffusion, ds.Noise.draw((4, 8, 8), *key, 3, posterior=False).diffusion)
    assert not torch.equal(a.diffusion, a.posterior)
    assert abs(a.diffusion.mean()) < 0.1
    assert abs(a.diffusion.std() - 1) < 0.1


def test_seed_is_reproducible_and_ignores_the_global_generator(sd):
    picture = smooth_picture(2)
    torch.manual_seed(1)
    one = ds.features(sd, picture, size=64, ensemble=2)
    torch.manual_seed(2)
    assert torch.equal(one.values, ds.features(sd, picture, size=64, ensemble=2).values)
    assert not torch.equal(one.values, ds.features(sd, picture, size=64, ensemble=2, seed=1).values)


def test_clean_schedule_ignores_noise(adm):
    """Spec 7a.10: with alphabar = 1 the features do not depend on the draw."""
    schedule = ds.NoiseSchedule.from_alphas_cumprod(torch.ones(10))
    clean = type(adm)(adm.unet, schedule)
    picture = smooth_picture(3)
    one, two = (ds.features(clean, picture, t=5, site="out.3", size=32, ensemble=1, seed=seed) for seed in (0, 1))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.values, ds.features(clean, picture, t=5, site="out.3", size=32, noise="none").values)


def test_ensemble_variance_falls_as_one_over_members(adm):
    """Spec 7a.11."""
    picture = smooth_picture(4)

    def spread(members: int) -> float:
        maps = [
            ds.features(adm, picture, t=300, site="out.3", size=32, ensemble=members, seed=seed).values
            for seed in range(6)
        ]
        pairs = zip(maps[::2], maps[1::2], strict=True)
        return sum(((a - b) ** 2).mean().item() for a, b in pairs) / 3

    assert 0.6 < 4 * spread(4) / spread(1) < 1.6


def test_odd_sizes_keep_every_pixel(sd):
    fm = ds.features(sd, smooth_picture(5, 104, 72), size="0", ensemble=1)
    assert fm.values.shape[1:] == (5, 7)  # latents 13 x 9, halved with rounding up
    corners = torch.tensor([[-0.5, -0.5], [103.5, 71.5]], dtype=torch.float64)
    assert torch.allclose(fm.frame.to_grid(corners), torch.tensor([[-0.5, -0.5], [6.5, 4.5]], dtype=torch.float64))


def test_several_sites_from_one_pass(sd):
    picture = smooth_picture(6)
    chosen = recipe(sd, ensemble=2, size=64)
    maps = feature_maps(sd, picture, chosen, ["mid", "up.1"])
    assert torch.equal(maps["up.1"].values, ds.features(sd, picture, ensemble=2, size=64).values)
    assert torch.equal(maps["mid"].values, ds.features(sd, picture, site="mid", ensemble=2, size=64).values)


def test_joined_sizes_weigh_the_same(seedling):
    picture, other = smooth_picture(6, 64, 48), smooth_picture(7, 64, 48)
    options = {"ensemble": 1, "site": "up.1", "t": 20}
    joined = [ds.features(seedling, p, size="32x24+64x48", **options) for p in (picture, other)]
    fine = [ds.features(seedling, p, size="64x48", **options) for p in (picture, other)]
    coarse = [ds.features(seedling, p, size="32x24", **options) for p in (picture, other)]
    assert joined[0].values.shape == (2 * fine[0].values.shape[0], *fine[0].values.shape[1:])
    assert joined[0].recipe["size"] == [[32, 24], [64, 48]]
    points = fine[0].frame.to_picture(torch.tensor([[5.0, 7.0], [20.0, 11.0]], dtype=torch.float64))  # cell centres

    def cosine(pair):
        return torch.nn.functional.cosine_similarity(pair[0].at(points), pair[1].at(points))

    unit = [replace(fm, values=torch.nn.functional.normalize(fm.values, dim=0)) for fm in coarse]
    assert torch.allclose(cosine(joined), (cosine(fine) + cosine(unit)) / 2, atol=1e-4)
    with pytest.raises(ds.InputError, match="one picture"):
        concatenate([fine[0], ds.features(seedling, smooth_picture(6, 48, 48), size=48, **options)])
    with pytest.raises(ds.InputError, match="cover the whole"):
        concatenate([fine[0], replace(fine[0], frame=fine[0].frame.crop(0, 0, *fine[0].frame.grid).pad(1, 0, -1, 0))])


def test_saved_features_come_back(sd, tmp_path):
    fm = ds.features(sd, GOLDEN / "dift-sd" / "cat.png", size=64, ensemble=1)
    again = ds.FeatureMap.load(fm.save(tmp_path / "deep" / "cat.safetensors"))
    assert torch.equal(again.values, fm.values)
    assert (again.frame, again.recipe) == (fm.frame, fm.recipe)
    assert again.picture is not None
    assert again.picture.digest == ds.read(GOLDEN / "dift-sd" / "cat.png").digest
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["cat.safetensors"]
    with pytest.raises(ds.InputError, match="safetensors"):
        fm.save(tmp_path / "cat.npy")
    with pytest.raises(ds.MissingError):
        ds.FeatureMap.load(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not features")
    with pytest.raises(ds.InputError, match="does not hold features"):
        ds.FeatureMap.load(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"t": 1000}, r"\[0, 1000\)"),
        ({"t": -1}, r"\[0, 1000\)"),
        ({"site": "up.9"}, r"no site 'up.9'.*nearest are up.3"),
        ({"site": "up.1.attn.0.self_map"}, "no map of features"),
        ({"preset": "artistic"}, "semantic, geometric, temporal"),
        ({"ensemble": 0}, "at least 1 member"),
        ({"size": 48}, "at least 64"),
        ({"size": "big"}, "not understood"),
        ({"prompt": 3}, "prompts, not by class numbers"),
        ({"noise": ds.Noise(torch.zeros(1, 4, 9, 9))}, r"\[4, 9, 9\].*\[4, 8, 8\]"),
        ({"noise": ds.Noise(torch.zeros(2, 4, 8, 8)), "ensemble": 3}, "2 members"),
    ],
)
def test_bad_settings_are_named(sd, options, sentence):
    with pytest.raises(ds.InputError, match=sentence):
        ds.features(sd, smooth_picture(0), **{"size": 64, "ensemble": 1, **options})


def test_adm_needs_multiples_of_its_stride(adm):
    with pytest.raises(ds.InputError, match="multiples of 4; use size 32x36"):
        ds.features(adm, smooth_picture(0), size=(32, 34), ensemble=1)
    with pytest.raises(ds.InputError, match="unconditional"):
        ds.features(adm, smooth_picture(0), size=32, ensemble=1, prompt="a cat")


def test_features_that_overflow_are_refused(adm):
    with torch.no_grad():
        adm.unet.out[2].bias.fill_(0)  # not on the way to the site
        before = adm.unet.input_blocks[0][0].bias.clone()
        adm.unet.input_blocks[0][0].bias.fill_(float("inf"))
    try:
        with pytest.raises(ds.InputError, match="not finite"):
            ds.features(adm, smooth_picture(0), size=32, ensemble=1, site="out.3")
    finally:
        adm.unet.input_blocks[0][0].bias.copy_(before)


def test_long_prompts_and_unknown_words_are_told(sd, seedling):
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        sd.condition(["cat " * 200])
    with pytest.warns(UserWarning, match="does not hold: zeppelin"):
        seedling.condition(["a photo of a zeppelin"])


@pytest.mark.parametrize(
    ("size", "picture", "expected"),
    [
        (768, (500, 300), (768, 768)),
        ("640x480", (500, 300), (640, 480)),
        ((640, 480), (500, 300), (640, 480)),
        ("0", (500, 300), (500, 300)),
        ("short480", (854, 480), (832, 480)),
        ("short480", (480, 854), (480, 832)),
        ("long128", (500, 300), (128, 80)),
        ("long128", (300, 500), (80, 128)),
    ],
)
def test_sizes(size, picture, expected):
    assert resolve_size(size, picture) == expected
