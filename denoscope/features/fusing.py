"""Several feature maps of one picture as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from denoscope.errors import InputError
from denoscope.features.feature_map import FeatureMap


def concatenate(maps: Sequence[FeatureMap]) -> FeatureMap:
    """Maps of one picture, each of unit length in every cell, enlarged (bilinear) to the finest grid and concatenated.

    Every map weighs the same: where interpolation does not matter, the cosine between two such features is the mean of the
    cosines of their parts. The recipe lists the parts' sizes.

    Raises InputError for maps of different pictures, or that do not cover the whole picture.
    """
    if len({fm.frame.picture for fm in maps}) != 1:
        raise InputError("Only maps of one picture can be joined.")
    finest = max(maps, key=lambda fm: fm.values.shape[1] * fm.values.shape[2])
    w, h = finest.frame.picture
    corners = torch.tensor([[0, 0], [w, h]], dtype=torch.float64) - 0.5
    for fm in maps:
        whole = torch.tensor([(0, 0), fm.frame.grid], dtype=torch.float64) - 0.5
        if not torch.allclose(fm.frame.to_grid(corners), whole, atol=1e-6):
            raise InputError("Only maps that cover the whole picture can be joined.")
    size = finest.values.shape[1:]
    parts = [
        F.interpolate(F.normalize(fm.values, dim=0)[None], size, mode="bilinear", align_corners=False)[0] for fm in maps
    ]
    return replace(
        finest,
        values=torch.cat([F.normalize(part, dim=0) for part in parts]),
        recipe={**finest.recipe, "size": [fm.recipe.get("size") for fm in maps]},
    )
