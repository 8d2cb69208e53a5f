"""Sparse key points: detected, on a grid, or read from files; and the features at them."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from denoscope.errors import InputError, MissingError
from denoscope.features import FeatureMap
from denoscope.images import Frame, Picture, Points, PointsLike, as_points, grid_points

KEYPOINT_SUFFIXES = (".kp", ".txt", ".npz", ".csv", ".json")
_GRID = 32  # points along a side of a grid that nothing else was said about


def detect(picture: Picture, detector: str = "sift", n: int = 1000) -> Points:
    """At most `n` distinct key points of a picture, the strongest first; there are none in a flat picture.

    detector: "sift" or "orb" (OpenCV's, whose coordinates have the centre of the top-left pixel at (0, 0), as ours).
    """
    points, _ = detect_and_describe(picture, detector, n)
    return points


def detect_and_describe(picture: Picture, detector: str = "sift", n: int = 1000) -> tuple[Points, np.ndarray]:
    """Key points as `detect` gives them, and the detector's own descriptors [N, 128] float32 (SIFT) or [N, 32] bytes (ORB).

    SIFT puts a point with two orientations down twice; only the first is kept, as features have no orientation.
    """
    if n < 1:
        raise InputError(f"Ask for at least 1 key point, not {n}.")
    grey = cv2.cvtColor(np.array(picture.image()), cv2.COLOR_RGB2GRAY)
    match detector:
        case "sift":  # without precise_upscale every coordinate is off by up to half a pixel
            found, described = cv2.SIFT.create(2 * n, enable_precise_upscale=True).detectAndCompute(grey, None)
        case "orb":
            found, described = cv2.ORB.create(2 * n).detectAndCompute(grey, None)
        case other:
            raise InputError(f"Unknown key point detector {other!r}; use 'sift' or 'orb'.")
    if described is None or not found:
        return torch.zeros(0, 2, dtype=torch.float64), np.zeros((0, 1), np.float32)
    xy = np.array([point.pt for point in found], np.float64)
    order = np.argsort([-point.response for point in found], kind="stable")
    _, first = np.unique(xy[order], axis=0, return_index=True)
    kept = order[np.sort(first)][:n]
    return torch.from_numpy(xy[kept]), described[kept]


def read_keypoints(path: str | Path) -> Points:
    """Key points (x, y) from a file.

    .kp, .txt: one "x y" a line, further columns ignored. .npz: the key "keypoints", [N, 2] or wider (D2-Net's files, which
    carry the picture's suffix and the method's name after a dot, are such files too). .csv: two columns, or a header that
    names x and y. .json: a list of pairs, or {"points": list}.

    Raises MissingError, or InputError when the file does not hold points.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"There is no key point file {path}.")
    if path.suffix.lower() in (".csv", ".json"):
        return as_points(read_point_list(path))
    try:
        if path.suffix.lower() == ".npz" or zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as file:
                values = file["keypoints"]
        else:
            lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
            values = np.array([[float(x), float(y)] for x, y, *_ in lines]).reshape(-1, 2)
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or values.shape[1] < 2 or not np.isfinite(values[:, :2]).all():
            raise ValueError("not [N, 2] finite numbers")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        hint = "the key 'keypoints' [N, 2]" if path.suffix.lower() == ".npz" else "one 'x y' a line"
        raise InputError(f"{path} does not hold key points, which should be {hint} ({error}).") from None
    return torch.from_numpy(np.ascontiguousarray(values[:, :2]))


def read_point_list(path: Path) -> list[tuple[float, float]]:
    """Points (x, y) from a .json file (list of pairs, or {"points": list}) or a .csv file (columns x, y); at least one."""
    if not path.is_file():
        raise MissingError(f"There is no points file {path}.")
    try:
        if path.suffix.lower() == ".json":
            values = json.loads(path.read_text("utf-8-sig"))
            return as_point_list(values["points"] if isinstance(values, dict) else values, str(path))
        rows = [[cell.strip() for cell in row] for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
        if rows and not all(_is_number(cell) for cell in rows[0]):
            header = [cell.lower() for cell in rows[0]]
            if header.count("x") != 1 or header.count("y") != 1:
                raise InputError(f"{path}: the header must name one column x and one column y, not {rows[0]}.")
            x, y = header.index("x"), header.index("y")
            rows = [[row[x], row[y]] for row in rows[1:]]
        return as_point_list([[float(cell) for cell in row] for row in rows], str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} does not hold points; write pairs [[x, y], …] or columns x,y.") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def as_point_list(values: Any, where: str) -> list[tuple[float, float]]:
    """A list of pairs of numbers as floats; InputError, naming `where` they are from, for anything else."""
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} holds no points; give at least one x,y.")
    for pair in values:
        numbers = isinstance(pair, list | tuple) and all(type(number) in (int, float) for number in pair)
        if not numbers or len(pair) != 2:
            raise InputError(f"{where}: every point needs exactly two numbers, x,y.")
    return [(float(x), float(y)) for x, y in values]


def keypoints_of(picture: Picture, keypoints: str | Path | PointsLike, n: int = 1000) -> Points:
    """Key points of a picture by whatever names them.

    keypoints: "sift" or "orb" (at most `n` of them), "grid" (32 x 32, fewer where the picture is smaller) or "grid:N",
        a file for `read_keypoints`, or the points themselves.

    Raises InputError for points outside the picture, and what reading the file raises.
    """
    if not isinstance(keypoints, str | Path):
        return Frame.of(picture.size).inside(keypoints) if len(keypoints) else torch.zeros(0, 2, dtype=torch.float64)
    text = str(keypoints)
    if text in ("sift", "orb"):
        return detect(picture, text, n)
    if text == "grid":
        return grid_points(picture.size, min(_GRID, *picture.size))
    if text.startswith("grid:") and text[5:].isdecimal():
        return grid_points(picture.size, int(text[5:]))
    if isinstance(keypoints, str) and Path(text).suffix.lower() not in KEYPOINT_SUFFIXES and not Path(text).is_file():
        known = ", ".join(KEYPOINT_SUFFIXES)
        raise InputError(f"Key points {text!r} are not understood; write sift, orb, grid, grid:N or a file ({known}).")
    points = read_keypoints(keypoints)
    try:
        return Frame.of(picture.size).inside(points) if len(points) else points
    except InputError as error:
        raise InputError(f"{text}: {error}") from None


def describe(fm: FeatureMap, keypoints: PointsLike, convention: str = "exact") -> Float[Tensor, "points channels"]:
    """Features at key points (x, y), in pixels of the picture.

    convention: "exact" is `FeatureMap.at`. "official" is the sampling of the published HPatches evaluation, bit for bit:
        positions are divided by W - 1 and H - 1 but sampled with cell borders on picture borders, so that they are off by up
        to half a pixel, and what lies within half a cell of the border is blended with zeros. It only exists for maps that
        cover the whole picture.

    Raises InputError for an unknown convention and, in "exact", for points outside the picture.
    """
    check_convention(convention)
    if not len(keypoints):
        return fm.values.new_zeros(0, len(fm.values), dtype=torch.float32)
    if convention == "exact":
        return fm.at(keypoints)
    w, h = fm.frame.picture
    centre = torch.tensor([(w - 1) / 2.0, (h - 1) / 2.0]).clamp_min(0.5)
    at = (as_points(keypoints).float() - centre) / centre
    sampled = F.grid_sample(fm.values[None].float(), at.to(fm.values.device)[None, :, None], align_corners=False)
    return sampled[0, :, :, 0].mT


def check_convention(convention: str) -> None:
    if convention not in ("exact", "official"):
        raise InputError(f"Unknown sampling convention {convention!r}; use 'exact' or 'official'.")


def unique_rows(points: Points) -> list[int]:
    """Indices of the first of each set of equal points, in the order of x, then y (`numpy.unique`, as published)."""
    return np.unique(points.numpy(), return_index=True, axis=0)[1].tolist()
