"""Sparse matching and the geometry behind it: homography, fundamental and essential matrix.

DIFT, arXiv 2306.03881, section 5.2: features at key points, mutual nearest neighbours, robust estimation. Matrices take
homogeneous pixels (x, y, 1) of picture A; the centre of the top-left pixel is (0, 0).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denoscope.correspondence.keypoints import check_convention, describe, keypoints_of, unique_rows
from denoscope.correspondence.matching import comparable, mutual_nearest
from denoscope.correspondence.verified import GeometricMatches
from denoscope.denoisers.protocol import Denoiser
from denoscope.errors import InputError, MissingError
from denoscope.features import FeatureMap, as_extractor, paired
from denoscope.images import Points, PointsLike, as_points, read

Matrix = Float[np.ndarray, "3 3"]
# and the fewest matches that decide them
MATRICES = {"homography": 4, "affine": 3, "similarity": 2, "fundamental": 8, "essential": 5}
METHODS = {
    "usac-magsac": cv2.USAC_MAGSAC,
    "usac-accurate": cv2.USAC_ACCURATE,
    "usac-default": cv2.USAC_DEFAULT,
    "usac-fast": cv2.USAC_FAST,
    "usac-prosac": cv2.USAC_PROSAC,
    "ransac": cv2.RANSAC,
    "lmeds": cv2.LMEDS,
}
# fewer agreeing matches than this are chance: several times what decides the matrix
LEAST_AGREEING = {"homography": 8, "affine": 8, "similarity": 8, "fundamental": 16, "essential": 12}
_SQUASHED, _PERSPECTIVE, _GROWN = 8.0, 4.0, 50.0  # what no part of a picture should suffer, see `absurd`
_RANK = 1e-9  # a matrix whose singular values fall off by more than this has collapsed


class Estimate(NamedTuple):
    """matrix: None when nothing could be estimated. inliers: matches within the threshold, none when not ok.

    reason: why it is not ok, else "". rotation, translation: of the second camera, for an essential matrix: a point X before
    the first camera is at `rotation @ X + translation` before the second, |translation| = 1.
    """

    matrix: Matrix | None
    inliers: Bool[Tensor, " matches"]
    ok: bool
    reason: str = ""
    rotation: Matrix | None = None
    translation: Float[np.ndarray, " 3"] | None = None


def estimate(
    points_a: PointsLike,
    points_b: PointsLike,
    matrix: str = "homography",
    method: str = "usac-magsac",
    threshold: float | int = 3.0,
    intrinsics: Any = None,
) -> Estimate:
    """The homography, fundamental or essential matrix that most matches agree with, by OpenCV's robust estimators.

    points_a, points_b: matching points (x, y) in pixels, row by row; for "usac-prosac" the best matches first.
    matrix: "homography" (b ~ H a; at least 4 matches) or, with fewer freedoms, "affine" (3) or "similarity" (2, by "ransac" or
        "lmeds" only); "fundamental" (b^T F a = 0; 8) or "essential" (5).
    method: "usac-magsac" (MAGSAC++, Barath et al., arXiv 1912.05909), "usac-accurate", "usac-default", "usac-fast",
        "usac-prosac", "ransac" or "lmeds" (least median of squares, which needs half the matches to be right). OpenCV starts
        its random numbers afresh in every call, so that equal input gives equal output.
    threshold: distance in pixels up to which a match is an inlier ("lmeds" finds its own).
    intrinsics: for "essential" the 3 x 3 camera matrix, one for both pictures or a pair of them (see `camera_matrix`).

    A failed estimate is a result with `ok=False` and a reason. Raises InputError for unknown names and wrong arguments.
    """
    if matrix not in MATRICES:
        raise InputError(f"Unknown matrix {matrix!r}; use one of {', '.join(MATRICES)}.")
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}; use one of {', '.join(METHODS)}.")
    if matrix == "similarity" and method not in ("ransac", "lmeds"):
        raise InputError(f"OpenCV estimates a similarity by ransac or lmeds, not by {method}.")
    if not 0 < threshold < math.inf:
        raise InputError(f"The inlier threshold must be a positive number of pixels, not {threshold:g}.")
    cameras = _cameras(intrinsics) if matrix == "essential" else None
    if len(points_a) != len(points_b):
        raise InputError(f"{len(points_a)} points cannot match {len(points_b)}; give one of B for every one of A.")
    none = torch.zeros(len(points_a), dtype=torch.bool)
    least = MATRICES[matrix]
    if len(points_a) < least:
        return Estimate(None, none, False, f"{len(points_a)} matches are too few for a {matrix}, which needs {least}")
    a, b = (as_points(points).numpy() for points in (points_a, points_b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("Points to estimate from must be finite; leave out NaN and infinity.")
    if min(len(np.unique(points, axis=0)) for points in (a, b)) < least:
        return Estimate(None, none, False, f"the matches lie on fewer than {least} distinct points")
    if matrix != "similarity" and any(_collinear(points) for points in (a, b)):
        return Estimate(None, none, False, "all matches lie on one line")
    if cameras is not None:
        return _essential(a, b, cameras, METHODS[method], threshold)
    try:  # single precision, as the published code has it
        found, mask = _FINDERS[matrix](a.astype(np.float32), b.astype(np.float32), METHODS[method], float(threshold))
    except cv2.error as error:
        return Estimate(None, none, False, f"OpenCV could not estimate a {matrix} ({error.err})")
    if found is None or found.shape[0] < 2 or mask is None:
        return Estimate(None, none, False, f"no {matrix} fits the matches")
    found = np.vstack([found, [0.0, 0.0, 1.0]]) if len(found) == 2 else found[:3]
    extent = float(max(np.abs(a).max(), np.abs(b).max()))
    # with coordinates of order one its singular values mean something
    scale = np.diag([extent, extent, 1.0])
    scaled = scale @ found @ scale if matrix == "fundamental" else np.linalg.inv(scale) @ found @ scale
    if reason := _degenerate(scaled, 2 if matrix == "fundamental" else 3):
        return Estimate(found, none, False, f"the {matrix} {reason}")
    return Estimate(found, torch.from_numpy(mask.ravel() > 0), True)


_FINDERS: dict[str, Any] = {
    "homography": cv2.findHomography,
    "fundamental": cv2.findFundamentalMat,
    "affine": lambda a, b, method, threshold: cv2.estimateAffine2D(
        a, b, method=method, ransacReprojThreshold=threshold
    ),
    "similarity": lambda a, b, method, threshold: cv2.estimateAffinePartial2D(
        a, b, method=method, ransacReprojThreshold=threshold
    ),
}


def _essential(a: np.ndarray, b: np.ndarray, cameras: list[Matrix], method: int, threshold: float | int) -> Estimate:
    """The essential matrix from rays, and the pose that puts most points before both cameras.

    The rays are seen by one camera with the mean focal length: OpenCV takes one camera, and MAGSAC counts in pixels.
    """
    none = torch.zeros(len(a), dtype=torch.bool)
    rays = [
        np.hstack([points, np.ones((len(points), 1))]) @ np.linalg.inv(camera).T
        for points, camera in zip((a, b), cameras, strict=True)
    ]
    focal = sum(camera[0, 0] + camera[1, 1] for camera in cameras) / 4
    one, two = (np.ascontiguousarray(focal * ray[:, :2] / ray[:, 2:]) for ray in rays)
    camera = np.diag([focal, focal, 1.0])
    try:
        found, mask = cv2.findEssentialMat(one, two, camera, method, 0.999, float(threshold))
        if found is None or found.shape[0] < 3 or mask is None:
            return Estimate(None, none, False, "no essential matrix fits the matches")
        poses = [  # five matches leave up to ten matrices
            (*cv2.recoverPose(matrix, one, two, camera, mask=mask.copy())[:3], matrix)
            for matrix in np.split(found, len(found) // 3)
            if not _degenerate(matrix, 2)
        ]
    except cv2.error as error:
        return Estimate(None, none, False, f"OpenCV could not estimate an essential matrix ({error.err})")
    if not poses:
        return Estimate(None, none, False, "the essential matrix is degenerate")
    before, rotation, translation, matrix = max(poses, key=lambda pose: pose[0])
    if not before:
        return Estimate(matrix, none, False, "no pose puts the matches before both cameras")
    matrix = matrix * (math.sqrt(2) / np.linalg.norm(matrix))  # singular values 1, 1, 0
    return Estimate(matrix, torch.from_numpy(mask.ravel() > 0), True, "", rotation, translation.ravel())


def _degenerate(matrix: Matrix, rank: int) -> str:
    if not np.isfinite(matrix).all():
        return "is not finite"
    values = np.linalg.svd(matrix / max(np.abs(matrix).max(), 1e-300), compute_uv=False)
    return "is degenerate" if values[rank - 1] < _RANK else ""


def _collinear(points: np.ndarray) -> bool:
    long, short = np.linalg.svd(points - points.mean(0), compute_uv=False)
    return bool(short < 1e-6 * long)


def camera_matrix(focal: float | int, size: tuple[int, int]) -> Matrix:
    """Intrinsics of a camera with square pixels and a focal length in pixels that looks at the middle of (width, height)."""
    if not 0 < focal < math.inf:
        raise InputError(f"The focal length must be a positive number of pixels, not {focal:g}.")
    return np.array([[focal, 0, (size[0] - 1) / 2], [0, focal, (size[1] - 1) / 2], [0, 0, 1]], np.float64)


def _cameras(intrinsics: Any) -> list[Matrix]:
    """Both camera matrices."""
    if intrinsics is None:
        raise InputError(
            "An essential matrix needs the camera: its focal length in pixels (--focal) or 3 x 3 intrinsics."
        )
    try:
        cameras = np.asarray(intrinsics, np.float64)
    except (TypeError, ValueError):
        cameras = np.zeros(0)
    if cameras.shape == (3, 3):
        cameras = np.stack([cameras, cameras])
    if cameras.shape != (2, 3, 3) or not np.isfinite(cameras).all() or (np.linalg.det(cameras) <= 0).any():
        raise InputError("Intrinsics must be an invertible 3 x 3 camera matrix, or two of them.")
    return [cameras[0], cameras[1]]


def corner_error(matrix: Any, truth: Any, size: tuple[int, int]) -> float:
    """Mean distance in pixels between the corners of picture A, of (width, height), under two homographies.

    The corners are (0, 0), (0, h - 1), (w - 1, 0) and (w - 1, h - 1). Infinite when there is no matrix, or when it sends a
    corner to infinity.
    """
    if matrix is None:
        return math.inf
    w, h = size
    corners = torch.tensor([[0, 0], [0, h - 1], [w - 1, 0], [w - 1, h - 1]], dtype=torch.float64)
    error = (project(matrix, corners) - project(truth, corners)).norm(dim=1).mean().item()
    return error if math.isfinite(error) else math.inf


def project(matrix: Any, points: Points) -> Points:
    """Points (x, y) under a homography; not finite where they go to infinity."""
    h = torch.as_tensor(np.asarray(matrix, np.float64))
    if h.shape != (3, 3):
        raise InputError(f"A homography must be 3 x 3, not {list(h.shape)}.")
    moved = torch.cat([points.double(), points.new_ones(len(points), 1, dtype=torch.float64)], 1) @ h.mT
    return moved[:, :2] / moved[:, 2:]


def read_homography(path: str | Path) -> Matrix:
    """A 3 x 3 matrix from a text file, as HPatches has them. Raises MissingError or InputError."""
    if not Path(path).is_file():
        raise MissingError(f"There is no homography {path}.")
    try:
        matrix = np.array(
            [[float(cell) for cell in line.split()] for line in Path(path).read_text().splitlines() if line]
        )
    except (ValueError, OSError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or np.linalg.det(matrix) == 0:
        raise InputError(f"{path} does not hold an invertible 3 x 3 matrix, three numbers a line.")
    return matrix


def match_keypoints(
    source: FeatureMap,
    target: FeatureMap,
    keypoints_a: Float[Tensor, "n 2"],
    keypoints_b: Float[Tensor, "m 2"],
    *,
    metric: str = "cosine",
    convention: str = "exact",
    unique: bool | None = None,
    matrix: str = "homography",
    method: str = "usac-magsac",
    threshold: float | int = 3.0,
    intrinsics: Any = None,
    force: bool = False,
) -> GeometricMatches:
    """Mutual nearest neighbours between the features at key points, and the matrix that most of them agree with.

    keypoints_a, keypoints_b: (x, y) in pixels of either picture. metric: see `mutual_nearest`. convention: see `describe`.
    unique: leave out repeated key points, which also sorts them by x, then y; by default as the convention has it (the
        published evaluation does). matrix, method, threshold, intrinsics: see `estimate`. force: see `transfer`.

    Raises InputError for wrong arguments; too few matches are a result with `ok=False`.
    """
    comparable(source, target, force)
    source, target = paired(source, target)
    if unique if unique is not None else convention == "official":
        keypoints_a, keypoints_b = keypoints_a[unique_rows(keypoints_a)], keypoints_b[unique_rows(keypoints_b)]
    one, two = describe(source, keypoints_a, convention), describe(target, keypoints_b, convention)
    if len(one) and len(two):
        pairs = mutual_nearest(one, two, metric)
        a, b, scores = keypoints_a[pairs.a.cpu()], keypoints_b[pairs.b.cpu()], pairs.scores.cpu()
    else:
        a, b, scores = keypoints_a[:0], keypoints_b[:0], torch.zeros(0)
    if method == "usac-prosac":
        order = scores.argsort(descending=True, stable=True)
        a, b, scores = a[order], b[order], scores[order]
    settings = {"matrix": matrix, "method": method, "threshold": float(threshold)}
    return GeometricMatches(
        a,
        b,
        scores,
        *estimate(a, b, matrix, method, threshold, intrinsics),
        keypoints=(len(keypoints_a), len(keypoints_b)),
        kind=matrix,
        recipe={**target.recipe, "metric": metric, "convention": convention, **settings},
        source=source.picture,
        target=target.picture,
    )


def absurd(matrix: Matrix, box: Points, source: tuple[int, int], target: tuple[int, int]) -> str:
    """Why a homography cannot be meant for a part of a picture, or "" when nothing speaks against it.

    box: corners of the part, in the order of its outline. source, target: (width, height) of the pictures. Mirrored, folded
    over the horizon, foreshortened more than 4 times across, squashed more than 8 times, grown or shrunk more than 50 times
    (in area, relative to the pictures), or outside of the target.
    """
    h = torch.from_numpy(matrix)
    w = box @ h[2, :2] + h[2, 2]
    if not (w.min() * w.max() > 0):
        return "it would be folded over the horizon"
    if w.abs().max() > _PERSPECTIVE * w.abs().min():
        return "it would be foreshortened beyond recognition"
    moved = project(matrix, box)
    areas = [_area(corners).item() for corners in (box, moved)]
    if areas[0] * areas[1] <= 0:
        return "it would be mirrored"
    ratio = abs(areas[1] / areas[0]) * source[0] * source[1] / (target[0] * target[1])
    if not 1 / _GROWN < ratio < _GROWN:
        return f"it would be {'enlarged' if ratio > 1 else 'shrunk'} beyond recognition"
    middle = box.mean(0)
    step = 1e-3 * (box.amax(0) - box.amin(0)).max()
    moves = torch.stack([middle, middle + torch.tensor([step, 0.0]), middle + torch.tensor([0.0, step])])
    one, right, down = project(matrix, moves)
    stretch = torch.linalg.svdvals(torch.stack([right - one, down - one]))
    if stretch[0] > _SQUASHED * stretch[1]:
        return "it would be squashed beyond recognition"
    low, high = moved.amin(0), moved.amax(0)
    outside = (high < -0.5).any() or bool((low > low.new_tensor(target) - 0.5).any())
    return "it would lie outside the picture" if outside else ""


def _area(corners: Points) -> Float[Tensor, ""]:
    """Signed area of a polygon."""
    x, y = corners.mT
    return ((x * y.roll(-1)) - (x.roll(-1) * y)).sum() / 2


def doubt(found: GeometricMatches) -> str:
    """Why an estimate is not to be trusted, or "": too few matches agree, or what they agree on is `absurd` where they lie.

    A handful of wrong matches always agrees on something. That many cannot be chance.
    """
    agreeing, least = int(found.inliers.sum()), LEAST_AGREEING[found.kind]
    if agreeing < least:
        return f"only {agreeing} of {len(found)} matches agree, where {least} are needed to mean something"
    if found.matrix is None or found.kind in ("fundamental", "essential") or not (found.source and found.target):
        return ""
    inliers = found.points_a[found.inliers]
    (left, top), (right, bottom) = inliers.amin(0).tolist(), inliers.amax(0).tolist()
    box = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=torch.float64)
    return absurd(found.matrix, box, found.source.size, found.target.size)


def match_geometric(
    model: Any,
    a: Any,
    b: Any,
    keypoints: str | Path | PointsLike = "sift",
    keypoints_b: str | Path | PointsLike | None = None,
    *,
    n: int = 1000,
    metric: str = "cosine",
    convention: str = "exact",
    unique: bool | None = None,
    matrix: str = "homography",
    method: str = "usac-magsac",
    threshold: float | int = 3.0,
    intrinsics: Any = None,
    focal: float | int | Sequence[float | int] | None = None,
    **options: Any,
) -> GeometricMatches:
    """Two pictures of one scene: key points, features there, mutual nearest neighbours, and the geometry they agree with.

    model: a Denoiser, whose "geometric" preset is the default, or any Extractor. a, b: anything that `denoscope.read` takes.
    keypoints: "sift" (at most `n` of them), "orb", "grid", "grid:N", a file (.kp, .npz, .csv, .json) or points (x, y) of
        A. keypoints_b: the same for picture B; by default B is detected in as A is, so points and files need their partner.
    focal: in pixels, of both cameras or one each, in the place of `intrinsics`. `options` are those of `denoscope.features`,
    the other arguments those of `match_keypoints`.

    Raises InputError for wrong arguments and points outside; failed estimates, and those that `doubt` speaks against, are
    results with `ok=False` (the latter keep their matrix).
    """
    if isinstance(model, Denoiser) and options.get("preset") is None:
        options["preset"] = "geometric"
    extract = as_extractor(model, **options)
    one, two = read(a), read(b)
    if keypoints_b is None:
        if not isinstance(keypoints, str) or Path(keypoints).is_file():
            raise InputError("Key points of A were given, so those of B are needed too: keypoints_b (--keypoints-b).")
        keypoints_b = keypoints
    points_a, points_b = keypoints_of(one, keypoints, n), keypoints_of(two, keypoints_b, n)
    if focal is not None:
        if intrinsics is not None:
            raise InputError("Give either the intrinsics or the focal length.")
        both = list(focal) if isinstance(focal, Sequence) else [focal, focal]
        if len(both) != 2:
            raise InputError(f"Give one focal length or two, not {len(both)}.")
        intrinsics = [camera_matrix(f, picture.size) for f, picture in zip(both, (one, two), strict=True)]
    # mistakes before the expensive part
    check_convention(convention)
    mutual_nearest(torch.ones(1, 1), torch.ones(1, 1), metric)
    estimate(points_a[:0], points_b[:0], matrix, method, threshold, intrinsics)
    found = match_keypoints(
        extract(one),
        extract(two),
        points_a,
        points_b,
        metric=metric,
        convention=convention,
        unique=unique,
        matrix=matrix,
        method=method,
        threshold=threshold,
        intrinsics=intrinsics,
    )
    reason = doubt(found) if found.ok else ""
    return replace(found, ok=False, reason=reason) if reason else found
