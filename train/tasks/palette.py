"""The field's colours of class ids."""

import numpy as np
from numpy.typing import NDArray


def _colours(count: int) -> NDArray[np.uint8]:
    """(count, 3) uint8: bit k of the three channels comes from bits 3k, 3k + 1, 3k + 2 of the class id."""
    ids = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


PALETTE = _colours(256)
