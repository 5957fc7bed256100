"""Tables are the same to the letter wherever they are made."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.output.scores import score_table
from train.output.tables import format_table

ROWS = [["name", "kind", "count"], ["a", "longer", "7"], ["b c", "x", "1,234"]]


def test_text_stands_left_and_numbers_right():
    assert format_table(ROWS, text_columns=2).splitlines() == [
        "name  kind    count",
        "a     longer      7",
        "b c   x       1,234",
    ]
    assert format_table(ROWS).splitlines()[1] == "a     longer      7"
    assert format_table(ROWS).splitlines()[2] == "b c        x  1,234"


def test_no_line_ends_in_spaces():
    assert format_table([["a", "b"], ["1", "longer"]], text_columns=2).splitlines()[0] == "a  b"


def test_markdown_says_how_columns_are_aligned():
    assert format_table(ROWS, markdown=True, text_columns=2).splitlines() == [
        "| name | kind   | count |",
        "| ---- | ------ | ----: |",
        "| a    | longer |     7 |",
        "| b c  | x      | 1,234 |",
    ]


def test_rows_of_different_lengths_are_a_bug():
    with pytest.raises(ValueError, match="shorter"):
        format_table([["a", "b"], ["a"]])


def test_scores_of_different_tasks_line_up():
    metrics = {"seg": {"mIoU": 50.0}, "edge": {"loss": 0.12345, "odsF": None}}
    table = score_table({"untrained": metrics, "trained": {"edge": {"loss": 0.1}}})
    assert table.splitlines() == [
        "task     metric           untrained    trained",
        "seg      mIoU %       ^       50.00        n/a",
        "edge     loss         v      0.1235     0.1000",
        "(^ higher is better, v lower; mIoU: over the classes that labels show)",
    ]


def test_the_formatter_needs_the_standard_library_alone():
    code = "import sys, train.output.tables; assert not {'torch', 'numpy', 'kernels'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
