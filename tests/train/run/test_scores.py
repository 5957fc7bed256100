"""Scores in the course of a run: recorded and printed, Delta_m against the first, the best checkpoint through kills."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.cli import main
from train.evaluate import main as evaluate
from train.run import checkpoint, loop, scores
from train.run.record import NAME, Record, read_lines

QUICK = ["--tasks", "seg,normals", "--batch-size", "2", "--set", "scenes=4", "--set", "val_scenes=2", "--workers", "0"]
QUICK += ["--image-size", "32", "--steps", "8", "--eval-every", "1", "--keep-best"]
MIOU = {2: 10.0, 4: 30.0, 6: 20.0, 8: 15.0}


def metrics_of(step):
    return {"seg": {"mIoU": MIOU[step], "mIoU_field": None}, "normals": {"mErr": 40.0 - step}}


@pytest.fixture
def scored(monkeypatch):
    """A model's scores are those of MIOU; the steps that were scored."""
    steps = []

    def score(run, title):
        if run.step:
            steps.append(run.step)
            return metrics_of(run.step), None
        return {}, None

    monkeypatch.setattr(loop, "score", score)
    return steps


def checkpoints(out):
    return sorted(path.name for path in out.glob("step-*")), os.readlink(out / "best"), os.readlink(out / "last")


def scores_lines(out):
    return [line for line in read_lines(out / NAME) if line["kind"] == "scores"]


def test_scores_are_recorded_printed_and_the_best_is_kept(scored, tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert scored == [2, 4, 6, 8] == [line["step"] for line in scores_lines(tmp_path)]
    first, second, *_ = scores_lines(tmp_path)
    assert second == {
        "kind": "scores", "step": 4, "delta_m": pytest.approx(100 * (2 + 2 / 38) / 2),
        "seg/mIoU": 30.0, "seg/mIoU_field": None, "normals/mErr": 36.0,
    }  # fmt: skip
    assert first["delta_m"] == 0
    assert [line.split() for line in printed.splitlines() if line.startswith(("step 2 ", "step 4 "))][:3] == [
        ["step", "2", "10.00", "38.00", "0.00"],
        ["step", "2", "10.00", "38.00", "0.00"],
        ["step", "4", "30.00", "36.00", "102.63"],
    ]
    assert checkpoints(tmp_path) == (["step-4", "step-8"], "step-4", "step-8")
    best = json.loads((tmp_path / "results.json").read_text())["best"]
    assert best == {"metric": "delta_m", "step": 4, "value": second["delta_m"]}
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("seg/mIoU")] == [*MIOU.items()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "score", lambda run, title: (metrics_of(run.step) if run.step else {}, None))
        out = tmp_path_factory.mktemp("whole")
        assert main([*QUICK, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("place", "step"), [("score", 4), ("score", 8), ("write_link", 4), ("prune", 8), ("draw_curves", 4)]
)
def test_a_run_that_is_killed_around_its_scores_ends_as_if_it_had_not_been(place, step, whole, scored, tmp_path):
    """In the scoring, and after each of the things that a score changes."""
    module = {"score": loop, "prune": checkpoint}.get(place, scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, place, killing(getattr(module, place), tmp_path, step))
        assert main([*QUICK, "--out", str(tmp_path)]) == 130
    assert main([*QUICK, "--resume", "--out", str(tmp_path)]) == 0
    assert checkpoints(tmp_path) == checkpoints(whole)
    assert scores_lines(tmp_path) == scores_lines(whole)
    assert json.loads((tmp_path / "results.json").read_text())["best"]["step"] == 4


def killing(function, out, step):
    """``function``, which is interrupted once the checkpoint of ``step`` is there."""

    def interrupted(*arguments):
        if (out / f"step-{step}").exists():
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def test_a_run_that_is_killed_between_checkpoints_continues_its_curves_from_the_last(scored, tmp_path):
    """Step 3 was logged and is done again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "REPORT_EVERY", 1)
        patch.setattr(loop, "agreed", lambda _: bool(os.path.exists(tmp_path / "step-2")) and interrupt())
        assert main([*QUICK, "--out", str(tmp_path)]) == 130
    assert max(line["step"] for line in read_lines(tmp_path / NAME)) == 3
    assert main([*QUICK, "--resume", "--out", str(tmp_path)]) == 0
    assert [line["step"] for line in read_lines(tmp_path / NAME) if line["kind"] == "step"] == [*range(1, 9)]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("lr")] == [*range(1, 9)]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("metric", "best"), [("seg/mIoU", 4), ("normals/mErr", 6), ("delta_m", 4), ("seg/mIoU_field", None), ("", None)]
)
def test_the_best_is_the_highest_or_the_lowest_of_those_that_are_there(metric, best, tmp_path):
    record = Record(None, ("seg", "normals"))
    for step in MIOU:
        record.add_scores(step, MIOU[step], metrics_of(step))
        (tmp_path / f"step-{step}").mkdir()
        if step < 8:  # that of the lowest error is not there
            (tmp_path / f"step-{step}" / "state.json").touch()
    record.flush()
    written = [f"step-{step}" for step in MIOU]
    run = SimpleNamespace(out=tmp_path, record=record, written=written, best=None)
    run.settings = SimpleNamespace(keep_best=metric, keep=1)
    (tmp_path / "best").symlink_to("step-2")
    scores.keep_best(run)
    kept = ["step-8"] if best is None else [f"step-{best}", "step-8"]
    assert run.best == best and run.written == kept == sorted(path.name for path in tmp_path.glob("step-*"))
    assert os.path.lexists(tmp_path / "best") == (best is not None)
    assert best is None or checkpoint.find(tmp_path / "best") == tmp_path / f"step-{best}"


@pytest.mark.parametrize("links", [True, False])
def test_best_is_scored_and_continued_like_last(links, whole, scored, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    if not links:
        (out / "best").unlink()
        (out / "best").write_text("step-4\n")
    assert evaluate([str(out / "best"), "--out", str(tmp_path / "scores"), "--odsf", "off"]) == 0
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["step"] == 4
    (out / "results.json").unlink()
    assert main([*QUICK, "--resume", str(out / "best"), "--out", str(out)]) == 0
    assert "resumed   from step 4 of" in capsys.readouterr().out and scored == [6, 8]
    assert checkpoint.find(out / "best").name == "step-4" and checkpoint.find(out).name == "step-8"


def test_a_lost_record_costs_no_checkpoint(whole, scored, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    for name in (NAME, "results.json"):
        (out / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "score", lambda run, title: interrupt())
        assert main([*QUICK, "--resume", "--out", str(out)]) == 130
    assert checkpoints(out) == (["step-4", "step-8"], "step-4", "step-8")
    assert main([*QUICK, "--resume", "--out", str(out)]) == 0
    assert checkpoints(out) == (["step-4", "step-8"], "step-8", "step-8")
    assert f"{NAME} has no scores of step-4, which was the best: it stays beside step-8" in capsys.readouterr().out


def test_scores_of_which_none_is_defined_do_not_end_a_run(tmp_path):
    """As where no validation image has a label: Delta_m has no task to be the mean of."""
    record = Record(None, ("seg", "normals"))
    run = SimpleNamespace(step=2, total=2, out=tmp_path, record=record, written=[], best=None)
    run.settings = SimpleNamespace(keep_best="", keep=1)
    run.data = [SimpleNamespace(protocol=SimpleNamespace(reported="ase"))]
    scores.record_scores(run, {"seg": {"mIoU": None}, "normals": {"mErr": None}})
    assert record.scores == {2: {"delta_m": None, "seg/mIoU": None, "normals/mErr": None}}


def test_a_metric_that_is_none_is_one_line(tmp_path, error_of):
    error = error_of(main, *QUICK, "edge/loss", "--out", tmp_path / "run")
    assert "--keep-best edge/loss: choose among seg/mIoU, seg/mIoU_field, normals/mErr, delta_m" in error
    (tmp_path / "copied" / "best").mkdir(parents=True)
    assert "best is a folder and not a link" in error_of(main, *QUICK, "--out", tmp_path / "copied")
