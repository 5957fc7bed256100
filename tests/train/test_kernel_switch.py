"""``--kernel`` changes who computes, not what is learned."""

import json
import os

import pytest
import torch

from kernels.backend import RESOLVED
from train.cli import main

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

TINY = [
    "--tasks", "seg,parts,sal,normals,edge", "--steps", "2", "--batch-size", "1", "--image-size", "16",
    "--moe", "8/2/1/2", "--set", "scenes=4", "--set", "val_scenes=1",
]


def results_of(kernel, folder):
    assert main([*TINY, "--kernel", kernel, "--out", str(folder / kernel)]) == 0
    return json.loads((folder / kernel / "results.json").read_text())


def test_two_steps_lose_the_same_under_both_kernels(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    RESOLVED.clear()  # another test may have asked without the interpreter
    triton, reference = results_of("triton", tmp_path), results_of("reference", tmp_path)
    assert (triton["kernel"], reference["kernel"]) == ("triton", "reference")
    # Two steps of AdamW, whose first is as large for a gradient of 1e-8 as for one of 1: rounding may grow.
    assert triton["final_losses"] == pytest.approx(reference["final_losses"], rel=1e-4)
    assert len(triton["final_losses"]) == 5 and all(loss > 0 for loss in reference["final_losses"].values())
