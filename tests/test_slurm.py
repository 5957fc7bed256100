"""The sbatch file of docs/pages/slurm.md, with stand-ins for srun and scontrol: it stops, requeues and continues."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.run import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs/pages/slurm.md").read_text(), re.DOTALL)[1]
QUICK = ["--tasks", "seg", "--image-size", "16", "--batch-size", "2", "--set", "scenes=8", "--set", "val_scenes=2"]
QUICK += ["--workers", "1", "--tracker", "none", "--set", "baselines=false"]

# As SLURM does: SIGUSR1 goes to every process of the step, SIGTERM kills them, and so does the end of the task.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys

mark = f"STEP_OF={{os.getpid()}}"

def send(number):
    for environ in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes().split(b"\\0"):
                os.kill(int(environ.parent.name), number)
        except OSError:
            pass

signal.signal(signal.SIGUSR1, lambda *_: send(signal.SIGUSR1))
signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
task = subprocess.Popen(command, env=os.environ | dict([mark.split("=")]))
status = task.wait()
send(signal.SIGKILL)
sys.exit(status if status >= 0 else 128 - status)
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$0.calls"\n'


@pytest.fixture
def cluster(tmp_path):
    """Starts the script as a job of one GPU."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", torchrun)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(SCRIPT)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}
    env = os.environ | slurm | {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def submit(*flags):
        command = ["bash", "job.sbatch", *QUICK, *map(str, flags), "--out", str(tmp_path / "run")]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=env, **options)

    return submit


def calls(folder):
    record = folder / "stubs" / "scontrol.calls"
    return record.read_text().splitlines() if record.exists() else []


def test_a_job_stops_before_its_limit_is_requeued_and_continues(cluster, tmp_path):
    run = tmp_path / "run"
    job = cluster("--steps", 100_000)
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 11:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and calls(tmp_path) == ["requeue 7"], said
    step = checkpoint.read_state(run / "last").step
    assert step >= 10 and f"stopped at step {step}: continue from" in said
    job = cluster("--steps", step + 1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and f"resumed   from step {step} of" in said, said
    assert json.loads((run / "results.json").read_text())["steps"] == step + 1
    assert calls(tmp_path) == ["requeue 7"], "a run that finishes is not requeued"


def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    job = cluster("--moe", "1/1/1/1")
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and "error: " in said and calls(tmp_path) == []


def test_the_file_is_a_script_and_asks_for_what_it_relies_on():
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True)
    options = re.findall(r"^#SBATCH --(\S+)", SCRIPT, re.MULTILINE)
    assert {"signal=B:USR1@300", "requeue", "open-mode=append", "ntasks-per-node=1"} <= {*options}
    grace, limit = (int(re.search(pattern, SCRIPT)[1]) for pattern in (r"USR1@(\d+)", r"SHUTDOWN_TIMEOUT=(\d+)"))
    assert limit < grace
