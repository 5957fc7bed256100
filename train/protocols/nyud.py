"""Both families on NYUD-v2: inputs are 4:3 or 9:7, and family A scales without rotating.

Where training differs from the field's on this data set, the notes of both protocols say so.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from train.protocols.base import Sample, Step, random_flip
from train.protocols.family_a import MTINET_NOTES, FamilyA, warp
from train.protocols.family_b import INVPT_NOTES, FamilyB

FARTHEST = 80.0  # metres: family B scores depth below that
NYUD_NOTES = (
    "the loss of depth is L1 of log depths; the field's is L1 in metres",
    "edges weigh 0.95 in their loss; MLoRE's runs on this data set use 0.88",
    "predicted depth is positive by construction; the field raises what is not to 1e-9 m",
)


@dataclass(frozen=True)
class ScaleByChoice:
    """Scales by one of ``scales`` as :func:`train.protocols.family_a.warp` does. Draws the index of the scale."""

    scales: tuple[float, ...] = (1.0, 1.2, 1.5)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return warp(sample, 0, self.scales[int(rng.integers(len(self.scales)))])


def limit_depth(sample: Sample, rng: np.random.Generator) -> Sample:
    """Depth of 80 m and more becomes void, which is 0."""
    return sample | {"depth": sample["depth"] * (sample["depth"] < FARTHEST)} if "depth" in sample else sample


class NyudA(FamilyA):
    """Family A on NYUD-v2 (ASTMT, MTI-Net)."""

    name, own_size, aspect = "nyud_mtinet", 480, (3, 4)
    dataset = "NYUD"
    published = "NYUD A"
    notes: ClassVar[tuple[str, ...]] = (
        *MTINET_NOTES,
        *NYUD_NOTES,
        "depth is scored in whole millimetres, as our files store it; the field's .mat files hold floats",
    )

    @property
    def train(self) -> tuple[Step, ...]:
        return random_flip, ScaleByChoice(), *self.val


class NyudB(FamilyB):
    """Family B on NYUD-v2 (ATRC, InvPT, TaskPrompter, MLoRE, MTMamba)."""

    name, own_size, aspect = "nyud_invpt", 448, (7, 9)
    dataset = "NYUD"
    published = "NYUD B"
    notes: ClassVar[tuple[str, ...]] = (
        *INVPT_NOTES,
        *NYUD_NOTES,
        "depth of 80 m and more is void in training too; the field leaves it out of the scores only",
    )

    @property
    def val(self) -> tuple[Step, ...]:
        first, *rest = super().val
        return first, limit_depth, *rest
