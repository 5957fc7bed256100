"""Schedule-free AdamW (Defazio et al. 2024, the package schedulefree) whose training can be interrupted exactly."""

import torch
from schedulefree import AdamWScheduleFree

from train.run.optimizers import Groups


class ScheduleFree(AdamWScheduleFree):
    """Always in training mode but inside :func:`train.run.optimizers.averaged`.

    The package computes the trained weights back from the averaged ones, with rounding. Here they are kept, and are in
    a checkpoint beside the averaged ones: scores and checkpoints change no bit, and a resumed run has the same bits.
    """

    def __init__(self, groups: Groups, lr: float) -> None:
        super().__init__(groups, lr)
        self.train()

    def eval(self) -> None:
        for p, state in self.state.items():
            if "z" in state:
                state["trained"] = p.detach().clone()
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        for p, state in self.state.items():
            if "trained" in state:
                p.copy_(state.pop("trained"))
        for group in self.param_groups:
            group["train_mode"] = True

    def load_state_dict(self, state_dict: dict) -> None:
        """The state of a checkpoint, which was written inside ``averaged``."""
        super().load_state_dict(state_dict)
        self.train()
