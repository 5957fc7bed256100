"""Gates by patch: those of the equations, at their patch's place."""

import numpy as np
import pytest
import torch

from fastmoe_lora import MoEConfig, adapt
from kernels import UserError
from kernels.reference import gates
from model import MultiTaskViT, ViT, ViTConfig
from model.backbone import Level
from train.evaluation.gate_maps import gate_maps


@pytest.mark.parametrize("gating", ["ase", "naive-shared"])
def test_they_are_those_of_each_patch_without_class_token_and_registers(gating):
    """Of an image that is not square, k = 2 and S = 2, and the second of two tasks before the first."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(width=24, depth=2, heads=2, patch=8, registers=2), 32)
    config = MoEConfig.parse("8/2/2/2", gating)
    routing = adapt(vit, config, tasks=2)
    model = MultiTaskViT(vit, {"seg": 3, "edge": 1}, "light", routing).eval()
    routers, seen = vit.blocks[1].mlp.routers, []
    with torch.no_grad():
        routers.normal_()  # far from ties
    vit.blocks[1].mlp.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    maps = gate_maps(model, image, ("edge", "seg"))
    assert maps.shape == (2, 2, 2, 3, 8) and routing.statistics is None
    for position, task in enumerate((1, 0)):
        tokens = seen[0][task]  # (1 + 2 + 6, 24); the pass is task-major
        expected = gates(tokens @ routers.detach()[task].T, config.gating)[-6:]
        torch.testing.assert_close(maps[1, position], expected.view(2, 3, 8))
    assert ((maps[..., :6] > 0).sum(-1) == 2).all() and (maps[..., 6:] > 0).all()


def test_one_task_can_be_asked_for_alone():
    torch.manual_seed(0)
    vit = ViT(ViTConfig(width=24, depth=2, heads=2, patch=8), 16)
    model = MultiTaskViT(vit, {"seg": 3, "edge": 1}, "light", adapt(vit, "4/1/0/2", tasks=2)).eval()
    image = np.zeros((16, 16, 3), np.uint8)
    torch.testing.assert_close(gate_maps(model, image, ["edge"])[:, 0], gate_maps(model, image, model.tasks)[:, 1])


def test_a_hierarchical_backbone_is_refused():
    """The last tokens of a finer layer would be taken for its whole map."""
    vit = ViT(ViTConfig(width=24, depth=2, heads=2, patch=8), 16)
    model = MultiTaskViT(vit, {"seg": 3}, "light", adapt(vit, "4/1/0/2")).eval()
    vit.levels = Level(24, 4), Level(24, 8)
    with pytest.raises(UserError, match=r"patches of several sizes \(4, 8 pixels\)"):
        gate_maps(model, np.zeros((16, 16, 3), np.uint8), ["seg"])
