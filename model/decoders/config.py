"""The configurations of the decoders."""

from dataclasses import dataclass

from kernels import Gating, UserError


@dataclass(frozen=True)
class FGConfig:
    """Fine-grained experts, written N/K/m/K_s, in a decoder of ``width`` channels C; an expert has 4 C hidden ones.

    N expert MLPs per task, of which K are active per token, are cut along the hidden layer into m slices each. Of the
    m N slices, ``shared`` K_s are always active and m K - K_s of the others are selected per token, so that parameters
    and active parameters do not depend on m.
    """

    experts: int
    active: int
    slices: int
    shared: int
    gating_name: str = ""
    width: int = 256

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise UserError(f"fg {self}: the slices m of an expert must be at least 1")
        if 4 * self.width % self.slices:
            raise UserError(f"fg {self}: the slices m must divide the hidden width {4 * self.width} of an expert")
        if not 1 <= self.active <= self.experts:
            raise UserError(f"fg {self}: the active experts K must be between 1 and N = {self.experts}")
        if not 0 <= self.shared < self.slices * self.active:
            most = self.slices * self.active - 1
            raise UserError(f"fg {self}: the shared slices K_s must be between 0 and m K - 1 = {most}")
        if not self.gating_name:
            object.__setattr__(self, "gating_name", "naive-shared" if self.shared else "topk")
        _ = self.gating

    @classmethod
    def parse(cls, text: str, gating: str = "", width: int = 0) -> "FGConfig":
        """``"N/K/m/K_s"``; without a gating, ``naive-shared`` where K_s > 0 and ``topk`` where K_s = 0. A width of 0
        is the default."""
        try:
            experts, active, slices, shared = (int(field) for field in text.split("/"))
        except ValueError:
            raise UserError(f"fg {text!r} is not of the form N/K/m/K_s, for example 4/2/4/1") from None
        return cls(experts, active, slices, shared, gating, width or cls.width)

    def __str__(self) -> str:
        return f"{self.experts}/{self.active}/{self.slices}/{self.shared}"

    @property
    def pool(self) -> int:
        """Slices of one task."""
        return self.slices * self.experts

    @property
    def gating(self) -> Gating:
        """Over the pool, whose last slices are the shared ones."""
        return Gating(self.gating_name, self.slices * self.active - self.shared, self.shared)


@dataclass(frozen=True)
class MLoREConfig:
    """MLoRE's sizes: ``width`` channels, one rank for each of the shared experts, and the rank of a task's path."""

    width: int
    ranks: tuple[int, ...]
    task_rank: int
    active: int = 9
    gating_name: str = "topk"

    @classmethod
    def of(cls, encoder_width: int, gating: str = "", width: int = 0) -> "MLoREConfig":
        """The sizes for an encoder: those of the paper for ViT-S, B and L, where L has even steps between its ranks,
        and smaller ones of ours for narrower encoders. Another ``width`` than theirs scales the ranks. Gatings are
        ``topk``, as on PASCAL-Context, and ``topk-renorm``, as on NYUD-v2."""
        if gating not in ("", "topk", "topk-renorm"):
            raise UserError(f"gating {gating!r} is not one of the mlore decoder's: choose topk or topk-renorm")
        usual, steps, task_rank = next(sizes for least, sizes in _MLORE_SIZES.items() if encoder_width >= least)
        width = width or usual
        ranks = [max(1, rank * width // usual) for rank in (*steps, task_rank)]
        return cls(width, tuple(ranks[:-1]), ranks[-1], gating_name=gating or "topk")

    @property
    def gating(self) -> Gating:
        return Gating(self.gating_name, self.active, 0)


_MLORE_SIZES = {  # least width of the encoder -> (width, ranks, rank of a task's path)
    1024: (768, range(16, 241, 16), 16),
    768: (640, range(16, 129, 8), 64),
    384: (192, range(8, 65, 4), 32),
    0: (96, range(4, 33, 2), 16),
}
