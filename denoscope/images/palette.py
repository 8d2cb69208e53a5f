"""Colours of labels in indexed pictures."""

import numpy as np


def _palette() -> list[int]:
    """The colours of DAVIS and PASCAL VOC: bit i of each channel, from the highest, is bit 3i + channel of the label."""
    label = np.arange(256)[:, None] >> np.arange(3)
    return sum(((label >> 3 * i) & 1) << (7 - i) for i in range(8)).flatten().tolist()  # pyright: ignore


PALETTE = _palette()
