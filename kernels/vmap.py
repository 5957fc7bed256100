"""Backward passes for many gradients at once, as ``is_grads_batched`` and TorchJD ask for: one after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for many under vmap: it then has no memory that a kernel could be given."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def looped(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple]:
    """A vmap rule for ``op``, to be given to its ``register_vmap``: run it for each gradient and stack the results."""

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        each = [
            op(*(value.select(dim, i) if isinstance(dim, int) else value for value, dim in pairs))
            for i in range(info.batch_size)
            for pairs in [zip(inputs, in_dims, strict=True)]
        ]
        stacked = tuple(torch.stack(results) for results in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
