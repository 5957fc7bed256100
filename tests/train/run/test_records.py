"""losses.csv and routing.csv: damaged lines are left out and named, and never stop a run that is resumed."""

import shutil
from uuid import uuid4

import pytest

from kernels import UserError
from train.cli import main
from train.run.losses import read_losses

LOSSES = b"step,seg,sal\n1,0.5,0.25\n2,0.4,0.125\n3,0.3,0.0625\n"
WHOLE = {1: (0.5, 0.25), 2: (0.4, 0.125), 3: (0.3, 0.0625)}


@pytest.mark.parametrize(
    "line", [b"2,0.4", b"2,0.4,0.1,0.1", b"2;0.4,0.1", b"two,0.4,0.1", b"2,0.4,\xff", b"2,0.4,low", b""]
)
def test_a_damaged_line_is_left_out_and_named(line, tmp_path, capsys):
    path = tmp_path / "losses.csv"
    path.write_bytes(LOSSES.replace(b"2,0.4,0.125", line))
    assert read_losses(path, 3) == (("seg", "sal"), {1: WHOLE[1], 3: WHOLE[3]})
    assert capsys.readouterr().err == f"note: {path} is damaged in line 3, left out here\n"


def test_a_damaged_heading_matters_only_where_the_tasks_are_not_known(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_bytes(b"\xff" + LOSSES)
    with pytest.raises(UserError, match="it is not a table of losses"):
        read_losses(path, 3)
    assert read_losses(path, 2, ("seg", "sal")) == (("seg", "sal"), {1: WHOLE[1], 2: WHOLE[2]})


def test_no_flipped_bit_stops_a_reader_that_knows_the_tasks(tmp_path):
    path = tmp_path / "losses.csv"
    for place in range(len(LOSSES)):
        path.write_bytes(LOSSES[:place] + bytes([LOSSES[place] ^ 16]) + LOSSES[place + 1 :])
        _, rows = read_losses(path, 3, ("seg", "sal"))
        assert sum(rows.get(step) == row for step, row in WHOLE.items()) >= 1


def test_damaged_records_do_not_stop_a_resumed_run(tiny_scenes_run, tmp_path, capsys):
    run = shutil.copytree(tiny_scenes_run, tmp_path / "run", symlinks=True)
    head, first, *rest = (run / "losses.csv").read_bytes().splitlines(keepends=True)
    (run / "losses.csv").write_bytes(b"".join([head, b"\xff" + first, *rest]))
    (run / "routing.csv").write_bytes(b"step,layer,task,measure,0\n\xff,0,seg,mass,0.5\n1,0,sal,mass,0.5\n")
    (run / f".predictions.png.{uuid4().hex}.partial").touch()
    assert main(["--resume", "--steps", "3", "--out", str(run)]) == 0
    assert not [path for path in run.iterdir() if path.suffix == ".partial"], "of a picture, left by a kill"
    said = capsys.readouterr().err
    assert all(
        f"note: {run / name} is damaged in line 2, left out here" in said for name in ("losses.csv", "routing.csv")
    )
    assert {*read_losses(run / "losses.csv", 3)[1]} == {2, 3}
    assert (run / "routing.csv").read_text() == "step,layer,task,measure,0\n1,0,sal,mass,0.5\n"
