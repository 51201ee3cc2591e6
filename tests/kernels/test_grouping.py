"""Groups by rank and by latent against slow loops over rows, by both implementations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import native
from sae_lightning.kernels.products import grouped, rank_groups


@pytest.fixture(params=["native", "portable"])
def dtype(request, monkeypatch):
    """float32 with the compiled kernels, or float64 without them."""
    return use(request.param, monkeypatch)


def use(way: str, monkeypatch) -> torch.dtype:
    if way == "portable":
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    elif not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    return torch.float32 if way == "native" else torch.float64


def slow_rank_groups(rows: list[list[float]], ks: list[int]) -> list[int]:
    """Sort each row, larger first, of equal values the earlier; look up each place among the ks."""
    groups = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))
        for e in range(len(row)):
            place = order.index(e)
            groups.append(next((g for g, k in enumerate(ks) if place < k), len(ks) - 1))
    return groups


def offsets_of(rows: list[list]) -> torch.Tensor:
    return torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(1, 6).map(float), max_size=25), min_size=1, max_size=6),
    st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True).map(sorted),
    st.sampled_from(["native", "portable"]),
)
def test_rank_groups_equal_sorting_each_row_with_many_ties(rows, ks, way):
    with pytest.MonkeyPatch.context() as monkeypatch:
        dtype = use(way, monkeypatch)
        values = torch.tensor([v for row in rows for v in row], dtype=dtype)
        before = values.clone()
        got = rank_groups(values, offsets_of(rows), torch.tensor(ks))
        assert got.tolist() == slow_rank_groups(rows, ks)
        assert torch.equal(values, before)


@pytest.mark.parametrize("ks", [[1], [3], [400], [1, 2, 4, 8, 16], [5, 37, 300], [299, 300, 301]])
def test_rank_groups_of_long_rows(dtype, ks):
    generator = torch.Generator().manual_seed(0)
    counts = [300, 0, 1, 37, 299, 0]
    rows = [torch.rand(n, generator=generator).tolist() for n in counts]
    rows[0] = [round(v, 2) + 0.01 for v in rows[0]]  # a hundred values, three times each
    values = torch.tensor([v for row in rows for v in row], dtype=dtype)
    got = rank_groups(values, offsets_of(rows), torch.tensor(ks))
    assert got.tolist() == slow_rank_groups([values[a:b].tolist() for a, b in offsets_of(rows).unfold(0, 2, 1)], ks)


def test_groups_nest_into_the_topk_of_each_row(dtype):
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets, ks = torch.arange(0, 4001, 100), torch.tensor([2, 4, 32])
    group = rank_groups(values, offsets, ks).view(40, 100)
    for level, k in enumerate(ks[:-1]):
        top = torch.zeros(40, 100, dtype=torch.bool).scatter(1, values.view(40, 100).topk(int(k)).indices, True)
        assert torch.equal(group <= level, top)


def test_rank_groups_shared_among_threads(dtype):
    values = torch.rand(400, 150, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = rank_groups(values.flatten(), torch.arange(401) * 150, torch.tensor([3, 20, 90])).view(400, 150)
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    assert torch.equal(got, (rank >= 3).long() + (rank >= 20))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=6), st.sampled_from(["native", "portable"])
)
def test_grouped_sorts_the_entries_of_each_row_by_group(rows, way):
    with pytest.MonkeyPatch.context() as monkeypatch:
        dtype = use(way, monkeypatch)
        group = torch.tensor([g for row in rows for g in row], dtype=torch.long)
        latents = torch.cat([torch.arange(len(row)) for row in rows])
        values = torch.arange(1, len(group) + 1, dtype=dtype, requires_grad=True)
        got = grouped(latents, values, offsets_of(rows), group, 4)
        expected, counts, e = [], [], 0
        for row in rows:
            for g in range(4):
                here = [(i, e + i + 1.0) for i, own in enumerate(row) if own == g]
                expected += here
                counts.append(len(here))
            e += len(row)
        assert list(zip(got[0].tolist(), got[1].tolist(), strict=True)) == expected
        assert got[2].tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]


def test_grouped_passes_the_gradient_to_the_entry_it_came_from(dtype):
    values = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    group, offsets = torch.tensor([1, 0, 0]), torch.tensor([0, 2, 3])
    _, sorted_values, _ = grouped(torch.tensor([0, 4, 4]), values, offsets, group, 2)
    assert sorted_values.tolist() == [2, 1, 3]
    sorted_values.backward(torch.tensor([10.0, 20.0, 30.0], dtype=dtype))
    assert values.grad.tolist() == [20, 10, 30]
