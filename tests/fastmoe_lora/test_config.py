"""MoEConfig: the paper's notation (N/k/S/r), the default gating, and errors that name what to mend."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmoe_lora import MoEConfig
from kernels import GATINGS, Gating, UserError


@st.composite
def configs(draw):
    experts = draw(st.integers(1, 128))
    shared = draw(st.integers(0, experts - 1))
    active = draw(st.integers(1, experts - shared))
    gating = draw(st.sampled_from(["", "ase", "naive-shared"] if shared else ["", "topk", "topk-renorm"]))
    return MoEConfig(experts, active, shared, draw(st.integers(1, 64)), gating)


@given(configs())
def test_what_is_written_is_read_back(config):
    assert MoEConfig.parse(str(config), config.gating_name) == config


@given(configs())
def test_the_gating_carries_k_and_s(config):
    assert config.gating == Gating(config.gating_name, config.active, config.shared)


@given(configs())
def test_only_naive_shared_experts_have_no_logit(config):
    columns = config.gating.router_columns(config.experts)
    assert columns == config.experts - (config.shared if config.gating_name == "naive-shared" else 0)


def test_fields_stand_in_the_papers_order():
    assert MoEConfig.parse("16/3/1/4") == MoEConfig(experts=16, active=3, shared=1, rank=4)
    assert str(MoEConfig(experts=32, active=6, shared=2, rank=2)) == "32/6/2/2"


@pytest.mark.parametrize(("text", "gating"), [("16/3/1/4", "ase"), ("64/12/4/1", "ase"), ("16/4/0/4", "topk")])
def test_the_default_gating_follows_from_the_shared_experts(text, gating):
    assert MoEConfig.parse(text).gating_name == gating


@pytest.mark.parametrize("text", ["1/1/0/1", "16/16/0/1", "16/15/1/1", "16/1/15/1"])
def test_the_ends_of_the_ranges_are_accepted(text):
    assert str(MoEConfig.parse(text)) == text


ERRORS = [
    # text, gating, what the message must name
    ("16/3/1", "", ["'16/3/1'", "N/k/S/r", "16/3/1/4"]),
    ("16/3/1/4/1", "", ["'16/3/1/4/1'", "N/k/S/r", "16/3/1/4"]),
    ("16/3/one/4", "", ["'16/3/one/4'", "N/k/S/r"]),
    ("16/3/1/0.5", "", ["'16/3/1/0.5'", "N/k/S/r"]),
    ("", "", ["''", "N/k/S/r"]),
    ("16/3/1/0", "", ["16/3/1/0", "rank r", "at least 1"]),
    ("16/3/1/-4", "", ["16/3/1/-4", "rank r", "at least 1"]),
    ("16/3/16/4", "", ["16/3/16/4", "shared experts S", "between 0 and N - 1 = 15"]),
    ("16/3/-1/4", "", ["16/3/-1/4", "shared experts S", "between 0 and N - 1 = 15"]),
    ("16/0/1/4", "", ["16/0/1/4", "active sparse experts k", "between 1 and N - S = 15"]),
    ("16/16/1/4", "", ["16/16/1/4", "active sparse experts k", "between 1 and N - S = 15"]),
    ("16/17/0/4", "", ["16/17/0/4", "active sparse experts k", "between 1 and N - S = 16"]),
    ("16/4/0/4", "ase", ["'ase'", "S = 0", "'topk'", "'topk-renorm'"]),
    ("16/4/0/4", "naive-shared", ["'naive-shared'", "S = 0", "'topk'", "'topk-renorm'"]),
    ("16/3/1/4", "topk", ["'topk'", "S = 1", "'ase'", "'naive-shared'"]),
    ("16/3/2/4", "topk-renorm", ["'topk-renorm'", "S = 2", "'ase'", "'naive-shared'"]),
    ("16/3/1/4", "softmax", ["unknown gating 'softmax'", *GATINGS]),
]


@pytest.mark.parametrize(("text", "gating", "named"), ERRORS, ids=[f"{row[0] or 'empty'} {row[1]}" for row in ERRORS])
def test_an_error_is_one_line_that_names_the_field_and_the_remedy(text, gating, named):
    with pytest.raises(UserError) as error:
        MoEConfig.parse(text, gating)
    message = str(error.value)
    assert "\n" not in message
    assert [words for words in named if words not in message] == []
