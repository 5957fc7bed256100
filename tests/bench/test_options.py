"""Flags of the benchmarks' commands: a wrong value is one line, and nothing is written where no --out is given."""

import argparse
import importlib

import pytest

from bench.options import Parser, finish, keep

COMMANDS = {name: importlib.import_module(f"bench.{name}") for name in ("aot", "counted", "host", "tune")}
COMMANDS["static"] = importlib.import_module("bench.static.__main__")


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("aot", ["--targets", "sm90"], "argument --targets: unknown 'sm90': did you mean sm_90?"),
        ("aot", ["--kernels", "gelu,route_shrunk"], "unknown 'route_shrunk': did you mean route_shrink?"),
        ("aot", ["--dtypes", "f8"], "unknown 'f8': choose among fp32, fp16, bf16"),
        ("aot", ["--pools", "16-3-1-4"], "is not of the form N/k/S/r"),
        ("counted", ["--configs", "16/16/1/4"], "N - S = 15"),
        ("tune", ["--kernels", "sort"], "unknown 'sort'"),
        ("static", ["--kernels", "sort"], "unknown 'sort'"),
        ("static", ["--tokens", "many"], "'many' are not numbers of at least 5, separated by commas"),
        ("static", ["--tokens", "40960,-5"], "are not numbers of at least 5"),
        ("static", ["--check", "--pools", "16/4/1/4"], "there are no budgets of these kernels for them"),
        ("host", ["--cofig", "16/3/1/4"], "unrecognized arguments: --cofig"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(command, argv, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as caught:
        COMMANDS[command].main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert error.startswith("error: ") and f"(python -m bench.{command} --help explains)" in error


class Parsed(Exception):
    """What a command would run with."""


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_written_by_default(command, monkeypatch, tmp_path):
    """So that a trial does not replace the committed results."""

    def stop(self, *_):
        raise Parsed(argparse.ArgumentParser.parse_args(self, []))

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(Parsed) as caught:
        COMMANDS[command].main([])
    (options,) = caught.value.args
    assert options.out is None
    keep(options.out, "rows")
    keep(tmp_path / "rows.json", "rows")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["rows"]


def test_a_mistake_that_comes_late_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        finish(lambda: keep(tmp_path / "none" / "rows.json", "rows") or 0)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(
        f"error: cannot write {tmp_path}/none/rows.json"
    )


def test_a_status_is_handed_on():
    with pytest.raises(SystemExit) as caught:
        finish(lambda: 1)
    assert caught.value.code == 1
