"""metrics.jsonl: it keeps every number; damaged lines are left out and named, and never stop a resumed run."""

import json
import math
import shutil
from uuid import uuid4

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kernels import UserError
from train.cli import main
from train.run import loop
from train.run.record import NAME, NotFiniteError, Record, read_lines, read_record

ROWS = {1: (0.5, 0.25), 2: (0.4, 0.125), 3: (0.3, 0.0625)}


def text_of(rows, tasks=("seg", "sal")):
    lines = [
        {"kind": "step", "step": n} | {f"loss/{t}": v for t, v in zip(tasks, r, strict=True)} for n, r in rows.items()
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(text_of(ROWS))
    return path


def test_it_keeps_every_number_and_is_continued(tmp_path):
    path = tmp_path / NAME
    record = Record(path, ("seg", "edge"))
    record.begin()
    losses, norms = torch.rand(5, 2), torch.rand(5)
    for step, row in enumerate(losses, 1):
        record.add_step(step, row, {"gradient_norm": norms[step - 1]}, lr=0.1)
    record.add_scores(4, 0.5, {"seg": {"mIoU": 50.5, "mIoU_field": None}})
    record.add("pace", 5, {"images_per_second": 8.0})
    record.flush()
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 6, "lr": 0.1, "loss/s')  # cut short by a kill
    lines = read_lines(path, until=4)
    assert [line["kind"] for line in lines] == ["step"] * 4 + ["scores"]
    assert lines[0] == {
        "kind": "step", "step": 1, "lr": 0.1, "gradient_norm": norms[0].item(),
        "loss/seg": losses[0, 0].item(), "loss/edge": losses[0, 1].item(),
    }  # fmt: skip
    again = Record(path, ("seg", "edge"), lines)
    again.begin()
    again.add_step(5, losses[4], {}, lr=0.1)
    again.add_scores(4, None, {"seg": {"mIoU": 0.0}})  # known
    again.flush()
    found = read_record(path)
    assert found.losses == {step: tuple(row) for step, row in enumerate(losses.tolist(), 1)} == again.losses
    assert found.scores == {4: {"delta_m": 0.5, "seg/mIoU": 50.5, "seg/mIoU_field": None}} and found.tasks == (
        "seg",
        "edge",
    )
    assert again.mean(2) == pytest.approx(dict(zip(found.tasks, losses[3:].mean(0).tolist(), strict=True)))
    again.add_step(6, torch.tensor([1.0, torch.inf]), {}, lr=0.1)
    with pytest.raises(NotFiniteError, match="^the loss of edge is inf at step 6$"):
        again.flush()
    assert read_record(path).losses[6] == (1.0, math.inf) and again.skipped == 1


def test_a_mean_is_over_the_steps_that_have_a_label_of_the_task():
    record = Record(None, ("seg", "edge", "sal"))
    for step, row in enumerate([(3.0, 0.0, 0.0), (5.0, 4.0, 0.0), (7.0, 2.0, 0.0)]):
        record.add_step(step, torch.tensor(row), {}, lr=0.1)
    record.flush()
    assert record.mean(3) == {"seg": 5.0, "edge": 3.0, "sal": 0.0}
    assert all(map(math.isnan, Record(None, ("seg",)).mean(3).values()))


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "step", "step": 2, "loss/seg": 0.4}',
        b'{"kind": "step", "step": 2, "loss/seg": 0.4, "loss/sal": null}',
        b'{"kind": "step", "step": 2, "loss/sal": 0.4, "loss/seg": 0.4}',
        b'{"kind": "step", "step": "2", "loss/seg": 0.4, "loss/sal": 0.1}',
        b'{"kind": "step", "loss/seg": 0.4, "loss/sal": 0.1}',
        b'{"kind": "scores", "step": 2, "seg/mIoU": "high"}',
        b'{"kind": "scores", "step": 2, "delta_m": "high"}',
        b'{"kind": "st\xff", "step": 2}',
        b"[2]",
        b"",
    ],
)
def test_a_damaged_line_is_left_out_and_named(line, path, capsys):
    path.write_bytes(text_of({1: ROWS[1]}) + line + b"\n" + text_of({3: ROWS[3]}))
    assert read_record(path).losses == {1: ROWS[1], 3: ROWS[3]}
    assert capsys.readouterr().err == f"note: {path} is damaged in line 2, left out here\n"


def test_no_flipped_bit_stops_a_reader_that_knows_the_tasks(path):
    text = path.read_bytes()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 16]) + text[place + 1 :])
        losses = Record(None, ("seg", "sal"), read_lines(path, ("seg", "sal"))).losses
        assert sum(losses.get(step) == row for step, row in ROWS.items()) >= 1


def test_what_is_no_record_is_one_line(path):
    with pytest.raises(UserError, match="missing does not exist: give the output folder of python -m train"):
        read_record(path.parent / "missing")
    path.write_text("colour\n")
    with pytest.raises(UserError, match="holds no losses of a step: give the output folder"):
        read_record(path)


def test_a_number_that_a_step_returns_by_name_is_logged_everywhere(tmp_path, monkeypatch):
    def step(run, batch, own=loop.training_step):
        result = own(run, batch)
        result.extras["expert_norm"] = result.losses.new_tensor(run.step + 0.5)
        return result

    monkeypatch.setattr(loop, "training_step", step)
    sizes = ["--set", "scenes=4", "--set", "val_scenes=2", "--batch-size", "2", "--image-size", "32", "--workers", "0"]
    assert main(["--tasks", "seg", *sizes, "--steps", "2", "--out", str(tmp_path)]) == 0
    lines = [line for line in read_lines(tmp_path / NAME) if line["kind"] == "step"]
    assert [line["expert_norm"] for line in lines] == [0.5, 1.5]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("expert_norm")] == [(1, 0.5), (2, 1.5)]


def test_damaged_records_do_not_stop_a_resumed_run(tiny_scenes_run, tmp_path, capsys):
    run = shutil.copytree(tiny_scenes_run, tmp_path / "run", symlinks=True)
    first, *rest = (run / NAME).read_bytes().splitlines(keepends=True)
    (run / NAME).write_bytes(b"".join([first[:9] + b"\xff" + first[9:], *rest]))
    (run / f".predictions.png.{uuid4().hex}.partial").touch()
    assert main(["--resume", "--steps", "3", "--out", str(run)]) == 0
    assert not [path for path in run.iterdir() if path.suffix == ".partial"], "of a picture, left by a kill"
    assert f"note: {run / NAME} is damaged in line 1, left out here" in capsys.readouterr().err
    assert {*read_record(run).losses} == {2, 3} and {*read_record(run).scores} == {2, 3}
