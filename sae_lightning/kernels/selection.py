"""Which latents are active: the encoder's dense product and the choice among its entries, without the whole matrix.

The product runs over a few hundred rows at a time, and each part is reduced to its active entries while it
is still in the cache. Where the processor multiplies bfloat16 quickly, candidates come from a bfloat16
product with a bound on its error, and only they are computed again in float32; the selection and its
values are then those of the float32 product. All functions are without gradient; ``sparse_pre_acts``
attaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from sae_lightning.distributed.ranks import sum_over_ranks, world_size
from sae_lightning.kernels import native, portable
from sae_lightning.kernels.portable import offsets_of

PART = {"cpu": 1 << 23, "cuda": 1 << 27}  # entries of the product that are held at once: a cache's worth, or 512 MB

SAMPLE, GUESS = 64, 0.95  # rows that tell where a cut lies, and the share of it from which entries are looked at

SPARSE_BELOW = 0.05  # share of candidates up to which computing them again beats a float32 product

_one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

Entries = tuple[Tensor, Tensor, Tensor]  # latents [nnz], values [nnz], offsets [N + 1]


@cache
def fast_bf16() -> bool:
    """Whether this CPU has bfloat16 (or tile) instructions, so that such a product takes a third of float32's time."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


@dataclass
class Rows:
    """One part of the product: ``pre`` [n, d_sae] without the bias, its rows of ``x``, and its error bounds."""

    pre: Tensor
    x: Tensor
    slack: Tensor | None  # [n]: an entry's error is at most slack[row] * norms[latent] + 2^-8 |entry - bias|


@dataclass
class Product:
    """``x Wᵀ`` in parts. ``x`` [N, d], ``W`` [d_sae, d]; ``margin`` is the error of the type's own rounding."""

    x: Tensor
    W: Tensor
    low: bool  # in bfloat16
    margin: float = 0.0

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x and W in the product's type, the norms [d_sae] of W's rows and the slack [N] of x's (see ``Rows``)."""
        if not self.low:
            return self.x, self.W, None, None
        if not self.margin:
            return self.x.bfloat16(), self.W.bfloat16(), None, None
        x, x_norms, x_lost = native.to_bf16(self.x)
        W, norms, W_lost = native.to_bf16(self.W)
        worst = (W_lost / norms.clamp_min(1e-30)).max() + self.x.shape[1] * 2.0**-23
        return x, W, norms, 1.01 * (x_lost + x_norms * worst) + 1e-30

    def rows(self) -> Iterator[Rows]:
        x, W, _, slack = self.operands
        n = max(64, PART.get(x.device.type, 1 << 27) // len(W))
        buffer: Tensor | None = None
        for start in range(0, len(x), n):
            part = x[start : start + n]
            if x.device.type == "cpu" and not self.low:
                pre = _cpu_product(part, W)
            else:
                if buffer is None or len(buffer) != len(part):
                    buffer = native.empty((len(part), len(W)), x)
                pre = torch.mm(part, W.T, out=buffer)
            yield Rows(pre, self.x[start : start + n], None if slack is None else slack[start : start + n])

    def sample(self, n: int) -> Tensor:
        """About ``n`` rows of the product, evenly spaced, [n', d_sae] float32 or wider."""
        x, W, _, _ = self.operands
        return (x[:: max(1, len(x) // n)] @ W.T).to(self.x.dtype)


def _cpu_product(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ; through oneDNN for float32, which on processors that are not Intel's is twice as fast as MKL."""
    if x.dtype == torch.float32 and _one_dnn is not None and torch.backends.mkldnn.is_available():
        return _one_dnn(x, W, None, "none", [], "")
    return x @ W.T


def product(x: Tensor, W: Tensor, exact: bool = False) -> Product:
    """The product for ``x`` [N, d] and ``W`` [d_sae, d]: in bfloat16 under autocast, else exact in their own type.

    ``exact`` forbids the way through bfloat16 candidates.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return Product(x, W, low=True)
    if not exact and native.available(x, W) and fast_bf16():
        return Product(x, W, low=True, margin=2.0**-8)
    return Product(x, W, low=False)


@torch.no_grad()
def topk(x: Tensor, W: Tensor, bias: Tensor, k: int) -> Entries:
    """The k largest positive entries of each row of ``x Wᵀ + bias``, fewer where fewer are positive.

    ``x`` [N, d], ``W`` [d_sae, d], ``bias`` [d_sae]. Latents ascend within a row; of equal entries those of
    lower latents come first on the CPU's kernels, any elsewhere.
    """
    kernels = native.available(x, W)
    x, W, parts = x.contiguous(), W.detach(), []
    made = product(x, W)
    for rows in made.rows():
        if kernels:
            parts.append(native.topk(rows.pre, bias, k, rows.slack, made.margin, made.operands[2], rows.x, W))
        else:
            parts.append(portable.topk(rows.pre, bias, k))
    latents, values, counts = (torch.cat(some) for some in zip(*parts, strict=True))
    return packed(latents, values, counts)


def packed(latents: Tensor, values: Tensor, counts: Tensor) -> Entries:
    """The entries of ``latents`` and ``values`` [N, k], of which each row's first ``counts`` [N] are filled."""
    offsets = offsets_of(counts)
    if int(offsets[-1]) == latents.numel():
        return latents.flatten(), values.flatten(), offsets
    filled = torch.arange(latents.shape[1], device=latents.device) < counts[:, None]
    return latents[filled], values[filled], offsets


@torch.no_grad()
def above(x: Tensor, W: Tensor, bias: Tensor, cuts: Tensor) -> Entries:
    """The entries of ``x Wᵀ + bias`` that are greater than their latent's cut (``cuts`` [d_sae] or a scalar)."""
    return _above(product(x.contiguous(), W.detach()), bias, cuts)


def _above(made: Product, bias: Tensor, cuts: Tensor) -> Entries:
    cuts = cuts.to(bias.dtype).expand(len(made.W)).contiguous()
    entries = _few_above(made, bias, cuts)
    if entries is None:
        entries = _few_above(product(made.x, made.W, exact=True), bias, cuts)
    assert entries is not None
    return entries


def _few_above(made: Product, bias: Tensor, cuts: Tensor) -> Entries | None:
    """As ``above``; None where there are too many candidates for computing them one by one."""
    scan = native.above if native.available(made.x, made.W) else portable.above
    norms = made.operands[2]
    parts: list[Entries] = []
    for rows in made.rows():
        # an entry above its cut has rounded to at least cut - slack * norm - margin * |cut - bias|
        lowered = cuts if rows.slack is None else cuts - 1.02 * made.margin * (cuts - bias).abs()
        latents, values, offsets = scan(rows.pre, bias, lowered, rows.slack, norms)
        if rows.slack is not None:
            if len(latents) > SPARSE_BELOW * rows.pre.numel():
                return None
            values = native.exact(latents, offsets, rows.x, made.W, bias)
        parts.append(keep((latents, values, offsets), values > cuts[latents]))
    return join(parts)


@torch.no_grad()
def largest(x: Tensor, W: Tensor, bias: Tensor, budget: int) -> Entries:
    """Candidates for the ``budget`` largest positive entries of ``x Wᵀ + bias``: all of those, and some more.

    With fewer positive entries than ``budget``, all positive ones. A few rows tell about where the cut lies, and
    only entries above that are looked at; should they be too few, the search goes on lower.
    """
    made = product(x.contiguous(), W.detach())
    some = made.sample(SAMPLE) + bias
    share = max(1, round(budget * len(some) / len(x)))
    high = some[some > some.std()]
    floor = kth_largest(high if len(high) > share else some.flatten(), min(share, some.numel())).clamp_min(0)
    entries = _above(made, bias, GUESS * floor)
    for lower in (0.7, 0.4, 0.0):
        if len(entries[0]) >= budget or float(floor) == 0:
            break
        entries = _above(made, bias, lower * floor)
    return entries


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [n], a scalar tensor."""
    return (native if native.available(values) else portable).kth_largest(values.contiguous(), k)


def keep(entries: Entries, mask: Tensor) -> Entries:
    """The entries where ``mask`` [nnz] holds."""
    latents, values, offsets = entries
    places = mask.nonzero().squeeze(1)
    return latents[places], values[places], offsets_of(mask)[offsets]


def join(parts: list[Entries]) -> Entries:
    """The entries of consecutive rows as one."""
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for latents, _, _ in parts:
        starts.append(starts[-1] + len(latents))
    offsets = [p[2][:-1] + start for p, start in zip(parts, starts, strict=False)]
    end = torch.tensor([starts[-1]], device=offsets[0].device)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([*offsets, end])


@torch.no_grad()
def kth_largest_over_ranks(values: Tensor, k: int) -> Tensor:
    """The k-th largest of all ranks' ``values`` [n], of each rank the k largest at least; the least of all if fewer.

    A scalar; infinity where no rank has any. Every rank sends its k largest.
    """
    if world_size() > 1:
        if len(values) > k:
            values = values[values >= kth_largest(values, k)][:k]
        padded = values.new_full((k,), float("-inf"))
        padded[: len(values)] = values
        gathered = values.new_empty(world_size() * k)
        dist.all_gather_into_tensor(gathered, padded)
        values = gathered[gathered.isfinite()]
    return kth_largest_of_all(values, k)


def kth_largest_of_all(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [n], a scalar; the least of all if there are fewer, infinity if there is none."""
    if len(values) < k:
        return values.min() if len(values) else values.new_tensor(float("inf"))
    return kth_largest(values, k)


@torch.no_grad()
def kth_positive_over_ranks(values: Tensor, k: int) -> Tensor:
    """The k-th largest of all ranks' positive ``values`` [n] as a scalar, exactly; 0 where there are fewer than k.

    Without DDP by selection. Over ranks by bisection of the numbers' bits, which are in the order of the numbers: the
    ranks add up counts, 31 times (63 in float64), and no rank holds the values of another.
    """
    if world_size() == 1:
        return kth_largest(values, k) if len(values) >= k else values.new_zeros(())
    whole = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits, low, high = values.contiguous().view(whole), 0, torch.iinfo(whole).max  # ``low`` or above are k at least
    while high - low > 1:
        middle = (low + high) // 2
        enough = int(sum_over_ranks((bits >= middle).sum())) >= k
        low, high = (middle, high) if enough else (low, middle)
    return torch.tensor(low, dtype=whole, device=values.device).view(values.dtype)
