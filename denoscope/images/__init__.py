"""Pictures, clips, coordinates, and drawing."""

from denoscope.images.frame import Frame, Points, PointsLike, as_points, grid_points
from denoscope.images.picture import Clip, Picture, read, read_clip, read_mask
from denoscope.images.writing import atomically, save_result, write

__all__ = [
    "Clip",
    "Frame",
    "Picture",
    "Points",
    "PointsLike",
    "as_points",
    "atomically",
    "grid_points",
    "read",
    "read_clip",
    "read_mask",
    "save_result",
    "write",
]
