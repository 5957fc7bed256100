"""The whole training step as one CUDA graph: forward, losses, backward, clipping and update are launched at once.

A graph repeats the launches of one recorded step on the same memory. Batches of one composition have the same shapes,
so one step is recorded, and every batch is copied to where the recorded one was. The learning rate, which changes from
step to step, is a tensor that is filled before each.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from train.datasets.batches import Batch
from train.run.start import Run
from train.run.step import StepResult, set_learning_rate, update

WARM_UP = 3  # steps before the recording, in which libraries choose their kernels and the optimiser makes its state


class GraphedStep:
    """Called like :func:`train.run.step.training_step`, by a run that :mod:`train.run.build` accepts."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None
        for group in run.optimizer.param_groups:
            group["lr"], group["capturable"] = torch.tensor(float(group["lr"]), device=run.device), True

    def __call__(self, batch: Batch) -> StepResult:
        if self.graph is None:
            self._record(batch)
        self._fill(batch)
        set_learning_rate(self.run)
        assert self.graph is not None
        self.graph.replay()
        extras = {name: value.clone() for name, value in self.result.extras.items()}
        return StepResult(self.result.losses.clone(), extras)

    def _record(self, batch: Batch) -> None:
        self.batch = batch.to(self.run.device)
        restore = self._state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                update(self.run, self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = update(self.run, self.batch)
        restore()

    def _fill(self, batch: Batch) -> None:
        for target, source in zip(self.batch.tensors, batch.tensors, strict=True):
            target.copy_(source)

    def _state(self) -> Callable[[], None]:
        """Remembers parameters, buffers, optimiser and random states; returns what brings them back.

        The graph reads and writes these very tensors, so their values are copied back into them.
        """
        random = torch.cuda.get_rng_state(), torch.get_rng_state()
        kept = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]

        def restore() -> None:
            before = {id(tensor) for tensor, _ in kept}
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
                for tensor in self._tensors():  # the state that the optimiser made in its first step begins at zero
                    if id(tensor) not in before:
                        tensor.zero_()
            torch.cuda.set_rng_state(random[0])
            torch.set_rng_state(random[1])

        return restore

    def _tensors(self) -> Iterable[Tensor]:
        yield from self.run.model.parameters()
        yield from self.run.model.buffers()
        for state in self.run.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))
