"""--optimizer: each trains, resumes to the same bits, and keeps what it promises about groups and rates."""

import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from train.cli import main, parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run import checkpoint, loop, optimizers, schedule
from train.run.optimizers import OPTIMIZERS, averaged, build_optimizer
from train.run.start import set_up
from train.run.step import training_step

QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=8", "--set", "val_scenes=2", "--workers", "0"]
EVERY = [*OPTIMIZERS, "timm:radam"]


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    """In place of the package timm, whose torchvision fits few torches: RAdam under its name there."""

    def create_optimizer_v2(groups, opt, lr):
        if opt != "radam":
            raise ValueError(f"Optimizer {opt} not found in registry")
        return torch.optim.RAdam(groups, lr)

    module = ModuleType("timm.optim")
    module.create_optimizer_v2 = create_optimizer_v2
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.optim", module)


def open_run(out, *flags):
    return set_up(resolve_settings(parse([*QUICK, "--steps", "4", "--out", str(out), *flags])[0]), None)


def take_steps(run, first, last):
    s = run.settings
    for batch in train_loader(run.data[0], s.task_names, s.batch_size, range(first, last), s.seed, 0):
        result = training_step(run, batch)
        run.step += 1
        run.record.add_step(run.step, result.losses, result.extras, run.learning_rate)


def weights(run):
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("name", EVERY)
def test_two_and_two_steps_are_four(name, tmp_path):
    """With a scale of the gradients, as in fp16. The whole run writes no checkpoint and scores nothing on its way."""
    whole, first, then = (open_run(tmp_path / part, "--optimizer", name) for part in ("whole", "first", "then"))
    for run in (whole, first, then):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    before = weights(whole)
    take_steps(whole, 0, 4)
    take_steps(first, 0, 2)
    loop.score(first, "")
    loop.save(first)
    folder = tmp_path / "first" / "step-2"
    checkpoint.restore(folder, then.model, then.parts)
    then.step = 2
    for run in (first, then):
        take_steps(run, 2, 4)
        assert all(torch.equal(run.model.state_dict()[key], tensor) for key, tensor in weights(whole).items())
    moved = [not torch.equal(before[name], tensor) for name, tensor in weights(whole).items()]
    assert sum(moved) > len(moved) / 2


def test_a_schedule_free_run_scores_and_saves_the_average(tmp_path):
    run = open_run(tmp_path / "run", "--optimizer", "schedule-free")
    take_steps(run, 0, 3)
    trained = weights(run)
    with averaged(run.optimizer):
        average = weights(run)
    loop.save(run)
    saved = load_file(tmp_path / "run" / "step-3" / "model.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(run).items())
    assert any(not torch.equal(average[name], trained[name]) for name in average)
    rates = [schedule.learning_rate(run.settings, step, 100) for step in (0, 5, 99)]
    assert rates[0] < rates[1] == rates[2] == run.settings.lr


def test_muon_gets_the_matrices_and_adamw_the_rest(tmp_path):
    run = open_run(tmp_path / "run", "--optimizer", "muon")
    take_steps(run, 0, 1)
    groups = run.optimizer.param_groups
    matrices, others = ([p for g in groups if g["muon"] == muon for p in g["params"]] for muon in (True, False))
    assert {p.ndim for p in matrices} == {2} and {p.ndim for p in others} >= {1, 4}
    assert all(run.optimizer.state[p].keys() == {"momentum_buffer"} for p in matrices)
    assert all(run.optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} for p in others)


@pytest.mark.parametrize("name", EVERY)
def test_groups_and_their_scales_are_the_same_for_all(name, tmp_path):
    """Weight decay on matrices only; a pretrained backbone that is trained has its share of the rate."""
    sets = [f"--set={value}" for value in ("weight_decay=0.5", "train_backbone=true", "backbone_lr=0.25")]
    run = open_run(tmp_path / "run", "--optimizer", name, *sets)
    take_steps(run, 0, 1)
    rate = schedule.learning_rate(run.settings, 0, run.total)
    of = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert of.keys() == {id(p) for p in trained.values()}
    for name, p in trained.items():
        plain = p.ndim <= 1 or "cls_token" in name or "pos_embed" in name
        assert of[id(p)]["weight_decay"] == (0 if plain else 0.5), name
        inside = name.startswith("vit.") and not optimizers.is_adapter(name.removeprefix("vit."))
        assert of[id(p)]["lr"] == rate * (0.25 if inside else 1), name


def test_sgd_is_the_fields():
    """v = 0.9 v + g + wd p; p = p - lr v."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    model = torch.nn.Module()
    model.weight = weight
    settings = resolve_settings({"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01})
    optimizer, expected, velocity = build_optimizer(settings, model, torch.nn.Module()), weight.detach().clone(), 0
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        velocity = 0.9 * velocity + 1 + 0.01 * expected
        expected = expected - 0.1 * velocity
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_that_is_not_finite_changes_nothing(name, tmp_path):
    run = open_run(tmp_path / "run", "--optimizer", name, "--on-nonfinite", "skip")
    take_steps(run, 0, 1)
    before = weights(run)
    batch = next(iter(train_loader(run.data[0], run.settings.task_names, 4, range(1), 0, 0)))
    batch.labels["normals"][:] = float("nan")
    training_step(run, batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(run).items())
    take_steps(run, 1, 2)
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_what_is_not_there_is_one_line(error_of, tmp_path, monkeypatch):
    flags = [*QUICK, "--steps", "1", "--out", tmp_path / "run", "--optimizer"]
    assert f"unknown optimizer 'adam': choose among {', '.join(OPTIMIZERS)}, timm:NAME" in error_of(
        main, *flags, "adam"
    )
    assert "unknown optimizer 'timm:'" in error_of(main, *flags, "timm:")
    assert "timm does not make it (Optimizer lino not found" in error_of(main, *flags, "timm:lino")
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    assert "timm:lion needs the package timm with a torchvision that fits torch" in error_of(main, *flags, "timm:lion")
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    monkeypatch.delitem(sys.modules, "train.run.schedule_free", raising=False)
    assert "needs the package schedulefree: pip install schedulefree" in error_of(main, *flags, "schedule-free")
    assert not (tmp_path / "run").exists()
