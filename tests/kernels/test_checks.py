"""Arguments that do not fit end in one ValueError that names the tensor and both shapes, for every kernel."""

import pytest
import torch

from kernels import Gating, TaskSegments, UserError, lora_moe

CPU = torch.device("cpu")
KERNELS = ["reference", "triton"]
GATING = Gating("ase", 3, 1)
N, R, D_IN, D_OUT, HIDDEN, TOKENS, TASKS = 16, 64, 24, 40, 48, 9, 2
SHAPES = {"x": (TOKENS, D_IN), "base": (TOKENS, D_OUT), "A": (R, D_IN), "B": (D_OUT, R), "routers": (TASKS, N, D_IN),
          "W1": (HIDDEN, D_IN), "b1": (HIDDEN,), "W2": (D_OUT, HIDDEN), "b2": (D_OUT,)}  # fmt: skip


def call(kernel, layer="beside", counts=(4, 5), gating=GATING, **shapes):
    t = {name: torch.zeros(shape) for name, shape in (SHAPES | shapes).items()}
    segments = TaskSegments.of(counts, CPU)
    base = {"beside": t["base"], "linear": ((t["W2"], t["b2"]),), "ffn": ((t["W1"], t["b1"]), (t["W2"], t["b2"]))}
    return lora_moe(t["x"], base[layer], (t["A"], t["B"]), t["routers"], segments, gating, kernel)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton may be asked for; no launch is reached."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


CASES = [
    ("beside", {"A": (R, D_IN - 1)}, ["A", (R, D_IN - 1), (TOKENS, D_IN)]),  # narrower than x
    ("beside", {"A": (R, D_IN + 8)}, ["A", (R, D_IN + 8), (TOKENS, D_IN)]),
    ("beside", {"B": (D_OUT, R - 4)}, ["B", (D_OUT, R - 4), (D_OUT, R)]),
    ("beside", {"B": (D_OUT + 8, R)}, ["base", (TOKENS, D_OUT), (TOKENS, D_OUT + 8)]),  # read past the end of B or base
    ("beside", {"B": (D_OUT - 8, R)}, ["base", (TOKENS, D_OUT), (TOKENS, D_OUT - 8)]),
    ("beside", {"base": (TOKENS - 1, D_OUT)}, ["base", (TOKENS - 1, D_OUT), (TOKENS, D_OUT)]),
    ("beside", {"routers": (1, N, D_IN)}, ["routers", (1, N, D_IN), (TASKS, N, D_IN)]),  # two segments, one router
    ("beside", {"routers": (3, N, D_IN)}, ["routers", (3, N, D_IN), (TASKS, N, D_IN)]),
    ("beside", {"routers": (TASKS, N, D_IN - 1)}, ["routers", (TASKS, N, D_IN - 1), (TASKS, N, D_IN)]),
    ("beside", {"A": (R + 1, D_IN), "B": (D_OUT, R + 1)}, ["A", (R + 1, D_IN), "16 experts"]),
    ("linear", {"W2": (D_OUT, D_IN + 1)}, ["W1", (D_OUT, D_IN + 1), (D_OUT, D_IN)]),
    ("linear", {"W2": (D_OUT + 1, D_IN)}, ["W1", (D_OUT + 1, D_IN), (D_OUT, D_IN)]),
    ("linear", {"W2": (D_OUT, D_IN), "b2": (D_OUT - 1,)}, ["b1", (D_OUT - 1,), (D_OUT,)]),
    ("ffn", {"W1": (HIDDEN, D_IN - 1)}, ["W1", (HIDDEN, D_IN - 1), (HIDDEN, D_IN)]),
    ("ffn", {"b1": (1,)}, ["b1", (1,), (HIDDEN,)]),
    ("ffn", {"W2": (D_OUT, HIDDEN - 8)}, ["W2", (D_OUT, HIDDEN - 8), (D_OUT, HIDDEN)]),
    ("ffn", {"W2": (D_OUT - 8, HIDDEN)}, ["W2", (D_OUT - 8, HIDDEN), (D_OUT, HIDDEN)]),
    ("ffn", {"b2": (D_OUT + 1,)}, ["b2", (D_OUT + 1,), (D_OUT,)]),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("layer", "shapes", "words"), CASES, ids=str)
def test_a_tensor_of_another_shape(kernel, layer, shapes, words):
    with pytest.raises(ValueError) as caught:
        call(kernel, layer, **shapes)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("counts", [(4, 4), (9, 1), (0, 0)])
def test_segments_that_do_not_add_up_to_the_rows(kernel, counts):
    """Fewer would leave a part of the output uninitialised, more would be read past the end."""
    with pytest.raises(ValueError) as caught:
        call(kernel, counts=counts)
    assert str(counts) in str(caught.value) and str((TOKENS, D_IN)) in str(caught.value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_experts_than_there_are_cannot_be_selected(kernel):
    with pytest.raises(ValueError) as caught:
        call(kernel, gating=Gating("ase", 30, 1))
    assert "k = 30" in str(caught.value) and "15 sparse" in str(caught.value)
    with pytest.raises(ValueError, match="k = 16"):  # the shared expert cannot be selected
        call(kernel, gating=Gating("ase", 16, 1))


def test_a_gating_selects_at_least_one_expert():
    with pytest.raises(UserError, match="k = -1"):
        Gating("ase", -1, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_shared_experts_than_there_are_experts(kernel):
    with pytest.raises(ValueError, match=r"-1 sparse|0 sparse"):
        call(kernel, gating=Gating("ase", 1, 17))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("name", "shape"), [("x", (TOKENS,)), ("x", (3, 3, D_IN)), ("A", (R,)), ("B", (D_OUT,)), ("routers", (N, D_IN))]
)
def test_a_tensor_of_other_dimensions(kernel, name, shape):
    with pytest.raises(ValueError) as caught:
        call(kernel, **{name: shape})
    assert name in str(caught.value).split() and str(shape) in str(caught.value), caught.value


@pytest.mark.parametrize("layer", ["beside", "linear", "ffn"])
def test_what_fits_is_accepted_by_the_reference(layer):
    w2 = {"W2": (D_OUT, D_IN)} if layer == "linear" else {}
    assert call("reference", layer, **w2)[0].shape == (TOKENS, D_OUT)
