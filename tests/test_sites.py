"""Reading activations: nothing changes, nothing is left behind, the numbers are the network's own."""

import pytest
import torch
from conftest import smooth_picture

import denoscope as ds


def noisy_input(denoiser, size=64):
    latents = denoiser.encode(smooth_picture(1).resized((size, size))[None])
    return denoiser.schedule.add_noise(
        latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), 100
    )


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.mark.parametrize("family", ["sd", "adm", "seedling"])
def test_every_site_is_reached_with_the_announced_shape(family, request):
    denoiser = request.getfixturevalue(family)
    noisy, size = noisy_input(denoiser), 64
    sites = denoiser.sites()
    assert len({site.name for site in sites}) == len(sites)
    condition = denoiser.condition(None)
    with torch.no_grad(), ds.Watch(denoiser, [site.name for site in sites], stop=False) as seen:
        denoiser.predict(noisy, 100, condition)
    for site in sites:
        value = seen[site.name]
        assert value.shape[1] == site.channels, site
        if site.kind == "map":
            assert value.shape[2] == (size / site.stride) ** 2
            assert torch.allclose(value.sum(-1), torch.ones(()), atol=1e-5)
        else:
            assert tuple(value.shape[-2:]) == (size / site.stride,) * 2, site


@pytest.mark.parametrize("family", ["sd", "adm", "seedling"])
def test_early_stop_reads_what_a_full_pass_reads(family, request):
    """Spec 7a.1, bitwise, for every block."""
    denoiser = request.getfixturevalue(family)
    noisy, condition = noisy_input(denoiser), denoiser.condition(None)
    blocks = [site.name for site in denoiser.sites() if site.kind == "block"]
    with torch.no_grad(), ds.Watch(denoiser, blocks, stop=False) as full:
        before = denoiser.predict(noisy, 100, condition)
    for name in blocks:
        with torch.no_grad(), ds.Watch(denoiser, [name]) as early:
            denoiser.predict(noisy, 100, condition)
            pytest.fail("the forward pass went on")
        assert torch.equal(early[name], full[name])
    with torch.no_grad():
        assert torch.equal(denoiser.predict(noisy, 100, condition), before)
    assert hooks(denoiser.network) == 0


def test_attention_maps_are_those_of_the_network(sd):
    """The map times the values, through the output projection, is the attention layer's own output."""
    noisy, condition = noisy_input(sd), sd.condition(["a photo of a cat"])
    name = "up.2.attn.1"
    layer = sd.network.get_submodule("up_blocks.2.attentions.1.transformer_blocks.0.attn1")
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    sites = [f"{name}.self_map", f"{name}.value", f"{name}.query", f"{name}.cross_map"]
    with torch.no_grad(), ds.Watch(sd, sites, stop=False) as seen:
        sd.predict(noisy, 100, condition)
    handle.remove()
    values = seen[f"{name}.value"].flatten(2).mT.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    mixed = (seen[f"{name}.self_map"] @ values).transpose(1, 2).flatten(2)
    assert torch.allclose(layer.to_out[0](mixed), outputs[0], atol=1e-5)
    assert seen[f"{name}.cross_map"].shape[-1] == 77


def test_the_network_is_left_as_found_after_an_exception(sd):
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in sd.network.named_parameters()}
    with pytest.raises(RuntimeError, match="mine"), ds.Watch(sd, ["up.1", "mid"]):
        raise RuntimeError("mine")
    with pytest.raises(Exception), ds.Watch(sd, ["up.1"]):  # noqa: B017, PT011 - whatever torch says of a wrong shape
        sd.predict(torch.zeros(1, 7, 8, 8), 0, sd.condition(None))
    assert hooks(sd.network) == 0
    assert before == {name: (p.data_ptr(), p.requires_grad) for name, p in sd.network.named_parameters()}


def test_mistakes_are_named(sd):
    with pytest.raises(ds.InputError, match="no site 'up.7'.*up.3.*finer"):
        ds.Watch(sd, ["up.7"])
    with pytest.raises(ds.InputError, match="at least one site"):
        ds.Watch(sd, [])
    with pytest.raises(ds.InputError, match="never reached 'up.1'"), ds.Watch(sd, ["up.1"]):
        pass


def test_take_empties_the_watch_between_steps(adm):
    noisy = noisy_input(adm, 32)
    with torch.no_grad(), ds.Watch(adm, ["mid"], stop=False) as watch:
        adm.predict(noisy, 100, adm.condition(None))
        first = watch.take()
        assert list(watch) == []
        adm.predict(noisy, 900, adm.condition(None))
        second = watch.take()
    assert not torch.equal(first["mid"], second["mid"])


def test_the_output_of_an_only_block_is_what_the_layer_projects(sd):
    """`up.1.attn.0.block.0` goes through proj_out and past the layer's skip; the result is `up.1.attn.0`."""
    noisy, condition, name = noisy_input(sd), sd.condition(None), "up.1.attn.0"
    layer = sd.network.get_submodule("up_blocks.1.attentions.0")
    skips = []
    handle = layer.register_forward_pre_hook(lambda module, args: skips.append(args[0]))
    with torch.no_grad(), ds.Watch(sd, [f"{name}.block.0", name]) as seen:
        sd.predict(noisy, 100, condition)
    handle.remove()
    with torch.no_grad():
        tokens = seen[f"{name}.block.0"]
        projected = (
            layer.proj_out(tokens)
            if isinstance(layer.proj_out, torch.nn.Conv2d)
            else layer.proj_out(tokens.flatten(2).mT).mT.unflatten(-1, tokens.shape[-2:])
        )
    assert torch.allclose(projected + skips[0], seen[name], atol=1e-5)
    places = [site.name for site in sd.sites(sizes=False)]
    assert places.index(f"{name}.feed_forward") < places.index(f"{name}.block.0") < places.index(name)


def test_sites_of_single_blocks_keep_rows_and_columns(sd):
    """Not only squares: a query of a wide picture is the projection of each place's own token."""
    latents = torch.randn(1, 4, 5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), ds.Watch(sd, ["up.3.attn.0.block.0", "up.3.attn.0"]) as seen:
        sd.predict(latents, 100, sd.condition(None))
    assert seen["up.3.attn.0.block.0"].shape[-2:] == seen["up.3.attn.0"].shape[-2:] == (5, 12)
