"""What the feature benchmark tells: the best option under the bare name, ratios of values measured side by side."""

from __future__ import annotations

import torch

from experiments.bench.feature_peers.memory import watch
from experiments.bench.feature_peers.results import Result, named, print_results, rows
from experiments.bench.feature_peers.stream import one_pass

RESULTS = [
    Result("stream cold", "sequential", "", [1.0, 2.0, 1.0]),
    Result("stream cold", "ours", "", [1.25, 2.5, 1.0], beside=[1.0, 2.0, 1.0]),
    Result("stream cold", "lmdb", "0 workers", [4.0, 4.0, 5.0]),
    Result("stream cold", "lmdb", "2 workers", [3.0, 2.5, 2.0]),
]


def test_the_fastest_option_has_the_bare_name():
    by_name = {row.contender: row for row in rows(RESULTS)}
    assert list(by_name) == ["sequential", "ours", "lmdb", "lmdb, 0 workers", "lmdb, 2 workers"]
    assert by_name["lmdb"].median_s == by_name["lmdb, 2 workers"].median_s == 2.5
    assert [result.option for result in named(RESULTS)] == ["", "", "", "0 workers", "2 workers"]


def test_the_table_says_ratios_in_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_results(RESULTS)
    shown = capsys.readouterr().out
    assert "80 % of the sequential read" in shown
    assert "ours is 2.0 times as fast" in shown


def test_a_pass_counts_bytes_and_stops_at_its_limit():
    batches = [torch.ones(8, 64, dtype=torch.float16)] * 5
    whole, cut = one_pass(batches), one_pass(batches, limit=0)
    assert (whole.n_bytes, whole.cut) == (5 * 8 * 64 * 2, False)
    assert (cut.n_bytes, cut.cut) == (8 * 64 * 2, True)
    assert 0 < whole.first <= whole.seconds


def test_memory_is_seen():
    memory = watch(lambda: torch.ones(2**26).sum())  # 256 MB, beside what the system takes from or gives to the rest
    assert 150 < memory.peak_mb < 500
