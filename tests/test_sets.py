"""Names and sets of activations, and attention features, against the recording of the published extractor and by hand."""

import json

import pytest
import tiny
import torch
from conftest import GOLDEN, relative, smooth_picture
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

import denoscope as ds
from denoscope.features.gdf import gdf_of, site_of
from denoscope.features.sets import SETS, attention_places, expand, grid, readings
from denoscope.sites import Skeleton, unet_sites

RECORDED = GOLDEN / "content-shift-features"


@pytest.fixture(scope="module")
def recorded():
    cases = json.loads((RECORDED / "cases.json").read_text())
    return {case["name"]: case for case in cases["cases"]}, load_file(RECORDED / "fixture.safetensors")


@pytest.fixture(scope="module")
def gdf():
    return ds.load(RECORDED / "pipeline", device="cpu")


@pytest.fixture(scope="module")
def transformers_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name in ("xl", "dit", "pixart", "flux"):
        tiny.saved(folder / name, name)
    return {name: ds.load(folder / name, device="cpu") for name in ("xl", "dit", "pixart", "flux")}


def read(denoiser, name, noisy, prompt=None, t=50):
    """The one feature that a name stands for."""
    (reading,) = readings(denoiser, [name])
    condition = denoiser.condition(None if prompt is None else [prompt])
    with torch.no_grad(), ds.Watch(denoiser, reading.watch) as seen:
        denoiser.predict(noisy, t, condition)
    return reading.values(seen.seen, tuple(noisy.shape[-2:]))


def noise(denoiser, height, width):
    return torch.randn(1, denoiser.latent_shape(64, 64)[0], height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", ["legacy", "practical", "amal_attn", "map_ffn"])
def test_names_of_the_published_extractor_read_what_it_recorded(case, recorded, gdf):
    cases, tensors = recorded
    ids = [name for name in cases[case]["order"] if name != "attn"]
    sites = [site for name in ids for site in expand(gdf, name)]
    with torch.no_grad(), ds.Watch(gdf, sites) as seen:
        gdf.predict(
            tensors[f"{case}.unet_input"], int(cases[case]["unet_calls_t"][0]), gdf.condition(["a photo of a cat"])
        )
    for name, site in zip(ids, sites, strict=True):
        assert relative(seen[site], tensors[f"{case}/{name}"]) < 5e-6, name


def test_the_attention_feature_is_the_recorded_one(recorded, gdf):
    _, tensors = recorded
    found = read(gdf, "attention.up_cross", tensors["amal_attn.unet_input"], "a photo of a cat", 51)
    assert found.shape == (1, 154, 16, 16)
    assert relative(found, tensors["amal_attn/attn"]) < 5e-6


def test_rows_of_attention_sum_to_one_and_sizes_stay_apart(sd):
    found = read(sd, "attention.up_cross", noise(sd, 16, 16), "a photo of a cat")
    coarse, fine = found[0, :77], found[0, 77:]
    for part in (coarse, fine):
        assert torch.allclose(part.sum(0), torch.ones(16, 16), atol=1e-5)
    for part, factor in ((coarse, 4), (fine, 2)):  # nearest: every token repeats its cells
        cells = part[:, ::factor, ::factor]
        assert torch.equal(part, cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    assert not torch.equal(fine[:, ::4, ::4], fine[:, 2::4, 2::4])


def test_attention_is_the_mean_over_heads_and_layers_of_one_size(sd):
    noisy = noise(sd, 16, 16)
    names = [f"up.2.attn.{j}.cross_map" for j in range(3)]
    with torch.no_grad(), ds.Watch(sd, names) as seen:
        sd.predict(noisy, 50, sd.condition([""]))
    by_hand = torch.stack([seen[name].mean(1) for name in names]).mean(0)  # [batch, tokens, words]
    found = read(sd, "attention.up_cross", noisy, "")[0, 77:, ::2, ::2]
    assert torch.allclose(found, by_hand[0].T.reshape(77, 8, 8), atol=1e-6)


@pytest.mark.parametrize("size", [(13, 9), (8, 24), (11, 16)])
def test_attention_of_pictures_that_are_no_squares(sd, size):
    """Tokens keep their rows and columns, also where a stride does not divide the latents."""
    noisy = noise(sd, *size)
    found = read(sd, "attention.up_cross", noisy, "")
    assert found.shape == (1, 154, *size)
    assert torch.allclose(found[0, :77].sum(0), torch.ones(size), atol=1e-5)
    with (
        torch.no_grad(),
        ds.Watch(sd, ["up.2.attn.0.cross_query", "up.2.attn.0.cross_map", "up.2.attn.1.cross_map"]) as seen,
    ):
        sd.predict(noisy, 50, sd.condition([""]))
    assert tuple(seen["up.2.attn.0.cross_query"].shape[-2:]) == grid(size, 2)


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([2, 4]))
def test_the_grid_is_that_of_repeated_halving(height, width, ratio):
    """A convolution of stride 2 and padding 1 leaves ceil(n / 2) cells."""
    size = (height, width)
    for _ in range({2: 1, 4: 2}[ratio]):
        size = tuple(F.conv1d(torch.zeros(1, 1, n), torch.zeros(1, 1, 3), stride=2, padding=1).shape[-1] for n in size)
    assert grid((height, width), ratio) == size


def test_a_cross_query_is_the_projection_of_the_normalised_tokens(sd):
    noisy, name = noise(sd, 8, 12), "up.1.attn.1.cross_query"
    block = sd.network.get_submodule("up_blocks.1.attentions.1.transformer_blocks.0")
    inputs = []
    handle = block.norm2.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad(), ds.Watch(sd, [name]) as seen:
        sd.predict(noisy, 50, sd.condition([""]))
    handle.remove()
    with torch.no_grad():
        by_hand = block.attn2.to_q(block.norm2(inputs[0])).mT.unflatten(-1, (2, 3))
    assert torch.equal(seen[name], by_hand)


def test_attention_of_transformers(transformers_of):
    pixart, flux = transformers_of["pixart"], transformers_of["flux"]
    found = read(pixart, "attention.cross", noise(pixart, 8, 12), "a cat")
    assert found.shape[2:] == (8, 12)
    assert torch.allclose(found.sum(1), torch.ones(()), atol=1e-5)
    assert torch.equal(found, read(pixart, "attention.up_cross", noise(pixart, 8, 12), "a cat"))
    noisy = noise(flux, 8, 12)
    both = read(flux, "attention.cross,self", noisy, "a cat")
    assert both.shape == (1, 512 + 4 * 6, 8, 12)
    assert torch.allclose(both.sum(1), torch.ones(()), atol=1e-5)  # image and prompt share a softmax


def test_published_sets_have_the_published_channels():
    """On networks of the published shapes, without weights."""
    with torch.device("meta"):
        plain = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        large = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=(2, 1, 1), transformer_layers_per_block=(1, 2, 8),  # not all of its repeats
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        noisy, t, tokens = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
        noisy_large, tokens_large = torch.zeros(1, 4, 128, 128), torch.zeros(1, 77, 2048)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}

    def measured(network, family, forward, width):
        named = unet_sites(network)
        for sites in SETS[family].values():  # as the published code concatenates them
            assert sorted(sites, key=[site.name for site in named].index) == list(sites)
        members = [site for site in named if any(site.name in sites for sites in SETS[family].values())]
        counts = {site.name: site.channels for site in Skeleton(network, members).measured(forward, width)}
        return {name: sum(counts[site] for site in sites) for name, sites in SETS[family].items()}

    found = measured(plain, "stable-diffusion", lambda network: network(noisy, t, tokens), 512)
    assert found == {"legacy": 3520, "practical": 3520, "amalgamation": 2880}
    found = measured(
        large,
        "stable-diffusion-xl",
        lambda network: network(noisy_large, t, tokens_large, added_cond_kwargs=added),
        1024,
    )
    assert found == {"legacy": 2240, "practical": 3840, "playground": 1280}


def test_a_setting_names_sites_sets_and_published_names(sd):
    assert expand(sd, "up.1") == ["up.1"]
    assert expand(sd, "up.2 + mid+up.2") == ["up.2", "mid"]
    assert expand(sd, "up.1+practical") == ["up.1", *SETS["stable-diffusion"]["practical"]]
    assert expand(sd, "up-level1-repeat1-vit-block0-cross-q+mid-vit-out") == ["up.1.attn.1.cross_query", "mid.attn.0"]
    assert expand(sd, "up.1.attn.1.block.0.cross_query") == ["up.1.attn.1.cross_query"]  # its only block
    assert expand(sd, "up-level1-repeat1-vit-block0-out") == ["up.1.attn.1.block.0"]
    assert expand(sd, "amalgamation+attention.up_cross,mid_cross")[-1] == "attention.up_cross,mid_cross"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("up.1.atn.1.cross_qury", "nearest are up.1.attn.1.cross_query"),
        ("up.1+", "no site ''"),
        ("up-level1-repeat1-vit-block0-cross-k", "belong to the words of the prompt"),
        ("unet-after-conv-in", "are no features"),
        ("vae-out", "one sampling step later"),
        ("up-level1-repeat1-vit-block0-nonsense", "no activation; write for example"),
        ("up-level9-repeat1-res-out", "no site 'up-level9-repeat1-res-out'"),
        ("playground", "no set 'playground'.*there are legacy, practical, amalgamation"),
        ("attention.sideways_cross", "no attention at 'sideways_cross'.*it has .*up_cross"),
        ("attention.up_cross,,", "no attention at ''"),
    ],
)
def test_wrong_names_are_explained(sd, name, message):
    with pytest.raises(ds.InputError, match=message):
        expand(sd, name)


def test_what_a_model_has_not_is_said(sd, adm, seedling, transformers_of):
    with pytest.raises(ds.InputError, match=r"up.2.attn.1.cross_map is no map of features.*attention.up_cross"):
        readings(sd, ["up.1", "up.2.attn.1.cross_map"])
    with pytest.raises(ds.InputError, match="no site 'up.77'"):
        readings(sd, ["up.77"])
    with pytest.raises(ds.InputError, match="2 to 4 latent cells; those of seedling have 8"):
        readings(seedling, expand(seedling, "attention.up_cross"))
    with pytest.raises(ds.InputError, match="no attention layers that can be read"):
        expand(adm, "attention.up_cross")
    with pytest.raises(ds.InputError, match="no attention at 'cross'.*it has self"):
        expand(transformers_of["dit"], "attention.cross")
    with pytest.raises(ds.InputError, match="none are published"):
        expand(transformers_of["flux"], "practical")
    with pytest.raises(
        ds.InputError, match="has no up.1.attn.0.block.0, of the set|has no up.0.attn.0.block.5, of the set"
    ):
        expand(transformers_of["xl"], "practical")  # two levels, two blocks


def test_every_published_name_leads_back_to_its_site(sd, transformers_of):
    nameless = {}
    for denoiser in (sd, *transformers_of.values()):
        known = [site.name for site in denoiser.sites(sizes=False)]
        names = {site: gdf_of(site, known) for site in known}
        published = {site: name for site, name in names.items() if name is not None}
        assert len(set(published.values())) == len(published)
        assert {site: site_of(name, known) for site, name in published.items()} == {site: site for site in published}
        nameless[denoiser.family] = [site for site, name in names.items() if name is None]
    assert nameless["stable-diffusion"] == ["down.3", "mid", "up.3"]  # the ends of these levels have names of their own
    assert nameless["flux"] == []
    pixart = [site.name for site in transformers_of["pixart"].sites(sizes=False)]
    flux = [site.name for site in transformers_of["flux"].sites(sizes=False)]
    assert (gdf_of("block.2.key", pixart), gdf_of("block.2.key", flux)) == ("vit-block2-self-k", "vit-block2-k")
    assert gdf_of("down.1.attn.0.block.1.value") == "down-level1-repeat0-vit-block1-self-v"
    assert gdf_of("out.7") is None


@given(
    st.text(max_size=40)
    | st.from_regex(r"(up|mid|vit)-(level\d-)?(repeat\d-)?(vit|res)-[a-z0-9-]{0,12}", fullmatch=True)
)
def test_any_text_is_a_published_name_or_refused(text):
    try:
        site = site_of(text)
    except ds.InputError:
        return
    name = gdf_of(site)
    assert name is None or site_of(name) == site


def test_places_are_in_the_order_of_the_pass(sd):
    places = attention_places(sd)
    assert list(places) == ["down_self", "down_cross", "mid_self", "mid_cross", "up_self", "up_cross"]
    assert [site.name for site in places["up_cross"]][:2] == ["up.1.attn.0.cross_map", "up.1.attn.1.cross_map"]


def test_features_of_a_set_are_its_members_side_by_side(sd):
    """Nearest to the finest, raw, in the written order: as the extraction script of the published code writes them."""
    picture = smooth_picture(3, 96, 64)
    made = {"t": 50, "ensemble": 1, "size": "96x64"}
    parts = [ds.features(sd, picture, site=site, **made).values for site in SETS["stable-diffusion"]["legacy"]]
    size = parts[-1].shape[1:]
    by_hand = torch.cat([F.interpolate(part[None], size, mode="nearest")[0] for part in parts])
    assert torch.allclose(ds.features(sd, picture, site="legacy", **made).values, by_hand, atol=1e-5)


def test_models_lists_shapes_published_names_and_sets(run, tmp_path):
    status, out, _ = run("models", RECORDED / "pipeline", "--sites", "--size", "512x384")
    assert status == 0
    rows = {
        line.split()[0]: line.split(maxsplit=2)[2]
        for line in out.splitlines()
        if line.startswith(("up.", "down.", "mid"))
    }
    assert rows["up.2.attn.1.cross_query"].split("  ")[0] == "16 x 24 x 32"
    assert rows["up.2.attn.1.cross_query"].endswith(" up-level2-repeat1-vit-block0-cross-q")
    assert rows["up.2.attn.1.cross_map"].startswith("4 x 768 x words ")
    assert rows["mid.attn.0.self_map"].startswith("4 x 48 x 48 ")
    assert "set practical: 56 channels, up.1.attn.1.cross_query + up.1.resnet.2" in out
    assert "attention.up_cross" in out.splitlines()[-1]
    assert "mid_cross" not in out.splitlines()[-1]  # its tokens have 8 latent cells a side
    tiny.saved(tmp_path, "pixart")
    _, out, _ = run("models", tmp_path, "--sites")  # the preset's long640: 80 latent cells, 40 tokens a side
    assert any(
        line.split() == ["block.1.cross_query", "tokens", "24", "x", "40", "x", "40", "vit-block1-cross-q"]
        for line in out.splitlines()
    )
    _, out, _ = run("models", tmp_path, "--size", "96x64")
    assert "cross_query" not in out
    assert "24 x 4 x 6" in next(line for line in out.splitlines() if line.startswith("block.1 "))
    status, _, err = run("models", tmp_path, "--size", "100")
    assert status == 2
    assert "multiples of 16" in err
