"""--weighting: what each does to losses and gradients, that a run resumes to the same bits, and what is refused."""

import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from model import VITS, ViT
from train.cli import main, parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run import checkpoint, loop, weighting
from train.run.start import set_up
from train.run.step import training_step
from train.run.weighting import WEIGHTINGS
from train.tasks import TASKS

QUICK = ["--batch-size", "4", "--image-size", "32", "--set", "scenes=8", "--set", "val_scenes=2", "--workers", "0"]
THREE = ["--tasks", "seg,sal,normals"]


def open_run(out, *flags):
    run = set_up(resolve_settings(parse([*QUICK, *THREE, "--steps", "4", "--out", str(out), *flags])[0]), None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.weighting.parameters():  # so that factors are not all 1
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return run


def batches(run, first, last):
    s = run.settings
    return train_loader(run.data[0], s.task_names, s.batch_size, range(first, last), s.seed, 0)


def take_steps(run, first, last):
    for batch in batches(run, first, last):
        result = training_step(run, batch)
        run.step += 1
        run.record.add_step(run.step, result.losses, result.extras, run.learning_rate)


def state(run):
    """Weights, and what the weighting has learned or seen."""
    tensors = {**run.model.state_dict(), **{f"weighting.{k}": v for k, v in run.weighting.state_dict().items()}}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", list(WEIGHTINGS)[1:])
def test_two_and_two_steps_are_four(name, tmp_path, monkeypatch):
    monkeypatch.setattr(weighting, "WINDOW", 1)
    whole, first, then = (open_run(tmp_path / part, "--weighting", name) for part in ("whole", "first", "then"))
    take_steps(whole, 0, 4)
    take_steps(first, 0, 2)
    loop.save(first)
    checkpoint.restore(tmp_path / "first" / "step-2", then.model, then.parts)
    then.step = 2
    take_steps(then, 2, 4)
    ours, theirs = state(then), state(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_parts_of_a_batch_add_up_to_it(name, tmp_path):
    """Light heads have no batch norm, and the mutual-information loss is off: each part would have its own."""
    results = []
    for parts in ("1", "2"):
        flags = ["--weighting", name, "--head", "light", "--set", "mi_weight=0", "--accumulate", parts]
        run = open_run(tmp_path / parts, *flags)
        run.model.double()
        run.weighting.double()
        run.optimizer.step = lambda: None
        (batch,) = batches(run, 0, 1)
        result = training_step(run, batch)
        named = [*run.model.named_parameters(), *run.weighting.named_parameters()]
        gradients = {key: p.grad for key, p in named if p.requires_grad}
        weights = {key: value for key, value in result.extras.items() if key.startswith("weight/")}
        results.append((gradients, weights, result.losses))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_task_by_task_with_weights_of_1_a_step_is_that_of_the_sum(tmp_path):
    """Of the optimiser too, which reads gradients in the layout of their parameters."""
    runs = []
    for name in ("fixed", "gradnorm"):
        flags = [*QUICK, *THREE, "--weighting", name, "--steps", "4", "--out", str(tmp_path / name)]
        runs.append(set_up(resolve_settings(parse(flags)[0]), None))
        runs[-1].model.double()
        runs[-1].weighting.double()
        take_steps(runs[-1], 0, 1)
    ours, theirs = (dict(run.model.named_parameters()) for run in runs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def made(name, tasks=3, seed=0):
    return WEIGHTINGS[name]([1.0] * tasks, seed)


def test_uncertainty_learns_a_log_variance_per_task(tmp_path):
    """d/ds (exp(-s) loss + s) = 1 - exp(-s) loss, and only for tasks with a label."""
    run = open_run(tmp_path, "--weighting", "uncertainty", "--loss-weights", "seg=2,sal=1,normals=1")
    run.optimizer.step = lambda: None
    (batch,) = batches(run, 0, 1)
    batch.labels["sal"].fill_(255)
    result = training_step(run, batch)
    s = run.weighting.log_variances
    expected = torch.tensor([1.0, 0, 1]) - (-s).exp() * torch.tensor([2.0, 1, 1]) * result.losses
    torch.testing.assert_close(s.grad, expected.detach())
    assert result.losses[1] == 0 and s.grad[1] == 0
    group = run.optimizer.param_groups[-1]
    assert group["params"][0] is s and group["weight_decay"] == 0
    named = {f"weight/{task}": value for task, value in zip(run.model.tasks, (-s).exp().detach(), strict=True)}
    torch.testing.assert_close({key: result.extras[key] for key in named}, named)


def test_dwa_compares_the_last_two_windows(monkeypatch):
    monkeypatch.setattr(weighting, "WINDOW", 2)
    dwa = made("dwa")
    rows = [[4.0, 1, 0], [2.0, 3, 0], [1.0, 2, 5], [2.0, math.nan, 5]]  # no label of the third task in the first window
    for step, row in enumerate(rows):
        assert dwa.factors(step).tolist() == [1, 1, 1]
        dwa.observe(torch.tensor(row), step)
    ratios = torch.tensor([1.5 / 3, 2 / 2, 1])
    torch.testing.assert_close(dwa.factors(4), 3 * (ratios / 2).softmax(0))


def test_random_weights_are_a_function_of_seed_and_step():
    factors = [[made("random", seed=seed).factors(step) for step in range(500)] for seed in (0, 0, 1)]
    assert all(torch.equal(*pair) for pair in zip(*factors[:2], strict=True))
    assert not torch.equal(factors[0][0], factors[0][1]) and not torch.equal(factors[0][0], factors[2][0])
    drawn = torch.stack(factors[0])
    torch.testing.assert_close(drawn.sum(1), torch.full((500,), 3.0))
    assert ((drawn.mean(0) - 1).abs() < 0.15).all() and (drawn > 0).all()


def test_gradnorm_moves_towards_norms_that_are_alike():
    gradnorm = made("gradnorm")
    gramian, losses = torch.diag(torch.tensor([16.0, 1.0, 4.0])), torch.tensor([2.0, 2.0, 2.0])
    gradnorm.combine(gramian, losses, 0)
    assert gradnorm.logits.grad[0] > 0 > gradnorm.logits.grad[1]  # the largest norm gets less weight
    gradnorm.combine(torch.eye(3), torch.tensor([1.0, 2.0, 2.0]), 1)
    assert gradnorm.initial.tolist() == [2, 2, 2] and gradnorm.logits.grad[0] > 0  # its loss has fallen most


@pytest.mark.parametrize("name", weighting.METHODS)
def test_a_gradient_method_is_torchjds_on_what_tasks_share_and_leaves_the_rest(name, tmp_path):
    """Its own driver, which goes backward under vmap, on backbone and experts; heads get their own loss's gradient."""
    from torchjd import aggregation
    from torchjd.autojac import jac

    run = open_run(tmp_path, "--weighting", name, "--set", "mi_weight=0", "--set", "clip_norm=1e9")
    run.model.double()
    run.weighting.double()
    run.optimizer.step = lambda: None
    (batch,) = batches(run, 0, 1)
    result = training_step(run, batch)
    predictions = run.model(batch.images, batch.index)
    weighted = [run.settings.task_weights[task] * weighting_loss(task, predictions, batch) for task in run.model.tasks]
    named = {key: p for key, p in run.model.named_parameters() if p.requires_grad}
    shared = [p for key, p in named.items() if key.startswith("vit.") and not key.endswith("routers")]
    matrix = torch.cat([j.flatten(1) for j in jac(weighted, shared, retain_graph=True)], dim=1)
    torch.manual_seed(int(weighting.np.random.SeedSequence([0, 0]).generate_state(1)[0]))
    method, options = weighting.METHODS[name], {"CAGrad": {"c": 0.5}, "NashMTL": {"n_tasks": 3}}
    scale = 1 if method in ("PCGrad", "NashMTL") else 3
    expected = scale * getattr(aggregation, method)(**options.get(method, {}))(matrix)
    found = torch.cat([p.grad.flatten() for p in shared])
    tolerance = 1e-3 if method in ("CAGrad", "NashMTL") else 1e-9  # those of their solvers
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    rest = {key: p for key, p in named.items() if not any(p is other for other in shared)}
    own = torch.autograd.grad(sum(weighted), list(rest.values()))
    torch.testing.assert_close([p.grad for p in rest.values()], list(own), rtol=1e-9, atol=1e-9)
    assert set(result.extras) == {f"weight/{task}" for task in run.model.tasks} | {"mi", "gradient_norm"}


def weighting_loss(task, predictions, batch):
    return TASKS[task].loss(predictions[task], batch.labels[task])


@pytest.mark.parametrize("name", weighting.METHODS)
def test_a_task_without_a_label_takes_no_part(name):
    gradients = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients[1] = 0
    weights = made(name).double().combine(gradients @ gradients.T, torch.ones(3), 5)
    two = made(name, 2).double().combine(gradients[::2] @ gradients[::2].T, torch.ones(2), 5)
    assert weights[1] == 0 and torch.equal(weights[::2], two) and (two != 0).all()


@pytest.mark.parametrize("name", weighting.METHODS)
def test_a_batch_with_labels_of_one_task_is_that_tasks(name):
    weights = made(name).combine(torch.diag(torch.tensor([0.0, 4.0, 0.0])), torch.tensor([0.0, 1.0, 0.0]), 5)
    assert weights[1] == 1


@pytest.mark.parametrize("name", [name for name in weighting.METHODS if name != "nash-mtl"])  # it bounds the norm
def test_weights_do_not_depend_on_the_scale_of_gradients(name):
    gradients = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    small, usual, large = (
        made(name).double().combine(scale * gradients @ gradients.T, torch.ones(3), 5) for scale in (1e-12, 1, 1e12)
    )
    assert usual.abs().sum() > 0.1
    torch.testing.assert_close([small, large], [usual, usual], rtol=1e-3, atol=1e-3)  # of CAGrad's solver


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "gradnorm", "pcgrad", "nash-mtl"])
def test_a_step_that_is_not_finite_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(weighting, "WINDOW", 1)
    run = open_run(tmp_path / "run", "--weighting", name, "--on-nonfinite", "skip")
    take_steps(run, 0, 2)
    before = {key: p.detach().clone() for key, p in [*run.model.named_parameters(), *run.weighting.named_parameters()]}
    (batch,) = batches(run, 2, 3)
    batch.labels["normals"][:] = math.nan
    training_step(run, batch)
    after = dict([*run.model.named_parameters(), *run.weighting.named_parameters()])
    assert all(torch.equal(after[key], value) for key, value in before.items())
    take_steps(run, 3, 4)
    assert all(value.isfinite().all() for value in state(run).values())


def test_gradient_methods_run_in_bf16(tmp_path):
    run = open_run(tmp_path / "run", "--weighting", "pcgrad", "--precision", "bf16")
    take_steps(run, 0, 1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--weighting", "uncertain"], f"unknown weighting 'uncertain': choose among {', '.join(WEIGHTINGS)}"),
        (["--weighting", "mgda", "--precision", "fp16"], "use --precision bf16 or fp32"),
        (["--weighting", "gradnorm", "--tasks", "seg"], "give --tasks two at least"),
        (["--weighting", "pcgrad", "--compile"], "which --compile does not allow"),
    ],
)
def test_what_would_not_be_right_is_refused(flags, error, error_of, tmp_path):
    out = tmp_path / "run"
    assert error in error_of(main, *QUICK, "--steps", "1", *flags, "--out", out) and not out.exists()


def test_tasks_that_share_nothing_are_one_line(error_of, tmp_path):
    torch.manual_seed(0)
    save_file(ViT(VITS["vit_micro"], 32).state_dict(), tmp_path / "micro.safetensors")
    flags = ["--pretrained", tmp_path / "micro.safetensors", "--moe", "none", "--set", "lora_rank=0", *THREE]
    error = error_of(main, *QUICK, *flags, "--steps", "1", "--weighting", "pcgrad", "--out", tmp_path / "run")
    assert "the tasks share no trained parameter" in error


def test_packages_that_are_not_there_are_one_line(error_of, tmp_path, monkeypatch):
    flags = [*QUICK, "--steps", "1", "--out", tmp_path / "run", "--weighting"]
    monkeypatch.setitem(sys.modules, "torchjd", None)
    assert "pip install 'torchjd[full]'" in error_of(main, *flags, "pcgrad")
    monkeypatch.undo()
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    for name, package in {"cagrad": "cvxpy", "nash-mtl": "cvxpy", "upgrad": "quadprog"}.items():
        error = error_of(main, *flags, name)
        assert "pip install 'torchjd[full]'" in error and package in error
