"""Amalgamation: the rules without training, the assigners against the released code's recording, the losses, files."""

import argparse
import itertools
import json

import pytest
import torch
from conftest import GOLDEN, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import Tensor, nn

import denoscope as ds
from denoscope.benchmarks.pairs import Pairs
from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.semantic import transfer_square
from denoscope.errors import InputError, MissingError
from denoscope.features import paired
from denoscope.features.amalgamation import (
    Assigners,
    ChannelAssigner,
    ScalarAssigner,
    SparsityWalk,
    aggregate,
    amalgamate,
    mixed,
    mixing_weights,
    official_loss,
    paper_loss,
    read_assigners,
    standardised,
    weight_norms,
)
from denoscope.images import Frame

HEADS = GOLDEN / "content-shift-heads"


def feature_map(values: Tensor, site: str = "up.1", picture: tuple[int, int] = (96, 64)) -> ds.FeatureMap:
    return ds.FeatureMap(values, Frame.of(picture).resize((values.shape[2], values.shape[1])), {"site": site, "t": 50})


def random_map(seed: int, channels: int = 3, height: int = 4, width: int = 6, site: str = "up.1") -> ds.FeatureMap:
    return feature_map(torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)), site)


def assigners(seed: int = 0, **options) -> Assigners:
    """Untrained, in eval mode, with running statistics away from 0 and 1."""
    torch.manual_seed(seed)
    made = Assigners(**{"channels": 5, **options})
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return made.eval()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(HEADS / "fixture.safetensors")


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_aggregation_repeats_cells_and_keeps_values_and_order(count, height, width, up, across, seed) -> None:
    coarse = [random_map(seed + k, 2, height, width, f"up.{k}") for k in range(count)]
    fine = random_map(seed + 50, 3, height * up, width * across, "fine")
    made = aggregate([*coarse, fine])
    assert made.values.shape == (2 * count + 3, height * up, width * across)
    for k, fm in enumerate(coarse):
        repeated = fm.values.repeat_interleave(up, 1).repeat_interleave(across, 2)
        assert torch.equal(made.values[2 * k : 2 * k + 2], repeated)
    assert torch.equal(made.values[-3:], fine.values)
    assert made.frame == fine.frame
    assert made.recipe["site"] == "+".join([*(f"up.{k}" for k in range(count)), "fine"])


def test_aggregation_of_one_map_is_that_map() -> None:
    one = random_map(0)
    assert aggregate([one]) is one


def test_maps_that_do_not_belong_together_are_refused() -> None:
    whole = random_map(0)
    with pytest.raises(InputError, match="at least one"):
        aggregate([])
    with pytest.raises(InputError, match="map 1 is of another"):
        aggregate([whole, feature_map(whole.values, picture=(96, 65))])
    half = ds.FeatureMap(whole.values, Frame.of((96, 64)).crop(0, 0, 48, 64).resize((6, 4)), {})
    with pytest.raises(InputError, match="same part of one picture"):
        amalgamate([whole, half])
    values = whole.values.clone()
    values[1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        aggregate([whole, feature_map(values)])
    with pytest.raises(InputError, match=r"\[3, 4, 6\] and \[3, 2, 3\].*same site and size"):
        amalgamate([whole, random_map(1, 3, 2, 3)])
    with pytest.raises(InputError, match=r"\[3, 4, 6\] and \[2, 4, 6\]"):
        amalgamate([whole, random_map(1, 2)], assigners(channels=3))
    for how in ("median", "pca", "pca:0", "pca:-3", "mean "):
        with pytest.raises(InputError, match="mean, concat, standard, pca:N"):
            amalgamate([whole], how)


def test_mean_and_attention_beside_it() -> None:
    maps, attention = [random_map(k) for k in range(3)], random_map(9, 2, 8, 12, "attention.up_cross")
    made = amalgamate(maps, "mean", attention)
    mean = torch.stack([fm.values for fm in maps]).mean(0)
    assert torch.allclose(made.values[:3], mean.repeat_interleave(2, 1).repeat_interleave(2, 2), atol=1e-6)
    assert torch.equal(made.values[3:], attention.values)
    assert made.frame == attention.frame
    assert made.recipe["amalgam"] == "mean"
    assert [member["site"] for member in made.recipe["members"]] == ["up.1"] * 3


@given(st.integers(0, 99), st.floats(0.01, 1e3), st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_standardised_channels_forget_scale_and_shift(seed, scale, shift) -> None:
    values = random_map(seed, 4, 5, 7).values
    one, other = (standardised(feature_map(v)).values for v in (values, values.double().mul(scale).add(shift).float()))
    assert torch.allclose(one.mean((1, 2)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(one.var((1, 2), correction=0), torch.ones(4), atol=1e-4)
    assert (one - other).abs().max() < 2e-6 * (1 + abs(shift) / scale) * 10


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, -3e-12, 7e8])
def test_constant_channels_standardise_to_zero(value) -> None:
    assert standardised(feature_map(torch.full((2, 9, 7), value))).values.abs().max() == 0


def test_standard_balances_maps_of_different_size() -> None:
    loud, quiet = random_map(0), random_map(1)
    one, other = (amalgamate([feature_map(loud.values * s), quiet], "standard").values for s in (1, 1e4))
    assert torch.allclose(one, other, atol=1e-5)
    assert one.shape[0] == 6


def test_pca_is_of_both_pictures_of_a_pair_together() -> None:
    pair = [[random_map(10 * p + k, 4) for k in range(3)] for p in range(2)]
    one, two = (amalgamate(maps, "pca:5") for maps in pair)
    assert one.values.shape[0] == 12  # whole until compared
    made = [torch.nn.functional.normalize(fm.values.flatten(1), dim=0).mT for fm in paired(one, two)]
    standard = torch.cat([amalgamate(maps, "standard").values.flatten(1).mT for maps in pair])
    scores = torch.from_numpy(PCA(5).fit_transform(standard.double().numpy())).float()
    scores = torch.nn.functional.normalize(scores, dim=1)
    found = torch.cat(made)
    assert found.shape == (48, 5)
    assert torch.allclose(found @ found.mT, scores @ scores.mT, atol=1e-5)


def test_pca_of_more_channels_than_cells_keeps_every_cosine() -> None:
    one, two = (amalgamate([random_map(p + k, 40, 2, 3) for k in range(2)], "pca:99") for p in (0, 7))
    cells = torch.cat([fm.parts[0].values.flatten(1).mT for fm in (one, two)]).double()
    centred = torch.nn.functional.normalize(cells - cells.mean(0), dim=1)
    found = torch.cat([fm.values.flatten(1).mT for fm in paired(one, two)]).double()
    found = torch.nn.functional.normalize(found, dim=1)
    assert found.shape[1] <= 12
    assert torch.allclose(found @ found.mT, centred @ centred.mT, atol=1e-5)


def test_joined_with_pca_survives_a_file(tmp_path) -> None:
    one, two = (amalgamate([random_map(p + k) for k in range(2)], "pca:3", random_map(p + 5, 2)) for p in (0, 20))
    again = [ds.FeatureMap.load(fm.save(tmp_path / f"{k}.safetensors")) for k, fm in enumerate((one, two))]
    for made, read in zip(paired(one, two), paired(*again), strict=True):
        assert torch.allclose(made.values, read.values, atol=1e-6)
        assert read.recipe["amalgam"] == "pca:3"


def test_released_network_is_reproduced(recorded, tmp_path) -> None:
    """Weights under their released names, through a safetensors file and through a released checkpoint."""
    expected = json.loads((HEADS / "expected.json").read_text())["agg"]
    state = {name[7:]: value for name, value in recorded.items() if name.startswith("agg.sd.")}
    save_file(state, tmp_path / "agg.safetensors")
    checkpoint = {"step": 5, "config": argparse.Namespace(lr=1), "aggregation_network": state}
    torch.save(checkpoint, tmp_path / "agg.pt")
    for name in ("agg.safetensors", "agg.pt"):
        for head in ("conv", "nn"):
            network = read_assigners(tmp_path / name, head)
            assert (network.settings["channels"], network.settings["attention"]) == (20, 6)
            made = network(recorded["agg.x"], recorded["agg.attn"])
            assert relative(made.values, recorded[f"agg.out_{head}"]) < 1e-6
            assert -weight_norms(made.weights).mean().item() == pytest.approx(expected["sparsity_term"], rel=1e-6)


def test_amalgam_of_recorded_maps(recorded, tmp_path) -> None:
    """Through feature maps of one picture, as the extractor makes it."""
    save_file({k[7:]: v for k, v in recorded.items() if k.startswith("agg.sd.")}, tmp_path / "agg.safetensors")
    maps = [feature_map(values) for values in recorded["agg.x"][1]]
    made = amalgamate(maps, read_assigners(tmp_path / "agg.safetensors"), feature_map(recorded["agg.attn"][1]))
    assert relative(made.values, recorded["agg.out_conv"][1]) < 1e-6


@pytest.mark.parametrize("k", [0, 1, 2])
def test_pixel_assigners_are_those_released(recorded, k) -> None:
    """The assigners' part of the pixel classifier: its layers on the two mixtures give the recorded logits."""
    parts = []
    for name, x in (("weight_assigner", recorded["pix.x"]), ("weight_assigner_ddpm", recorded["pix.ddpm"])):
        f, prefix = ChannelAssigner(x.shape[2], pixels=True).eval(), f"pix{k}.sd.{name}.0."
        f.load_state_dict(
            {key[len(prefix) :]: v for key, v in recorded.items() if key.startswith(prefix)}, strict=False
        )
        parts.append(mixed(mixing_weights(f, x), x))
    sizes = [19, 128, 32, 5]
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.BatchNorm1d(b)]
    classifier, prefix = nn.Sequential(*layers[:-2]).eval(), f"pix{k}.sd.layers."
    classifier.load_state_dict(
        {key[len(prefix) :]: v for key, v in recorded.items() if key.startswith(prefix)}, strict=False
    )
    assert relative(classifier(torch.cat(parts, 1)), recorded[f"pix{k}.logits"]) < 1e-6


@given(st.integers(1, 5), st.integers(0, 99), st.booleans(), st.floats(0.1, 30))
@settings(max_examples=25, deadline=None)
def test_weights_are_shares_and_their_length_is_bounded(maps, seed, scalar, loud) -> None:
    torch.manual_seed(seed)
    f = (ScalarAssigner if scalar else ChannelAssigner)(4).eval()
    x = torch.randn(2, maps, 4, 5, 6) * loud
    weights = mixing_weights(f, x)
    assert weights.shape == (2, maps, 1 if scalar else 4)
    assert torch.allclose(weights.sum(1), torch.ones(2, weights.shape[2]), atol=1e-6)
    lengths = torch.linalg.vector_norm(weights, dim=1)
    assert (lengths >= maps**-0.5 - 1e-6).all()
    assert (lengths <= 1 + 1e-6).all()
    same = x[:, :1].expand(-1, maps, -1, -1, -1)
    assert torch.allclose(mixed(mixing_weights(f, same), same), x[:, 0], atol=1e-5 * loud)
    order = torch.randperm(maps)
    assert torch.allclose(mixed(mixing_weights(f, x[:, order]), x[:, order]), mixed(weights, x), atol=1e-4 * loud)


def test_equal_maps_make_that_map_whatever_the_assigners() -> None:
    one = random_map(3, 5)
    made = amalgamate([one] * 4, assigners(head="nn"))
    assert torch.allclose(made.values, one.values, atol=1e-6)
    assert torch.allclose(amalgamate([one] * 4).values, one.values, atol=1e-6)


def test_several_assigners_share_one_convolution_only_where_official() -> None:
    x, attention = torch.randn(2, 3, 5, 4, 6), torch.randn(2, 2, 4, 6)
    own, shared = (assigners(count=2, attention=2, official=official) for official in (False, True))
    assert own.state_dict().keys() == shared.state_dict().keys()
    assert shared.out[0] is shared.out[1]
    assert own.out[0] is not own.out[1]
    assert own(x, attention).values.shape == shared(x, attention).values.shape == (2, 14, 4, 6)
    nn_own, nn_official = (assigners(count=2, attention=2, head="nn", official=o) for o in (False, True))
    assert nn_own(x, attention).values.shape[1] == 2 * 5 + 2
    assert nn_official(x, attention).values.shape[1] == 2 * (5 + 2)
    assert torch.equal(nn_own(x, attention).values[:, -2:], attention)


def test_paper_loss_by_hand() -> None:
    one = torch.tensor([[[1.0], [0.0]]])  # one batch element, two maps, one weight: all on the first map
    other = torch.tensor([[[0.6], [0.4]]])
    lengths = 1 + (0.36 + 0.16) ** 0.5
    apart = (0.4**2 + 0.4**2) ** 0.5
    loss = paper_loss(torch.tensor(2.0), [one, other], 0.1, 0.3)
    assert loss.item() == pytest.approx(2 - 0.1 * lengths - 0.3 / 2 * 2 * apart, rel=1e-6)
    equal = paper_loss(torch.tensor(2.0), [one.requires_grad_(), one], 0.1, 0.3)
    equal.backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()


def test_official_loss_is_smaller_by_its_share_and_pulls_towards_few_maps() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    task = (logits**2).mean() + 1
    strength = 0.3
    loss = official_loss(task, [logits.softmax(1)], strength)
    assert loss.item() == pytest.approx((1 - strength) * task.item(), rel=1e-6)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (plain,) = torch.autograd.grad(task, logits, retain_graph=True)
    norm = weight_norms([logits.softmax(1)]).mean()
    (sparse,) = torch.autograd.grad(norm, logits)
    assert torch.allclose(found, plain - strength * (task / norm).item() * sparse, atol=1e-6)


def test_sparsity_walk_keeps_what_made_the_loss_fall_more() -> None:
    walk, up = SparsityWalk(), 1e-5
    walk.look(1.0, up, False)  # nothing to compare with: a fall of 0 is not more than 0
    assert (walk.strength, walk.kept) == (up, 0.0)
    walk.look(0.5, up, False)  # fell by 0.5: kept
    assert (walk.strength, walk.kept) == (2 * up, up)
    assert walk.fall == pytest.approx(0.45)
    walk.look(0.2, -up, False)  # fell by 0.3 only: dropped, on from the one kept
    assert (walk.strength, walk.kept) == (0.0, up)
    walk.look(0.9, -up, True)  # rose, but kept anyway
    assert (walk.strength, walk.kept) == (0.0, 0.0)


def test_square_protocol_is_the_recorded_one(recorded) -> None:
    """Predicted points exactly, distances and PCK of both kinds (the recording has points as (y, x))."""
    expected = json.loads((HEADS / "expected.json").read_text())["nn"]
    side, (w, h) = expected["load_size"][0], expected["target_size_wh"]
    source, target = (feature_map(recorded[f"nn.{name}"][0], picture=(w, h)) for name in ("f1", "f2"))
    scale = torch.tensor([w, h], dtype=torch.float64) / side
    points, truth = recorded["nn.src_yx"].flip(1).double() * scale, recorded["nn.gt_yx"].flip(1).double()
    found = transfer_square(source, target, points, side)
    assert torch.equal((found / scale).round(), recorded["nn.pred_yx"].flip(1).double())
    assert torch.allclose(found, recorded["nn.pred_rescaled_yx"].flip(1).double(), atol=1e-4)
    x1, y1, x2, y2 = map(float, expected["bbox"])
    pair = Pair("a", "b", "", points, truth, (x1, y1, x2, y2), (w, h))
    assert torch.allclose((found - truth).norm(dim=1), torch.tensor(expected["dist"]).double(), atol=1e-4)
    assert pair.correct(found, 0.1, "img").tolist() == expected["pck_img"]
    assert pair.correct(found, 0.1, "bbox").tolist() == expected["pck_bbox"]


def test_square_protocol_needs_the_whole_picture() -> None:
    half = ds.FeatureMap(torch.randn(3, 4, 6), Frame.of((96, 64)).crop(0, 0, 48, 64).resize((6, 4)), {})
    with pytest.raises(InputError, match="cover the whole picture"):
        transfer_square(half, half, torch.tensor([[3.0, 4.0]]).double())
    for wrong in ({"square": -1}, {"square": 512, "flip": True}, {"square": 512, "soft": 2.0}):
        with pytest.raises(InputError, match="square is a side"):
            Pairs(HEADS / "pairs.json", **wrong)


def test_assigners_survive_a_file(tmp_path) -> None:
    made = assigners(count=2, attention=2, weights="scalar", made={"t": 50})
    path = made.save(tmp_path / "some.safetensors")
    again = read_assigners(path)
    x, attention = torch.randn(1, 3, 5, 4, 6), torch.randn(1, 2, 4, 6)
    assert torch.equal(again(x, attention).values, made(x, attention).values)
    assert again.describe() == made.describe() != assigners(1, count=2, attention=2, weights="scalar").describe()
    assert again.made == {"t": 50}
    assert not any(p.requires_grad for p in again.parameters())
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_files_and_channels_are_named(tmp_path) -> None:
    with pytest.raises(MissingError, match="no trained assigners at"):
        read_assigners(tmp_path / "none.safetensors")
    for name, content in (
        ("text.safetensors", b"hello"),
        ("empty.pt", b""),
        ("text.pt", b"some text"),
        ("e.safetensors", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="does not hold trained assigners"):
            read_assigners(tmp_path / name)
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="does not hold trained assigners"):
        read_assigners(tmp_path / "other.safetensors")
    torch.save(["not", "a", "dict"], tmp_path / "list.pt")
    with pytest.raises(InputError, match="does not hold trained assigners"):
        read_assigners(tmp_path / "list.pt")
    broken = assigners()
    with torch.no_grad():
        broken.out[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        read_assigners(broken.save(tmp_path / "nan.safetensors"))
    with pytest.raises(InputError, match=r"saved as \.safetensors"):
        broken.save(tmp_path / "some.pt")
    with pytest.raises(InputError, match="3 channels and 0 of attention.*made for 5 and 2"):
        amalgamate([random_map(0), random_map(1)], assigners(attention=2))
    for wrong in ({"weights": "all"}, {"head": "mlp"}, {"count": 0}, {"channels": 0}):
        with pytest.raises(InputError):
            Assigners(**{"channels": 3, **wrong})
