"""Several processes train as one: the same losses, gradients and metrics, whatever slice each of them has."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.run import checkpoint
from train.run.record import read_record
from train.run.weighting import WEIGHTINGS

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--image-size", "32", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=5", "--workers", "0"]

# Two steps in fp64 from given weights, without updates; writes losses, gradients and buffers.
STEPS = """
import sys
import torch
from train.cli import parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run.distributed import leads, parallel, processes
from train.run.step import training_step
from train.run.start import set_up

torch.set_default_dtype(torch.float64)
with processes():
    settings = resolve_settings(parse(sys.argv[2:])[0])
    torch.manual_seed(0)
    run = set_up(settings, None)
    run.parallel = parallel(run.model.double())
    run.optimizer.step = lambda *_: None
    steps = []
    for batch in train_loader(run.data[0], settings.task_names, settings.batch_size, range(2), settings.seed, 0):
        result = training_step(run, batch)
        gradients = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        numbers = {"losses": result.losses, "extras": result.extras}
        steps.append({**numbers, "gradients": gradients, "buffers": buffers})
    if leads():
        torch.save(steps, sys.argv[1])
"""

# One step for every weighting, whose parameters are not those that it begins with.
WEIGHTED = """
import sys
from dataclasses import replace
import torch
from model.norm import BatchNorm2d
from train.cli import parse
from train.config.settings import resolve_settings
from train.datasets.batches import train_loader
from train.run import weighting
from train.run.distributed import leads, parallel, processes
from train.run.step import training_step
from train.run.start import set_up

torch.set_default_dtype(torch.float64)
weighting.WINDOW = 1
with processes():
    settings, results = resolve_settings(parse(sys.argv[2:])[0]), {}
    torch.manual_seed(0)
    run = set_up(settings, None)
    for head in run.model.heads.values():  # light heads have no batch norm, over which processes meet in each backward
        head.mix = torch.nn.Sequential(head.mix, BatchNorm2d(head.HIDDEN))
    run.parallel = parallel(run.model.double())
    run.optimizer.step = lambda *_: None
    (batch,) = train_loader(run.data[0], settings.task_names, settings.batch_size, range(1), settings.seed, 0)
    for name in weighting.WEIGHTINGS:
        run.settings = replace(settings, weighting=name)
        run.weighting, run.step = weighting.build_weighting(run.settings), 2
        run.weighting.observe(torch.tensor([1.0, 2.0, 3.0]), 0)
        run.weighting.observe(torch.tensor([2.0, 2.0, 1.0]), 1)
        with torch.no_grad():
            for parameter in run.weighting.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
        result = training_step(run, batch)
        named = [*run.model.named_parameters(), *run.weighting.named_parameters()]
        gradients = {key: p.grad.clone() for key, p in named if p.requires_grad}
        results[name] = [result.losses, result.extras, gradients, run.weighting.state_dict()]
    if leads():
        torch.save(results, sys.argv[1])
"""


def launch(processes, *command):
    """The command as torchrun starts it, in so many processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    whole = [*torchrun, *map(str, command)] if processes > 1 else [sys.executable, *map(str, command)]
    return subprocess.Popen(whole, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(params=[pytest.param("scenes", marks=pytest.mark.long), "partial"])
def flags(request):
    """Settings of a run; those of the tree have a task with one label, so that of two batches one has it in one of its
    slices, and one has none."""
    if request.param == "scenes":
        return [*QUICK, "--head", "up"]
    tree = request.getfixturevalue("pascal_copy")
    for id in (path.stem for path in (tree / "human_parts").iterdir()):
        if id.startswith("2008") and id != "2008_000000":  # the training images
            (tree / f"human_parts/{id}.mat").unlink()
            (tree / f"pascal-context/trainval/{id}.mat").unlink(missing_ok=True)
    small = ["--model", "vit_micro", "--image-size", "64", "--workers", "0", "--set", "lora_rank=0"]
    return ["--data", str(tree), "--protocol", "mini", "--partial-labels", "--batch-size", "4", *small]


def test_losses_and_gradients_of_two_processes_are_those_of_one(flags, tmp_path):
    script = tmp_path / "step.py"
    script.write_text(STEPS)
    for n in (1, 2):
        finished(launch(n, script, tmp_path / f"{n}.pt", *flags, "--out", tmp_path / f"run-{n}"))
    for one, two in zip(*(torch.load(tmp_path / f"{n}.pt") for n in (1, 2)), strict=True):
        assert all(
            value.isfinite().all() for tensors in (one["gradients"], one["buffers"]) for value in tensors.values()
        )
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


def test_every_weighting_is_the_same_in_two_processes(tmp_path):
    script = tmp_path / "weighted.py"
    script.write_text(WEIGHTED)
    flags = [*QUICK, "--tasks", "seg,sal,normals", "--head", "light"]
    for n in (1, 2):
        finished(launch(n, script, tmp_path / f"{n}.pt", *flags, "--out", tmp_path / f"run-{n}"))
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one.keys() == two.keys() == WEIGHTINGS.keys()
    for name in WEIGHTINGS:
        tolerance = 1e-5 if name in ("cagrad", "nash-mtl") else 1e-9  # those of their solvers
        torch.testing.assert_close({name: two[name]}, {name: one[name]}, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_of_a_batch_add_up_to_it(processes, tmp_path):
    """Light heads have no batch norm, and the mutual-information loss is off: each part would have its own."""
    script = tmp_path / "step.py"
    script.write_text(STEPS)
    flags = [*QUICK, "--set", "mi_weight=0", "--head", "light"]
    finished(launch(1, script, tmp_path / "whole.pt", *flags, "--out", tmp_path / "whole"))
    parts = [*flags, "--accumulate", "2", "--out", tmp_path / "parts"]
    finished(launch(processes, script, tmp_path / "parts.pt", *parts))
    whole, added = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    for own, theirs in zip(added, whole, strict=True):
        torch.testing.assert_close(own["losses"], theirs["losses"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own["gradients"], theirs["gradients"], rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{number of processes: folder} of a short run."""
    folder = tmp_path_factory.mktemp("ranks")
    for n in (1, 2):
        said = finished(launch(n, "-m", "train", *QUICK, "--steps", "6", "--out", folder / str(n)))
        assert said.count("results.json, last, metrics.jsonl") == 1, "one process speaks"
    return {n: folder / str(n) for n in (1, 2)}


def assert_alike(one, other):
    rows = [torch.tensor(list(read_record(out).losses.values())) for out in (one, other)]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-5)
    results = [json.loads((out / "results.json").read_text()) for out in (one, other)]
    for task, scores in results[0]["metrics"].items():
        for name, value in scores.items():
            theirs = results[1]["metrics"][task][name]
            assert value is None if theirs is None else theirs == pytest.approx(value, rel=1e-2, abs=0.2)


def test_a_run_of_two_processes_is_a_run_of_one(runs):
    assert_alike(runs[1], runs[2])
    one, two = (json.loads((runs[n] / "results.json").read_text()) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics_constant"] == two["metrics_constant"]


def test_metrics_of_the_same_weights_are_the_same(runs):
    """The untrained model is scored before the first step, so that its weights have no rounding of their own."""
    one, two = (json.loads((runs[n] / "results.json").read_text())["metrics_untrained"] for n in (1, 2))
    for task, scores in one.items():
        known = {name: value for name, value in scores.items() if value is not None}
        assert {name: two[task][name] for name in known} == pytest.approx(known, rel=1e-12)
        assert all(two[task][name] is None for name in scores.keys() - known.keys())


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_is_resumed_with_another_number_of_processes(first, then, runs, tmp_path):
    out = tmp_path / "run"
    flags = [*QUICK, "--out", out, "--checkpoint-every", "1", "--keep", "9"]
    finished(launch(first, "-m", "train", *flags, "--steps", "6"))
    (out / "last").unlink()
    (out / "last").symlink_to("step-3")
    (out / "results.json").unlink()
    finished(launch(then, "-m", "train", *flags, "--resume", "--steps", "6"))
    assert_alike(runs[1], out)


def test_a_process_that_dies_ends_the_job_with_its_reason(tmp_path, pascal_copy):
    """The second process meets a damaged photo, and the first would wait for it for ever."""
    for photo in (pascal_copy / "JPEGImages").iterdir():
        photo.write_bytes(photo.read_bytes()[:-200])
    data = ["--data", pascal_copy, "--protocol", "mini", "--partial-labels", "--model", "vit_micro"]
    small = ["--image-size", "64", "--batch-size", "4", "--workers", "0", "--set", "lora_rank=0", "--steps", "3"]
    process = launch(2, "-m", "train", *data, *small, "--out", tmp_path / "run")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "JPEGImages" in said and "restore it" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_torchrun_ends_all_processes_with_one_checkpoint(number, tmp_path):
    """It passes SIGTERM on. Where it is killed they would go on without it, and hold the folder's lock."""
    out = tmp_path / "run"
    process = launch(2, "-m", "train", *QUICK, "--steps", "3000", "--out", out)
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 11:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    step = checkpoint.read_state(out / "last").step
    assert f"stopped at step {step}: continue from {out}/step-{step} with --resume" in said
    assert load_file(out / "last" / "model.safetensors")


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path):
    process = launch(2, "-m", "train", *QUICK, "--batch-size", "1", "--steps", "1", "--out", tmp_path / "run")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "--accumulate 1 in 2 processes needs a batch of 2 images at least, not 1" in said
