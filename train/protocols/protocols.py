"""Protocols: the transforms that the field's published numbers rest on, which are comparable only within one protocol.

=======  ====  ================================================================================================
name     size  what it is
=======  ====  ================================================================================================
invpt     512  family B (ATRC, InvPT, TaskPrompter, MLoRE, MTMamba): scale, crop, pad; original pixels in val
mtinet    512  family A (ASTMT, MTI-Net, M3ViT; MTLoRA at 448): turn, scale, stretch to a square
ase       224  family A at the size of Adaptive Shared Experts, arXiv 2510.00570
mini      224  ours: an antialiased square, nothing but a flip
=======  ====  ================================================================================================
"""

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from kernels.errors import UserError
from train.protocols.transforms import (
    PadTo,
    RandomCrop,
    RandomScale,
    Sample,
    ScaleAndRotate,
    ShrinkTo,
    Step,
    StretchTo,
    derive_edges,
    distort_colours,
    random_flip,
    unit_normals,
    void_absent_parts,
)

UINT8_NOTE = "images are uint8 up to the model, which normalises them; the field normalises in its transforms"
OPENCV_NOTE = "OpenCV 5 warps to exact places, OpenCV 4 to 1/32 of a pixel: up to a few grey levels at sharp contrasts"

INVPT_NOTES = (
    UINT8_NOTE,
    "scaled images are rounded to grey levels; the field keeps fractions and drops them in the colour distortion",
    "padding is ImageNet's mean colour rounded to grey levels; the field pads with 0 after normalisation",
    "normals have length 1; the field lets its loss and its meter normalise them",
    "without seg a crop is drawn once; the field's code stops with a KeyError",
)
MTINET_NOTES = (
    UINT8_NOTE,
    "cubic overshoot is clipped to 0..255 and rounded; the field's cast to uint8 wraps it around, -3 to 253",
    "normals are void where nearest interpolation finds void; the field scales what cubic interpolation leaves there, "
    "vectors of arbitrary direction, to length 1",
    OPENCV_NOTE,
)
ASE_NOTES = (
    *MTINET_NOTES,
    "the paper gives 224 x 224 pixels and family A's mIoU of saliency, but no transforms: family A's are assumed",
)


@dataclass(frozen=True)
class Protocol:
    """The steps of a sample from the disk to the model, (size, size), in training and in evaluation.

    With ``edges_at_input``, "edge" enters as the LabelMap (H, W). With ``needs_seg``, training wants "seg" even where
    it is no task, to guide the crop. ``notes`` are where ours differs from the field's code, and why.
    """

    name: str
    size: int
    train: tuple[Step, ...]
    val: tuple[Step, ...]
    edges_at_input: bool = False
    needs_seg: bool = False
    notes: tuple[str, ...] = ()

    @property
    def reported(self) -> str:
        """The name under which results are reported: "invpt", or "invpt@256" at a size that is not its own."""
        return self.name if self.size == OWN_SIZES[self.name] else f"{self.name}@{self.size}"

    def apply(self, sample: Sample, training: bool, rng: np.random.Generator) -> Sample:
        """Raw arrays, see train.protocols.transforms -> "image" uint8 (size, size, 3), labels as in train.tasks."""
        return reduce(lambda arrays, step: step(arrays, rng), self.train if training else self.val, sample)


def invpt(size: int) -> Protocol:
    """Family B."""
    val = (PadTo(size), void_absent_parts, unit_normals)
    train = (RandomScale(), RandomCrop(size), random_flip, distort_colours, *val)
    return Protocol("invpt", size, train, val, needs_seg=True, notes=INVPT_NOTES)


def mtinet(size: int) -> Protocol:
    """Family A."""
    val = (StretchTo(size), void_absent_parts, unit_normals)
    return Protocol("mtinet", size, (random_flip, ScaleAndRotate(), *val), val, notes=MTINET_NOTES)


def ase(size: int) -> Protocol:
    """Family A for what a paper leaves open."""
    return replace(mtinet(size), name="ase", notes=ASE_NOTES)


def mini(size: int) -> Protocol:
    """Ours. Edges come from the resized LabelMap, which keeps them one pixel thin, and only then are mirrored:
    thinning is not symmetric.
    """
    labels = (ShrinkTo(size), void_absent_parts, derive_edges)
    return Protocol("mini", size, (*labels, random_flip, unit_normals), (*labels, unit_normals), edges_at_input=True)


PROTOCOLS = {"invpt": invpt, "mtinet": mtinet, "ase": ase, "mini": mini}
OWN_SIZES = {"invpt": 512, "mtinet": 512, "ase": 224, "mini": 224}


def build_protocol(name: str, size: int = 0) -> Protocol:
    """The protocol at ``size`` pixels, 0 for its own size; UserError for a name that is none."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: choose among {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name](size or OWN_SIZES[name])
