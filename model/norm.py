"""Batch norm over the whole batch of a data-parallel run."""

import torch
from torch import Tensor, nn

from fastmoe_lora.ranks import over_ranks, world_size
from kernels import UserError


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics are over the images of all processes, on any device and backend.

    nn.SyncBatchNorm needs a GPU. A process may have no image of a task: its zero rows enter the sums all the same.
    UserError in training where a process alone has one value a channel, which has no variance. Where no process has an
    image, the running statistics stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) -> the same shape."""
        if not self.training or world_size() == 1:
            if self.training and x.numel() == x.shape[1]:
                raise UserError("batch norm needs two values, a task has one image of one patch: raise --batch-size")
            return super().forward(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        count = over_ranks(exact.new_tensor(x.numel() / x.shape[1]))
        some = count.clamp(min=1)
        mean = over_ranks(exact.sum((0, 2, 3))) / some
        centred = exact - mean[:, None, None]
        variance = over_ranks(centred.square().sum((0, 2, 3))) / some
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1), count > 0)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, moves: Tensor) -> None:
        """Moves the running statistics, as nn.BatchNorm2d does with the unbiased variance; not where ``moves`` is
        False."""
        assert self.momentum is not None
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(new.to(running.dtype), self.momentum * moves.to(running.dtype))
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
