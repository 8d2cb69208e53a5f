"""`Matches`: the result of point transfer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from denoscope.errors import InputError
from denoscope.features import FeatureMap
from denoscope.images import Points, save_result


@dataclass(frozen=True, eq=False)
class Matches:
    """source_points, points: (x, y) in pixels of the source and of the target picture. scores: cosine of each pair.

    cycle: distance in source pixels after transferring each match back, if it was asked for (small = consistent).
    recipe: how the features were made. source, target: the feature maps.
    """

    source_points: Points
    points: Points
    scores: Float[Tensor, " points"]
    cycle: Float[Tensor, " points"] | None
    recipe: dict[str, Any]
    source: FeatureMap = field(repr=False)
    target: FeatureMap = field(repr=False)

    def __len__(self) -> int:
        return len(self.points)

    def rows(self) -> list[dict[str, float]]:
        """One dict per match: index, source_x, source_y, x, y, score and, if known, cycle."""
        names = ["source_x", "source_y", "x", "y", "score", *(["cycle"] if self.cycle is not None else [])]
        columns = [*self.source_points.mT.tolist(), *self.points.mT.tolist(), self.scores.tolist()]
        columns += [self.cycle.tolist()] if self.cycle is not None else []
        return [{"index": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(zip(*columns, strict=True))]

    def to_dict(self) -> dict[str, Any]:
        """Everything that is saved as JSON."""
        recipe = {key: value for key, value in self.recipe.items() if key not in ("picture", "size")}
        pictures = {
            role: {
                "path": fm.recipe.get("picture"),
                "size": list(fm.frame.picture),
                "network_size": fm.recipe.get("size"),
            }
            for role, fm in (("source", self.source), ("target", self.target))
        }
        return {**pictures, "recipe": recipe, "matches": self.rows()}

    def draw(self, heat: bool = False, **options: Any) -> Image.Image:
        """Both pictures side by side with numbered points; `heat` adds the cosine map of the first point.

        Raises InputError when the pictures of saved features are gone.
        """
        from denoscope.images.draw import draw_matches

        one, two = self.source.picture, self.target.picture
        if one is None or two is None:
            raise InputError("The pictures behind these features are gone, so they cannot be drawn.")
        said = ["colours: cosine with point 0"] if heat else []
        said += ["matched from the mirror image of the source"] if self.recipe.get("mirrored") else []
        if said:
            options.setdefault("title", "; ".join(said))
        if heat:
            options["heat"] = self.target.similarity(self.source.at(self.source_points[:1]))[0]
        return draw_matches(one, two, self.source_points, self.points, scores=self.scores, **options)

    def save(self, path: str | Path) -> Path:
        """Write by suffix: .json (everything), .csv (one row per match), .npz (arrays) or an image."""
        arrays = {"source_points": self.source_points, "points": self.points, "scores": self.scores}
        return save_result(
            path,
            "Matches",
            self.to_dict,
            lambda: {**arrays, "recipe": json.dumps(self.recipe)},
            self.draw,
            lambda: (list(self.rows()[0]), self.rows()),
        )
