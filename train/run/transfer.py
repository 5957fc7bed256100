"""Batches on their way to the device."""

from collections.abc import Iterable, Iterator

import torch

from train.datasets.batches import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on ``device``. To a GPU each is copied on a stream of its own, while the step before computes."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:  # asked for when the step on the batch before was launched, not when it has ended
        with torch.cuda.stream(stream):
            moved = batch.to(device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in moved.tensors:
            tensor.record_stream(computing)  # its memory is not given to the next batch before the step has read it
        yield moved
