"""Features without a network: what they are, where they lie, and that nothing breaks them."""

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st

import denoscope as ds
from denoscope.correspondence import transfer
from denoscope.features import BASELINES, load_extractor


def textured(seed: int = 0, width: int = 96, height: int = 80) -> ds.Picture:
    noise = np.random.default_rng(seed).uniform(0, 1, (height // 4, width // 4, 3))
    return ds.read(np.clip(np.kron(noise, np.ones((4, 4, 1))), 0, 1))


@settings(max_examples=12, deadline=None)
@given(
    source=st.tuples(st.integers(16, 640), st.integers(16, 100)),
    target=st.tuples(st.integers(16, 100), st.integers(16, 540)),
    share=st.tuples(st.floats(0.02, 0.98), st.floats(0.02, 0.98)),
)
def test_position_is_the_same_relative_place(source, target, share) -> None:
    one, two = (BASELINES["position"]()(ds.read(torch.zeros(3, h, w))) for w, h in (source, target))
    point = torch.tensor([[share[k] * source[k] - 0.5 for k in (0, 1)]], dtype=torch.float64)
    found = transfer(one, two, point).points[0]
    for axis in (0, 1):
        shrunk = max(1, max(target) / 512, max(source) / 512 * target[axis] / source[axis])
        border = 0.5 * shrunk + target[axis] / 128  # the outer half of the outer cells is of one value
        near = min(share[axis], 1 - share[axis]) * target[axis] < border
        assert abs(found[axis] - (share[axis] * target[axis] - 0.5)) <= (border if near else 0) + 0.5 + 0.05 * shrunk


@pytest.mark.parametrize("name", BASELINES)
def test_a_picture_is_found_in_itself(name: str) -> None:
    picture = textured()
    features = BASELINES[name](size="96x80", stride=4)(picture)
    points = torch.tensor([[x, y] for x in (26, 50, 66) for y in (22, 58)], dtype=torch.float64)
    made = transfer(features, features, points)
    assert (made.points - points).abs().max() <= 0.5
    assert made.scores.min() > 1 - 1e-5
    assert features.frame.grid == (24, 20)


@pytest.mark.parametrize("name", ["rgb", "sift", "sift-fine"])
def test_one_colour_has_no_features(name: str) -> None:
    plain = ds.read(torch.full((3, 50, 70), 0.3))
    features = BASELINES[name]()(plain)
    assert features.values.isfinite().all()
    assert features.values.abs().max() == 0
    with pytest.warns(UserWarning, match="zero length"):
        assert transfer(features, features, [(10, 10)]).scores.item() == 0


def test_rgb_is_a_patch_without_its_mean() -> None:
    picture = textured(1, 32, 32)
    features = BASELINES["rgb"](size="32", stride=1)(picture).values
    patch = picture.resized((32, 32))[:, 10:17, 5:12]  # the 7 x 7 around row 13, column 8
    expected = (patch - patch.mean()).flatten()
    assert torch.allclose(features[:, 13, 8].sort().values, expected.sort().values, atol=1e-6)
    assert features.shape == (147, 32, 32)


def test_sift_tells_scale_by_its_diameter_and_ignores_brightness() -> None:
    picture = smooth_picture(3, 128, 128)
    darker = ds.Picture(picture.pixels * 0.5)
    coarse, fine = (BASELINES[name]()(picture).values for name in ("sift", "sift-fine"))
    assert coarse.shape == fine.shape == (128, 32, 32)
    again = BASELINES["sift"]()(darker).values
    inner = (slice(None), slice(6, -6), slice(6, -6))
    alike = torch.cosine_similarity(coarse[inner], again[inner], dim=0).mean()
    other = torch.cosine_similarity(coarse[inner], fine[inner], dim=0).mean()
    assert alike > 0.97 > other


def test_tasks_have_their_grids_and_any_aspect() -> None:
    picture = textured(2, 64, 32)
    assert BASELINES["rgb"]()(picture).frame.grid == (32, 32)
    assert BASELINES["rgb"](preset="temporal")(picture).frame.grid == (960 // 8, 60)
    assert BASELINES["position"](stride=8, preset="temporal")(picture).frame.grid == (960 // 8, 60)
    assert BASELINES["sift-fine"](size="33x20", stride=8)(picture).frame.grid == (5, 3)


def test_what_they_say_decides_them() -> None:
    picture = textured(4)
    said = {str(one.describe()): one for one in (BASELINES["rgb"](), BASELINES["rgb"](size="128"), BASELINES["sift"]())}
    assert len(said) == 3
    assert BASELINES["rgb"]().describe() == BASELINES["rgb"](preset="semantic").describe()
    assert torch.equal(BASELINES["sift"]()(picture).values, BASELINES["sift"]()(picture).values)


def test_wrong_settings() -> None:
    with pytest.raises(ds.InputError, match="no preset 'best'"):
        BASELINES["rgb"](preset="best")
    with pytest.raises(ds.InputError, match="at least 1 pixel"):
        BASELINES["rgb"](stride=0)
    with pytest.raises(ds.InputError, match="no use for t"):
        load_extractor("sift", t=3)
    with pytest.raises(ds.InputError, match="is set up already; size"):
        ds.features(BASELINES["rgb"](), textured(), size="64")
