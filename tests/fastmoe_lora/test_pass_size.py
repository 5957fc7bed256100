"""How much code a pass runs through: functions of ours that a steady-state pass enters, and the files they are in."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from triton import knobs  # noqa: E402

from fastmoe_lora import adapt  # noqa: E402
from kernels.dispatch import known_family  # noqa: E402

ROOT = Path(__file__).parents[2]
FUNCTIONS, FILES = 45, 12  # of Python and of Triton together


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.skipif(not knobs.runtime.interpret, reason="Triton's functions are seen in the interpreter")
def test_a_pass_enters_few_functions_in_few_files(monkeypatch):
    """Forward and backward, one task, fused. Comprehensions are no functions."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()
    model, x, codes = nn.ModuleDict({"mlp": FFN()}), torch.randn(10, 16, requires_grad=True), set()
    adapt(model, "8/2/1/4", where="mlp", kernel="triton")

    def enter(frame, event, argument):
        codes.add(frame.f_code)

    def step():
        model["mlp"](x).sum().backward()

    step()  # what is made once
    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    entered = sorted({found for found in map(function, codes) if found})
    told = "\n".join(f"{path} {name}" for path, _, name in entered)
    assert {"lora_moe", "gelu_kernel", "gates_backward"} <= {name for _, _, name in entered}, told
    assert len(entered) <= FUNCTIONS and len({path for path, _, _ in entered}) <= FILES, f"{len(entered)}\n{told}"


def function(code):
    """(file, line, name) of a function of ours, else None."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "tests") or code.co_name.startswith("<"):
        return None
    return str(path.relative_to(ROOT)), code.co_firstlineno, code.co_name
