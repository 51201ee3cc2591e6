"""Memory that is taken again: only when nothing refers to it any more."""

import pytest
import torch

from sae_lightning.kernels import native

SHAPE = (600, 700)  # above a megabyte, and of no other test


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(native, "_storages", {})
    monkeypatch.setattr(native, "_asked", {})


def test_memory_in_use_is_never_given_twice():
    like = torch.zeros(1)
    first, second = native.empty(SHAPE, like), native.empty(SHAPE, like)
    assert first.data_ptr() != second.data_ptr()
    view = first[3:5].detach()  # a view keeps it in use
    where = first.data_ptr()
    del first
    assert native.empty(SHAPE, like).data_ptr() != where
    del view
    assert native.empty(SHAPE, like).data_ptr() == where


def test_a_gradient_s_memory_comes_back_when_the_gradient_is_dropped():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return p.sum()

        @staticmethod
        def backward(ctx, grad):
            return native.empty(SHAPE, grad).fill_(2.0)

    p = torch.nn.Parameter(torch.zeros(SHAPE))
    Double.apply(p).backward()
    where = p.grad.data_ptr()
    p.grad = None
    Double.apply(p).backward()
    assert p.grad.data_ptr() == where  # taken over, not copied
    assert bool((p.grad == 2).all())


def test_sizes_that_nobody_asks_for_are_let_go(monkeypatch):
    monkeypatch.setattr(native, "STALE", 5)
    like = torch.zeros(1)
    native.empty((700, 700), like)
    for _ in range(6):
        native.empty(SHAPE, like)
    held = [native.empty(SHAPE, like) for _ in range(3)]
    assert list(native._storages) == [(SHAPE, torch.float32)]
    assert len({tensor.data_ptr() for tensor in held}) == 3
