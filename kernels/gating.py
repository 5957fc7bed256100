"""The four gatings: how router logits become gates."""

from dataclasses import dataclass

from kernels.errors import UserError

GATINGS = {
    "ase": "one softmax over the selected sparse and all shared experts, equations (6) to (9)",
    "topk": "softmax over all experts, the k largest kept as they are, equations (1) and (2)",
    "topk-renorm": "softmax over the k selected experts",
    "naive-shared": "topk over the sparse experts, shared gates fixed to 1, equation (5)",
}


@dataclass(frozen=True)
class Gating:
    """A gating: its name, k sparse experts per token and S always-on shared experts (the last S of the pool)."""

    name: str
    k: int
    shared: int

    def __post_init__(self) -> None:
        if self.name not in GATINGS:
            raise UserError(f"unknown gating {self.name!r}: choose among {', '.join(GATINGS)}")
        if self.name in ("ase", "naive-shared") and self.shared == 0:
            raise UserError(f"gating {self.name!r} needs shared experts but S = 0: use 'topk' or 'topk-renorm'")
        if self.name in ("topk", "topk-renorm") and self.shared > 0:
            raise UserError(
                f"gating {self.name!r} knows no shared experts but S = {self.shared}: use 'ase' or 'naive-shared'"
            )

    def router_columns(self, experts: int) -> int:
        """Logits per token for a pool of ``experts``: a shared expert whose gate is fixed has none."""
        return experts - self.shared if self.name == "naive-shared" else experts

    def experts(self, columns: int) -> int:
        """The inverse of :meth:`router_columns`."""
        return columns + self.shared if self.name == "naive-shared" else columns
