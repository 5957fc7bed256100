"""The arms of the study: which recipes each table and figure of ASE (arXiv 2510.00570) compares."""

from dataclasses import dataclass
from typing import Any

from train.config.settings import Settings, own_values
from train.tasks import DEFAULT_TASKS

# The first arm of each is the one that the others are compared with.
FIGURES: dict[str, tuple[str, ...]] = {
    "table1": ("lora_moe_16_4_0_4", "lora_moe_32_8_0_2", "ase_16_3_1_4", "ase_32_6_2_2", "ase_64_12_4_1",
               "ase_fc1_16_3_1_4", "lora", "mtl_vit", "plain", "fgmoe", "mlore"),
    "fig2": ("lora_moe_16_4_0_4", "topk_renorm_16_4_0_4", "naive_shared_16_3_1_4", "ase_16_3_1_4"),
    "fig3a": tuple(name for k in range(3, 8) for name in (f"lora_moe_16_{k + 1}_0_4", f"ase_16_{k}_1_4")),
    "fig3b": ("lora_moe_16_4_0_4", "ase_16_3_1_4", "lora_moe_32_8_0_2", "ase_32_6_2_2", "lora_moe_64_16_0_1",
              "ase_64_12_4_1"),
    "decoders": ("ase_16_3_1_4", "plain", "fgmoe", "mlore"),
}  # fmt: skip
SHARED = ("paper", "scenes")  # recipes below the arms', in whose place a study has its own


@dataclass(frozen=True)
class Arm:
    """What is trained: a recipe's values over those that all arms share, on all tasks or on one, by a weighting."""

    recipe: str
    tasks: tuple[str, ...] = DEFAULT_TASKS
    weighting: str = Settings.weighting

    @property
    def name(self) -> str:
        single = self.tasks[:1] if len(self.tasks) == 1 else ()
        weighted = (self.weighting,) if self.weighting != Settings.weighting else ()
        return "_".join((self.recipe, *single, *weighted))

    @property
    def values(self) -> dict[str, Any]:
        own = own_values(self.recipe)
        while (base := own.pop("base")) not in SHARED:
            own = own_values(base) | own
        weighted = {"weighting": self.weighting} if self.weighting != Settings.weighting else {}
        return own | {"tasks": ",".join(self.tasks)} | weighted


SINGLE = tuple(Arm("stl", (task,)) for task in DEFAULT_TASKS)  # the single-task models of Delta_m
LIKE = Arm("ase_16_3_1_4")
DECODERS = (Arm("plain"), Arm("fgmoe"), Arm("mlore"))  # they get as many trainable parameters as LIKE
ROUTED, MOMENTS = Arm("fig4"), 24  # the run whose routing is drawn; how often it is recorded, where its steps are given
PRETRAINING = Arm("scenes_pretrain", ("seg",))  # the backbone of a study on rendered scenes
PRETRAINING_SEED = 1000  # whose scenes are none of those that the arms see
