"""The formats of a table of scores: what a paper and a spreadsheet can take."""

import csv

from train.output.formats import as_csv, as_latex, as_markdown, as_text

ROWS = [
    ["run", "all M", "seg mIoU ^", "normals mErr v", "Delta_m % ^"],
    ["50%_of {a} & b\\#1~2^3$", "1.50", "50.00 +- 1.25", "12.00", "-1.50 +- 0.10"],
    ["plain", "n/a", "n/a", "13.00", "+2.00"],
]


def test_latex_has_rules_and_escapes_names():
    assert as_latex(ROWS, "protocol mini,\n4 images").splitlines() == [
        "% protocol mini, 4 images",
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"run & all M & seg mIoU $\uparrow$ & normals mErr $\downarrow$ & Delta\_m \% $\uparrow$ \\",
        r"\midrule",
        r"50\%\_of \{a\} \& b\textbackslash{}\#1\textasciitilde{}2\textasciicircum{}3\$ "
        r"& 1.50 & 50.00 $\pm$ 1.25 & 12.00 & $-$1.50 $\pm$ 0.10 \\",
        r"plain & n/a & n/a & 13.00 & +2.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_has_one_number_a_cell():
    heads, first, second = csv.reader(as_csv(ROWS, "a caption").splitlines())
    assert heads == [
        "run", "all M", "seg mIoU", "seg mIoU deviation", "normals mErr", "Delta_m %", "Delta_m % deviation",
    ]  # fmt: skip
    assert first == [ROWS[1][0], "1.50", "50.00", "1.25", "12.00", "-1.50", "0.10"]
    assert second == ["plain", "", "", "", "13.00", "+2.00", ""]


def test_markdown_has_signs_and_text_is_ascii():
    text = as_markdown(ROWS, "a caption")
    assert " seg mIoU ↑ | normals mErr ↓ |" in text and "50.00 ± 1.25" in text and text.endswith("\n\na caption\n")
    assert as_text(ROWS, "a caption").isascii() and as_text(ROWS, "a caption").endswith("+2.00\n\na caption\n")
