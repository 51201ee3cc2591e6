"""Which entries are selected: against the whole product in float64, in every way there is to compute them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import native, selection
from tests.processes import run

WAYS = ["float32 by bfloat16 candidates", "float32", "float32 without a compiler", "float64"]


@pytest.fixture(params=WAYS)
def dtype(request, monkeypatch):
    """The float type of one way to select, which the test then uses."""
    return use(request.param, monkeypatch)


def use(way: str, monkeypatch) -> torch.dtype:
    if "compiler" in way:
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    elif "float32" in way and not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    monkeypatch.setattr(selection, "fast_bf16", lambda: "bfloat16" in way)
    monkeypatch.setattr(selection, "PART", dict.fromkeys(selection.PART, 1))  # 64 rows a part
    return torch.float64 if way == "float64" else torch.float32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def usual(n: int = 50, d_sae: int = 200, d: int = 24, k: int = 7):
    """x [n, d], W [d_sae, d], bias [d_sae] and k."""
    return normal(n, d), torch.nn.functional.normalize(normal(d_sae, d, seed=1), dim=1), normal(d_sae, seed=2) / 10, k


def changed(part: int, rows, by, **sizes):
    """The usual input with some rows of x, W or the bias multiplied."""
    made = usual(**sizes)
    made[part][rows] *= by
    return made


def exact_in_bf16(offset: float):
    """Inputs that bfloat16 holds exactly, whose products it does not, and a bias as large as they."""
    x, W = 16 * torch.ones(40, 24, dtype=torch.float64), torch.ones(200, 24, dtype=torch.float64)
    x[:, 1:] += torch.randint(-8, 8, (40, 23), generator=torch.Generator().manual_seed(0))
    W[:, 1:] = torch.randint(0, 4, (200, 23), generator=torch.Generator().manual_seed(1)) / 4
    return x, W, offset - (x @ W.T).mean(0), 5


def twins():
    """Every latent three times, and the first one a hundred times."""
    x, W, bias, _ = usual()
    return x, torch.cat([W[:30].repeat(3, 1), W[:1].expand(100, -1)]), bias[:190] * 0, 20


CASES = {
    "usual": usual,
    "one sample": lambda: usual(n=1),
    "one latent": lambda: usual(d_sae=1, k=1),
    "63 latents": lambda: usual(d_sae=63),
    "65 latents": lambda: usual(d_sae=65),
    "many parts": lambda: usual(n=150, k=3),
    "k of all latents": lambda: usual(d_sae=70, k=70),
    "k of one": lambda: usual(k=1),
    "few positive": lambda: (*usual()[:2], usual()[2] - 2.5, 30),
    "all negative": lambda: (*usual()[:2], usual()[2] - 50, 5),
    "all positive": lambda: (*usual()[:2], usual()[2] + 50, 5),
    "a huge latent": lambda: changed(1, 17, 1e4),
    "a huge sample": lambda: changed(0, 17, 1e4),
    "both huge": lambda: (changed(0, 17, 1e3)[0], changed(1, 17, 1e3)[1], *usual()[2:]),
    "a huge dimension": lambda: (usual()[0] * torch.eye(24)[3] * 1e3 + usual()[0], *usual()[1:]),
    "tiny latents": lambda: changed(1, slice(0, 200, 2), 1e-6),
    "zero samples": lambda: changed(0, slice(0, 50, 2), 0),
    "zero latents": lambda: changed(1, slice(0, 200, 2), 0),
    "everything zero": lambda: (*(t * 0 for t in usual()[:3]), 4),
    "twins": twins,
    "large bias": lambda: changed(2, slice(None), 3000),
    "bias as large as the product": lambda: exact_in_bf16(1.0),
    "bias a little larger": lambda: exact_in_bf16(-4.0),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def truth(x, W, bias):
    """The pre-activations in float64, and the rounding error that float32 may have made in each."""
    x, W, bias = x.double(), W.double(), bias.double()
    pre = x @ W.T + bias
    return pre, 2e-6 * (x.norm(dim=1, keepdim=True) * W.norm(dim=1) + bias.abs()) + 1e-30


def assert_selected(entries, pre, error, must, may):
    """Values are right, latents ascend, all entries of ``must`` are there and none outside ``may``."""
    latents, values, offsets = entries
    assert offsets.dtype == latents.dtype == torch.long
    assert (int(offsets[0]), int(offsets[-1]), len(offsets)) == (0, len(latents), len(pre) + 1)
    rows = torch.repeat_interleave(torch.arange(len(pre)), offsets.diff())
    assert (torch.diff(rows * pre.shape[1] + latents) > 0).all()
    assert ((values.double() - pre[rows, latents]).abs() <= error[rows, latents]).all()
    got = torch.zeros_like(pre, dtype=torch.bool)
    got[rows, latents] = True
    assert (got | ~must).all(), f"{int((must & ~got).sum())} of {int(must.sum())} entries are missing"
    assert (may | ~got).all(), f"{int((got & ~may).sum())} entries should not be there"


def kth(values, k: int):
    """The k-th largest of each row, 0 where fewer are positive."""
    return values.sort(dim=1, descending=True).values[:, k - 1 : k].clamp_min(0)


def test_topk_are_the_k_largest_positive_entries_of_each_row(dtype, case):
    *tensors, k = case
    x, W, bias = (t.to(dtype) for t in tensors)
    pre, error = truth(x, W, bias)
    entries = selection.topk(x, W, bias, k)
    must = (pre - error > kth(pre + error, k)) & (pre > error)
    may = (pre + error >= kth(pre - error, k)) & (pre > -error)
    assert_selected(entries, pre, error, must, may)
    counts = entries[2].diff()
    assert (counts >= (pre > error).sum(1).clamp_max(k)).all()
    assert (counts <= (pre > -error).sum(1).clamp_max(k)).all()


@pytest.mark.parametrize("cut", ["zero", "high", "negative", "by latent", "unreachable"])
def test_above_are_the_entries_greater_than_their_cut(dtype, case, cut):
    x, W, bias = (t.to(dtype) for t in case[:3])
    pre, error = truth(x, W, bias)
    high = pre.flatten().sort().values[int(0.99 * pre.numel())]
    cuts = {
        "zero": torch.zeros(()), "high": high, "negative": -high.abs(), "unreachable": pre.max() + 1 + high.abs(),
        "by latent": pre.mean(0) + 2 * pre.std(0, correction=0),
    }[cut].to(dtype)  # fmt: skip
    error = error + 1e-6 * cuts.double().abs()
    must, may = pre - error > cuts, pre + error > cuts
    assert_selected(selection.above(x, W, bias, cuts), pre, error, must, may)


def test_largest_holds_the_largest_positive_entries_of_the_whole_batch(dtype, case):
    *tensors, k = case
    x, W, bias = (t.to(dtype) for t in tensors)
    pre, error = truth(x, W, bias)
    budget = k * len(x)
    entries = selection.largest(x, W, bias, budget)
    cut = kth((pre + error).view(1, -1), budget)
    assert_selected(entries, pre, error, (pre - error > cut) & (pre > error), pre > -error)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000), budget=st.integers(1, 500), way=st.sampled_from(WAYS), shift=st.floats(-3, 1),
    sampled=st.integers(1, 30), guess=st.floats(0, 8), huge=st.booleans(),
)  # fmt: skip
def test_the_largest_are_the_same_wherever_the_search_starts(seed, budget, way, shift, sampled, guess, huge):
    with pytest.MonkeyPatch.context() as monkeypatch:
        dtype = use(way, monkeypatch)
        monkeypatch.setattr(selection, "SAMPLE", sampled)
        monkeypatch.setattr(selection, "GUESS", guess)
        x, W, bias, _ = usual(n=30, d_sae=70)
        x[0] *= 100 if huge else 1  # the first row is always in the sample
        x, W, bias = (x + seed / 1000).to(dtype), W.to(dtype), (bias + shift).to(dtype)
        pre, error = truth(x, W, bias)
        found = selection.largest(x, W, bias, budget)
        kept = found
        if len(found[1]) > budget:
            kept = selection.keep(found, found[1] >= selection.kth_largest(found[1], budget))
        assert len(kept[0]) == min(budget, int((pre > 0).sum()))
        flat, wide = pre.view(1, -1), error.view(1, -1)
        must = (pre - error > kth(flat + wide, budget)) & (pre > error)
        may = (pre + error >= kth(flat - wide, budget)) & (pre > -error)
        assert_selected(kept, pre, error, must, may)


def test_largest_takes_all_positive_entries_for_a_budget_beyond_the_number_of_entries(dtype):
    x, W, bias = (t.to(dtype) for t in usual(n=3, d_sae=20)[:3])
    found = selection.largest(x, W, bias, 1000)
    assert len(found[0]) == int((x @ W.T + bias > 0).sum())


@pytest.mark.parametrize("low", [True, False])
def test_selections_shared_among_threads_are_the_same(low, monkeypatch):
    use("float32 by bfloat16" if low else "float32", monkeypatch)
    monkeypatch.undo()  # parts of their usual size
    monkeypatch.setattr(selection, "fast_bf16", lambda: low)
    *tensors, k = usual(n=520, d_sae=4099, d=520)
    x, W, bias = (t.float() for t in tensors)
    pre, error = truth(x, W, bias)
    top, bottom = (pre + error).topk(k).values[:, -1:], (pre - error).topk(k).values[:, -1:]
    assert_selected(selection.topk(x, W, bias, k), pre, error, pre - error > top, pre + error >= bottom)
    cut = torch.tensor(2.2)
    assert_selected(selection.above(x, W, bias, cut), pre, error, pre - error > cut, pre + error > cut)
    least = (pre + error).flatten().topk(k * 520).values[-1]
    assert_selected(selection.largest(x, W, bias, k * 520), pre, error, pre - error > least, pre > -error)


@pytest.mark.parametrize("low", [True, False])
def test_of_equal_entries_topk_takes_the_lower_latents(low, monkeypatch):
    use("bfloat16 float32" if low else "float32", monkeypatch)
    whole = torch.randint(-2, 3, (300, 6), generator=torch.Generator().manual_seed(0)).float()
    x, W, bias = whole[:100], whole[100:], torch.zeros(200)  # whole numbers: sums are exact in any order
    latents, values, offsets = selection.topk(x, W, bias, 9)
    for i, row in enumerate(x @ W.T):
        best = sorted(range(200), key=lambda latent, row=row: (-float(row[latent]), latent))[:9]
        expected = sorted(latent for latent in best if row[latent] > 0)
        assert latents[offsets[i] : offsets[i + 1]].tolist() == expected
        assert torch.equal(values[offsets[i] : offsets[i + 1]], row[expected])


@pytest.mark.parametrize("name", ["usual", "many parts", "few positive", "a huge sample", "zero samples"])
@pytest.mark.parametrize("compiled", [True, False])
def test_under_autocast_the_product_is_bfloat16s(name, compiled, monkeypatch):
    use("float32" if compiled else "without a compiler", monkeypatch)
    *tensors, k = CASES[name]()
    x, W, bias = (t.float() for t in tensors)
    pre, error = truth(x, W, bias)
    error = 1e4 * error  # 2% of the norms' product
    half = (x.bfloat16() @ W.bfloat16().T).double() + bias
    everywhere = torch.ones_like(pre, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        top = selection.topk(x, W, bias, k)
        above = selection.above(x, W, bias, torch.tensor(1.0))
    assert torch.equal(top[2].diff(), (half > 0).sum(1).clamp_max(k))
    assert torch.equal(above[2].diff(), (half > 1).sum(1))
    for entries in (top, above):
        assert_selected(entries, pre, error, everywhere & False, everywhere)
        assert_selected(entries, half, error / 100, everywhere & False, everywhere)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=200), st.data(), st.sampled_from(WAYS[1:]))
def test_kth_largest_is_the_sorted_ones(values, data, way):
    k = data.draw(st.integers(1, len(values)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        tensor = torch.tensor(values, dtype=use(way, monkeypatch))
        assert float(selection.kth_largest(tensor, k)) == sorted(values, reverse=True)[k - 1]
        assert tensor.tolist() == values


def test_keep_and_join_list_the_entries_of_consecutive_rows():
    first = (torch.tensor([0, 3, 1]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3]))
    second = (torch.tensor([2]), torch.tensor([4.0]), torch.tensor([0, 0, 1]))
    latents, values, offsets = selection.join([first, second, second])
    assert latents.tolist() == [0, 3, 1, 2, 2]
    assert values.tolist() == [1, 2, 3, 4, 4]
    assert offsets.tolist() == [0, 2, 2, 3, 3, 4, 4, 5]
    latents, values, offsets = selection.keep(first, torch.tensor([False, True, True]))
    assert (latents.tolist(), values.tolist(), offsets.tolist()) == ([3, 1], [2, 3], [0, 1, 1, 2])


BROKEN = """
import torch
from sae_lightning.kernels import selection
for low in (False, True):
    for value in ("nan", "inf"):
        selection.fast_bf16 = lambda: low
        x, W = torch.randn(4, 8), torch.randn(64, 8)
        x[0, 2] = float(value)
        W[3:, 2] = 0
        for select in (lambda *a: selection.topk(*a, 5), lambda *a: selection.largest(*a, 9)):
            print(value, "by bfloat16" if low else "in float32", flush=True)
            select(x, W, torch.zeros(64))
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_feature_that_is_not_finite_does_not_hang_the_process(tmp_path):
    assert run("-c", BROKEN, cwd=tmp_path).stdout.splitlines()[-1] == "done"
