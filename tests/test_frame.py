"""Coordinates: every chain of operations inverts, and agrees with what torch does to pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import denoscope as ds
from denoscope.images import Frame, as_points, grid_points

sides = st.integers(1, 3000)
sizes = st.tuples(sides, sides)
steps = st.one_of(
    st.tuples(st.just("resize"), sizes),
    st.tuples(st.just("crop"), st.tuples(st.integers(-50, 50), st.integers(-50, 50), sides, sides)),
    st.tuples(st.just("pad"), st.tuples(*[st.integers(0, 64)] * 4)),
)


def build(size, chain):
    frame = Frame.of(size)
    for name, given_ in chain:
        frame = frame.resize(given_) if name == "resize" else getattr(frame, name)(*given_)
    return frame


@given(sizes, st.lists(steps, max_size=4), st.lists(st.tuples(*[st.floats(-0.5, 3000)] * 2), min_size=1, max_size=5))
def test_round_trip(size, chain, points):
    frame, given_ = build(size, chain), as_points(points)
    assert torch.allclose(frame.to_picture(frame.to_grid(given_)), given_, atol=1e-6, rtol=1e-9)
    assert Frame.from_dict(frame.to_dict()) == frame


@given(sizes, sizes)
def test_borders_stay_borders_when_resized(size, other):
    frame = Frame.of(size).resize(other)
    corners = torch.tensor([[-0.5, -0.5], [size[0] - 0.5, size[1] - 0.5]], dtype=torch.float64)
    wanted = torch.tensor([[-0.5, -0.5], [other[0] - 0.5, other[1] - 0.5]], dtype=torch.float64)
    assert torch.allclose(frame.to_grid(corners), wanted, atol=1e-9)


def test_agrees_with_interpolation_crop_and_padding_of_pixels():
    """A ramp whose value is its own x coordinate, sent through the same operations."""
    ramp = torch.arange(40, dtype=torch.float64).expand(30, 40)[None, None]
    shown = F.pad(F.interpolate(ramp, (60, 100), mode="bilinear", align_corners=False)[..., 8:58, 12:92], (3, 0, 5, 0))
    frame = Frame.of((40, 30)).resize((100, 60)).crop(12, 8, 80, 50).pad(3, 5)
    assert frame.grid == (83, 55)
    for column in (3, 20, 60, 82):
        x = frame.to_picture(torch.tensor([[column, 30.0]], dtype=torch.float64))[0, 0]
        assert shown[0, 0, 30, column].item() == pytest.approx(x.item(), abs=1e-9)


def test_grid_points_lie_inside_and_are_spread():
    points = grid_points((640, 480), 8)
    assert points.shape == (64, 2)
    assert torch.equal(Frame.of((640, 480)).inside(points), points)
    assert points[:8, 0].diff().tolist() == [80] * 7
    with pytest.raises(ds.InputError, match="at least 1"):
        grid_points((10, 10), 0)


def test_the_edge_of_the_last_pixel_is_still_inside():
    Frame.of((10, 10)).inside([[9.5, -0.5]])
    with pytest.raises(ds.InputError, match=r"\(9.6, 0\)"):
        Frame.of((10, 10)).inside([[9.6, 0]])
