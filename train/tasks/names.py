"""The five dense prediction tasks: their names and the void convention of their labels.

A label array has the height and width of its image:

=======  ==========================  ========================================================
task     dtype and shape             meaning
=======  ==========================  ========================================================
seg      uint8 (H, W)                class id; 255 is void
parts    uint8 (H, W)                0 background, 1..6 head .. lower leg; 255 is void
sal      uint8 (H, W)                0 or 1; 255 is void
normals  float32 (3, H, W)           unit vector (x right, y, z as the data set has them); (0, 0, 0) is void
edge     uint8 (H, W)                0 or 1; 255 is void
=======  ==========================  ========================================================
"""

from kernels.errors import UserError

TASKS = ("seg", "parts", "sal", "normals", "edge")
ALIASES = {"semseg": "seg", "human_parts": "parts"}
VOID = 255

PART_NAMES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")


def parse_tasks(text: str) -> tuple[str, ...]:
    """``"semseg,edge"`` -> ``("seg", "edge")``: canonical names in canonical order, each once."""
    names = [ALIASES.get(name.strip(), name.strip()) for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}: choose among {', '.join(TASKS)}, or semseg and human_parts")
        if names.count(name) > 1:
            raise UserError(f"task {name!r} is given twice: name each task once")
    return tuple(task for task in TASKS if task in names)


def output_channels(tasks: tuple[str, ...], classes: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Channels each task's head predicts; ``classes`` names the classes of seg and parts."""
    fixed = {"sal": 2, "normals": 3, "edge": 1}
    return {task: fixed[task] if task in fixed else len(classes[task]) for task in tasks}
