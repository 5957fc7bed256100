"""One rule for the folders of all commands: a data set is only read, and a file belongs to what wrote it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import UserError
from train.datasets.base import TREES
from train.files.folders import MARKS, claim, holding, lock, require_new, require_outside_data, walk_files


def test_a_command_may_write_again_what_it_wrote(tmp_path):
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        assert claim(str(out), "train.compare", ["table.txt", "table.md"]) == out
        (out / "table.txt").write_text("of compare")
    assert len((out / ".written").read_text().splitlines()) == 2, "the record does not grow"


def test_what_another_wrote_is_refused_by_name(tmp_path):
    claim(tmp_path, "train", ["results.json", "predictions.png"])
    (tmp_path / "predictions.png").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/predictions.png was written by train, not by train.compare: "):
        claim(tmp_path, "train.compare", ["table.txt", "predictions.png"])
    assert "train.compare" not in (tmp_path / ".written").read_text(), "nothing is claimed by a refused command"
    claim(tmp_path, "train.compare", ["table.txt"])  # other files may stand beside
    claim(tmp_path, "train.evaluate", ["results.json"])  # which the run has not written
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match="results.json was written by train.evaluate, not by train: "):
        claim(tmp_path, "train", ["results.json"])


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_no_command_wrote_is_refused_by_name(kind, tmp_path):
    mine = tmp_path / "sheet.png"
    {"file": mine.touch, "folder": mine.mkdir, "dangling link": lambda: mine.symlink_to("nowhere")}[kind]()
    with pytest.raises(UserError, match=f"^{mine} was not written by train.predict of a: move it away, or choose"):
        claim(tmp_path, "train.predict of a", ["sheet.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png"]


def test_a_run_takes_over_its_folder_where_the_record_was_lost(tmp_path):
    """Copies may leave out hidden files; other commands may have written into the copy since."""
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, "train.compare", ["table.txt"])
    with pytest.raises(UserError, match="metrics.jsonl was not written by train"):
        claim(tmp_path, "train", ["metrics.jsonl", "skipped.txt"])
    claim(tmp_path, "train", ["metrics.jsonl", "results.json"], adopt=True)
    claim(tmp_path, "train", ["metrics.jsonl"])
    (tmp_path / "skipped.txt").touch()
    with pytest.raises(UserError, match="skipped.txt was not written by train"):
        claim(tmp_path, "train", ["metrics.jsonl", "skipped.txt"], adopt=True)


def test_a_damaged_record_says_nothing(tmp_path):
    (tmp_path / ".written").write_bytes(b"\xff\xfe no tab\n\nlast")
    assert claim(tmp_path, "train", ["last"]) == tmp_path
    (tmp_path / "last").touch()
    assert claim(tmp_path, "train", ["last"]) == tmp_path, "the record was written anew"


LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def is_locked(out):
    """Whether another process finds the lock of ``out`` taken."""
    return subprocess.run([sys.executable, "-c", LOCK, out / ".lock"], stderr=subprocess.DEVNULL).returncode != 0


def test_a_claimed_folder_is_no_other_processs_until_the_command_ends(tmp_path):
    with holding():
        for _ in range(2):
            claim(tmp_path, "train.compare", ["table.txt"])
        with holding():
            claim(tmp_path / "inner", "train.compare", ["table.txt"])
            claim(tmp_path / "run", "train", ["last"], alone=False)
            assert is_locked(tmp_path / "inner") and not is_locked(tmp_path / "run")
        assert is_locked(tmp_path) and not is_locked(tmp_path / "inner")
    assert not is_locked(tmp_path)


def test_two_commands_cannot_claim_one_folder(tmp_path):
    holder = f"{LOCK}; print(flush=True); sys.stdin.read()".replace("fcntl.lockf(open", "fcntl.lockf(file := open")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder, tmp_path / ".lock"], **pipes) as other:
        other.stdout.readline()
        for owner in ("train.compare", "train.check"):
            with pytest.raises(UserError, match=f"^another command .process unknown. writes to {tmp_path}: choose"):
                claim(tmp_path, owner, ["table.txt"])
        assert not (tmp_path / ".written").exists()
        other.stdin.close()
    claim(tmp_path, "train.compare", ["table.txt"])


def test_default_folders_are_unique(tmp_path):
    base = str(tmp_path / "runs" / "check")
    made = [claim("", "train.check", ["sheet.png"], base) for _ in range(3)]
    assert [out.name for out in made] == ["check", "check-2", "check-3"]
    (tmp_path / "runs" / "check-4").touch()
    assert claim(None, "train.check", ["sheet.png"], base).name == "check-5"


@pytest.mark.parametrize("mark", MARKS)
def test_a_data_set_is_only_read(mark, tmp_path):
    (tmp_path / "data" / mark).mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    for inside in (tmp_path / "data", tmp_path / "data" / mark / "out", tmp_path / "link" / "out"):
        for write in (
            lambda path: claim(path, "train.compare", ["table.txt"]),
            lambda path: claim("", "train.compare", ["table.txt"], str(path)),
            lambda path: require_new(path, "--out"),
        ):
            with pytest.raises(UserError, match=f"^{inside} lies inside the data set {tmp_path}/data, .*another --out"):
                write(inside)
    with pytest.raises(UserError, match="choose another --save-predictions$"):
        require_outside_data(tmp_path / "data", "--save-predictions")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == [mark]


def test_every_data_set_has_its_mark():
    assert all(set(tree.marks) & set(MARKS) for tree in TREES)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_must_be_new_must_not_exist(kind, tmp_path):
    to = tmp_path / "model.pt2"
    require_new(to, "--to")
    {"file": to.touch, "folder": to.mkdir, "dangling link": lambda: to.symlink_to("nowhere")}[kind]()
    with pytest.raises(UserError, match=f"^{to} exists already and is not overwritten: choose another --to$"):
        require_new(to, "--to")


@pytest.mark.parametrize("take", [lock, lambda out: claim(out, "train", ["last"])], ids=["lock", "claim"])
def test_a_folder_that_cannot_be_written_is_one_line(take, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/.* .Read-only file system.: write elsewhere"):
        take(tmp_path)


@pytest.mark.parametrize("name", ["loop", "file", "file/below"])
def test_what_can_be_no_folder_is_one_line(name, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^cannot make the folder {tmp_path / name}: "):
        claim(tmp_path / name, "train", ["last"])


def test_files_below_a_folder_are_those_of_the_user(tmp_path):
    """What a command wrote is not read as photos again, unless it is the folder that was given."""
    out = claim(tmp_path / "photos/out", "train.predict", ["semseg"])
    (out / "semseg").mkdir()
    for path in (out / "semseg/a.png", tmp_path / "photos/a.png", tmp_path / "photos/.a.png"):
        path.touch()
    assert list(walk_files(tmp_path / "photos")) == [tmp_path / "photos/a.png"]
    assert list(walk_files(out)) == [out / "semseg/a.png"]


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/gone cannot be read .No such file or directory.: make it"):
        list(walk_files(tmp_path / "gone"))
