"""The expert pool: the compile-time constants that every Triton kernel is specialised for."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels.gating import Gating

MOST_RANKS = 256  # NP r of which a kernel keeps a row of H in registers without spills


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_experts(experts: int) -> int:
    """NP: a power of two and at least 16, the narrowest operand of a GPU's matrix product."""
    return max(16, next_power_of_two(experts))


def fits_one_tile(experts: int, rank: int) -> bool:
    """Whether kernels can keep all of H in one register tile; other pools go through :mod:`kernels.experts`."""
    return padded_experts(experts) * rank <= MOST_RANKS and rank == next_power_of_two(rank)


@dataclass(frozen=True)
class Pool:
    """N experts of rank r with C logits per token.

    Tiles have NP >= N expert columns, see :func:`padded_experts`.
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
        return padded_experts(self.experts)

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
    experts = known.experts(columns)
    return Pool(experts, columns, ranks // experts, known)
