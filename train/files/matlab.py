"""A reader of MATLAB files, versions 5 to 7.2, that survives damaged files.

scipy.io.loadmat trusts the content of a file: a wrong type code crashes the process (scipy/scipy#25349), a wrong count
makes it loop endlessly. Here any inconsistency is a ValueError. The format is MathWorks' "MAT-File Level 5": a header
of 128 bytes, then elements. An element is a type, a size and that many bytes, which may contain elements.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A small file cannot ask for much time: PASCAL-Part's largest has a tenth of either.
LIMIT = 2**28  # bytes that the variables of a file may take once decompressed, up to the one that is read
MATRICES = 2**16  # in a variable
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, CHAR = 1, 2, 4
ARRAYS = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
IS_COMPLEX = 0x800


def load_variable(path: Path, name: str) -> Any:
    """One variable; KeyError where there is none.

    Numbers come as an array of their shape, text as str, a struct array as a list of dicts, a cell array as a tuple,
    both in MATLAB's order.
    """
    content = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None:
        raise ValueError("it has no header of a MATLAB file")
    elements, left = Elements(content[128:], order), LIMIT
    while elements.rest:
        kind, data = elements.take()
        if kind == COMPRESSED:
            content = _decompress(data, left)
            left -= len(content)
            kind, data = Elements(content, order).take()
        if kind == MATRIX:
            head, body = _head(Elements(data, order))
            if head.name == name:
                return _value(head, body)
    raise KeyError(name)


@dataclass
class Elements:
    """Reads elements from the bytes in ``rest``; ``order`` is the byte order of numbers, "<" or ">". All elements of a
    variable share ``matrices``, from which each matrix takes one."""

    rest: memoryview
    order: str
    matrices: Iterator[int] = field(default_factory=lambda: iter(range(MATRICES)))

    def take(self) -> tuple[int, memoryview]:
        """(type, bytes) of the next element."""
        kind, size = self._integers(8)
        start = 8
        if kind >> 16:  # a small element: up to 4 bytes of data in place of the size
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
        end = 8 if start == 4 else start + size
        if start + size > end or end > len(self.rest):
            raise ValueError("an element is larger than its container")
        data = self.rest[start : start + size]
        self.rest = self.rest[end if kind == COMPRESSED else -(-end // 8) * 8 :]
        return kind, data

    def numbers(self) -> NDArray:
        """The numbers of the next element, (n,)."""
        kind, data = self.take()
        if kind not in NUMBERS:
            raise ValueError(f"type {kind} where numbers are expected")
        return np.frombuffer(data, self.order + NUMBERS[kind])

    def text(self) -> str:
        kind, data = self.take()
        if kind not in ENCODINGS:
            raise ValueError(f"type {kind} where text is expected")
        wide = {"<": "-le", ">": "-be"}[self.order] if ENCODINGS[kind] in ("utf-16", "utf-32") else ""
        return str(data, ENCODINGS[kind] + wide)

    def _integers(self, size: int) -> list[int]:
        if len(self.rest) < size:
            raise ValueError("it ends too early")
        return np.frombuffer(self.rest[:size], self.order + "u4").tolist()


@dataclass(frozen=True)
class Head:
    """The header of a matrix."""

    kind: int
    is_complex: bool
    shape: tuple[int, ...]
    name: str


def _decompress(data: memoryview, limit: int) -> memoryview:
    stream = zlib.decompressobj()
    content = stream.decompress(data, max(limit, 1))  # 0 would mean any number
    if not stream.eof:
        raise ValueError("its compressed data ends too early, or is too large")
    return memoryview(content)


def _head(elements: Elements) -> tuple[Head, Elements]:
    flags, shape, name = elements.numbers(), elements.numbers(), elements.text()
    if len(flags) != 2 or len(shape) < 2 or (shape < 0).any():
        raise ValueError("a matrix has no valid header")
    return Head(int(flags[0]) & 0xFF, bool(flags[0] & IS_COMPLEX), tuple(shape.tolist()), name), elements


def _matrix(elements: Elements) -> Any:
    """The next element, which is a matrix; without content it is MATLAB's []."""
    kind, data = elements.take()
    if kind != MATRIX:
        raise ValueError(f"type {kind} where a matrix is expected")
    if next(elements.matrices, None) is None:
        raise ValueError(f"it has more than {MATRICES} matrices")
    return _value(*_head(Elements(data, elements.order, elements.matrices))) if data else np.zeros((0, 0))


def _value(head: Head, body: Elements) -> Any:
    if head.kind in ARRAYS and not head.is_complex:
        return body.numbers().reshape(head.shape, order="F").astype(ARRAYS[head.kind])
    if head.kind == CHAR:
        return body.text()
    count = math.prod(head.shape)
    if head.kind == CELL:
        _require_room(count, body)
        return tuple(_matrix(body) for _ in range(count))
    if head.kind == STRUCT:
        fields = _field_names(body)
        _require_room(count * max(len(fields), 1), body)
        return [{field: _matrix(body) for field in fields} for _ in range(count)]
    raise ValueError(f"a matrix is of kind {head.kind}{' (complex)' if head.is_complex else ''}, which no label has")


def _field_names(body: Elements) -> list[str]:
    """Names are stored in one text, in fields of equal length that are padded with zeros."""
    (length,), names = body.numbers().tolist(), body.text()
    if length < 1 or len(names) % length:
        raise ValueError("the names of a struct's fields have inconsistent lengths")
    return [names[i : i + length].partition("\0")[0] for i in range(0, len(names), length)]


def _require_room(matrices: int, body: Elements) -> None:
    if 8 * matrices > len(body.rest):
        raise ValueError("it has fewer matrices than it says")
