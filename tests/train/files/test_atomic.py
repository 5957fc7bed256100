"""Files and folders appear whole or not at all, whatever ends their writer."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from kernels import UserError
from train.files.atomic import (
    ABANDONED,
    make_folder,
    probe,
    remove_folder,
    remove_partials,
    replacing,
    replacing_folder,
    write_json,
    write_link,
    write_text,
)

ROOT = Path(__file__).resolve().parents[3]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_text_and_json_replace_what_was_there(tmp_path):
    write_text(tmp_path / "note.txt", "old")
    write_text(tmp_path / "note.txt", "größer\n")
    write_json(tmp_path / "value.json", {"a": [1, None]})
    assert (tmp_path / "note.txt").read_bytes() == "größer\n".encode()
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": [1, None]}
    assert names(tmp_path) == ["note.txt", "value.json"]


def test_the_old_content_stands_until_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.name.startswith(".") and partial.suffix == ".partial"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()], ids=["bug", "interrupt"])
def test_an_exception_leaves_the_old_content_and_no_partial(error, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_text("old")
    with pytest.raises(type(error)), replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    with pytest.raises(type(error)), replacing_folder(tmp_path / "folder") as partial:
        (partial / "other").write_text("half")
        raise error
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["inner"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space there"), (errno.EROFS, "write elsewhere")],
    ids=["full", "read-only"],
)
def test_a_disk_that_refuses_is_one_line(step, number, remedy, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(UserError) as caught:
        write_text(path, "new")
    message = f"cannot write {path} ({os.strerror(number)}): {remedy}"
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"] and path.read_text() == "old"


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="^cannot write .*/nowhere/file .No such file or directory.: "):
        write_text(tmp_path / "nowhere" / "file", "new")


def test_a_folder_appears_whole_and_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "deep" / "folder"
    for content in ("one", "two"):
        with replacing_folder(path) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / content).write_text(content)
            assert not (path / "sub" / content).exists()
        assert names(path / "sub") == [content] and names(path.parent) == ["folder"]


def test_a_folder_that_cannot_get_its_name_leaves_the_earlier_one(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", Path.rename
    path.mkdir()
    (path / "kept").write_text("")

    def refuse_the_new(self, target):
        if target == path and (self / "new").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(UserError, match="No space left"), replacing_folder(path) as partial:
        (partial / "new").write_text("")
    assert names(tmp_path) == ["folder"] and names(path) == ["kept"]


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    done, fsync = [], os.fsync

    def record(handle):
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        return fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc, to tell which file is synced")
    monkeypatch.setattr(os, "fsync", record)
    with replacing_folder(tmp_path / "folder") as partial:
        (partial / "inner").write_text("")
    assert sorted(done[:2]) == sorted(["inner", partial.name]) and done[2:] == [tmp_path.name]
    done.clear()
    with replacing(tmp_path / "file", sync=False) as partial:
        partial.write_text("")
    assert done == []


WRITER = """
import sys
from pathlib import Path
from train.files.atomic import write_text
for _ in range(60):
    write_text(Path(sys.argv[1]), 200_000 * sys.argv[2])
"""


def test_processes_that_write_the_same_path_never_mix(tmp_path):
    path = tmp_path / "file"
    writers = [start(WRITER, path, letter) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
            seen.add(text[0])
    assert [writer.wait() for writer in writers] == [0, 0]
    assert names(tmp_path) == ["file"] and path.read_text()[0] in seen


SLOW = """
import sys, time
from pathlib import Path
from train.files.atomic import replacing, replacing_folder
with replacing(Path(sys.argv[1]) / "file") as partial, replacing_folder(Path(sys.argv[1]) / "folder") as folder:
    partial.write_text("half")
    (folder / "inner").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_content_and_does_not_disturb_the_next(tmp_path):
    write_text(tmp_path / "file", "old")
    process = start(SLOW, tmp_path)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "file").read_text() == "old" and not (tmp_path / "folder").exists()
    assert len(names(tmp_path)) == 3  # two partials
    write_text(tmp_path / "file", "new")
    with replacing_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_text("new")
    remove_partials(tmp_path, "f*")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "new"


def test_partials_that_killed_writers_left_go_after_an_hour(tmp_path):
    """Those of writers that may still live stay, and so do folders, which hours of predictions go to."""
    before = time.time()
    for name in ("old.png", "young.png"):
        (tmp_path / f".{name}.{uuid4().hex}.partial").touch()
    (tmp_path / f".folder.{uuid4().hex}.partial").mkdir()
    (tmp_path / ".notes.partial").touch()
    for path in tmp_path.iterdir():
        if not path.name.startswith(".young"):
            os.utime(path, (before - 2 * ABANDONED,) * 2)
    make_folder(tmp_path)
    assert [name.split(".")[1] for name in names(tmp_path)] == ["folder", "notes", "young"]


def test_a_link_replaces_what_was_there_and_is_a_file_where_there_are_none(tmp_path, monkeypatch):
    write_link(tmp_path / "last", "step-1")
    write_link(tmp_path / "last", "step-2")
    assert os.readlink(tmp_path / "last") == "step-2"

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # what Linux says of FAT

    monkeypatch.setattr(os, "symlink", refuse)
    write_link(tmp_path / "last", "step-3")
    assert not (tmp_path / "last").is_symlink() and (tmp_path / "last").read_text() == "step-3\n"
    assert names(tmp_path) == ["last"]


def test_a_file_that_cannot_be_synced_is_no_success(tmp_path, monkeypatch):
    """Folders that cannot are: see test_a_disk_without_links_and_without_sync_of_folders_holds_a_run."""

    def refuse(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="cannot write .*Input/output error"):
        write_text(tmp_path / "file", "new")
    assert names(tmp_path) == []


def test_a_disk_is_tried_out_without_a_trace(tmp_path, monkeypatch):
    probe(tmp_path)
    assert names(tmp_path) == []
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/.* .Read-only.: write elsewhere"):
        probe(tmp_path)


def test_a_folder_is_removed_whole_or_has_no_name(tmp_path, monkeypatch):
    """A kill in the middle must leave no half of a checkpoint under a name."""
    (tmp_path / "step-1").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # killed before
    remove_folder(tmp_path / "step-1")
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".step-1.") and partial.suffix == ".partial"
    monkeypatch.undo()
    remove_partials(tmp_path, "step-*")
    remove_folder(tmp_path / "step-1")  # is not there
    assert names(tmp_path) == []
