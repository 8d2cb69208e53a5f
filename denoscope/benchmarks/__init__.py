"""Data set layouts and evaluation protocols."""

from denoscope.benchmarks.pck import Pair, pck
from denoscope.benchmarks.spair import read_pairs

__all__ = ["Pair", "pck", "read_pairs"]
