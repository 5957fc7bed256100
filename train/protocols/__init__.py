"""Protocols, by name. Published numbers are comparable only within one.

===========  =========  ========================================================================================
name         input      what it is
===========  =========  ========================================================================================
invpt        512 x 512  family B (ATRC, InvPT, TaskPrompter, MLoRE, MTMamba): scale, crop, pad; original pixels
                        in val
mtinet       512 x 512  family A (ASTMT, MTI-Net, M3ViT; MTLoRA at 448): rotate, scale, stretch to a square
ase          224 x 224  family A at the size of Adaptive Shared Experts, arXiv 2510.00570
mini         224 x 224  ours: antialiased resize to a square, flip only
nyud_invpt   576 x 448  family B on NYUD-v2
nyud_mtinet  640 x 480  family A on NYUD-v2: scale, stretch
cityscapes   1024x512   ours: family A at 2:1; scale, stretch
===========  =========  ========================================================================================

Every protocol takes the images of every data set; the last column names the one it comes from, if not PASCAL-Context.
Inputs are width x height. The settings give the height alone; the width follows from the protocol's aspect ratio.
"""

from kernels.errors import UserError
from train.protocols.base import PHOTO_SIZE, AlignedPrediction, Protocol, Sample
from train.protocols.cityscapes import Cityscapes
from train.protocols.family_a import ASE, FamilyA
from train.protocols.family_b import FamilyB
from train.protocols.nyud import NyudA, NyudB
from train.protocols.square import Mini, Rendered

__all__ = ["PHOTO_SIZE", "PROTOCOLS", "AlignedPrediction", "Protocol", "Rendered", "Sample", "build_protocol"]

PROTOCOLS: dict[str, type[Protocol]] = {
    protocol.name: protocol for protocol in (FamilyB, FamilyA, ASE, Mini, NyudB, NyudA, Cityscapes)
}


def build_protocol(name: str, size: int = 0) -> Protocol:
    """The protocol at inputs of ``size`` pixels in height, 0 for its default size; UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: choose among {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name](size or PROTOCOLS[name].own_size)
