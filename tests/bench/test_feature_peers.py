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
    try:
        peer.write(features, tmp_path)
        loader = peer.loader(tmp_path, 512, **peer.OPTIONS[option])
        batches = [batch.reshape(-1, 64).clone() for batch in loader]
    except ImportError as error:
        pytest.skip(str(error))
    got = torch.cat(batches)
    numbers, order = token_numbers(got).sort()
    assert torch.equal(numbers, torch.arange(2003 * 16))
    assert torch.equal(got[order].view(torch.int16), torch.cat(list(features)).view(-1, 64).view(torch.int16))
    assert not torch.equal(order, torch.arange(len(order))), "nothing was shuffled"


@pytest.mark.parametrize("name", YARDSTICKS)
def test_yardsticks_move_all_bytes(name, features, tmp_path):
    PEERS[name].write(features, tmp_path)
    moved = sum(piece.nbytes for piece in PEERS[name].loader(tmp_path, 512))
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert moved == (files if name == "sequential" else features.n_bytes)
