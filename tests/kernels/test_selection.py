"""The top-k on integer keys, and the selection that the saved logits carry to the backward pass."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

import triton.language as tl  # noqa: E402

from kernels import Gating  # noqa: E402
from kernels.jit_helpers import mark, marks, select  # noqa: E402
from kernels.reference import top_k_mask  # noqa: E402
from kernels.route_shrink import marked_reference  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not triton.knobs.runtime.interpret, reason="no GPU and no interpreter"
)
ROWS, COLUMNS = 256, 16
INF, NAN, TINY = float("inf"), float("nan"), 1.4e-45
FEW = torch.tensor([-INF, -1.0, -TINY, -0.0, 0.0, TINY, 1.0, 3.4e38, INF, NAN])


@triton.jit
def selection_kernel(z, selected, marked, found, k, BM: tl.constexpr, NP: tl.constexpr):
    at = tl.arange(0, BM)[:, None] * NP + tl.arange(0, NP)[None, :]
    logits = tl.load(z + at)
    chosen = select(logits, NP, k)
    carrying = mark(logits, chosen)
    tl.store(selected + at, chosen.to(tl.int8))
    tl.store(marked + at, carrying)
    tl.store(found + at, marks(carrying).to(tl.int8))


def run(z, k):
    """(selection, marked logits, the selection read from them)."""
    z = z.to(DEVICE)
    selected, found = (torch.empty_like(z, dtype=torch.int8) for _ in range(2))
    marked = torch.empty_like(z)
    selection_kernel[(1,)](z, selected, marked, found, k, ROWS, COLUMNS)
    return selected.bool().cpu(), marked.cpu(), found.bool().cpu()


def logits(kind):
    rng = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randn(ROWS, COLUMNS, generator=rng)
    return FEW[torch.randint(len(FEW), (ROWS, COLUMNS), generator=rng)]


@pytest.mark.parametrize("kind", ["random", "ties, zeros, infinities and NaN"])
@pytest.mark.parametrize("k", [1, 3, COLUMNS])
def test_the_k_largest_are_selected_and_of_equals_the_first(kind, k):
    z = logits(kind)
    assert torch.equal(run(z, k)[0], top_k_mask(z.masked_fill(z == 0, 0.0), k))


@pytest.mark.parametrize("kind", ["random", "ties, zeros, infinities and NaN"])
@pytest.mark.parametrize("k", [1, 3, COLUMNS])
def test_saved_logits_carry_the_selection_at_one_unit_in_the_last_place(kind, k):
    z = logits(kind)
    selected, marked, found = run(z, k)
    assert torch.equal(marked.view(torch.int32), marked_reference(z, Gating("topk", k, 0)).view(torch.int32))
    assert torch.equal(found[~z.isinf()], selected[~z.isinf()])
    assert found[z.isinf()].all()  # whose gates are NaN, or 0 for -inf, whatever is selected
    finite = z.isfinite()
    up, down = (torch.nextafter(z[finite], torch.tensor(end)) for end in (INF, -INF))
    assert ((down <= marked[finite]) & (marked[finite] <= up)).all()
    assert torch.equal(marked.isnan(), z.isnan())
    assert torch.equal(top_k_mask(marked, k)[finite.all(1)], selected[finite.all(1)])
