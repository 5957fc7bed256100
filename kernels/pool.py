"""The expert pool: the compile-time constants that every Triton kernel is specialised for."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels.gating import Gating


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Pool:
    """N experts of rank r with C logits per token.

    Tiles have NP >= N expert columns: a power of two and at least 16, the narrowest operand of a GPU's matrix product.
    """

    experts: int
    columns: int
    rank: int
    gating: Gating

    @property
    def ranks(self) -> int:
        """R."""
        return self.experts * self.rank

    @property
    def padded(self) -> int:
        """NP."""
        return max(16, next_power_of_two(self.experts))

    @property
    def tile_columns(self) -> int:
        """Columns that a kernel holds per token: its ranks and its gates or logits, NP (r + 1)."""
        return self.padded * (self.rank + 1)

    def constants(self) -> dict[str, int]:
        """The constants that every kernel takes."""
        return {"N": self.experts, "C": self.columns, "NP": self.padded, "RANK": self.rank}

    def gate_constants(self) -> dict[str, int | str]:
        return {"SHARED": self.gating.shared, "GATING": self.gating.name}


@cache
def make_pool(ranks: int, columns: int, *gating: Any) -> Pool:
    """From R, C and the gating's name, k and S; made once, not for every launch."""
    known = Gating(*gating)
    experts = columns + known.shared if known.name == "naive-shared" else columns
    return Pool(experts, columns, ranks // experts, known)
