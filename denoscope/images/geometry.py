"""Drawing geometry: lines between matches, one picture warped onto another, optical flow as colours."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from denoscope.errors import InputError
from denoscope.images.draw import DARK, FINE, OKABE_ITO, WHITE, Box, Number, _layer, _onto, _write
from denoscope.images.frame import Frame, Points
from denoscope.images.picture import Picture

GREEN, ORANGE = OKABE_ITO[2], OKABE_ITO[3]
_SQUARES = 8  # of a checkerboard along the longer side


def draw_lines(
    source: Picture,
    target: Picture,
    points_a: Points,
    points_b: Points,
    inliers: Bool[Tensor, " matches"],
    title: str | None = None,
    side: int = 640,
    most: int = 120,
) -> Image.Image:
    """Two pictures side by side with a straight line for every match: green for inliers, over thin orange ones.

    side: long side of a panel in pixels. most: of either kind at most so many lines are drawn, evenly spread over the list.
    """
    gutter, line = max(6, side // 80), max(16, side // 28)
    scale = side / max(*source.size, *target.size)
    sizes = [(max(1, round(w * scale)), max(1, round(h * scale))) for w, h in (source.size, target.size)]
    top = gutter + (2 * line if title else 0)
    lefts = gutter, 2 * gutter + sizes[0][0]
    width = lefts[1] + sizes[1][0] + gutter
    canvas = Image.new("RGB", (width, top + max(h for _, h in sizes) + gutter), WHITE)
    frames = []
    for picture, size, left in zip((source, target), sizes, lefts, strict=True):
        canvas.paste(picture.image().resize(size, Image.Resampling.LANCZOS, reducing_gap=3), (left, top))
        frames.append(Frame.of(picture.size).resize(size).pad(left, top))
    whole: Box = (0, 0, *canvas.size)
    if title:
        with _layer(canvas, (0, 0, canvas.width, top)) as pen:
            _write(pen, title, (FINE * width / 2, FINE * top / 2), FINE * side / 34, DARK, FINE * (width - 2 * gutter))
    starts, ends = (_onto(whole, frame, points) for frame, points in zip(frames, (points_a, points_b), strict=True))
    for kind, colour, thick, opacity in ((False, ORANGE, 0.8, 0.55), (True, GREEN, 1.3, 0.9)):
        chosen = (inliers == kind).nonzero()[:, 0].tolist()
        with _layer(canvas, whole, opacity) as pen:
            for i in chosen[:: max(1, math.ceil(len(chosen) / most))]:
                pen.line([tuple(starts[i]), tuple(ends[i])], colour, max(1, round(FINE * thick * side / 640)))
                for x, y in (starts[i], ends[i]):
                    reach = FINE * 1.8 * thick * side / 640
                    pen.ellipse((x - reach, y - reach, x + reach, y + reach), colour)
    return canvas


def warp_onto(source: Picture, target: Picture, matrix: Float[np.ndarray, "3 3"], style: str = "blend") -> Image.Image:
    """The target with the source brought onto it by a homography: "blend" (half and half) or "checker" (squares by turns)."""
    if style not in ("blend", "checker"):
        raise InputError(f"Unknown style {style!r}; use 'blend' or 'checker'.")
    w, h = target.size
    alpha = np.full((source.height, source.width), 255, np.uint8)
    moved = warp(np.dstack([np.array(source.image()), alpha]), matrix, target.size)
    weight = moved[..., 3:] / 255
    if style == "blend":
        weight = weight / 2
    else:
        square = math.ceil(max(w, h) / _SQUARES)
        weight = weight * (np.add.outer(np.arange(h) // square, np.arange(w) // square) % 2)[..., None]
    mixed = weight * moved[..., :3] + (1 - weight) * np.array(target.image())
    return Image.fromarray(mixed.round().astype(np.uint8))


def warp(rgba: np.ndarray, matrix: Float[np.ndarray, "3 3"], size: tuple[int, int]) -> np.ndarray:
    """RGBA [H, W, 4] under a homography onto a transparent canvas of (width, height).

    Colours are weighted by alpha while they are interpolated, so that what lies hidden under transparent pixels does not
    bleed into the edges.
    """
    values = rgba.astype(np.float32)
    values[..., :3] *= values[..., 3:] / 255
    moved = cv2.warpPerspective(values, np.asarray(matrix, np.float64), size)
    moved[..., :3] /= np.maximum(moved[..., 3:], 1e-3) / 255
    return moved.clip(0, 255).round().astype(np.uint8)


def draw_outline(
    image: Image.Image, corners: Points | Sequence[Sequence[Number]], colour: tuple[int, ...], width: int = 3
) -> Image.Image:
    """The image with a closed polygon of points (x, y) drawn over it; one that is not finite is left out."""
    xy = torch.as_tensor(corners, dtype=torch.float64).reshape(-1, 2)
    image = image.convert("RGB")
    if xy.isfinite().all() and xy.abs().max() < 1e6:
        with _layer(image, (0, 0, *image.size)) as pen:
            loop = [tuple(FINE * (point + 0.5).numpy()) for point in (*xy, xy[0])]
            pen.line(loop, WHITE, FINE * (width + 2), joint="curve")
            pen.line(loop, colour, FINE * width, joint="curve")
    return image


def flow_colours(flow: Float[np.ndarray, "*shape 2"], longest: float | int | None = None) -> np.ndarray:
    """Motion vectors as colours [..., 3] uint8: the direction is the hue, the length the saturation; white stands still.

    longest: length that is fully saturated, by default the 99th percentile. Vectors that are not finite are black.
    """
    known = np.all(np.isfinite(flow), axis=-1)
    flow = np.where(known[..., None], flow, 0)
    length = np.linalg.norm(flow, axis=-1)
    if longest is None:
        longest = float(np.percentile(length[known], 99)) if known.any() else 1.0
    hue = np.mod(np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi), 1) * 360
    hsv = np.stack([hue, (length / (longest or 1.0)).clip(0, 1), np.ones_like(hue)], -1).astype(np.float32)
    rgb = cv2.cvtColor(hsv.reshape(-1, 1, 3), cv2.COLOR_HSV2RGB).reshape(hsv.shape)
    return ((rgb * known[..., None]) * 255).round().astype(np.uint8)
