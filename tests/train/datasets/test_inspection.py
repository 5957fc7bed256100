"""Reading a whole split in processes: what is found, and how it ends when something goes wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kernels import UserError
from train.datasets.base import open_tree
from train.datasets.inspection import inspect_image, inspect_images
from train.datasets.pascal.labels import Reader
from train.datasets.tree import list_images
from train.tasks import DEFAULT_TASKS

HURT, NO_PERSON = "2008_000000", "2008_000001"
ROOT = Path(__file__).resolve().parents[3]


def images(root, split="train"):
    return list_images(open_tree(root), split, DEFAULT_TASKS)


class Deadly(Reader):
    """Kills the process that uses it."""

    def label(self, image, task, shape):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_counted_pixel_for_pixel(workers, pascal_tree):
    findings = inspect_images(images(pascal_tree, "all"), Reader(), workers)
    assert [finding.id for finding in findings] == [image.id for image in images(pascal_tree, "all")]
    for finding in findings:
        seg = pascal_tree / f"semseg/VOC12/{finding.id}.png"
        label = np.asarray(Image.open(seg if seg.exists() else pascal_tree / f"semseg/pascal-context/{finding.id}.png"))
        assert finding.pixels["seg"] == dict(
            zip(*map(np.ndarray.tolist, np.unique(label, return_counts=True)), strict=True)
        )
        assert finding.size == label.shape and finding.faults == ()
        assert all(sum(counts.values()) == label.size for counts in finding.pixels.values())
        assert set(finding.pixels) == set(DEFAULT_TASKS) and set(finding.pixels["normals"]) <= {0, 1}
    assert findings[1].id == NO_PERSON and set(findings[1].pixels["parts"]) == {255}


def test_every_fault_of_an_image_is_found(pascal_copy):
    (pascal_copy / f"sal_distill/{HURT}.png").write_bytes(b"")
    (pascal_copy / f"human_parts/{HURT}.mat").write_bytes(b"")
    (pascal_copy / f"pascal-context/trainval/{HURT}.mat").write_bytes(b"")  # of two tasks
    (pascal_copy / f"normals_distill/{HURT}.png").unlink()
    finding = inspect_image(images(pascal_copy)[0], Reader())
    assert len(finding.faults) == 4 and not any("\n" in fault for fault in finding.faults)
    assert finding.faults[0].endswith(f"{HURT}.png does not exist: restore it, or pass --partial-labels")
    assert set(finding.pixels) == {"seg"}


def test_a_process_that_is_killed_is_one_line(pascal_tree):
    with pytest.raises(UserError, match="^a process that inspects the images was killed.*fewer --workers$"):
        inspect_images(images(pascal_tree), Deadly(), 2)


INTERRUPTED = """
import sys, time
from pathlib import Path
from train.datasets.inspection import inspect_images
from train.datasets.pascal.labels import Reader
from train.datasets.base import open_tree
from train.datasets.tree import list_images
from train.tasks import DEFAULT_TASKS

class Slow(Reader):
    def label(self, image, task, shape):
        Path(sys.argv[2]).touch()
        time.sleep(0.1)
        return super().label(image, task, shape)

if __name__ == "__main__":
    try:
        inspect_images(25 * list_images(open_tree(Path(sys.argv[1])), "all", DEFAULT_TASKS), Slow(), 2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_an_interrupt_ends_it_soon_and_in_silence(pascal_tree, tmp_path):
    """Ctrl-C reaches every process of the terminal's group. All images would take 75 seconds, one image 0.5."""
    script, started = tmp_path / "slow.py", tmp_path / "started"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(pascal_tree), str(started)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=40)
    assert process.returncode == 130 and "Traceback" not in error
