"""The configuration of a LoRA mixture-of-experts, written as the paper writes it: (N/k/S/r)."""

from dataclasses import dataclass, field

from kernels import Gating, UserError


@dataclass(frozen=True)
class MoEConfig:
    """N experts of which ``shared`` are always on and ``active`` of the others are selected per token.

    ``MoEConfig.parse("16/3/1/4")`` has 16 experts of rank 4, one of them shared, and three sparse ones active.
    """

    experts: int
    active: int
    shared: int
    rank: int
    gating_name: str = ""
    gating: Gating = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sparse = self.experts - self.shared
        if self.experts < 1:
            raise UserError(f"moe {self}: the experts N must be at least 1")
        if self.rank < 1:
            raise UserError(f"moe {self}: the rank r must be at least 1")
        if not 0 <= self.shared < self.experts:
            raise UserError(f"moe {self}: the shared experts S must be between 0 and N - 1 = {self.experts - 1}")
        if not 1 <= self.active <= sparse:
            raise UserError(f"moe {self}: the active sparse experts k must be between 1 and N - S = {sparse}")
        if not self.gating_name:
            object.__setattr__(self, "gating_name", "ase" if self.shared else "topk")
        object.__setattr__(self, "gating", Gating(self.gating_name, self.active, self.shared))

    @classmethod
    def parse(cls, text: str, gating: str = "") -> "MoEConfig":
        """``"N/k/S/r"``; without a gating, ``ase`` where S > 0 and ``topk`` where S = 0."""
        try:
            experts, active, shared, rank = (int(field) for field in text.split("/"))
        except ValueError:
            raise UserError(f"moe {text!r} is not of the form N/k/S/r, for example 16/3/1/4") from None
        return cls(experts, active, shared, rank, gating)

    def __str__(self) -> str:
        return f"{self.experts}/{self.active}/{self.shared}/{self.rank}"
