"""Segmentation of pictures."""

from denoscope.segmentation.ensemble import PixelEnsemble
from denoscope.segmentation.examples import Example, Examples, read_examples
from denoscope.segmentation.few_shot import FewShot
from denoscope.segmentation.masks import Classes, Masks
from denoscope.segmentation.pixels import PixelStore

__all__ = ["Classes", "Example", "Examples", "FewShot", "Masks", "PixelEnsemble", "PixelStore", "read_examples"]
