"""Drawing what was tracked: points with their tails, boxes, and the paths of a whole video."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from denoscope.images.draw import DARK, FINE, OKABE_ITO, WHITE, Colour, Pen, _layer, _mark, _onto, _write
from denoscope.images.frame import Frame, Points
from denoscope.images.picture import Picture


def draw_points(picture: Picture, points: Points, tail: Sequence[Points] = ()) -> Image.Image:
    """The picture with a dot at every point, NaN left out, each with its own colour.

    tail: where the points were before, oldest first; drawn as lines that grow stronger towards the dots.
    """
    image = picture.image()
    box, radius = (0, 0, *image.size), FINE * max(2.0, max(image.size) / 160)
    places = [_onto(box, Frame.of(picture.size), torch.as_tensor(one).double()) for one in (*tail, points)]
    with _layer(image, box) as pen:
        for index in range(len(points)):
            colour = _colour(index)
            _path(pen, [place[index] for place in places], colour, radius * 0.8)
            if np.isfinite(places[-1][index]).all():
                _mark(pen, places[-1][index], radius, colour, "dot")
    return image


def draw_boxes(picture: Picture, boxes: Sequence[Sequence[int | float]], numbers: Sequence[int]) -> Image.Image:
    """The picture with frames around boxes (x1, y1, x2, y2), both corners included, and the objects' numbers, from 1."""
    image = picture.image()
    whole, thick = (0, 0, *image.size), max(2, round(max(image.size) / 250))
    with _layer(image, whole) as pen:
        for (x1, y1, x2, y2), number in zip(boxes, numbers, strict=True):
            colour, size = _colour(number - 1), FINE * max(10, max(image.size) // 45)
            corners = [FINE * value for value in (x1, y1, x2 + 1, y2 + 1)]
            for grow, ink in ((1, WHITE), (0, colour)):
                pen.rectangle([c + s * FINE * grow for c, s in zip(corners, (-1, -1, 1, 1), strict=True)], None, ink,
                              FINE * (thick + 2 * grow))  # fmt: skip
            left, top = corners[0], max(0, corners[1] - size * 1.3)
            width = size * (0.4 + 0.6 * len(str(number)))
            pen.rectangle([left, top, left + width, top + size * 1.3], colour)
            ink = DARK if np.dot(colour, (0.299, 0.587, 0.114)) > 110 else WHITE
            _write(pen, str(number), (left + width / 2, top + size * 0.65), size, ink, width)
    return image


def draw_paths(picture: Picture, paths: Float[Tensor, "frames objects 2"]) -> Image.Image:
    """The first frame of a video with the way that every point went over it: a ring at its start, a dot at its end."""
    image = picture.image()
    box, radius = (0, 0, *image.size), FINE * max(2.0, max(image.size) / 200)
    with _layer(image, box) as pen:
        for index, path in enumerate(paths.unbind(1)):
            places = list(_onto(box, Frame.of(picture.size), path.double()))
            _path(pen, places, _colour(index), radius)
            seen = [place for place in places if np.isfinite(place).all()]
            for place, kind in zip(seen[:1] + seen[-1:], ("ring", "dot"), strict=False):
                _mark(pen, place, radius, _colour(index), kind)
    return image


def _colour(index: int) -> Colour:
    return OKABE_ITO[index % len(OKABE_ITO)]


def _path(pen: Pen, places: Sequence[Any], colour: Colour, width: float) -> None:
    """Lines from place to place, thicker towards the last; gaps where a place is not finite."""
    pieces = list(pairwise(places))
    for number, (start, end) in enumerate(pieces, 1):
        if np.isfinite(start).all() and np.isfinite(end).all():
            pen.line([*start, *end], colour, max(1, round(width * (0.3 + 0.7 * number / len(pieces)))))
