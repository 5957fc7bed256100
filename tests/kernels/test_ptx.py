"""The code that a GPU of type sm_90 would run, bf16 included, interpreted on the CPU where the interpreter is at hand.

It finds reads out of bounds, races and missing waits too. Other tests are run again, in a process in which Triton
compiles: one launch of every kind, and whole passes beside a linear layer and an FFN.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT.parent / "shared" / "tools"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TOOLS / "ptxemu").exists(), reason=f"no interpreter of PTX in {TOOLS}"),
]
ONE_CASE = "[('ase', (16, 3, 1, 4), (5, 0, 33), 24, 40)-torch.bfloat16]"
PARTS = "tests/kernels/test_triton_parts.py::TestKernels::test_"
FUSED = "tests/kernels/test_fused.py::TestAccuracy::test_of_one_layer_in_half_precision"
TESTS = (
    *(f"{PARTS}{name}{ONE_CASE}" for name in ("route_shrink", "expand", "gate_backward", "weight_grads")),
    "tests/kernels/test_pack.py::TestPacked::test_from_fp32_masters[torch.bfloat16-(40, 72, 24, 64, (2, 16))-ffn]",
    *(f"{FUSED}[{algorithm}-torch.bfloat16]" for algorithm in ("fused", "linear")),
)

# The emulator clears what depends on the architecture by the names that these caches had.
NAMES = """
from types import SimpleNamespace
from kernels import dispatch, tiles
tiles.options, dispatch.RESOLVED = tiles.tile, SimpleNamespace(clear=dispatch.known_family.cache_clear)
"""


def test_kernels_in_bf16_are_right_as_compiled_for_sm_90(tmp_path):
    (tmp_path / "names.py").write_text(NAMES)
    path = os.pathsep.join(map(str, (ROOT, TOOLS, tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "names", "-p", "ptxemu.plugin", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "PTXEMU_TARGET": "sm_90"},
    )
    assert done.returncode == 0 and f"{len(TESTS)} passed" in done.stdout, done.stdout + done.stderr
