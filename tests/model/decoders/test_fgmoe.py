"""The reconstruction of FGMoE against its equations, and what cutting experts into slices leaves unchanged."""

import pytest
import torch
from torch.nn import functional as F

from kernels import Gating, TaskSegments, UserError
from kernels.experts.reference import expert_mixture
from model import FGConfig, FGMoE
from model.decoders import Frame
from model.decoders.pool import ExpertPool

CHANNELS = {"seg": 5, "sal": 2, "edge": 1}


def pools(width, hidden, experts, slices, sets=1):
    """The same weights uncut and cut."""
    torch.manual_seed(0)
    whole, cut = (ExpertPool(width, hidden, experts, m, sets).double() for m in (1, slices))
    cut.load_state_dict(whole.state_dict())
    return whole, cut


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_slices_whose_gates_are_all_1_are_the_uncut_mlps(slices):
    _, cut = pools(6, 16, 3, slices, sets=2)
    x, counts = torch.randn(7, 6, dtype=torch.float64), (3, 4)
    # One slice is selected with probability 1 and every other one shared: all gates are 1
    z, gating = torch.zeros(7, 1, dtype=torch.float64), Gating("naive-shared", 1, 3 * slices - 1)
    y, g, _ = expert_mixture(x, None, cut.experts, z, TaskSegments.of(counts, x.device), gating)
    assert g.shape == (7, 3 * slices) and (g == 1).all()
    for t, (run, sums) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        expected = torch.zeros_like(run)
        for e in range(3):
            rows = slice(16 * e, 16 * (e + 1))
            hidden = F.gelu(F.linear(run, cut.down[t, rows], cut.hidden_bias[t, rows]))
            expected += F.linear(hidden, cut.up[t][:, rows], cut.output_bias[t, e])
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cut.dense(run, t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 8])
def test_experts_have_the_same_parameters_whatever_the_slices(m):
    frame = Frame(24, (2, 2), CHANNELS)
    counts = {}
    for slices in (4, m):
        with torch.device("meta"):
            decoder = FGMoE(frame, FGConfig(4, 2, slices, 1))
        counts[slices] = sum(p.numel() for name, p in decoder.named_parameters() if name != "routers")
        assert decoder.routers.shape == (3, 4 * slices - 1, 256)
    assert counts[4] == counts[m]


def test_slices_divide_the_hidden_layer():
    with pytest.raises(UserError, match="fg 4/2/3/1: the slices m must divide the hidden width 1024 of an expert"):
        FGConfig.parse("4/2/3/1")


@pytest.mark.parametrize("name", ["fgmoe", "fgmoe, ase"])
def test_the_decoder_is_its_equations(make, features, name):
    """Token by token, expert by expert; m = 4 of 3 experts, K = 2, K_s = 1: 7 of 11 routed slices and slice 11."""
    decoder = make(name).eval()
    predictions = decoder(features)
    concat = torch.cat([tap.permute(0, 2, 3, 1) for tap in features.maps], dim=-1)
    f = decoder.norm(decoder.reduce(concat))  # (3, h, w, C)
    for t, task in enumerate(CHANNELS):
        x = decoder.mixers[task](f.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        total = x.clone()
        for place in torch.cartesian_prod(*map(torch.arange, f.shape[:3])).tolist():
            place = tuple(place)
            for i, g in gates_of(decoder, t, x[place]).items():
                total[place] += g * slice_of(decoder.pool, t, i, 4, x[place])
            logits = F.linear(f[place], decoder.global_router) + decoder.global_bias[t]
            for j, g in enumerate(logits.softmax(-1)):
                total[place] += g * slice_of(decoder.global_pool, 0, j, 1, f[place])
        expected = decoder.heads[task](total.permute(0, 3, 1, 2))
        torch.testing.assert_close(predictions[task], expected, rtol=1e-10, atol=1e-10)


def gates_of(decoder, t, x):
    """{slice: gate} of one token, the active ones."""
    z = decoder.routers[t] @ x
    if decoder.config.gating_name == "naive-shared":
        probabilities = z.softmax(-1)
        return {i: probabilities[i] for i in z.topk(7).indices.tolist()} | {11: torch.ones((), dtype=x.dtype)}
    active = [*z[:11].topk(7).indices.tolist(), 11]
    return dict(zip(active, z[active].softmax(-1), strict=True))


def slice_of(pool, t, i, m, x):
    """E_i(x): ``i`` counts the slices of all experts, of which an expert has ``m``."""
    width = 1024 // m
    rows = slice(width * i, width * (i + 1))
    hidden = F.gelu(pool.down[t, rows] @ x + pool.hidden_bias[t, rows])
    return pool.up[t][:, rows] @ hidden + pool.output_bias[t, i // m] / m


@pytest.mark.parametrize(("mixer", "common"), [(False, True), (True, False), (False, False)])
def test_ablations_leave_their_part_away(frame, features, mixer, common):
    decoder = FGMoE(frame, FGConfig.parse("4/2/1/0"), mixer, common).double()
    names = {name.split(".")[0] for name, _ in decoder.named_parameters()}
    assert ("mixers" in names, "global_pool" in names, "global_router" in names) == (mixer, common, common)
    assert decoder(features)["seg"].shape == (3, 5, 3, 2)
