"""A pool of processes: order, few jobs in flight, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import UserError
from train.files import processes
from train.files.processes import end_with_parent, killed_workers, process_map, stop_for_parent_alone

pytestmark = pytest.mark.usefixtures("own_processes")
PRELOAD = "train.files.processes"


def slow_first(n):
    """(n, the process that was asked); the first takes longest."""
    time.sleep(0.2 if n == 0 else 0)
    return n, os.getpid()


def handles_interrupts(_):
    return signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def die(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(n):
    raise UserError(f"image {n} is damaged: restore it")


def touch(path):
    time.sleep(0.3)
    path.touch()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    with process_map(workers, "counts", PRELOAD) as run:
        results = list(run(slow_first, iter(range(20))))
    assert [n for n, _ in results] == list(range(20))
    assert ({pid for _, pid in results} == {os.getpid()}) == (workers == 0)
    assert len({pid for _, pid in results}) <= max(workers, 1)


def test_jobs_are_taken_as_workers_become_free():
    jobs = iter(range(20))
    with ThreadPoolExecutor(2) as pool:
        results = processes._map_ordered(pool.submit, 4, abs, jobs)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert next(jobs) == 8, "four are on their way when the first is waited for, and one more for each given"
        assert list(results) == [5, 6, 7, *range(9, 20)]


def test_workers_ignore_interrupts():
    with process_map(1, "counts", PRELOAD) as run:
        assert list(run(handles_interrupts, [0])) == [False]


def test_a_process_that_is_killed_is_one_line():
    message = "^a process that counts was killed, perhaps for lack of memory: use fewer --workers$"
    with pytest.raises(UserError, match=message), process_map(2, "counts", PRELOAD) as run:
        list(run(die, range(10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_of_a_job_is_raised_here(workers):
    message = "^image 0 is damaged: restore it$"
    with pytest.raises(UserError, match=message), process_map(workers, "counts", PRELOAD) as run:
        list(run(fail, range(10)))


def test_jobs_that_have_not_started_are_dropped_at_the_end(tmp_path):
    paths = [tmp_path / str(n) for n in range(20)]
    with pytest.raises(KeyboardInterrupt), process_map(1, "counts", PRELOAD) as run:
        for _ in run(touch, paths):
            raise KeyboardInterrupt
    assert 1 <= len(list(tmp_path.iterdir())) <= 4  # the first, the next, and what the pool's queue had taken


INTERRUPTED_START = """
import os, signal, sys
from multiprocessing.popen_forkserver import Popen
from train.files.processes import end_with_parent, killed_workers, process_map, stop_for_parent_alone

def launch(self, process, started=[], launch=Popen._launch):
    launch(self, process)
    started.append(process)
    if len(started) == 2:
        os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    Popen._launch = launch
    try:
        with process_map(2, "counts", "train.files.processes") as run:
            list(run(abs, range(100)))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_an_interrupt_while_a_process_starts_ends_the_block(tmp_path):
    """The pool would not know of that process, which would take the message that tells another to stop."""
    script = tmp_path / "start.py"
    script.write_text(INTERRUPTED_START)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


UNGUARDED = """
from train.files.processes import process_map
with process_map(2, "counts", "train.files.processes") as run:
    print("counted", *run(abs, range(-3, 0)))
"""


def test_a_script_without_a_guard_is_run_once(tmp_path):
    """Nor is what came from stdin, a heredoc or a cell, of which there is no file that a process could import."""
    (tmp_path / "own.py").write_text(UNGUARDED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    options = {"env": environment, "text": True, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)}
    script, piped = (subprocess.Popen([sys.executable, name], **options) for name in (tmp_path / "own.py", "-"))
    for process, given in ((script, ""), (piped, UNGUARDED)):
        assert process.communicate(given, timeout=60) == ("counted 3 2 1\n", "") and process.returncode == 0


def test_only_a_killed_worker_is_taken_for_one():
    with pytest.raises(RuntimeError, match="^CUDA error$"), killed_workers():
        raise RuntimeError("CUDA error")
    with pytest.raises(UserError, match="^a process that prepares batches was killed"), killed_workers():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who sent a signal, and that a parent ended")


@linux
def test_a_worker_ends_by_the_signal_of_its_parent_alone():
    """One for the whole group is left to the parent, which needs the worker for its last step."""
    ready, told = os.pipe()
    if (worker := os.fork()) == 0:
        stop_for_parent_alone(os.getppid())
        for number in processes.STOPS:
            os.kill(os.getpid(), number)
        time.sleep(0.3)
        os.write(told, b"alive")
        time.sleep(60)
        os._exit(1)
    assert os.read(ready, 5) == b"alive"
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    os.close(ready), os.close(told)


@linux
def test_a_process_hears_that_its_parent_was_killed():
    """As a rank does of torchrun."""
    read, write = os.pipe()
    if (parent := os.fork()) == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda *_: (os.write(write, b"ended"), os._exit(0)))
            end_with_parent(signal.SIGTERM)
            os.write(write, b"begun")
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    os.close(write)
    assert os.read(read, 5) == b"begun"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(read, 5) == b"ended"
    os.close(read)
