"""Labels of a first frame (object masks, key points, boxes) as maps of feature cells, and back.

Masks follow DAVIS (label numbers in an indexed picture, 0 background, 255 void), key points JHMDB as VideoWalk evaluates it
(Jabri et al., NeurIPS 2020, arXiv 2006.14613): one map per joint behind one of the background.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from denoscope.errors import InputError, MissingError
from denoscope.features import FeatureMap
from denoscope.images import atomically
from denoscope.images.palette import PALETTE

Mask = UInt8[np.ndarray, "height width"]
Labels = Float[Tensor, "classes rows columns"]

VOID = 255
MOST = 32  # colours or grey levels that still are labels; more are a photo or soft edges
SIGMA = 0.5  # of the Gaussian around a joint, in cells
BEST = 3  # cells whose weighted mean is a joint's position


def read_mask_labels(source: str | Path | Image.Image | np.ndarray, name: str | None = None) -> Mask:
    """Object numbers `[H, W]` from a mask: 0 is background, void (255) too.

    Indexed pictures and integer arrays hold the numbers themselves. Two grey levels are one object (the lighter one), also
    with soft edges; a few grey levels are the numbers. A few colours are one object each: their number in the palette of
    DAVIS if they are in it, else 1, 2, … in the order in which they occur; black and transparent are background.
    name: for messages, when the source is no path.

    Raises MissingError, and InputError for files that are damaged, empty masks, and pictures with many colours.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            raise MissingError(f"There is no mask {path}.")
        try:
            with Image.open(path) as image:
                image.load()
                return read_mask_labels(image.copy(), str(path))
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be read as a mask ({error}); save it as PNG again.") from None
    what = name or "The mask"
    labels = _from_image(source, what) if isinstance(source, Image.Image) else _from_array(np.asarray(source), what)
    labels = np.where(labels == VOID, 0, labels).astype(np.uint8)
    if not labels.any():
        raise InputError(f"{what} is empty; every pixel is background.")
    return labels


def _from_image(image: Image.Image, what: str) -> np.ndarray:
    if image.mode == "P" and not image.has_transparency_data:
        return _from_array(np.array(image), what, indexed=True)
    if image.mode == "P":
        clear = np.array(image.convert("RGBA"))[..., 3] == 0
        return np.where(clear, 0, _from_array(np.array(image), what, indexed=True))
    if image.mode == "1" or image.mode == "L" or image.mode.startswith("I"):
        return _from_array(np.array(image), what)
    rgba = np.array(image.convert("RGBA"))
    colours = np.where(rgba[..., 3:] < 128, 0, rgba[..., :3]).astype(np.uint8)
    if (colours == colours[..., :1]).all():
        return _from_array(colours[..., 0], what)
    codes = colours.astype(np.int64) @ (65536, 256, 1)
    values, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    if len(values) > MOST:
        raise InputError(
            f"{what} has {len(values)} colours; a mask holds one number, or one flat colour, per object. "
            "Save it as an indexed PNG without smooth edges (JPEG blurs them)."
        )
    table = np.array(PALETTE).reshape(-1, 3) @ (65536, 256, 1)
    if np.isin(values, table).all():
        numbers = np.array([np.flatnonzero(table == value)[0] for value in values])
    else:
        rank = np.argsort(np.argsort(np.where(values == 0, -1, first)))
        numbers = rank + (0 if 0 in values else 1)
    return numbers[inverse].reshape(codes.shape)


def _from_array(array: np.ndarray, what: str, indexed: bool = False) -> np.ndarray:
    if array.ndim != 2 or not array.size:
        raise InputError(f"{what} must be [height, width] of object numbers, not {list(array.shape)}.")
    if array.dtype == bool:
        return array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{what} must hold whole numbers or booleans, not {array.dtype}.")
    if array.min() < 0 or array.max() > (65535 if array.dtype.itemsize > 1 else 255):
        raise InputError(f"{what} has object numbers from {array.min()} to {array.max()}; use 0 to 254.")
    values, counts = np.unique(array, return_counts=True)
    ends = int(counts[0] + counts[-1])
    soft = not indexed and ends > 0.9 * array.size and values[-2:][0] > MOST
    white = len(values) == 1 and not indexed
    if values[-1] in (VOID, 65535) and (white or (values[0] == 0 and (len(values) == 2 or soft))):
        return (array > values[-1] // 2).astype(np.uint8)  # black and white, perhaps with soft edges
    if len(values) > MOST or values.max() > VOID:
        raise InputError(
            f"{what} has {len(values)} levels up to {values.max()}; a mask holds one number from 1 to 254 per object."
        )
    return array


def box_labels(boxes: Any, size: tuple[int, int]) -> Mask:
    """Boxes (x1, y1, x2, y2) in pixels, both corners included, as objects 1, 2, …; smaller boxes lie over larger ones.

    Raises InputError for boxes that are no boxes, reach outside a picture of (width, height), or are hidden by others.
    """
    try:
        corners = np.asarray(boxes, dtype=float).reshape(-1, 4)
    except (TypeError, ValueError):
        raise InputError("Boxes must have four numbers each: x1, y1, x2, y2.") from None
    width, height = size
    if not 0 < len(corners) < VOID:
        raise InputError(f"There are {len(corners)} boxes; give 1 to 254, each x1, y1, x2, y2.")
    labels = np.zeros((height, width), np.uint8)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    for index in np.argsort(-areas, kind="stable"):
        x1, y1, x2, y2 = corners[index]
        if not (-0.5 <= x1 < x2 <= width - 0.5 and -0.5 <= y1 < y2 <= height - 0.5):
            raise InputError(
                f"Box {index} from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is no box inside the picture of "
                f"{width}x{height} pixels; write x1,y1,x2,y2 with 0 <= x1 < x2 < {width} and 0 <= y1 < y2 < {height}."
            )
        left, top, right, bottom = (int(np.floor(value + 0.5)) for value in (x1, y1, x2, y2))
        labels[top : bottom + 1, left : right + 1] = index + 1
    if hidden := [i for i in range(len(corners)) if not (labels == i + 1).any()]:
        raise InputError(f"Box {hidden[0]} is hidden by smaller boxes over it.")
    return labels


def mask_maps(labels: Mask, grid: tuple[int, int]) -> tuple[Labels, list[int]]:
    """One-hot maps of a mask at (width, height) feature cells, nearest pixel as in DAVIS, and the number of each class.

    Class 0 is the background. The published code has a class for every number up to the largest; those that do not occur
    change nothing and are left out.
    """
    small = torch.from_numpy(np.array(Image.fromarray(labels).resize(grid, Image.Resampling.NEAREST)))
    numbers = sorted({0, *np.unique(labels).tolist()})
    return torch.stack([small == number for number in numbers]).float(), numbers


def network_size(fm: FeatureMap) -> tuple[int, int]:
    """(width, height) that label maps are enlarged to before the arg-max: that of the network's picture, as published.

    The picture's own where the network saw it smaller (nearest enlargement would draw stairs) or where it is not known.
    """
    size = fm.recipe.get("size")
    match size:
        case [int(width), int(height)] if width >= fm.frame.picture[0] or height >= fm.frame.picture[1]:
            return width, height
    return fm.frame.picture


def hard_mask(soft: Labels, numbers: list[int], network: tuple[int, int], picture: tuple[int, int]) -> Mask:
    """Object numbers at (width, height) of the picture from propagated maps, as DAVIS results are written.

    Enlarged (bilinear) to the network's size, every class stretched to [0, 1] by its own minimum and maximum if that is
    positive, arg-max over the classes, nearest pixel at the picture's size.
    """
    large = F.interpolate(soft[None], network[::-1], mode="bilinear", align_corners=False)[0]
    for plane in large:
        low, high = plane.aminmax()
        if high > 0 and high > low:  # a constant class stays as it is; the published code divides 0 by 0
            plane.sub_(low).div_(high - low)
    best = np.array(numbers, np.uint8)[large.argmax(0).cpu().numpy()]
    return np.array(Image.fromarray(best).resize(picture, Image.Resampling.NEAREST))


def joint_maps(cells: Float[Tensor, "joints 2"], grid: tuple[int, int], official: bool = False) -> Labels:
    """Background and one Gaussian per joint at (x, y) in units of cells, the centre of the first cell being (0, 0).

    The Gaussian (sigma 0.5, 4 x 4 cells, height 1) sits on the nearest cell; what reaches outside is cut off, and a joint
    that is outside or not finite has an empty map. Background is 1 where every joint is 0.
    official: as VideoWalk draws it, which puts joints within 1.5 cells of the left or upper border one cell too far from it.
    """
    width, height = grid
    side = int(6 * SIGMA + 1)
    offset = torch.arange(side) - side // 2
    patch = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * SIGMA**2))
    maps = torch.zeros(len(cells) + 1, height, width)
    whole = int if official else math.floor
    for plane, (x, y) in zip(maps[1:], cells.tolist(), strict=True):
        if not (np.isfinite(x) and np.isfinite(y)):
            continue
        left, top = whole(x - 3 * SIGMA), whole(y - 3 * SIGMA)
        right, bottom = (whole(value + 3 * SIGMA + 1) for value in (x, y))
        if left >= width or top >= height or right < 0 or bottom < 0:
            continue
        x0, x1, y0, y1 = max(0, left), min(right, width), max(0, top), min(bottom, height)
        plane[y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    maps[0] = maps[1:].sum(0) == 0
    return maps


def joint_cells(soft: Labels) -> Float[Tensor, "joints 2"]:
    """(x, y) in cells of every joint: mean of its 3 highest cells, weighted by their values; (-1, -1) for empty maps.

    soft: background first, as `joint_maps` makes it.
    """
    joints = soft[1:]
    flat = joints.flatten(1).mT.contiguous()
    values, index = flat.topk(min(BEST, len(flat)), dim=0)
    values = values / values.sum(0)
    x, y = index % soft.shape[2], index // soft.shape[2]
    return torch.where(flat.sum(0) == 0, -1.0, torch.stack([(x * values).sum(0), (y * values).sum(0)])).mT


def write_mask(labels: Mask, path: str | Path) -> Path:
    """Write object numbers as an indexed PNG with the palette of DAVIS, beside and then renamed."""
    image = Image.fromarray(labels)
    image.putpalette(PALETTE)
    return atomically(path, lambda beside: image.save(beside, format="PNG"))
