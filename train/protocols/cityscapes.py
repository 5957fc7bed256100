"""Family A on Cityscapes' rectangle. Published multi-task numbers on Cityscapes are of other sizes, classes and depths,
so that none stands beside ours."""

from train.protocols.base import Step, random_flip
from train.protocols.family_a import FamilyA
from train.protocols.nyud import ScaleByChoice


class Cityscapes(FamilyA):
    """Ours: flip, scale without rotating, stretch to 2:1."""

    name, own_size, aspect = "cityscapes", 512, (1, 2)
    dataset = "Cityscapes"
    published = ""
    notes = (
        *FamilyA.notes,
        "segmentation has the 19 classes of the benchmark; MTAN and others also report 7 categories",
        "depth is in metres, up to 65.535 m; MTAN and others learn and score inverse depth",
        "scores are at the photo's size; MTAN and others score at the input's, mostly 256 x 128",
    )

    @property
    def train(self) -> tuple[Step, ...]:
        return random_flip, ScaleByChoice(), *self.val
