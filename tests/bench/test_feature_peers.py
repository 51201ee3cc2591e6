"""Every contender of the feature benchmark delivers every token once an epoch."""

from __future__ import annotations

import pytest
import torch

from experiments.bench.feature_peers import PEERS, synthetic
from experiments.bench.feature_peers.synthetic import Features, token_numbers

YARDSTICKS = ("sequential", "memcpy")
LOADERS = [(name, option) for name, peer in PEERS.items() if name not in YARDSTICKS for option in peer.OPTIONS]


@pytest.fixture
def features(monkeypatch) -> Features:
    """4 MB: 2,003 images of 16 tokens of 64, in shards of 1 MiB."""
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 2**20)
    return Features(2003, n_patches=16, d_in=64)


@pytest.mark.parametrize(("name", "option"), LOADERS)
def test_an_epoch_has_every_token_once(name, option, features, tmp_path):
    peer = PEERS[name]
    if name != "ours":
        pytest.importorskip(name.split()[0])
    peer.write(features, tmp_path)
    loader = peer.loader(tmp_path, 512, **peer.OPTIONS[option])
    got = torch.cat([batch.reshape(-1, 64).clone() for batch in loader])
    numbers, order = token_numbers(got).sort()
    assert numbers.unique().equal(numbers)
    missing = 2003 * 16 - len(numbers)
    assert missing == (2003 * 16 % 512 if name == "ours" else 0), "ours drops what fills no batch"
    wanted = torch.cat(list(features)).view(-1, 64)[numbers]
    assert torch.equal(got[order].view(torch.int16), wanted.view(torch.int16))
    assert not torch.equal(order, torch.arange(len(order))), "nothing was shuffled"


@pytest.mark.parametrize("name", YARDSTICKS)
def test_yardsticks_move_all_bytes(name, features, tmp_path):
    PEERS[name].write(features, tmp_path)
    moved = sum(piece.nbytes for piece in PEERS[name].loader(tmp_path, 512))
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert moved == (files if name == "sequential" else features.n_bytes)
