"""What is drawn is where it should be, in the colour it should have, for pictures of any shape."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from denoscope.errors import InputError
from denoscope.images.draw import (
    OKABE_ITO,
    _place_labels,
    contact_sheet,
    draw_matches,
    heat_overlay,
    mask_overlay,
    pca_basis,
    pca_image,
)
from denoscope.images.frame import Points, grid_points
from denoscope.images.picture import Picture

SIDE, GUTTER = 320, 6  # with side=320 the gutter is 6 pixels
REFUSED = InputError, TypeError  # under jaxtyping's import hook, sizes that do not agree are a TypeError
FIVE = torch.tensor([[10.0, 12], [80, 15], [50, 40], [15, 65], [85, 70]], dtype=torch.float64)


def plain(width: int, height: int, level: float = 0.5) -> Picture:
    return Picture(torch.full((3, height, width), level))


def pixel(image: Image.Image, left: int, scale: float, point: torch.Tensor) -> tuple[int, ...]:
    """The pixel that shows a point of the picture whose panel begins at (left, GUTTER), enlarged by `scale`."""
    x, y = ((point + 0.5) * scale - 0.5).round().int().tolist()
    return image.getpixel((left + x, GUTTER + y))


def test_dots_lie_at_the_scaled_points_in_both_panels():
    targets = FIVE.flip(0) / 2
    image = draw_matches(plain(100, 80), plain(50, 40, 0.2), FIVE, targets, side=SIDE)
    assert image.mode == "RGB"
    assert image.width == 2 * SIDE + 3 * GUTTER
    for point, target, colour in zip(FIVE, targets, OKABE_ITO, strict=False):
        assert pixel(image, GUTTER, 3.2, point) == colour
        assert pixel(image, 2 * GUTTER + SIDE, 6.4, target) == colour
    assert image.getpixel((GUTTER + 2, GUTTER + 2)) == (128, 128, 128)  # elsewhere the picture shows
    assert image.getpixel((2 * GUTTER + SIDE + 2, GUTTER + 253)) == (51, 51, 51)


def test_title_and_scores_take_room_below_and_above_but_not_beside():
    pair = plain(100, 80), plain(100, 80), FIVE, FIVE
    bare = draw_matches(*pair, side=SIDE)
    for more in ({"title": "A title"}, {"scores": torch.linspace(0.1, 0.9, 5)}):
        image = draw_matches(*pair, side=SIDE, **more)
        assert image.width == bare.width
        assert image.height > bare.height + 10


def test_right_points_are_rings_and_wrong_ones_crosses():
    correct = torch.tensor([True, False, True, False, True])
    image = draw_matches(plain(100, 80), plain(100, 80), FIVE, FIVE, correct=correct, side=SIDE)
    for point, right, colour in zip(FIVE, correct, OKABE_ITO, strict=False):
        shown = pixel(image, 2 * GUTTER + SIDE, 3.2, point)
        assert (shown == colour) != bool(right)  # a ring is open in the middle


def test_lines_join_up_to_sixty_points_of_one_target():
    def gutter_is_white(points: Points) -> bool:
        image = draw_matches(plain(64, 64), plain(64, 64), points, points, side=SIDE)
        return bool((np.array(image)[GUTTER + 20 : 300, GUTTER + SIDE : 2 * GUTTER + SIDE] == 255).all())

    points = grid_points((64, 64), 8)[:61]
    assert gutter_is_white(points)
    assert not gutter_is_white(points[:60])


def test_many_points_are_coloured_by_their_place_in_the_source():
    points = grid_points((200, 160), 15)[:200]
    image = draw_matches(plain(200, 160), plain(200, 160), points, points.flip(0), side=SIDE)
    source = [pixel(image, GUTTER, 1.6, point) for point in points]
    target = [pixel(image, 2 * GUTTER + SIDE, 1.6, point) for point in points.flip(0)]
    assert source == target
    assert len(set(source)) == 200


def test_labels_keep_apart_and_inside():
    area = (0, 0, 600, 400)
    for points in (np.full((24, 2), [5.0, 5.0]), np.random.default_rng(0).normal([300, 200], 30, (24, 2))):
        boxes = np.array(_place_labels(points, np.full((24, 2), [24.0, 16.0]), area, 6.0))
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= area[2:]).all()
        shared = np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2])
        overlaps = (shared > 1e-6).all(2) & ~np.eye(24, dtype=bool)
        assert not overlaps.any()


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16), (1, 1), (32, 32), (3000, 2000)])
def test_any_aspect_fits(size: tuple[int, int]):
    corners = torch.tensor([[0, 0], [size[0] - 1, size[1] - 1]], dtype=torch.float64)
    point = torch.zeros(2, 2, dtype=torch.float64)
    image = draw_matches(plain(*size), plain(90, 60), corners, point, side=SIDE, title="A title too long " * 20)
    assert image.width <= 2 * SIDE + 3 * GUTTER
    assert SIDE // 4 < image.height < SIDE + 100
    assert heat_overlay(plain(*size), torch.rand(1, 1)).size == size
    assert contact_sheet([plain(*size).image()], ["é中" * 300], side=64).width == 64 + 2 * 6


def test_targets_wrap_to_rows_of_one_height():
    targets = [plain(100, 80), plain(50, 80)] * 3
    image = draw_matches(plain(100, 80), targets, FIVE, [FIVE / 2] * 6, side=SIDE)
    assert image.width == GUTTER + 3 * (SIDE + GUTTER) + 160 + GUTTER  # source, then wide, narrow, wide
    assert 2 * 256 < image.height < 2 * (256 + 40)
    row = GUTTER + 256 + image.height // 2 - 256  # the second row: the place of the third dot in its first panel
    found = (np.array(image)[row:, GUTTER + SIDE : GUTTER + 2 * SIDE] == OKABE_ITO[2]).all(2)
    assert found.sum() > 20


def test_heat_covers_the_first_target_only():
    heat = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    image = draw_matches(plain(64, 64), plain(64, 64), FIVE[:1] / 2, FIVE[:1] / 2, heat=heat, side=SIDE)
    assert image.getpixel((GUTTER + 310, GUTTER + 310)) == (128, 128, 128)
    alone = heat_overlay(plain(64, 64), heat).getpixel((62, 62))
    assert image.getpixel((2 * GUTTER + SIDE + 310, GUTTER + 310)) == alone != (128, 128, 128)


def test_matches_that_do_not_fit_are_refused():
    one, two = plain(100, 80), plain(50, 40)
    for targets, points, more in (
        (two, FIVE, {}),  # outside the target
        (one, FIVE * torch.nan, {}),
        (one, FIVE[:4], {}),
        ([one, one], [FIVE], {}),
        (one, FIVE, {"scores": torch.ones(4)}),
    ):
        with pytest.raises(REFUSED):
            draw_matches(one, targets, FIVE, points, **more)


def test_heat_runs_through_the_colormap():
    heat = torch.linspace(-3, 7, 50).repeat(20, 1)
    image = np.array(heat_overlay(plain(50, 20), heat, alpha=1.0))
    for column, level in ((0, 0.0), (49, 1.0)):
        colour = np.array(matplotlib.colormaps["viridis"](level)[:3]) * 255
        assert np.abs(image[10, column] - colour).max() <= 1
    assert (np.diff(image[10, :, 1].astype(int)) >= 0).all()  # green rises all along viridis


def test_heat_may_be_constant_but_not_nan():
    with np.errstate(invalid="raise"):
        image = np.array(heat_overlay(plain(30, 20), torch.full((4, 4), 2.5), alpha=1.0))
    assert (image == matplotlib.colormaps["viridis"](0, bytes=True)[:3]).all()
    with pytest.raises(InputError):
        heat_overlay(plain(30, 20), torch.tensor([[0.0, torch.nan]]))


def test_mask_tints_regions_and_leaves_the_background():
    picture = Picture(torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)))
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[5:20, 5:30], mask[5:20, 30:50] = 1, 2
    before, after = np.array(picture.image()), np.array(mask_overlay(picture, mask))
    assert (after[mask.numpy() == 0] == before[mask.numpy() == 0]).all()
    for x, colour in ((15, OKABE_ITO[0]), (40, OKABE_ITO[1])):
        assert np.abs(after[12, x] - (before[12, x] * 0.5 + np.array(colour) * 0.5)).max() <= 0.5
    for y, x in ((5, 15), (19, 15), (12, 29), (12, 30), (12, 49)):  # also where two regions meet
        colour = OKABE_ITO[int(mask[y, x]) - 1]
        assert after[y, x].sum() < 0.5 * (before[y, x] * 0.5 + np.array(colour) * 0.5).sum()
    assert mask_overlay(picture, mask == 1).tobytes() == mask_overlay(picture, (mask == 1).long()).tobytes()
    with pytest.raises(InputError):
        mask_overlay(picture, mask.T)


def test_pca_of_one_direction_is_a_ramp():
    direction = torch.tensor([0.1, -0.2, 0.9, 0.3])
    values = direction[:, None, None] * torch.linspace(5, 9, 100)[None, None]
    pixels = np.array(pca_image(values))[0].astype(int)
    assert (np.diff(pixels[:, 0]) >= 0).all()
    assert pixels[0, 0] == 0
    assert pixels[-1, 0] == 255
    assert (np.abs(pixels[:, 1:] - 128) <= 1).all()  # rounding error is not stretched into colours
    assert (np.array(pca_image(values.half())) == np.array(pca_image(values.half().float()))).all()


def test_a_shared_basis_gives_equal_colours_to_equal_vectors():
    random = torch.Generator().manual_seed(1)
    first, other = torch.randn(8, 6, 5, generator=random), 4 * torch.randn(8, 3, 7, generator=random)
    second = other.clone()
    second[:, 1, 2], second[:, 0, 6] = first[:, 3, 4], first[:, 0, 0]
    mean, components = basis = pca_basis([first, second])
    a, b = (np.array(pca_image(values, basis)) for values in (first, second))
    assert (a[3, 4] == b[1, 2]).all()
    assert (a[0, 0] == b[0, 6]).all()
    assert (np.array(pca_image(first))[3, 4] != a[3, 4]).any()  # its own basis spreads it otherwise
    projected = torch.cat([(v.flatten(1).T - mean) @ components.T for v in (first.double(), second.double())])
    ends = torch.from_numpy(np.percentile(projected.numpy(), (1, 99), axis=0))
    assert torch.allclose(ends, torch.tensor([[-0.5], [0.5]], dtype=torch.float64).expand(2, 3))
    gram = components @ components.T
    assert torch.allclose(gram, gram.diag().diag(), atol=1e-9)
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()
    with pytest.raises(REFUSED):
        pca_image(first[:5], basis)


def test_pca_enlarges_and_bears_few_channels():
    values = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2))
    small, large = pca_image(values), pca_image(values, size=(40, 30))
    assert large.size == (40, 30)
    assert large.getpixel((25, 17)) == small.getpixel((2, 1))
    assert pca_image(values, size=(40, 30), smooth=True).getpixel((20, 15)) != large.getpixel((20, 15))
    assert (np.array(pca_image(torch.ones(1, 2, 2))) == 128).all()


def test_contact_sheet_places_every_thumbnail():
    colours = OKABE_ITO[:5]
    sizes = [(100, 100), (400, 100), (10, 80), (3, 3), (100, 50)]
    images = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    sheet = contact_sheet(images, columns=2, side=64)
    assert sheet.size == (2 * 64 + 3 * 6, 64 + 64 + 32 + 4 * 6)  # the last row is as tall as its one thumbnail
    for index, (colour, (width, height)) in enumerate(zip(colours, sizes, strict=True)):
        count = (np.array(sheet) == colour).all(2).sum()
        scale = 64 / max(width, height)
        assert count == round(width * scale) * round(height * scale), index
    labelled = contact_sheet([*images[:4], images[4].convert("L")], list("abcde"), side=64)
    assert labelled.width == 3 * 64 + 4 * 6
    assert labelled.mode == "RGB"
    with pytest.raises(InputError):
        contact_sheet(images, ["too few"])
    with pytest.raises(InputError):
        contact_sheet([])
