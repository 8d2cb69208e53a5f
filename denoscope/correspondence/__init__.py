"""Corresponding points between pictures."""

from denoscope.correspondence.matches import Matches
from denoscope.correspondence.matching import Mutual, match, mutual_nearest, transfer

__all__ = ["Matches", "Mutual", "match", "mutual_nearest", "transfer"]
