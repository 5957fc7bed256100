"""``python -m train.parameters``: the parts add up, and decoders of one size are of one size."""

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


def test_a_mistake_is_one_line(capsys):
    assert main(["--decoder", "fgmoe", "--fg", "4/2/3/1"]) == 2
    assert "the slices m must divide the hidden width 1024" in capsys.readouterr().err
