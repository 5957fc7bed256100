"""The model's constants. They are assumptions and published figures, and none was measured by this project.

A change of a constant states the reason, and the table before and after.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

# Warp instructions per clock of a multiprocessor (CUDA programming guide, arithmetic throughput, capability 9.0).
RATES = {"issue": 4.0, "fma": 4.0, "imad": 2.0, "alu": 2.0, "fp16": 2.0, "xu": 0.5, "lsu": 1.0, "uniform": 1.0}
# Clocks until a result is available; 12, as for arithmetic, where an opcode is not listed.
LATENCIES = {
    "LDG": 650, "LDGSTS": 650, "UTMALDG": 750, "LDS": 30, "LDSM": 33, "STS": 20, "STG": 20, "SHFL": 25, "MUFU": 22,
    "LDC": 40, "S2R": 30, "S2UR": 30, "F2F": 20, "I2F": 20, "F2I": 20, "R2UR": 12, "SYNCS": 20, "P2R": 8, "VOTE": 12,
    "FLO": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Constants:
    """Clocks in GHz, bandwidths in TB/s, rates of GEMMs in TFLOP/s, times in microseconds; the others have no unit."""

    multiprocessors: int = 132
    clock: float = 1.755
    l2: float = 5.5
    dram: Mapping[str, float] = field(default_factory=lambda: {"H100": 3.0, "H200": 4.3})
    # Share of the DRAM bandwidth that a launch reaches.
    dram_reached: float = 0.85
    # Launches without a loop: (issue^6 + dram^6)^(1/6) of the issue time, at the boost clock, and the DRAM time.
    stream_clock: float = 1.80
    stream_issue_reached: float = 0.85
    stream_dram_reached: float = 0.97
    stream_power: float = 6
    # PyTorch's GELU in half precision: instructions per element of its formula, compiled by NVRTC.
    torch_gelu_instructions: Mapping[str, float] = field(default_factory=lambda: {"gelu": 28.7, "gelu_backward": 42.8})
    # cuBLAS, assumed rates: (inner dimension below the outer one, inner dimension at least the outer one).
    cublas: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"mid": (600, 670), "fast": (660, 730), "slow": (540, 610)}
    )
    cublas_few_tokens: float = 0.90  # factor on that rate at few tokens, where the last wave is half empty
    few_tokens: int = 20_000
    last_columns: float = 1.045  # time of a GEMM whose last tile of 256 columns is not full, over one without them
    triton_of_cublas: float = 0.85  # rate of our GEMMs over that of cuBLAS
    product_intensity: float = 300  # operations per byte above which a launch counts as a GEMM
    gap: float = 1.2  # between two launches
    reduction: float = 3.5  # torch's sum over partial results of more than a megabyte
    small_operator: float = 2.0  # any other operator of torch

    def lines(self) -> list[str]:
        """Every constant, to be printed below a table."""
        text = ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))
        return [
            f"constants: {text}",
            f"warp instructions a clock and multiprocessor: {RATES}",
            f"clocks of latency, else 12: {LATENCIES}",
        ]


CONSTANTS = Constants()
