"""Corresponding points between pictures."""

from denoscope.correspondence.edits import Propagated, propagate_edit
from denoscope.correspondence.geometric import corner_error, estimate, match_geometric, match_keypoints
from denoscope.correspondence.keypoints import describe, detect, read_keypoints
from denoscope.correspondence.matches import Matches
from denoscope.correspondence.matching import Mutual, match, mutual_nearest, transfer, transfer_aligned
from denoscope.correspondence.mirroring import align_flip, counterparts, mirror, unmirrored
from denoscope.correspondence.propagation import propagate_labels
from denoscope.correspondence.tracking import Tracked, Tracks, track
from denoscope.correspondence.verified import GeometricMatches

__all__ = [
    "GeometricMatches",
    "Matches",
    "Mutual",
    "Propagated",
    "Tracked",
    "Tracks",
    "align_flip",
    "corner_error",
    "counterparts",
    "describe",
    "detect",
    "estimate",
    "match",
    "match_geometric",
    "match_keypoints",
    "mirror",
    "mutual_nearest",
    "propagate_edit",
    "propagate_labels",
    "read_keypoints",
    "track",
    "transfer",
    "transfer_aligned",
    "unmirrored",
]
