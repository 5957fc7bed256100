"""--precision: what is computed and stored in which type, and that a run resumes to the same bits in each."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import VITS, ViT
from train.cli import main, parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run.record import read_record
from train.run.start import set_up
from train.run.step import training_step

QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4", "--workers", "0"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def frozen(tmp_path):
    """Flags of a run over a frozen backbone."""
    torch.manual_seed(0)
    path = tmp_path / "micro.safetensors"
    save_file(ViT(VITS["vit_micro"], 64).state_dict(), path)
    return [*QUICK, "--pretrained", str(path), "--set", "lora_rank=2"]


def open_run(flags, out):
    return set_up(resolve_settings(parse([*flags, "--steps", "4", "--out", str(out)])[0]), None)


@pytest.mark.parametrize("precision", TYPES)
def test_frozen_products_are_stored_as_they_are_computed_and_what_is_trained_in_fp32(precision, frozen, tmp_path):
    run = open_run([*frozen, "--precision", precision], tmp_path / "run")
    stored = {name: p.dtype for name, p in run.model.named_parameters() if not p.requires_grad}
    for name, dtype in stored.items():
        product = name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "proj.bias", "fc2.bias"))
        assert dtype == TYPES[precision] or not product, name
        assert dtype == torch.float32 or "norm" not in name and "embed" not in name.split(".")[-1], name
    assert all(p.dtype == torch.float32 for p in run.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", TYPES)
def test_the_residual_stream_is_fp32(precision, frozen, tmp_path):
    run = open_run([*frozen, "--precision", precision], tmp_path / "run")
    seen = []
    for block in run.model.vit.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    (batch,) = train_loader(run.data[0], run.settings.task_names, 4, range(1), 0, 0)
    losses = training_step(run, batch).losses
    assert seen == [torch.float32] * 4 and losses.dtype == torch.float32 and losses.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_follow_those_of_fp32(precision, frozen, tmp_path):
    for name in ("fp32", precision):
        assert main([*frozen, "--precision", name, "--steps", "4", "--out", str(tmp_path / name)]) == 0
    rows = [torch.tensor(list(read_record(tmp_path / n).losses.values())) for n in ("fp32", precision)]
    torch.testing.assert_close(rows[1], rows[0], rtol=0.02 if precision == "bf16" else 0.003, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_has_the_same_bits(precision, frozen, tmp_path):
    """With fp16 the scale of the gradients is part of the state."""
    flags = [*frozen, "--precision", precision, "--steps", "6"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "stopped"
    assert main([*flags, "--checkpoint-every", "3", "--keep", "2", "--out", str(out)]) == 0
    (out / "last").unlink()
    (out / "last").symlink_to("step-3")
    (out / "results.json").unlink()
    assert main(["--resume", "--out", str(out)]) == 0
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_record(tmp_path / "whole").losses == read_record(out).losses


def test_a_step_whose_scaled_gradients_overflow_is_skipped_by_the_scaler(frozen, tmp_path):
    run = open_run([*frozen, "--precision", "fp16"], tmp_path / "run")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    (batch,) = train_loader(run.data[0], run.settings.task_names, 4, range(1), 0, 0)
    training_step(run, batch)
    assert run.scaler.get_scale() == 2.0**59
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
