"""HPatches (Balntas et al., arXiv 1704.05939): homographies from sparse matches, as DIFT (arXiv 2306.03881) evaluates them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from denoscope.benchmarks.protocol import Features, Item, Record, Row
from denoscope.correspondence import mutual_nearest
from denoscope.correspondence.geometric import (
    METHODS,
    Matrix,
    corner_error,
    estimate,
    match_keypoints,
    project,
    read_homography,
)
from denoscope.correspondence.keypoints import detect_and_describe, keypoints_of
from denoscope.correspondence.verified import GeometricMatches
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, Points, as_points, read
from denoscope.images.draw import OKABE_ITO, WHITE
from denoscope.images.geometry import draw_outline, warp_onto

PIXELS = (1, 3, 5)
SUFFIXES = (".ppm", ".png", ".jpg", ".jpeg")
# d2-net's download script removes these: their pictures are very large. 108 of 116 sequences are left.
LARGE = {
    *("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding"),
    *("v_artisans", "v_astronautis", "v_talent"),
}


class SequencePair(NamedTuple):
    """One pair: pictures 1 and k of a sequence and the matrix that takes pixels of the first to the second."""

    sequence: str
    k: int
    first: Path
    other: Path
    truth: Matrix


@dataclass
class HPatches:
    """Homography estimation: `ROOT/<i_…|v_…>/{1, 2, …}.(ppm|png|jpg)` and `H_1_k`, any number of pictures.

    keypoints: folder with files SEQUENCE-K.kp (one "x y" a line), or "sift"; n: how many of those.
    metric, convention, method, threshold: see `match_keypoints`. The published evaluation is `convention="official"` with
        "cosine" and "lmeds" (Stable Diffusion) or "l2" and "ransac" (ADM).
    unique: leave out repeated key points, as published.
    small: leave out the eight sequences with very large pictures, as the evaluation of D2-Net and its followers does.

    acc@P: share of pairs whose mean corner error is at most P pixels; a pair without a homography counts as wrong and is
    counted under "failed". mma@P: share of the mutual matches that the true homography confirms within P pixels, mean over
    pairs (D2-Net, Dusmanu et al., arXiv 1905.03561); no matches count as 0. matches, inliers: means over pairs.
    """

    root: Path
    keypoints: str = "sift"
    n: int = 1000
    metric: str = "cosine"
    convention: str = "exact"
    method: str = "lmeds"
    threshold: float = 3.0
    unique: bool = True
    small: bool = False

    name = "hpatches"
    preset = "geometric"
    prompt = ""

    def __post_init__(self) -> None:
        self.root = Path(self.root).expanduser()
        if self.metric not in ("cosine", "l2") or self.convention not in ("exact", "official"):
            raise InputError("The metric must be cosine or l2, and the convention exact or official.")
        if self.method not in METHODS or not 0 < self.threshold < math.inf or self.n < 1:
            raise InputError(f"The method must be one of {', '.join(METHODS)}, threshold and n positive.")

    @property
    def columns(self) -> list[str]:
        return [f"{what}@{p}" for what in ("acc", "mma") for p in PIXELS] + ["matches", "inliers", "failed"]

    def items(self) -> list[Item]:
        if not self.root.is_dir():
            raise MissingError(f"There is no folder {self.root}.")
        folders = [path for path in sorted(self.root.iterdir()) if path.is_dir() and re.match("[iv]_", path.name)]
        if not folders:
            inner = sorted(self.root.glob("*/[iv]_*/H_1_2"))
            hint = f"; name {inner[0].parent.parent}" if inner else ""
            hint = f"; name its parent {self.root.parent}" if (self.root / "H_1_2").is_file() else hint
            raise MissingError(
                f"{self.root} is not in the HPatches layout: looked for folders i_NAME and v_NAME with 1.ppm, 2.ppm, … "
                f"and H_1_2, …{hint}."
            )
        return [
            Item(f"{pair.sequence}/1-{pair.k}", pair.sequence[0], pair)
            for folder in folders
            if not (self.small and folder.name in LARGE)
            for pair in self._pairs(folder)
        ]

    def _pairs(self, folder: Path) -> list[SequencePair]:
        pictures = {
            int(path.stem): path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES and path.stem.isdecimal()
        }
        if 1 not in pictures or len(pictures) < 2:
            raise MissingError(f"{folder} needs pictures 1.ppm, 2.ppm, … (or .png, .jpg); {len(pictures)} are there.")
        if self.keypoints != "sift":
            for k in pictures:
                self._keypoint_file(folder.name, k)
        return [
            SequencePair(folder.name, k, pictures[1], pictures[k], read_homography(folder / f"H_1_{k}"))
            for k in sorted(pictures)
            if k != 1
        ]

    def _keypoint_file(self, sequence: str, k: int) -> Path:
        path = Path(self.keypoints).expanduser() / f"{sequence}-{k}.kp"
        if not path.is_file():
            raise MissingError(f"There is no key point file {path}; give a folder of SEQUENCE-K.kp, or sift.")
        return path

    def _points(self, sequence: str, k: int, path: Path, picture: Picture) -> Points:
        if self.keypoints == "sift":
            return _detected(path, "sift", self.n)[0]
        return keypoints_of(picture, self._keypoint_file(sequence, k))

    def run(self, item: Item, features: Features) -> Record:
        pair: SequencePair = item.data
        one, two = read(pair.first), read(pair.other)
        found = match_keypoints(
            features(one, ""),
            features(two, ""),
            self._points(pair.sequence, 1, pair.first, one),
            self._points(pair.sequence, pair.k, pair.other, two),
            metric=self.metric,
            convention=self.convention,
            unique=self.unique,
            method=self.method,
            threshold=self.threshold,
        )
        return _record(pair, found, one.size)

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        found = []
        for category in ("all", *sorted({item.category for item in items})):
            chosen = [r for item, r in zip(items, records, strict=True) if category in ("all", item.category)]
            errors = np.array([math.inf if r["corner_error"] is None else r["corner_error"] for r in chosen])
            row: Row = {"category": category, "count": len(chosen)}
            row |= {f"acc@{p}": 100 * float(np.mean(errors <= p)) for p in PIXELS}
            row |= {f"mma@{p}": 100 * float(np.mean([r["mma"][str(p)] for r in chosen])) for p in PIXELS}
            row |= {name: float(np.mean([r[name] for r in chosen])) for name in ("matches", "inliers")}
            found.append({**row, "failed": sum(not r["ok"] for r in chosen)})
        return found

    def score(self, item: Item, record: Record) -> float:
        """Minus the mean corner error in pixels."""
        return -1e9 if record["corner_error"] is None else -min(record["corner_error"], 1e8)

    def draw(self, item: Item, record: Record) -> Image.Image:
        """The matches; below, picture 1 warped onto the other, with its true outline in blue and the estimated in orange."""
        pair: SequencePair = item.data
        one, two = read(pair.first), read(pair.other)
        points = torch.tensor(record["points"], dtype=torch.float64).reshape(-1, 4)
        inliers = torch.zeros(len(points), dtype=torch.bool)
        inliers[record["inlying"]] = True
        matrix = None if record["H"] is None else np.array(record["H"])
        drawn = GeometricMatches(
            points[:, :2], points[:, 2:], torch.zeros(len(points)), matrix, inliers, record["ok"], record["reason"],
            source=one, target=two,
        ).draw()  # fmt: skip
        w, h = one.size
        corners = as_points([[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]])
        warped = two.image() if matrix is None or not record["ok"] else warp_onto(one, two, matrix)
        warped = draw_outline(warped, project(pair.truth, corners), OKABE_ITO[6])
        if matrix is not None and record["ok"]:
            warped = draw_outline(warped, project(matrix, corners), OKABE_ITO[3])
        warped.thumbnail((drawn.width, 640))
        whole = Image.new("RGB", (drawn.width, drawn.height + warped.height + 8), WHITE)
        whole.paste(drawn)
        whole.paste(warped, ((drawn.width - warped.width) // 2, drawn.height))
        return whole

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        """The detectors' own descriptors: SIFT (l2) and ORB (Hamming distance), mutual nearest neighbours."""
        return {
            "opencv-sift": lambda item: self._classic(item, "sift"),
            "opencv-orb": lambda i: self._classic(i, "orb"),
        }

    def _classic(self, item: Item, detector: str) -> Record:
        pair: SequencePair = item.data
        (a, one), (b, two) = (_detected(path, detector, self.n) for path in (pair.first, pair.other))
        if len(a) and len(b):
            vectors = [torch.from_numpy(_bits(d) if detector == "orb" else d) for d in (one, two)]
            found = mutual_nearest(*vectors, metric="l2")  # of bits, the Hamming distance
            a, b, scores = a[found.a], b[found.b], found.scores
        else:
            a, b, scores = a[:0], b[:0], torch.zeros(0)
        made = estimate(a, b, "homography", self.method, self.threshold)
        return _record(pair, GeometricMatches(a, b, scores, *made), read(pair.first).size)


def _bits(described: np.ndarray) -> np.ndarray:
    return np.unpackbits(described, axis=1).astype(np.float32)


@lru_cache(maxsize=8)
def _detected(path: Path, detector: str, n: int) -> tuple[Points, np.ndarray]:
    """Key points of a picture; those of picture 1 are asked for by every pair of its sequence."""
    return detect_and_describe(read(path), detector, n)


def _record(pair: SequencePair, found: GeometricMatches, size: tuple[int, int]) -> Record:
    error = corner_error(found.matrix, pair.truth, size) if found.ok else math.inf
    off = (project(pair.truth, found.points_a) - found.points_b).norm(dim=1)
    rounded: list[Any] = torch.cat([found.points_a, found.points_b], 1).mul(100).round().div(100).tolist()
    return {
        "matches": len(found),
        "inliers": int(found.inliers.sum()),
        "H": None if found.matrix is None or not np.isfinite(found.matrix).all() else found.matrix.tolist(),
        "ok": found.ok,
        "reason": found.reason,
        "corner_error": error if math.isfinite(error) else None,
        "mma": {str(p): (off <= p).double().mean().item() if len(off) else 0.0 for p in PIXELS},
        "points": rounded,
        "inlying": found.inliers.nonzero()[:, 0].tolist(),
    }
