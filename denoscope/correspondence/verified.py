"""`GeometricMatches`: matches between two pictures of one scene, and the matrix that they agree with."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from denoscope.errors import InputError
from denoscope.images import Picture, Points, save_result


@dataclass(frozen=True, eq=False)
class GeometricMatches:
    """points_a, points_b: mutual nearest neighbours, (x, y) in pixels of either picture. scores: their similarity.

    matrix: takes pixels of A (see `estimate`), None when nothing could be estimated. inliers: the matches that agree with it.
    ok: whether the estimate stands; reason: why not. rotation, translation: of the second camera (essential matrices).
    keypoints: how many there were in A and B. kind: "homography", "affine", "similarity",
    "fundamental" or "essential".
    recipe: how the features and the matrix were made. source, target: the pictures A and B.
    """

    points_a: Points
    points_b: Points
    scores: Float[Tensor, " matches"]
    matrix: Float[np.ndarray, "3 3"] | None
    inliers: Bool[Tensor, " matches"]
    ok: bool
    reason: str = ""
    rotation: Float[np.ndarray, "3 3"] | None = None
    translation: Float[np.ndarray, " 3"] | None = None
    keypoints: tuple[int, int] = (0, 0)
    kind: str = "homography"
    recipe: dict[str, Any] = field(default_factory=dict)
    source: Picture | None = field(default=None, repr=False)
    target: Picture | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.points_a)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per match: index, ax, ay, bx, by, score, inlier."""
        columns = [*self.points_a.mT.tolist(), *self.points_b.mT.tolist(), self.scores.tolist(), self.inliers.tolist()]
        names = ("ax", "ay", "bx", "by", "score", "inlier")
        return [{"index": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(zip(*columns, strict=True))]

    def to_dict(self) -> dict[str, Any]:
        """Everything that is saved as JSON."""
        pictures = {
            role: picture and {"path": str(picture.path) if picture.path else None, "size": list(picture.size)}
            for role, picture in (("source", self.source), ("target", self.target))
        }
        arrays = {"matrix": self.matrix, "rotation": self.rotation, "translation": self.translation}
        return {
            **pictures,
            "kind": self.kind,
            "ok": self.ok,
            "reason": self.reason,
            "keypoints": list(self.keypoints),
            "matched": len(self),
            "inliers": int(self.inliers.sum()),
            **{name: None if array is None else array.tolist() for name, array in arrays.items()},
            "recipe": {key: value for key, value in self.recipe.items() if key not in ("picture", "size")},
            "matches": self.rows(),
        }

    def draw(self, **options: Any) -> Image.Image:
        """Both pictures side by side, joined by lines: green with the matrix, thin and orange against it."""
        from denoscope.images.geometry import draw_lines

        one, two = self._pictures()
        verdict = f"{int(self.inliers.sum())} of {len(self)} matches agree with one {self.kind}"
        verdict += " matrix" if self.kind in ("fundamental", "essential") else ""
        title = verdict if self.ok else f"{len(self)} matches; {self.reason}"
        return draw_lines(one, two, self.points_a, self.points_b, self.inliers, title=title, **options)

    def warped(self, style: str = "blend") -> Image.Image:
        """Picture A brought onto B by the homography, affine map or similarity.

        style: "blend" (half and half) or "checker" (alternating squares).

        Raises InputError when there is no homography, or when the pictures are gone.
        """
        from denoscope.images.geometry import warp_onto

        if self.kind in ("fundamental", "essential") or not self.ok or self.matrix is None:
            raise InputError(f"There is no homography to warp by{': ' + self.reason if self.reason else ''}.")
        return warp_onto(*self._pictures(), self.matrix, style)

    def _pictures(self) -> tuple[Picture, Picture]:
        if self.source is None or self.target is None:
            raise InputError("The pictures behind these matches are gone, so they cannot be drawn.")
        return self.source, self.target

    def save(self, path: str | Path) -> Path:
        """Write by suffix: .json (everything), .csv (one row per match), .npz (arrays) or an image of `draw`."""
        arrays = {
            "points_a": self.points_a,
            "points_b": self.points_b,
            "scores": self.scores,
            "inliers": self.inliers,
            "matrix": self.matrix,
            "rotation": self.rotation,
            "translation": self.translation,
            "recipe": json.dumps(self.recipe),
        }
        return save_result(
            path,
            "Matches",
            self.to_dict,
            lambda: {name: values for name, values in arrays.items() if values is not None},
            self.draw,
            lambda: (["index", "ax", "ay", "bx", "by", "score", "inlier"], self.rows()),
        )
