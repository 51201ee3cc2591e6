"""Every storage format gives back the images that were written, whichever block is asked for."""

from __future__ import annotations

import pytest
import torch

from experiments.bench.feature_peers import synthetic
from experiments.bench.feature_peers.synthetic import Features
from experiments.bench.format_candidates import CANDIDATES
from experiments.bench.pagecache import cold, evict, files_in, load, resident, warm


@pytest.mark.parametrize("name", CANDIDATES)
def test_blocks_come_back(name, monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 2**20)
    features = Features(1003, n_patches=16, d_in=64)
    try:
        CANDIDATES[name].write(features, tmp_path)
        read = CANDIDATES[name].open(tmp_path)
    except ImportError as error:
        pytest.skip(str(error))
    expected = torch.cat(list(features))
    for first, count in ((0, 1003), (505, 14), (999, 4), (17, 1)):
        out = torch.full((count, 16, 64), torch.nan, dtype=torch.float16)
        read(first, count, out)
        assert torch.equal(out.view(torch.int16), expected[first : first + count].view(torch.int16))


def test_files_leave_and_enter_the_page_cache(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 * 2**20 + 5))
    files = files_in(tmp_path)
    if evict(files) > 0.01:
        pytest.skip("this file system keeps its files in memory")
    assert resident(files) < 0.01
    assert load(files) == 1
    assert cold(tmp_path) == ""
    assert warm(tmp_path) == ""
    assert resident(files) == 1
