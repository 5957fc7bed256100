"""What a CUDA graph of the step would read is still there, at its address, after an evaluation: seen on a CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.cli import parse
from train.config.settings import resolve_settings
from train.datasets.batches import eval_loader, train_loader
from train.evaluation.validate import validate
from train.run.start import set_up
from train.run.step import update

QUICK = ["--batch-size", "2", "--set", "scenes=4", "--set", "val_scenes=2", "--workers", "0", "--image-size", "32"]


class Reads(TorchDispatchMode):
    """The storages that a block reads without having made them: a replayed graph reads these addresses again."""

    def __init__(self):
        super().__init__()
        self.given, self.made = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in self.made:
                self.given[tensor.untyped_storage().data_ptr()] = tensor
        self.made |= {t.untyped_storage()._cdata for t in tree_leaves(result) if torch.is_tensor(t)} - {
            t.untyped_storage()._cdata for t in self.given.values()
        }
        return result


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_step_reads_what_an_evaluation_leaves_in_place(kernel, tmp_path, monkeypatch):
    """Parameters, buffers, moments and the batch; nothing that a later pass makes anew and the graph would not see."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    flags = [*QUICK, "--moe", "8/2/1/2", "--model", "vit_micro", "--kernel", kernel, "--out", str(tmp_path / "run")]
    run = set_up(resolve_settings(parse(flags)[0]), None)
    batch = next(iter(train_loader(run.data[0], run.settings.task_names, 2, range(1), 0, 0)))
    update(run, batch)  # in which the optimiser makes its state
    reads = Reads()
    with reads:
        update(run, batch)
    kept = [*run.model.parameters(), *run.model.buffers(), *run.weighting.buffers(), *batch.tensors]
    kept += [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept += [p.grad for p in run.model.parameters() if p.grad is not None]
    own = {tensor.untyped_storage().data_ptr() for tensor in kept}
    strangers = [t for address, t in reads.given.items() if address not in own and t.numel() > 1]
    assert not strangers, [(tuple(t.shape), t.dtype) for t in strangers]
    loader = eval_loader(run.data[1], run.settings.task_names, 2, 0)
    validate(run.model, loader, run.data[1].classes, "evaluate")
    assert own == {tensor.untyped_storage().data_ptr() for tensor in kept}
