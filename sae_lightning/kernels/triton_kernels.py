"""The device code behind ``triton.py``. Importing it needs Triton; with ``TRITON_INTERPRET=1`` it runs on the CPU.

All matrices are row-major and contiguous, indices int64, sums float32. A program holds ENTRIES rows of BLOCK columns
at a time: the loads of several entries are then under way together, and their dot products share one reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ["nnz", "n_parts", "d_sae", "chunk"]  # not worth compiling again for, where they happen to divide by 16


@triton.jit
def decode_rows(
    latents, values, offsets, W, bias, out, d, BIAS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = bias + sum of values[e] * W[latents[e]] over row i's entries; a program is (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    end = tl.load(offsets + row + 1)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for first in range(tl.load(offsets + row), end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        latent = tl.load(latents + e, mask=e < end, other=0)
        value = tl.load(values + e, mask=e < end, other=0.0).to(tl.float32)
        mask = (e < end)[:, None] & inside[None, :]
        total += value[:, None] * tl.load(W + latent[:, None] * d + at[None, :], mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, 0)
    if BIAS:
        result += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + at, result, mask=inside)


@triton.jit
def normalize_rows(x, mean, std, out, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = (x[i] - mean) / std; a program is (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    value = tl.load(x + row * d + at, mask=inside, other=0.0).to(tl.float32)
    value = (value - tl.load(mean + at, mask=inside, other=0.0)) / tl.load(std)
    tl.store(out + row * d + at, value, mask=inside)


@triton.jit
def exact_rows(latents, offsets, x, W, bias, out, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """out[e] = x[i] · W[latents[e]] + bias[latents[e]] for row i's entries; a program is a row."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + row + 1)
    for first in range(tl.load(offsets + row), end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        latent = tl.load(latents + e, mask=e < end, other=0)
        total = tl.zeros([ENTRIES, BLOCK], tl.float32)
        for start in range(0, d, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = (e < end)[:, None] & (at < d)[None, :]
            w = tl.load(W + latent[:, None] * d + at[None, :], mask=mask, other=0.0).to(tl.float32)
            total += w * tl.load(x + row * d + at, mask=at < d, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(bias + latent, mask=e < end, other=0.0).to(tl.float32)
        tl.store(out + e, tl.sum(total, 1) + shift, mask=e < end)


@triton.jit(do_not_specialize=VARYING)
def sum_latents(
    starts, order, rows, part_latents, part_ends, values, x, W, out, parts, sums, part_sums, dots,
    nnz, n_parts, d_sae, d, chunk, DOTS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of values[e] * x[row] over ``chunk`` entries of one latent; a program is (piece, block of columns).

    The last d_sae pieces are the latents' first chunks, written to ``out``; the n_parts before them the further
    chunks of long latents, written to ``parts``. With DOTS also dots[block, e] = x[row] · W[latent] over the block's
    columns, otherwise the sums of the values.
    """
    piece = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    further = piece < n_parts
    latent = tl.load(part_latents + piece, mask=further, other=0)
    latent = tl.where(further, latent, piece - n_parts)
    if latent >= d_sae:  # n_parts is an upper bound
        return
    start, stop = tl.load(starts + latent), tl.load(starts + latent + 1)
    n_further = tl.maximum(stop - start - 1, 0) // chunk
    nth = tl.where(further, piece - tl.load(part_ends + latent) + n_further + 1, 0)
    begin = start + nth * chunk
    end = tl.minimum(begin + chunk, stop)

    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    if DOTS:
        w = tl.load(W + latent * d + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    weight = tl.zeros([ENTRIES], tl.float32)
    for first in range(begin, end, ENTRIES):
        t = first + tl.arange(0, ENTRIES)
        e = tl.load(order + t, mask=t < end, other=0)
        row = tl.load(rows + t, mask=t < end, other=0)
        value = tl.load(values + e, mask=t < end, other=0.0).to(tl.float32)
        mask = (t < end)[:, None] & inside[None, :]
        tile = tl.load(x + row[:, None] * d + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += value[:, None] * tile
        if DOTS:
            tl.store(dots + block * nnz + e, tl.sum(tile * w[None, :], 1), mask=t < end)
        else:
            weight += value

    if further:
        tl.store(parts + piece * d + at, tl.sum(total, 0), mask=inside)
    else:
        tl.store(out + latent * d + at, tl.sum(total, 0), mask=inside)
    if not DOTS:
        if further:
            tl.store(part_sums + piece, tl.sum(weight, 0), mask=block == 0)
        else:
            tl.store(sums + latent, tl.sum(weight, 0), mask=block == 0)


@triton.jit(do_not_specialize=VARYING)
def add_parts(
    part_latents, part_ends, starts, out, parts, sums, part_sums, d_sae, d, chunk,
    DOTS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add each long latent's parts to its first chunk; a program is (part, block of columns), the first part's acts."""
    piece = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    latent = tl.load(part_latents + piece)
    if latent >= d_sae:
        return
    end = tl.load(part_ends + latent)
    if piece != end - (tl.load(starts + latent + 1) - tl.load(starts + latent) - 1) // chunk:
        return
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    weight = tl.zeros([ENTRIES], tl.float32)
    for first in range(piece, end, ENTRIES):
        p = first + tl.arange(0, ENTRIES)
        mask = (p < end)[:, None] & inside[None, :]
        total += tl.load(parts + p[:, None] * d + at[None, :], mask=mask, other=0.0)
        if not DOTS:
            weight += tl.load(part_sums + p, mask=p < end, other=0.0)
    place = out + latent * d + at
    tl.store(place, tl.load(place, mask=inside, other=0.0) + tl.sum(total, 0), mask=inside)
    if not DOTS:
        tl.store(sums + latent, tl.load(sums + latent) + tl.sum(weight, 0), mask=block == 0)
