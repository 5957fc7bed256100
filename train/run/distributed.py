"""Training by several processes, one for each device: ``torchrun --nproc-per-node=K -m train ...``.

Every process has a slice of each batch and a copy of the model. DistributedDataParallel sums the gradients of the
trainable parameters, and frozen ones take no part. What is a sum over the batch is one over all processes
(:mod:`fastmoe_lora.ranks`), so that the losses are those of one process with the whole batch. The first process writes
the files and speaks.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoe_lora.ranks import over_ranks, rank, world_size
from kernels import UserError
from train.files.processes import end_with_parent
from train.files.progress import quiet


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started; without torchrun nothing happens. They end with it, as by its SIGTERM,
    even where it is killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with quiet(rank() > 0):
            yield
        # Gloo's threads must let go of the last tensors before Python ends, or they abort the process: pytorch#179291.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def leads() -> bool:
    """Whether this process writes the files and speaks."""
    return rank() == 0


def agreed(mine: bool) -> bool:
    """Whether any process says so."""
    return bool(over_ranks(torch.tensor(int(mine))))


def from_leader(make: Callable[[], Any]) -> Any:
    """What ``make`` returns in the first process, in all of them; its UserError is raised in all of them too."""
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None]
    if leads():
        try:
            outcome = [make()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def parallel(model: nn.Module) -> nn.Module:
    """``model`` for training steps: itself, or wrapped so that gradients are those of the whole batch."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the option's new name, which older versions lack
        return DistributedDataParallel(model, broadcast_buffers=False)
