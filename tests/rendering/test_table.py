"""Tables of the grid's page: what cells read, which are best, and the same as csv and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sae_lightning.rendering.table import SIGNS, Group, Head, Keyed, P, Spread, Table, Unknown, files, tex

NAN = float("nan")


@pytest.mark.parametrize(
    ("head", "cell", "text"),
    [
        (Head("a"), 0.12345, "0.123"),
        (Head("a"), None, "–"),
        (Head("a"), NAN, "–"),
        (Head("a"), "words", "words"),
        (Head("a", ".1%"), 0.034, "3.4 %"),
        (Head("a", sign=True), 0.5, "+0.500"),
        (Head("a", sign=True), -0.0001, "0.000"),
        (Head("a"), -0.0001, "0.000"),
        (Head("a"), Spread(0.5, 0.25), "0.500 ± 0.250"),
        (Head("a"), Spread(0.5, NAN), "0.500"),
        (Head("a", P), 0.00099, "<0.001"),
        (Head("a", P), 0.0833, "0.083"),
        (Head("a", P), NAN, "–"),
    ],
)
def test_a_cell_reads_as_its_head_says(head, cell, text):
    assert head.text(cell) == text


def test_the_best_of_a_column_are_all_that_read_the_same_as_the_best():
    heads = [Head("name"), Head("up", better=True), Head("down", better=False), Head("none"), Head("flat", better=True)]
    rows = [["a", 0.50001, 3.0, 9, 1.0], ["b", 0.50002, Spread(1.0, 9.0), 1, 1.0], ["c", 0.1, NAN, 5, 1.0]]
    assert Table("t", "t", heads, rows).best() == {(0, 1), (1, 1), (1, 2)}


def test_better_across_marks_rows():
    rows = [["x", 0.3, 0.1, 0.2], ["y", 0.4, 0.4, 0.4]]
    assert Table("t", "t", [Head(c) for c in "abcd"], rows, across=False).best() == {(0, 2)}


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="A row of table t has 1 cells, its heads are 2"):
        Table("t", "t", [Head("a"), Head("b")], [["x"]])


def test_csv_is_unrounded_and_gives_deviations_columns_of_their_own():
    table = Table("t", "t", [Head("backbone"), Head("M1", over="here"), Head("n", ".0f")],
                  [["dinov2, tiny", Spread(1 / 3, 0.1), 5.0], ["mae", None, NAN]])  # fmt: skip
    assert list(csv.reader(io.StringIO(table.csv()))) == [
        ["backbone", "here: M1", "here: M1 (std)", "n"],
        ["dinov2, tiny", repr(1 / 3), "0.1", "5"],
        ["mae", "", "", ""],
    ]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_csv_gives_every_number_back(values):
    read = list(csv.reader(io.StringIO(Table("t", "t", [Head("v")], [[v] for v in values]).csv())))
    assert [float(row[0]) for row in read[1:]] == values


def test_latex_has_booktabs_rules_spanning_heads_and_bold_best_numbers():
    table = Table("my-table", "Shares η² of 5 % & more", [
        Head("metric"), Head("backbone", better=True, over="here"), Head("rest", over="here"), Head("ρ", over="paper"),
    ], [["M1_a", 0.5, 0.25, -0.1], ["M2", 0.25, 0.5, None]])  # fmt: skip
    text = table.latex()
    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert r"\begin{tabular}{lrrr}" in lines
    assert r"\caption{Shares $\eta$$^2$ of 5 \% \& more}" in lines
    assert r"\label{tab:my-table}" in lines
    assert r" & \multicolumn{2}{c}{here} & paper \\" in text
    assert r"metric & backbone~$\uparrow$ & rest & $\rho$ \\" in lines
    assert r"M1\_a & \textbf{0.500} & 0.250 & -0.100 \\" in lines
    assert r"M2 & 0.250 & 0.500 & -- \\" in lines


def test_latex_allows_columns_of_the_same_name():
    text = Table("t", "t", [Head("a"), Head("ρ"), Head("ρ")], [["x", 0.1, 0.2]]).latex()
    assert r"x & 0.100 & 0.200 \\" in text


@given(st.text(st.sampled_from([*SIGNS, "a", " ", "1"])))
def test_no_sign_of_a_text_is_special_to_latex_unless_meant(text):
    made = tex(text)
    assert made.isascii()
    for sign in text:
        meant = SIGNS.get(sign, sign)
        assert made.startswith(meant)
        made = made[len(meant) :]
    bare = re.sub(r"\\[a-z]+(\{\})?|\\[&%$#_{}]|\$[^$]*\$|~", "", tex(text))
    assert not set(bare) & set("\\&%$#_{}^")


def test_html_cells_are_marked_and_long_texts_may_break():
    table = Table("t", "t", [Head("a"), Head("v", better=True, over="x"), Head("w", over="x")],
                  [["short", 1.0, 2.0], ["a long text of many words in it", 0.5, 2.0]])  # fmt: skip
    shown = table.view()
    assert shown["overs"] == [("", 1), ("x", 2)]
    assert [[cell["mark"] for cell in line] for line in shown["lines"]] == [["", "best", ""], ["", "", ""]]
    assert [line[0]["words"] for line in shown["lines"]] == ["words", "words long"]
    assert [cell["words"] for cell in shown["lines"][0][1:]] == ["", ""]


def test_each_table_is_two_files_and_no_two_share_a_name():
    one = Table("one", "t", [Head("a")], [[1.0]])
    assert set(files([one, Table("two", "t", [Head("a")], [[math.pi]])])) == {
        "one.csv",
        "one.tex",
        "two.csv",
        "two.tex",
    }
    with pytest.raises(ValueError, match="Two tables are called one"):
        files([one, one])


BACKBONES = Table(
    "t", "Scores", [Head("SAE"), Head("M1", better=True, about="connected"), Head("M7", better=False, drop=1)],
    [["a", 0.5, 0.1], ["b", 0.4, Unknown("no tasks")], [Keyed("c", "#123456"), 0.3, 0.2]],
    groups=[Group("clip", 2, "#111111", "of 12 layers"), Group("mae", 1)], of="features",
)  # fmt: skip


def test_groups_of_rows_have_a_line_on_pages_and_a_column_in_files():
    shown = BACKBONES.view()
    assert [(group.title, len(lines)) for group, lines in shown["groups"]] == [("clip", 2), ("mae", 1)]
    marks = [[cell["mark"] for cell in line] for line in shown["lines"]]
    assert marks == [["", "best", "best"], ["", "", ""], ["", "", ""]]
    assert (shown["lines"][1][2]["text"], shown["lines"][1][2]["why"]) == ("–", "no tasks")
    assert shown["lines"][2][0]["colour"] == "#123456"
    lines = BACKBONES.csv().splitlines()
    assert lines == ["features,SAE,M1,M7", "clip,a,0.5,0.1", "clip,b,0.4,", "mae,c,0.3,0.2"]


def test_the_best_of_a_group_is_marked_beside_the_best_of_all():
    heads, rows = [Head("x", better=True)], [[0.9], [0.8], [0.2], [0.1]]
    table = Table("t", "t", heads, rows, groups=[Group("a", 2), Group("b", 2)])
    assert [line[0]["mark"] for line in table.view()["lines"]] == ["best", "", "own", ""]


def test_markdown_has_bold_best_numbers_and_no_bare_bar():
    table = Table("t", "t", [Head("a|b"), Head("v", better=True, over="x")], [["c", 1.0], ["d", 0.5]])
    assert table.markdown().splitlines() == [
        r"| a\|b | x: v ↑ |",
        "|---|---:|",
        "| c | **1.000** |",
        "| d | 0.500 |",
    ]


def printed(table, **console):
    made = Console(record=True, **console)
    table.show(made)
    return made.export_text()


def test_a_terminal_shows_what_fits_and_names_the_rest():
    names = "a-run-with-a-name-of-40-letters-in-all--"
    heads = [Head("run"), Head("first", drop=1), Head("second"), Head("third"), Head("about", wraps=True)]
    table = Table("t", "", heads, [[names, 0.1, 0.2, 0.3, "some words that may be broken into lines"]])
    assert "too narrow" not in printed(table, width=160, force_terminal=True)
    assert "too narrow" not in printed(table, width=100, force_terminal=True)  # words are broken first
    text = printed(table, width=92, force_terminal=True)
    assert "The terminal is too narrow for: first." in text
    assert all(word in text for word in (names, "0.200", "0.300", "that may be"))
    assert max(map(len, text.splitlines())) <= 92
    few = printed(table, width=70, force_terminal=True)
    assert "The terminal is too narrow for: first, about." in few
    assert names in printed(table, width=20, force_terminal=True)
    assert all(f"0.{i}00" in printed(table, width=60) for i in (1, 2, 3))  # a file has no width


def test_a_terminal_is_told_why_there_is_no_number():
    text = printed(BACKBONES, width=100)
    assert "– M7: no tasks." in text
    assert "clip" in text
    assert "features" in text
