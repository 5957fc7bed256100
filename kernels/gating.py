"""The four gatings, how router logits become gates, and the pool of experts that kernels are specialised for."""

from dataclasses import dataclass, field
from functools import cache, cached_property

from kernels.errors import UserError

GATINGS = {
    "ase": "one softmax over the selected sparse and all shared experts, equations (6) to (9)",
    "topk": "softmax over all experts, the k largest kept as they are, equations (1) and (2)",
    "topk-renorm": "softmax over the k selected experts",
    "naive-shared": "topk over the sparse experts, shared gates fixed to 1, equation (5)",
}
MOST_RANKS = 256  # NP r of which a kernel keeps a row of H in registers without spills


@dataclass(frozen=True)
class Gating:
    """A gating: its name, k sparse experts per token and S always-on shared experts (the last S of the pool)."""

    name: str
    k: int
    shared: int
    text: str = field(init=False, repr=False, compare=False)  # "name/k/S", which operators take
    unrouted: int = field(init=False, repr=False, compare=False)  # shared experts without a logit: their gate is fixed

    def __post_init__(self) -> None:
        if self.name not in GATINGS:
            raise UserError(f"unknown gating {self.name!r}: choose among {', '.join(GATINGS)}")
        if self.name in ("ase", "naive-shared") and self.shared == 0:
            raise UserError(f"gating {self.name!r} needs shared experts but S = 0: use 'topk' or 'topk-renorm'")
        if self.name in ("topk", "topk-renorm") and self.shared > 0:
            remedy = "use 'ase' or 'naive-shared'"
            raise UserError(f"gating {self.name!r} knows no shared experts but S = {self.shared}: {remedy}")
        if self.k < 1 or self.shared < 0:
            raise UserError(f"gating {self.name!r}: k = {self.k} sparse and S = {self.shared} shared experts")
        object.__setattr__(self, "text", f"{self.name}/{self.k}/{self.shared}")
        object.__setattr__(self, "unrouted", self.shared if self.name == "naive-shared" else 0)

    @classmethod
    def parse(cls, text: str) -> "Gating":
        """The inverse of :attr:`text`."""
        name, k, shared = text.split("/")
        return cls(name, int(k), int(shared))

    @property
    def slots(self) -> int:
        """Experts that are active for a token."""
        return self.k + self.shared

    def router_columns(self, experts: int) -> int:
        """Logits per token for a pool of ``experts``."""
        return experts - self.unrouted


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
    """N experts of rank r with C logits per token: the constants that a kernel is compiled for.

    Tiles have NP >= N expert columns, see :func:`padded_experts`.
    """

    experts: int
    columns: int
    rank: int
    gating: Gating

    @cached_property
    def ranks(self) -> int:
        """R."""
        return self.experts * self.rank

    @cached_property
    def padded(self) -> int:
        """NP."""
        return padded_experts(self.experts)

    @cached_property
    def tile_columns(self) -> int:
        """Columns that a kernel holds per token: its ranks and its gates or logits, NP (r + 1)."""
        return self.padded * (self.rank + 1)

    @cached_property
    def constants(self) -> dict[str, int]:
        """The constants that every kernel takes."""
        return {"N": self.experts, "C": self.columns, "NP": self.padded, "RANK": self.rank}

    @cached_property
    def gate_constants(self) -> dict[str, int | str]:
        return {"SHARED": self.gating.shared, "GATING": self.gating.name}


@cache
def make_pool(ranks: int, columns: int, gating: str) -> Pool:
    """From R, C and the text of the gating; made once, not for every launch."""
    known = Gating.parse(gating)
    experts = columns + known.unrouted
    return Pool(experts, columns, ranks // experts, known)
