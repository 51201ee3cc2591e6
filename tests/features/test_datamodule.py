"""The stream: every token once, the same for every number of ranks, mixed, and deterministic."""

import time

import pytest
import torch

from sae_lightning.features.datamodule import FeatureDataModule, Prefetched, TokenStream


def batches(store, epoch=0, **kwargs):
    stream = TokenStream(store, **({"batch_size": 64, "buffer_tokens": 1024, "block_images": 4} | kwargs))
    stream.epoch = epoch
    return list(stream)


def keys(tokens):
    return [tuple(row) for row in tokens.tolist()]


def test_every_token_comes_at_most_once_and_nearly_all_come(stores):
    store = stores["train"]
    everything = set(keys(store.patches(slice(None)).reshape(-1, store.d_in)))
    got = keys(torch.cat(batches(store)))
    assert len(set(got)) == len(got)
    assert set(got) <= everything
    assert len(got) >= len(everything) - 64 - 8 * 4 * store.n_patches
    assert all(len(b) == 64 for b in batches(store))


def test_order_depends_on_seed_and_epoch_only(stores):
    store = stores["train"]
    first = torch.cat(batches(store, seed=1))
    assert torch.equal(first, torch.cat(batches(store, seed=1)))
    assert not torch.equal(first, torch.cat(batches(store, seed=2)))
    assert not torch.equal(first, torch.cat(batches(store, seed=1, epoch=1)))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_same_global_batches(stores, world):
    store = stores["train"]
    alone = batches(store)
    ranks = [batches(store, rank=r, world=world) for r in range(world)]
    assert {len(r) for r in ranks} == {len(alone)}
    for step, whole in enumerate(alone):
        parts = torch.cat([rank[step] for rank in ranks])
        assert sorted(keys(parts)) == sorted(keys(whole))


def test_batches_mix_images(stores):
    """Tokens of one batch come from many more images than an unshuffled read would give (64 / 16 = 4)."""
    store = stores["train"]
    tokens = store.patches(slice(None)).reshape(-1, store.d_in)
    image = {key: i // store.n_patches for i, key in enumerate(keys(tokens))}
    seen = [len({image[key] for key in keys(batch)}) for batch in batches(store, buffer_tokens=4096)]
    assert sum(seen) / len(seen) > 32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"batch_size": 60}, "multiple of the 8"), ({"world": 3}, "cannot share"), ({"batch_size": 80_000}, "lower")],
)
def test_impossible_divisions_fail_with_a_sentence(stores, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        batches(stores["train"], **change)


def test_errors_of_the_reading_thread_reach_the_consumer(stores):
    class Broken(TokenStream):
        def __iter__(self):
            yield torch.zeros(1)
            raise OSError("the disk is gone")

    stream = iter(Prefetched(Broken(stores["train"], 64)))
    next(stream)
    with pytest.raises(OSError, match="disk is gone"):
        next(stream)


def test_waiting_is_measured(stores):
    class Slow(TokenStream):
        def __iter__(self):
            for _ in range(3):
                time.sleep(0.05)
                yield torch.zeros(1)

    prefetched = Prefetched(Slow(stores["train"], 64))
    assert len(list(prefetched)) == 3
    assert prefetched.wait_seconds > 0.1


def test_validation_sees_every_token_once(stores):
    data = FeatureDataModule(stores["train"], stores["val"], batch_size=64)
    store = stores["val"]
    whole = torch.cat(list(data.val_dataloader()))
    assert torch.equal(whole, store.patches(slice(None)).reshape(-1, store.d_in))
