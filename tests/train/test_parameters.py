"""``python -m train.parameters``: the parts add up, and decoders of one size are of one size."""

import re

import pytest

from train.parameters import main


def counted(capsys, *argv):
    """{part: (parameters, trainable)} as printed."""
    assert main([*argv]) == 0
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["part", "parameters", "trainable"]
    return {name: (int(n.replace(",", "")), int(t.replace(",", ""))) for name, n, t in rows[1:]}


@pytest.mark.parametrize("options", [[], *(["--decoder", name] for name in ("fgmoe", "plain", "mlore"))], ids=str)
def test_the_parts_add_up(capsys, options):
    counts = counted(capsys, *options)
    whole = counts.pop("all")
    assert tuple(map(sum, zip(*counts.values(), strict=True))) == whole
    if options:
        assert counts["encoder"][1] == 0 and whole[1] == whole[0] - counts["encoder"][0]


def test_fgmoe_and_plain_differ_by_the_routers_alone(capsys):
    fine, plain = (counted(capsys, "--decoder", name) for name in ("fgmoe", "plain"))
    routers = {part for part in fine if "router" in part} | {"decoder.global_bias"}
    assert fine.keys() - plain.keys() == routers
    assert all(fine[part] == plain[part] for part in plain if part != "all")
    assert fine["all"][1] - plain["all"][1] == sum(fine[part][1] for part in routers)


def test_a_run_also_has_its_flops_and_latency(tiny_scenes_run, capsys):
    """And what is counted, and where it was measured."""
    assert main([str(tiny_scenes_run)]) == 0
    rows, below = capsys.readouterr().out.split("\n\n")
    assert rows.splitlines()[-1].startswith("all ")
    flops, counted, latency, measured = below.splitlines()
    assert re.fullmatch(r"FLOPs     0\.\d+ G for one image of 64 x 64", flops)
    assert "linear layers, attention and convolutions, all experts included; a multiply-add is two" in counted
    assert re.fullmatch(r"latency   [\d.]+ ms for one image", latency)
    assert "median of 10 passes after 3 to warm up, " in measured and measured.endswith(", fp32, kernel reference")


def test_a_run_takes_no_flags_of_a_model(tiny_scenes_run, error_of):
    assert "--batch-size is a flag of a new model" in error_of(main, tiny_scenes_run, "--batch-size", 3)
    assert "--set is a flag of a new model" in error_of(main, tiny_scenes_run, "--set", "lora_rank=3")


def test_a_mistake_is_one_line(capsys):
    assert main(["--decoder", "fgmoe", "--fg", "4/2/3/1"]) == 2
    assert "the slices m must divide the hidden width 1024" in capsys.readouterr().err
