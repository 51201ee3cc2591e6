"""Several trainings on one stream: who gets which batch, how often it is read, and what happens on failures."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.features.loader import FeatureLoader
from sae_lightning.features.shared import SharedLoader, SharedStream, StreamMember, StreamStoppedError

CPU = torch.device("cpu")
BATCH = 256


class Trainings:
    """``starts``: the first position of each of several threads that train for ``epochs`` epochs."""

    def __init__(self, store, starts, workers, epochs=2, fail=None):
        self.stream = SharedStream(len(starts), workers)
        self.places = [StreamMember(self.stream, i) for i in range(len(starts))]
        self.loaders = [FeatureLoader(store, BATCH, pinned=False) for _ in starts]
        self.epochs, self.fail = epochs, fail
        self.starts = starts
        self.seen = [[] for _ in starts]
        self.turns, self.errors, self.most = [], {}, 0
        self._working, self._lock = 0, threading.Lock()

    def run(self):
        threads = [threading.Thread(target=self._train, args=(i,)) for i in range(len(self.starts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return self

    def _train(self, i):
        try:
            self.stream.enter(i)
            loader = SharedLoader(self.loaders[i], self.places[i], CPU)
            loader.seek(0, self.starts[i])
            while loader._next[0] < self.epochs:
                for batch in loader:
                    self._step(i, batch)
        except BaseException as error:
            self.errors[i] = error
        finally:
            self.stream.leave(i)

    def _step(self, i, batch):
        with self._lock:
            self._working += 1
            self.most = max(self.most, self._working)
            self.turns.append((self.starts[i] + len(self.seen[i]), i))
        time.sleep(0.0002 * (i % 3))
        self.seen[i].append(batch.clone())
        with self._lock:
            self._working -= 1
        if self.fail == (i, len(self.seen[i])):
            raise ValueError("this one fails")


def alone(store, epochs=2):
    loader = FeatureLoader(store, BATCH, pinned=False)
    return [batch.clone() for _ in range(epochs) for batch in loader]


@settings(max_examples=12, deadline=None)
@given(starts=st.lists(st.integers(0, 40), min_size=1, max_size=5), workers=st.integers(1, 3))
def test_each_training_sees_what_it_would_see_alone(stores, starts, workers):
    expected = alone(stores["train"])
    trainings = Trainings(stores["train"], starts, workers).run()
    for start, seen in zip(starts, trainings.seen, strict=True):
        assert len(seen) == len(expected) - start
        assert all(torch.equal(a, b) for a, b in zip(seen, expected[start:], strict=True))
    assert trainings.most <= workers
    assert not trainings.errors


def test_a_batch_is_read_once_and_nothing_before_the_first_that_is_wanted(stores, monkeypatch):
    read = []
    following = SharedStream._following
    monkeypatch.setattr(SharedStream, "_following", lambda self: (read.append(self._next), following(self))[1])
    Trainings(stores["train"], [7, 3, 12], workers=2).run()
    assert read == list(range(3, len(alone(stores["train"]))))


def test_with_one_worker_turns_follow_from_the_positions_alone(stores):
    turns = [Trainings(stores["train"], [4, 0, 0, 2], workers=1).run().turns for _ in range(3)]
    assert turns[0] == sorted(turns[0])
    assert turns[0] == turns[1] == turns[2]


def test_nobody_runs_ahead(stores):
    turns = Trainings(stores["train"], [0, 0, 0, 0], workers=2).run().turns
    at = dict.fromkeys(range(4), 0)
    for position, member in turns:
        at[member] = position
        assert position <= min(at.values()) + 1 + SharedStream(4, 2).ahead


def test_one_that_fails_leaves_the_others_alone(stores):
    trainings = Trainings(stores["train"], [0, 0, 0], workers=2, fail=(1, 5)).run()
    expected = alone(stores["train"])
    assert list(trainings.errors) == [1]
    assert [len(seen) for seen in trainings.seen] == [len(expected), 5, len(expected)]


def test_a_stream_that_breaks_stops_all_with_its_error(stores, monkeypatch):
    def broken(self):
        raise OSError("the disk is gone")

    monkeypatch.setattr(SharedStream, "_following", broken)
    trainings = Trainings(stores["train"], [0, 0, 0], workers=2).run()
    assert [str(error) for error in trainings.errors.values()] == ["the disk is gone"] * 3


def test_a_stop_reaches_all_between_two_batches(stores):
    trainings = Trainings(stores["train"], [0, 0, 0], workers=2)
    trainings.stream.on_batch = lambda position, steps: position == 6 and trainings.stream.stop()
    trainings.run()
    assert sorted(trainings.errors) == [0, 1, 2]
    assert all(isinstance(error, StreamStoppedError) for error in trainings.errors.values())
    assert all(len(seen) <= 9 for seen in trainings.seen)


def test_the_clock_of_a_member_stands_while_others_work(stores):
    trainings = Trainings(stores["train"], [0, 0], workers=1)
    slow = trainings._step
    trainings._step = lambda i, batch: (time.sleep(0.005 * i), slow(i, batch))
    begun = [place.clock() for place in trainings.places]
    trainings.run()
    quick, other = (place.clock() - start for place, start in zip(trainings.places, begun, strict=True))
    assert quick < other - 0.003 * len(trainings.seen[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_let_go_of(stores, workers):
    trainings = Trainings(stores["train"], [0, 0, 0], workers)
    held = []
    trainings.stream.on_batch = lambda position, steps: held.append(len(trainings.stream._batches))
    trainings.run()
    assert max(held) <= 1 + workers + trainings.stream.ahead
