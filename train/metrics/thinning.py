"""Thinning, which edge labels and the boundary benchmark share."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Words = NDArray[np.uint64]

ONE, ALL_BUT_ONE = np.uint64(1), np.uint64(63)
WORD = np.dtype("<u8")  # 64 pixels, the leftmost in the lowest bit


def thin(mask: Mask) -> Mask:
    """Lines one pixel wide, connected as ``mask`` is: ``bwmorph(mask, "thin", Inf)``, ``skimage.morphology.thin``.

    Guo and Hall's two passes, as Lam, Lee and Suen give them (PAMI 14(9), 1992, p. 879), until neither removes a
    pixel. Each works on 64 pixels at once, the bits of a word. The words of all rows lie in one line, with a row of
    zeros above and below; a zero pixel ends every row and so also separates it from the next.
    """
    height, width = mask.shape
    words = width // 64 + 1
    padded = np.zeros((height + 2, 64 * words), bool)
    padded[1:-1, :width] = mask
    bits = np.packbits(padded, axis=1, bitorder="little").view(WORD).ravel()
    inside = bits[words:-words]
    before = None
    while before is None or (before != inside).any():
        before = inside.copy()
        inside &= ~_removable(*_ring(bits, words))
        ring = _ring(bits, words)
        inside &= ~_removable(*ring[4:], *ring[:4])  # the second pass is the first turned by 180 degrees
    rows = np.unpackbits(inside.view(np.uint8), bitorder="little").reshape(height, -1)
    return rows[:, :width].astype(bool)


def _ring(bits: Words, words: int) -> list[Words]:
    """The eight neighbours of every pixel: east, north-east and so on counter-clockwise."""
    east, west = bits >> ONE, bits << ONE
    east[:-1] |= bits[1:] << ALL_BUT_ONE
    west[1:] |= bits[:-1] >> ALL_BUT_ONE
    above, inside, below = slice(None, -2 * words), slice(words, -words), slice(2 * words, None)
    return [east[inside], east[above], bits[above], west[above], west[inside], west[below], bits[below], east[below]]


def _removable(x1: Words, x2: Words, x3: Words, x4: Words, x5: Words, x6: Words, x7: Words, x8: Words) -> Words:
    """Where the neighbours let the first pass remove the pixel between them: conditions G1, G2 and G3."""
    corners = x2 | x3, x4 | x5, x6 | x7, x8 | x1
    sides = x1 | x2, x3 | x4, x5 | x6, x7 | x8
    b1, b2, b3, b4 = corners[0] & ~x1, corners[1] & ~x3, corners[2] & ~x5, corners[3] & ~x7
    one_crossing = (b1 ^ b2 ^ b3 ^ b4) & ~(b1 & b2 | b3 & b4)
    two_or_three = _at_least_two(*corners) & _at_least_two(*sides) & ~(_all(*corners) & _all(*sides))
    return one_crossing & two_or_three & ~(x1 & (x2 | x3 | ~x8))


def _at_least_two(a: Words, b: Words, c: Words, d: Words) -> Words:
    pairs: Words = a & b | c & d
    return pairs | (a | b) & (c | d)


def _all(a: Words, b: Words, c: Words, d: Words) -> Words:
    return a & b & c & d
