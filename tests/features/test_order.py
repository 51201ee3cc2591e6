"""The order of rows: an exact permutation, the same for every number of ranks, found at any step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.features.order import Order


def batches(order, epoch=0, ranks=1):
    """Row numbers of every global batch, put together from what the ranks would read."""
    out = [[[] for _ in range(ranks)] for _ in range(order.steps)]
    for rank in range(ranks):
        lanes = order.lanes_of(rank, ranks)
        for window in range(order.windows):
            buffer = np.full(order.steps_of(window) * order.per_lane * len(lanes), -1)
            for position, lane in enumerate(lanes):
                rows = np.concatenate([np.arange(a, a + n) for a, n in order.segments(epoch, lane, window)])
                buffer[order.places(epoch, lane, window, len(lanes), position)] = rows
            assert (buffer >= 0).all()
            for i, batch in enumerate(np.split(buffer, order.steps_of(window))):
                assert order.window_of(order.first_step(window) + i) == window
                out[order.first_step(window) + i][rank] = batch.tolist()
    return out


orders = st.builds(
    Order,
    n_rows=st.integers(32, 700),
    batch_size=st.sampled_from([8, 16, 32]),
    block=st.integers(1, 40),
    window=st.integers(1, 9),
    lanes=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation_but_for_less_than_a_batch(order, epoch):
    rows = [row for batch in batches(order, epoch) for part in batch for row in part]
    assert len(set(rows)) == len(rows) == order.steps * order.batch_size
    assert set(rows) <= set(range(order.n_rows))
    assert order.n_rows - len(rows) < order.batch_size


@settings(max_examples=40, deadline=None)
@given(order=orders, epoch=st.integers(0, 5), ranks=st.sampled_from([2, 4, 8]))
def test_ranks_share_the_batches_that_one_would_have(order, epoch, ranks):
    if order.lanes % ranks:
        with pytest.raises(ValueError, match="cannot share"):
            order.lanes_of(0, ranks)
        return
    alone = [sorted(batch[0]) for batch in batches(order, epoch)]
    shared = batches(order, epoch, ranks)
    assert [sorted(row for part in batch for row in part) for batch in shared] == alone
    assert {len(part) for batch in shared for part in batch} == {order.batch_size // ranks}


def test_what_is_left_over_changes_from_epoch_to_epoch():
    order = Order(n_rows=1000, batch_size=64, block=10, window=4)
    left = [set(range(1000)) - set(np.ravel(batches(order, epoch)).tolist()) for epoch in range(4)]
    assert all(len(rows) == 1000 % 64 for rows in left)
    assert len(set.intersection(*left)) == 0


def test_epochs_and_seeds_differ():
    first = batches(Order(1000, 64, 10, 4, seed=1))
    assert first == batches(Order(1000, 64, 10, 4, seed=1))
    assert first != batches(Order(1000, 64, 10, 4, seed=2))
    assert first != batches(Order(1000, 64, 10, 4, seed=1), epoch=1)


def test_batches_of_a_class_sorted_store_are_balanced():
    """200 classes in order and windows of a ninth of the epoch: a batch has nearly as many classes as by chance.

    Without the shuffle in a window, a batch of blocks of 20 rows would have at most 800 / 20 + 8 of them.
    """
    n, classes, batch = 80_000, 200, 800
    order = Order(n, batch, block=20, window=12)
    counts = np.stack([np.bincount(np.array(b[0]) * classes // n, minlength=classes) for b in batches(order)])
    seen = (counts > 0).sum(1)
    by_chance = classes * (1 - (1 - 1 / classes) ** batch)
    assert seen.mean() > 0.85 * by_chance
    assert seen.min() > 0.8 * by_chance
    assert counts.var() < 3 * batch / classes, "the variance by chance is batch / classes"


@pytest.mark.parametrize(
    ("change", "sentence"), [({"batch_size": 60}, "multiple of the 8"), ({"n_rows": 63}, "lower batch_size")]
)
def test_impossible_divisions_fail_with_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Order(**({"n_rows": 1000, "batch_size": 64, "block": 10, "window": 4} | change))
