"""What a training step hands back beside the losses: the gradient's norm, the regularisers and the loss scale."""

import pytest
import torch

from train.cli import parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run.start import set_up
from train.run.step import training_step

QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4", "--workers", "0"]


def step(out, *flags):
    """A run and the result of its first step, whose gradients are not clipped."""
    argv = [*QUICK, "--image-size", "32", "--set", "clip_norm=1e9", *flags, "--out", str(out)]
    run = set_up(resolve_settings(parse(argv)[0]), None)
    (batch,) = train_loader(run.data[0], run.settings.task_names, 4, range(1), 0, 0)
    return run, training_step(run, batch)


@pytest.mark.parametrize("parts", ["1", "2"])
def test_the_norm_is_that_of_the_gradients_and_the_regulariser_that_of_the_model(parts, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("model.MultiTaskViT.regularisers", lambda _: seen.append(torch.rand(())) or {"mi": seen[-1]})
    run, result = step(tmp_path, "--accumulate", parts)
    gradients = torch.cat([p.grad.double().flatten() for p in run.model.parameters() if p.grad is not None])
    assert result.extras.keys() == {"mi", "gradient_norm"} and len(seen) == int(parts)
    torch.testing.assert_close(result.extras["gradient_norm"], gradients.norm().float())
    torch.testing.assert_close(result.extras["mi"], torch.stack(seen).mean())


def test_the_loss_scale_is_that_of_the_step(tmp_path):
    run, result = step(tmp_path, "--precision", "fp16")
    assert result.extras["loss_scale"] == 1024
    assert all(value.shape == () and not value.requires_grad for value in result.extras.values())
