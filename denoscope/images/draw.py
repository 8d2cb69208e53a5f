"""Drawing: matches, heat maps, masks, features as colours, and contact sheets, all as Pillow RGB images.

The colours are safe for the colour-blind: the Okabe-Ito palette for what is numbered or labelled, viridis for amounts.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from denoscope.errors import InputError
from denoscope.images.frame import Frame, Points, as_points
from denoscope.images.picture import Picture

Number = int | float  # run-time checkers do not take an int for a float
Colour = tuple[int, ...]
Box = tuple[int, int, int, int]  # left, top, right, bottom
Heat = Float[Tensor, "rows columns"]
Pen = ImageDraw.ImageDraw
Basis = tuple[Float[Tensor, " channels"], Float[Tensor, "3 channels"]]

CODES = "#E69F00 #56B4E9 #009E73 #D55E00 #CC79A7 #F0E442 #0072B2 #000000"
OKABE_ITO: list[Colour] = [ImageColor.getrgb(code) for code in CODES.split()]
WHITE, DARK, GREY, PAPER = (255, 255, 255), (32, 32, 32), (112, 112, 112), (243, 243, 243)
NUMBERED, CONNECTED = 24, 60  # the most points that carry numbers, and that are joined by lines
FINE = 3  # what lies over pictures is drawn this many times larger, then shrunk


def draw_matches(
    source: Picture,
    targets: Picture | Sequence[Picture],
    source_points: Points,
    target_points: Points | Sequence[Points],
    scores: Float[Tensor, " points"] | Sequence[Float[Tensor, " points"]] | None = None,
    heat: Heat | None = None,
    correct: Bool[Tensor, " points"] | Sequence[Bool[Tensor, " points"]] | None = None,
    title: str | None = None,
    side: int = 640,
) -> Image.Image:
    """The source at the left, the targets to its right, and every point in the same colour in all of them.

    Up to 24 points carry their index; more are small dots coloured by where they lie in the source. With one target and
    up to 60 points, lines join them. With several targets, `target_points`, `scores` and `correct` hold one entry each.

    scores: cosines, whose range is written below the target. heat: a map over the first target, see `heat_overlay`.
    correct: a ring marks a right point, a cross and a dashed line a wrong one. side: long side of a panel in pixels.

    Raises InputError when a point lies outside its picture, or when the numbers of points or of targets differ.
    """
    pictures = [source, targets] if isinstance(targets, Picture) else [source, *targets]
    count = len(as_points(source_points))

    def each(values: Any, what: str) -> list[Tensor]:
        """One tensor for each target, with one entry for each point; none at all for None."""
        entries = [] if values is None else [values] if isinstance(targets, Picture) else list(values)
        if values is not None and [len(entry) for entry in entries] != [count] * (len(pictures) - 1):
            raise InputError(f"{what} needs an entry for each of {len(pictures) - 1} targets, each for {count} points.")
        return [torch.as_tensor(entry).cpu() for entry in entries]

    given = [source_points, *each(target_points, "target_points")]
    points = [Frame.of(picture.size).inside(some) for picture, some in zip(pictures, given, strict=True)]
    scores, correct = each(scores, "scores"), each(correct, "correct")

    size, gutter, line = max(11, side // 40), max(6, side // 80), max(16, side // 28)
    footer = line * (2 if scores else 1) + gutter // 2
    boxes = _arrange([p.size for p in pictures], side, gutter, gutter + (2 * line if title else 0), footer)
    canvas = Image.new("RGB", (max(b[2] for b in boxes) + gutter, max(b[3] for b in boxes) + footer + gutter), WHITE)
    if title:
        with _layer(canvas, (0, 0, canvas.width, 2 * line + gutter)) as pen:
            middle = FINE * canvas.width / 2, FINE * (gutter + line * 0.8)
            _write(pen, title, middle, FINE * size * 1.4, DARK, FINE * (canvas.width - 2 * gutter))

    frames = []
    for index, (picture, (left, top, right, bottom)) in enumerate(zip(pictures, boxes, strict=True)):
        width, height = _fitted(picture.size, (right - left, bottom - top))
        corner = left + (right - left - width) // 2, top + (bottom - top - height) // 2
        canvas.paste(PAPER, (left, top, right, bottom))
        panel = heat_overlay(picture, heat) if heat is not None and index == 1 else picture.image()
        canvas.paste(panel.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3), corner)
        frames.append(Frame.of(picture.size).resize((width, height)).pad(*corner))

    colours = [OKABE_ITO[i % len(OKABE_ITO)] for i in range(count)] if count <= NUMBERED else _ramp(points[0])
    if len(pictures) == 2 and count <= CONNECTED:
        whole = (0, 0, *canvas.size)
        starts, ends = (_onto(whole, *both) for both in zip(frames, points, strict=True))
        with _layer(canvas, whole, 0.65) as pen:
            for i in range(count):
                dashed = bool(correct) and not correct[0][i]
                _join(pen, starts[i], ends[i], colours[i], FINE * max(side, 320) / 300, dashed)
    for index, (left, top, right, bottom) in enumerate(boxes):
        width, height = FINE * (right - left), FINE * (bottom - top)
        around = left - gutter, top - gutter, right + gutter, bottom + footer
        right_ones = correct[index - 1] if correct and index else None
        with _layer(canvas, around) as pen:
            edge, middle, below = FINE * gutter, FINE * gutter + width / 2, FINE * (1.5 * gutter + line / 2) + height
            _write(pen, pictures[index].name, (middle, below), FINE * size, DARK, width)
            if scores and index:
                ends = dict.fromkeys(f"{end:.2f}" for end in (scores[index - 1].min(), scores[index - 1].max()))
                _write(pen, "cosine " + " to ".join(ends), (middle, below + FINE * line), FINE * size, GREY, width)
            area = (edge, edge, edge + width, edge + height)
            _mark_all(pen, _onto(around, frames[index], points[index]), colours, right_ones, area, side)
    return canvas


def heat_overlay(picture: Picture, heat: Heat, alpha: float = 0.55, colormap: str = "viridis") -> Image.Image:
    """The picture under a heat map, scaled from its minimum to its maximum and enlarged bilinearly to the picture.

    heat: covers the whole picture, at any resolution. alpha: weight of the colours. colormap: a name of matplotlib's.
    Raises InputError when the map is not finite.
    """
    heat = torch.as_tensor(heat).detach().cpu().float()
    if heat.ndim != 2 or not heat.isfinite().all():
        raise InputError("The heat map must be [rows, columns] of finite numbers; replace NaN and infinity first.")
    heat = heat - heat.min()
    levels = Image.fromarray((heat / (heat.max() or 1) * 255).numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    table = matplotlib.colormaps[colormap](np.arange(256) / 255, bytes=True)[:, :3]
    return Image.blend(picture.image(), Image.fromarray(table[np.asarray(levels).round().astype(np.uint8)]), alpha)


def mask_overlay(
    picture: Picture, mask: Bool[Tensor, "height width"] | Integer[Tensor, "height width"], alpha: float = 0.5
) -> Image.Image:
    """The picture with every region tinted by its label and darkened along its inner contour.

    mask: True, or labels from 1, inside; the background (False, or labels up to 0) is left as it is, to the byte.
    """
    labels = torch.as_tensor(mask).detach().cpu()
    if labels.is_floating_point() or labels.shape != picture.pixels.shape[1:]:
        has = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"The mask must be boolean or integer [{picture.height}, {picture.width}], not {has}.")
    labels = labels.long()
    thick = max(1, round(max(picture.size) / 500))
    highest, lowest = (s * F.max_pool2d(s * labels[None].float(), 2 * thick + 1, 1, thick)[0] for s in (1, -1))
    pixels = torch.from_numpy(np.array(picture.image())).float()
    tinted = pixels + alpha * (torch.tensor(OKABE_ITO)[(labels - 1) % len(OKABE_ITO)] - pixels)
    tinted = torch.where((highest != lowest)[..., None], tinted * 0.45, tinted)
    return Image.fromarray(torch.where((labels > 0)[..., None], tinted, pixels).round().byte().numpy())


def pca_basis(maps: Sequence[Float[Tensor, "channels _ _"]]) -> Basis:
    """The colour space of `pca_image`, shared by several feature maps with the same channels.

    Returns (mean, components): a vector v has the colour `0.5 + components @ (v - mean)`. The rows are the principal
    directions, signed so that the largest loading of each is positive and scaled so that the 1st and 99th percentile of
    all vectors become 0 and 1 (rows without variance are zero); `mean` is the vector in the middle, drawn grey.
    """
    vectors = torch.cat([_vectors(values) for values in maps])
    mean = vectors.mean(0)
    vectors -= mean
    axes = torch.linalg.eigh(vectors.T @ vectors).eigenvectors.flip(1)[:, :3].T
    axes = F.pad(axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign(), (0, 0, 0, 3 - len(axes)))
    low, high = torch.from_numpy(np.percentile((vectors @ axes.T).numpy(), (1, 99), axis=0))
    span = high - low
    varies = span > max(1e-5 * span.max().item(), 1e-12)  # less is rounding error, not structure
    return mean + axes.T @ ((low + high) / 2), axes * torch.where(varies, 1 / span, 0.0)[:, None]


def pca_image(
    values: Float[Tensor, "channels _ _"],
    basis: Basis | None = None,
    size: tuple[int, int] | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Features as colours: their three principal components as red, green and blue.

    basis: from `pca_basis`, so that equal vectors of several maps get equal colours; without, that of this map alone.
    size: (width, height) to enlarge to, cell by cell or, if `smooth`, bilinearly.
    """
    mean, components = pca_basis([values]) if basis is None else basis
    if len(mean) != len(values):
        raise InputError(f"The basis is for {len(mean)} channels but the map has {len(values)}.")
    colours = (0.5 + (_vectors(values) - mean) @ components.T).clamp(0, 1).reshape(*values.shape[1:], 3)
    image = Image.fromarray((colours * 255).round().byte().numpy())
    return image.resize(size, Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST) if size else image


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None, side: int = 256
) -> Image.Image:
    """Thumbnails in rows on white, each fitted into a square of `side` pixels, with its label below."""
    if not images or len(labels or images) != len(images):
        raise InputError(f"A contact sheet needs images and a label for each; there are {len(images)} images.")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    gutter, size = max(6, side // 20), max(10, 6 + side // 32)
    line = round(size * 1.6) if labels else 0
    sizes = [_fitted(image.size, (side, side)) for image in images]
    heights = [max(h for _, h in sizes[i : i + columns]) + line + gutter for i in range(0, len(sizes), columns)]
    sheet = Image.new("RGB", (columns * (side + gutter) + gutter, sum(heights) + gutter), WHITE)
    for index, (image, (width, height)) in enumerate(zip(images, sizes, strict=True)):
        left, bottom = gutter + index % columns * (side + gutter), sum(heights[: index // columns + 1]) - line
        thumbnail = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
        sheet.paste(thumbnail, (left + (side - width) // 2, bottom - height))
        if labels:
            with _layer(sheet, (left, bottom, left + side, bottom + line)) as pen:
                _write(pen, labels[index], (FINE * side / 2, FINE * line * 0.55), FINE * size, DARK, FINE * side)
    return sheet


def _arrange(sizes: Sequence[tuple[int, int]], side: int, gutter: int, top: int, footer: int) -> list[Box]:
    """Boxes of one height: the source at the left, the targets in rows beside it, with room for captions below each."""
    height = min(side, max(round(side / max(w / h for w, h in sizes)), side // 4))
    widths = [min(side, max(round(height * w / h), side // 4)) for w, h in sizes]  # not as extreme as the pictures
    columns = len(sizes) - 1 if len(sizes) <= 4 else math.ceil(math.sqrt(len(sizes) - 1))
    boxes = [(gutter, top, gutter + widths[0], top + height)]
    for index, width in enumerate(widths[1:]):
        left = boxes[0 if index % columns == 0 else -1][2] + gutter
        high = top + index // columns * (height + footer + gutter)
        boxes.append((left, high, left + width, high + height))
    return boxes


def _fitted(size: tuple[int, int], within: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of the same aspect that fits, at least one pixel each way."""
    scale = min(within[0] / size[0], within[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _vectors(values: Float[Tensor, "channels height width"]) -> Float[Tensor, "cells channels"]:
    if values.ndim != 3 or not values.isfinite().all():
        raise InputError("Features to draw must be [channels, height, width] of finite numbers.")
    return values.detach().cpu().double().flatten(1).T


def _ramp(points: Points) -> list[Colour]:
    """One colour per point by its place among all of them: viridis along x, from light to dark along y."""
    low, high = points.amin(0), points.amax(0)
    x, y = ((points - low) / (high - low).clamp(min=1e-9)).numpy().T
    colours = matplotlib.colormaps["viridis"](0.12 + 0.86 * x)[:, :3]
    pull = np.where(y < 0.5, 1.1 * (0.5 - y), 0.7 * (y - 0.5))[:, None]
    colours = colours * (1 - pull) + pull * (y < 0.5)[:, None]
    return [tuple(colour) for colour in (colours * 255).round().astype(int).tolist()]


@contextmanager
def _layer(canvas: Image.Image, box: Box, opacity: float = 1.0) -> Iterator[Pen]:
    """Draw on a transparent sheet `FINE` times as large as the box, which is then shrunk and laid on the canvas."""
    sheet = Image.new("RGBA", (FINE * (box[2] - box[0]), FINE * (box[3] - box[1])))
    yield ImageDraw.Draw(sheet)
    sheet = sheet.reduce(FINE)
    canvas.paste(sheet, box[:2], sheet.getchannel("A").point([round(a * opacity) for a in range(256)]))


def _onto(box: Box, frame: Frame, points: Points) -> np.ndarray:
    """From picture pixels to the sheet of `_layer`."""
    width, height = box[2] - box[0], box[3] - box[1]
    return frame.crop(box[0], box[1], width, height).resize((FINE * width, FINE * height)).to_grid(points).numpy()


def _join(pen: Pen, start: np.ndarray, end: np.ndarray, colour: Colour, width: float, dashed: bool) -> None:
    """An S-shaped line that leaves and arrives level."""
    t = np.linspace(0, 1, 49)[:, None]
    curve = [tuple(p) for p in start + (end - start) * np.hstack([t, t * t * (3 - 2 * t)])]
    for piece in [curve[i : i + 3] for i in range(0, 48, 4)] if dashed else [curve]:
        pen.line(piece, WHITE, round(width * 1.8), joint="curve")
        pen.line(piece, colour, round(width), joint="curve")


def _mark_all(pen: Pen, xy: np.ndarray, colours: list[Colour], correct: Tensor | None, area: Box, side: int) -> None:
    """The marks of one panel and, where they are few, their numbers in chips beside them."""
    few = len(xy) <= NUMBERED
    radius = FINE * max(side, 320) * (0.0105 if few else min(0.0065, max(0.002, 0.17 / math.sqrt(len(xy)))))
    size = FINE * max(9, side // 44)
    sizes = np.array([((0.6 * len(str(i)) + 0.45) * size, 1.15 * size) for i in range(len(xy) if few else 0)])
    labels = _place_labels(xy[: len(sizes)], sizes, area, radius * 1.6)
    middles = [((label[0] + label[2]) / 2, (label[1] + label[3]) / 2) for label in labels]
    for point, middle, colour in zip(xy, middles, colours, strict=False):  # a label that was moved off stays tied
        pen.line([tuple(point), middle], WHITE, 3 * FINE)
        pen.line([tuple(point), middle], colour, FINE)
    for i, (point, colour) in enumerate(zip(xy, colours, strict=True)):
        _mark(pen, point, radius, colour, "dot" if correct is None else "ring" if correct[i] else "cross")
    for i, (label, middle) in enumerate(zip(labels, middles, strict=True)):
        pen.rounded_rectangle(tuple(label), size * 0.3, colours[i], WHITE, FINE)
        ink = DARK if np.dot(colours[i], (0.299, 0.587, 0.114)) > 110 else WHITE
        _write(pen, str(i), middle, size, ink, math.inf)


def _mark(pen: Pen, point: np.ndarray, radius: float, colour: Colour, kind: str) -> None:
    """A dot, ring or cross with a white halo and a dark hairline, so that it shows on anything."""
    x, y = point
    halo = min(radius * 0.25, 2 * FINE)
    for grow, ink in ((halo + FINE * 0.6, DARK), (halo, WHITE), (0, colour)):
        if kind == "cross":
            reach, width = 1.2 * radius + 0.7 * grow, round(0.6 * radius + 2 * grow)
            pen.line([x - reach, y - reach, x + reach, y + reach], ink, width)
            pen.line([x - reach, y + reach, x + reach, y - reach], ink, width)
        else:
            reach = radius * (1.65 if kind == "ring" else 1) + grow
            bounds = (x - reach, y - reach, x + reach, y + reach)
            pen.ellipse(bounds, None if kind == "ring" else ink, ink, round(0.6 * radius + 2 * grow))


def _place_labels(points: np.ndarray, sizes: np.ndarray, area: Box, reach: float) -> list[np.ndarray]:
    """A box for each label beside its point: in the area, and off the points and other labels where that can be."""
    angles = np.deg2rad(-45 + 22.5 * np.arange(16))
    steps = np.stack([np.cos(angles), np.sin(angles)], 1)
    boxes: list[np.ndarray] = []
    for point, half in zip(points, sizes / 2, strict=True):
        middles = np.concatenate([point + steps * (reach * ring + half) for ring in range(1, 40, 2)])
        middles = np.clip(middles, area[:2] + half, area[2:] - half)
        tried = np.hstack([middles - half, middles + half])
        taken = np.concatenate([np.hstack([points - reach * 0.8, points + reach * 0.8]), *(box[None] for box in boxes)])
        shared = np.minimum(tried[:, None, 2:], taken[:, 2:]) - np.maximum(tried[:, None, :2], taken[:, :2])
        overlap = shared.clip(0).prod(2).sum(1) / (4 * half.prod())
        boxes.append(tried[np.argmin(overlap * 1e6 + np.arange(len(tried)))])  # the earlier, the nearer
    return boxes


def _write(pen: Pen, text: str, middle: tuple[Number, Number], size: Number, ink: Colour, width: Number) -> None:
    """Text cut to a width. Pillow's own font has ASCII only, so accents are dropped and other letters become `?`."""
    letters = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    text, font = "".join(c if c.isascii() else "?" for c in letters), ImageFont.load_default(size=size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    pen.text(middle, text, ink, font, "mm")
