"""Tuples of the decoders: what they mean, and which are refused."""

import pytest

from kernels import UserError
from model import VITS, FGConfig, MLoREConfig


def test_a_tuple_parses_and_prints():
    config = FGConfig.parse("4/2/4/1")
    assert str(config) == "4/2/4/1" and config.pool == 16
    assert (config.gating.name, config.gating.k, config.gating.shared) == ("naive-shared", 7, 1)
    assert FGConfig.parse("4/2/1/0").gating.name == "topk" and FGConfig.parse("4/2/4/1", "ase").gating.name == "ase"


@pytest.mark.parametrize(
    ("text", "gating", "message"),
    [
        ("4/2/4", "", "'4/2/4' is not of the form N/K/m/K_s, for example 4/2/4/1"),
        ("4/two/4/1", "", "is not of the form"),
        ("4/5/4/1", "", "the active experts K must be between 1 and N = 4"),
        ("0/0/4/1", "", "the active experts K must be between 1 and N = 0"),
        ("4/2/0/1", "", "the slices m of an expert must be at least 1"),
        ("4/2/4/8", "", "the shared slices K_s must be between 0 and m K - 1 = 7"),
        ("4/2/4/-1", "", "the shared slices K_s must be between 0"),
        ("4/2/4/0", "ase", "needs shared experts but S = 0"),
        ("4/2/4/1", "topk", "knows no shared experts but S = 1"),
        ("4/2/4/1", "best", "unknown gating 'best'"),
    ],
)
def test_an_impossible_tuple_is_one_line(text, gating, message):
    with pytest.raises(UserError) as caught:
        FGConfig.parse(text, gating)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mlore_has_the_papers_sizes():
    small, base = (MLoREConfig.of(VITS[name].width) for name in ("vit_small", "vit_base"))
    assert (small.width, small.ranks[0], small.ranks[-1], small.task_rank) == (192, 8, 64, 32)
    assert (base.width, base.ranks[0], base.ranks[-1], base.task_rank) == (640, 16, 128, 64)
    assert all(len(MLoREConfig.of(config.width).ranks) == 15 for config in VITS.values())
    with pytest.raises(UserError, match="'ase' is not one of the mlore decoder's: choose topk or topk-renorm"):
        MLoREConfig.of(384, "ase")


def test_a_width_of_ones_own_scales_the_decoder():
    assert FGConfig.parse("4/2/4/1").width == 256 and FGConfig.parse("4/2/4/1", width=40).width == 40
    half = MLoREConfig.of(VITS["vit_base"].width, width=320)
    assert (half.width, half.ranks[0], half.ranks[-1], half.task_rank) == (320, 8, 64, 32)
    assert min(MLoREConfig.of(VITS["vit_micro"].width, width=8).ranks) == 1
