"""On an NVIDIA GPU: a step as one CUDA graph, and resuming, give the same bits. ``bash bench/gpu.sh`` runs them."""

import pytest
import torch
from safetensors.torch import load_file

from train.cli import main, parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run.graphs import GraphedStep
from train.run.start import set_up
from train.run.step import training_step
from train.run.transfer import on_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

QUICK = ["--batch-size", "4", "--set", "scenes=32", "--set", "val_scenes=4", "--workers", "0", "--steps", "8"]


def weights_after(graphs, out):
    """Of eight steps, eager or graphed, with the same optimiser."""
    run = set_up(
        resolve_settings(parse([*QUICK, "--precision", "bf16", "--deterministic", "--out", str(out)])[0]), None
    )
    step = GraphedStep(run)
    losses = []
    for batch in train_loader(run.data[0], run.settings.task_names, 4, range(8), 0, 0):
        batch = batch.to(run.device)
        losses.append((step(batch) if graphs else training_step(run, batch)).losses)
        run.step += 1
    return torch.stack(losses), {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def test_a_graphed_run_has_the_bits_of_an_eager_one(tmp_path):
    eager, graphed = (weights_after(graphs, tmp_path / str(graphs)) for graphs in (False, True))
    assert torch.equal(eager[0], graphed[0])
    assert all(torch.equal(eager[1][name], graphed[1][name]) for name in eager[1])


@pytest.mark.parametrize("flags", [[], ["--cuda-graphs"]], ids=["eager", "graphed"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(flags, tmp_path):
    flags = [*QUICK, "--deterministic", "--precision", "bf16", *flags]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "stopped"
    assert main([*flags, "--checkpoint-every", "4", "--keep", "2", "--out", str(out)]) == 0
    (out / "last").unlink()
    (out / "last").symlink_to("step-4")
    (out / "results.json").unlink()
    assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_batches_that_are_copied_ahead_arrive_whole(tmp_path):
    settings = resolve_settings(parse([*QUICK, "--out", str(tmp_path)])[0])
    run = set_up(settings, None)
    loader = list(train_loader(run.data[0], settings.task_names, 4, range(8), 0, 0))
    for moved, batch in zip(on_device(loader, run.device), loader, strict=True):
        busy = torch.randn(4096, 4096, device=run.device)
        for _ in range(20):  # the next copy runs beside this
            busy = busy @ busy / 64
        assert all(torch.equal(a.cpu(), b) for a, b in zip(moved.tensors, batch.tensors, strict=True))
