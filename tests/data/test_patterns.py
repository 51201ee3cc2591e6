"""Lists of files from one text."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.data import DataError
from sae_lightning.data.webdataset import expand_braces, files_of, fixed_folder

WORDS = st.text("abc0.-", max_size=3)


@settings(max_examples=100, deadline=None)
@given(WORDS, st.integers(0, 300), st.integers(0, 300), st.integers(1, 6), WORDS)
def test_ranges_are_written_out_with_zeros(before, first, last, width, after):
    texts = expand_braces(f"{before}{{{first:0{width}d}..{last:0{width}d}}}{after}")
    step = 1 if first <= last else -1
    width = max(len(f"{x:0{width}d}") for x in (first, last)) if any(
        len(f"{x:0{width}d}") > len(str(x)) for x in (first, last)
    ) else 0  # fmt: skip
    assert texts == [f"{before}{n:0{width}d}{after}" for n in range(first, last + step, step)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=2, max_size=3), min_size=1, max_size=3))
def test_lists_are_multiplied_out_in_order(lists):
    expected = [""]
    for choices in lists:
        expected = [text + "/" + choice for text in expected for choice in choices]
    assert expand_braces("".join("/{" + ",".join(choices) + "}" for choices in lists)) == expected


BASH = [
    "x", "{}", "a{b}c", "{a,b", "a,b}", "{a,b}{1..3}", "{00..10}", "{1..010}", "{10..7}", "{0..9..4}", "{9..0..3}",
    "{-2..2}", "{-01..1}", "{a,b{1..2},{c,d}e}", "{a,{b}}", "{{a,b}}", "{,x}y", "{a}{b,c}", "{a..c}x{1,2}", "{1..2}}",
    "{{1..2}", "p/{000000..000003}.tar", "{3..3}", "{1..a},{b,c}",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to compare with")
def test_braces_mean_what_they_mean_in_bash():
    letters = {"{a..c}x{1,2}"}  # ranges of letters are not for shards
    script = "\n".join(f"printf '%s|' {text}; echo" for text in BASH)
    lines = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    for text, line in zip(BASH, lines, strict=True):
        if text not in letters:
            assert expand_braces(text) == line[:-1].split("|"), text


@pytest.fixture
def tars(tmp_path):
    for name in ("train-00.tar", "train-01.tar", "val-00.tar", ".hidden.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["train-00", "train-01", "val-00"]),
        ("val-00.tar", ["val-00"]),
        ("train-*.tar", ["train-00", "train-01"]),
        ("train-{01..00}.tar", ["train-01", "train-00"]),
        ("{val,train}-*.tar", ["val-00", "train-00", "train-01"]),
        ("{train-00,train-*}.tar", ["train-00", "train-01"]),
    ],
)
def test_patterns_find_files_in_order_and_once(tars, pattern, names):
    assert files_of(tars / pattern) == [tars / f"{name}.tar" for name in names]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("train-{00..03}.tar", r"no file .*train-02\.tar and 1 more"),
        ("test-*.tar", r"no file .*test-\*\.tar; check"),
        ("notes.d", "no file"),
    ],
)
def test_patterns_without_files_are_refused(tars, pattern, sentence):
    with pytest.raises(DataError, match=sentence):
        files_of(tars / pattern)
    (tars / "empty").mkdir()
    with pytest.raises(DataError, match=r"No \*\.tar files lie in .*empty"):
        files_of(tars / "empty")


def test_the_fixed_part_of_a_pattern(tmp_path):
    assert fixed_folder(tmp_path) == tmp_path
    assert fixed_folder(Path("/d/x/shard-{00..09}.tar")) == Path("/d/x")
    assert fixed_folder(Path("/d/{a,b}/x.tar")) == Path("/d")
    assert fixed_folder(Path("/d/x.tar")) == Path("/d")
