"""Depth, the sixth task: its loss is with the others' in test_losses.py, here is what it alone has."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train.cli import main as train
from train.compare import main as compare
from train.datasets.scenes.compose import compose_scene
from train.datasets.scenes.dataset import label_depth, label_normals, rasterize
from train.evaluate import main as evaluate
from train.metrics.depth import FARTHEST, NEAREST, DepthErrors
from train.predict import main as predict
from train.protocols import build_protocol
from train.tasks import DEFAULT_TASKS, TASKS
from train.tasks.depth import ConstantDepth, depth_loss

DEPTH = TASKS["depth"]
RNG = np.random.default_rng(0)


def metres(*shape):
    """Depths between 0.5 and 10 m, one in four void."""
    return np.where(RNG.random(shape) < 0.25, 0, RNG.uniform(0.5, 10, shape)).astype(np.float32)


def test_errors_are_those_of_the_formulas_over_the_whole_set():
    labels, predictions = metres(3, 6, 7), RNG.uniform(0.2, 12, (3, 6, 7)).astype(np.float32)
    metric = DepthErrors()
    for label, prediction in zip(torch.tensor(labels), torch.tensor(predictions), strict=True):
        metric.count(prediction[None], label[None])
    d, g = predictions[labels > 0].astype(float), labels[labels > 0].astype(float)
    expected = {
        "rmse": np.sqrt(np.mean((d - g) ** 2)),
        "log_rmse": np.sqrt(np.mean((np.log(d) - np.log(g)) ** 2)),
        "absRel": 100 * np.mean(abs(d - g) / g),
        "sqRel": 100 * np.mean((d - g) ** 2 / g),
    } | {
        name: 100 * np.mean(np.maximum(d / g, g / d) < 1.25**n)
        for n, name in enumerate(("within_1.25", "within_1.25^2", "within_1.25^3"), 1)
    }
    assert metric.compute() == pytest.approx(expected, rel=1e-6)


def test_any_output_is_a_depth_that_a_file_can_hold():
    extremes = torch.tensor([-1e4, -20.0, 0, 20, 1e4]).view(1, 1, 1, -1)
    assert DEPTH.postprocess(extremes)[0, 0].tolist() == pytest.approx([NEAREST, NEAREST, 1, FARTHEST, FARTHEST])


def test_the_constant_is_the_median_and_none_is_better():
    label = torch.tensor(metres(4, 20, 20))
    constant = ConstantDepth()
    constant.update(label)
    best = constant.output()
    assert best.exp().item() == pytest.approx(label[label > 0].median().item(), rel=2e-3)
    losses = [depth_loss((best + step).expand(4, 1, 20, 20), label).item() for step in (-0.05, 0, 0.05)]
    assert losses[1] == min(losses)


def test_a_file_keeps_the_millimetre(tmp_path):
    depth = torch.tensor(RNG.uniform(NEAREST, FARTHEST, (5, 8)).astype(np.float32))
    picture = DEPTH.to_picture(DEPTH.to_levels(depth), rounded=True)
    Image.fromarray(picture).save(tmp_path / "depth.png")
    read = np.asarray(Image.open(tmp_path / "depth.png"))
    assert read.dtype == np.uint16 and np.array_equal(read, picture)
    assert (DEPTH.from_picture(read) - depth).abs().max() < 5.1e-4
    assert DEPTH.from_picture(np.zeros((1, 1), np.uint16)).item() == pytest.approx(NEAREST)


@pytest.mark.parametrize(("name", "factors"), [("mtinet", (0.75, 1.25)), ("invpt", (0.5, 2))])
def test_both_families_divide_depth_by_the_factor_of_a_scale(name, factors):
    """A wall 3 m away, enlarged by s, is a wall 3 / s m away; what comes in from outside is void."""
    raw = {"image": np.zeros((40, 50, 3), np.uint8), "depth": np.full((40, 50), 3, np.float32)}
    seen = set()
    for seed in range(40):
        label = build_protocol(name, 64).apply(raw, True, np.random.default_rng(seed))["depth"]
        (value,) = set(label[label > 0].tolist())
        seen.add(round(3 / value, 3))
        assert label.dtype == np.float32
    assert factors[0] <= min(seen) < 0.9 < 1.1 < max(seen) <= factors[1]


@pytest.mark.parametrize("name", ["mtinet", "invpt", "mini"])
def test_in_validation_depth_stays_as_it_is(name):
    raw = {"image": np.zeros((40, 50, 3), np.uint8), "depth": metres(40, 50)}
    label = build_protocol(name, 64).apply(raw, False, np.random.default_rng(0))["depth"]
    assert set(label.flat) <= set(raw["depth"].flat) | {0}


@pytest.mark.parametrize("index", range(4))
def test_depth_and_normals_of_a_scene_agree(index):
    """On a smooth surface the normal (left, up, towards) is (d depth / d left, d depth / d up, 1), made unit."""
    scene = compose_scene(np.random.default_rng([0, 0, index]))
    buffer = rasterize(scene, 240)
    depth, normals = label_depth(scene, buffer).astype(float), label_normals(scene, buffer)
    assert depth.min() > 0.5 and depth.max() < 10
    pixel = 2 / 240
    down, right = np.gradient(depth, pixel)
    slopes = np.stack([-right, -down, np.ones_like(depth)])
    from_depth = slopes / np.linalg.norm(slopes, axis=0)
    angle = np.degrees(np.arccos(np.clip((from_depth * normals).sum(0), -1, 1)))
    assert np.quantile(angle, 0.8) < 3  # the others are pixels at the border of a surface


def test_pictures_show_near_bright_and_void_grey():
    painted = DEPTH.paint_label(np.array([[0.6, 5, 19, 0]], np.float32)).astype(int)
    assert painted[0, 0].sum() > painted[0, 1].sum() > painted[0, 2].sum() and painted[0, 3].tolist() == [160] * 3


def test_all_commands_work_with_six_tasks(tmp_path, capsys):
    """train, evaluate from a checkpoint and from files, predict and compare."""
    run, tasks = tmp_path / "run", ",".join([*DEFAULT_TASKS, "depth"])
    sizes = ["--set", "scenes=8", "--set", "val_scenes=3", "--batch-size", "2", "--workers", "0"]
    assert train(["--tasks", tasks, "--steps", "3", *sizes, "--out", str(run)]) == 0
    assert "depth    rmse m" in capsys.readouterr().out
    kept, scored, again = tmp_path / "kept", tmp_path / "scored", tmp_path / "again"
    options = ["--workers", "0", "--save-predictions", str(kept), "--out", str(scored)]
    assert evaluate([str(run), *options]) == 0
    assert evaluate(["--predictions", str(kept), "--workers", "0", "--out", str(again)]) == 0
    ours, theirs = (json.loads((out / "results.json").read_text())["metrics"]["depth"] for out in (scored, again))
    assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-2)  # half a millimetre
    Image.fromarray(RNG.integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "photo.png")
    assert predict([str(run), str(tmp_path / "photo.png"), "--out", str(tmp_path / "predicted")]) == 0
    written = np.asarray(Image.open(tmp_path / "predicted" / "depth" / "photo.png"))
    assert written.dtype == np.uint16 and written.shape == (50, 70) and written.min() > 0
    assert compare([str(scored), str(again), "--out", str(tmp_path / "compared")]) == 0
    assert "depth rmse" in (tmp_path / "compared" / "table.txt").read_text()


def test_pascal_has_no_depth(pascal_tree, tmp_path, capsys):
    argv = ["--tasks", "seg,depth", "--data", str(pascal_tree), "--model", "vit_micro", "--out", str(tmp_path / "run")]
    assert train(argv) == 2
    assert "PASCAL-Context has no labels for 'depth': choose --tasks among seg, parts" in capsys.readouterr().err
