"""The sparse products in Triton, for tensors on a GPU; ``triton_kernels.py`` has the device code.

Sums over a latent's entries run over entries sorted by latent, so that they need no atomics and are the same every
time. A latent active on every sample would keep one program busy long after all others: its entries are cut into
chunks of CHUNK, whose sums are added up in their order. How many chunks there are is known on the device alone; the
grid takes an upper bound, d_sae + nnz / CHUNK, instead of waiting for the number.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sae_lightning.kernels.portable import rows_of

CHUNK = 256  # entries of one latent that one program sums
WIDEST = 1024  # columns a program holds
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # all are summed in float32


def available(*tensors: Tensor) -> bool:
    """Whether these kernels serve these tensors: on one GPU, at most 32 bits, and Triton compiles for it."""
    return all(t.is_cuda and t.dtype in TYPES for t in tensors) and _usable(tensors[0].device)


@cache
def _usable(device: torch.device) -> bool:
    """Whether Triton is installed and works for this GPU (it needs a C compiler there); a warning says why not."""
    if find_spec("triton") is None:
        return False
    entry, x = torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, 16, device=device)
    try:
        decode_backward(entry, x[0, :1], torch.arange(2, device=device), x, x)
    except Exception as error:
        warnings.warn(f"No Triton kernels on {device}, PyTorch's operators instead: {error}", stacklevel=3)
        return False
    return True


def _launch(name: str, grid: tuple[int, int], *arguments: Any, d: int, **constants: bool) -> None:
    """Start a kernel on the GPU of its first argument, a tensor; ``grid`` counts programs."""
    from sae_lightning.kernels import triton_kernels  # not on import: there may be no Triton

    if grid[0] == 0:
        return
    block = _block(d)
    shape = {"ENTRIES": max(4, min(16, 2048 // block)), "BLOCK": block}
    with torch.cuda.device_of(arguments[0]):
        getattr(triton_kernels, name)[grid](*arguments, **constants, **shape, num_warps=4, enable_fp_fusion=True)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in float32; ``x`` [..., d] contiguous, of a type in TYPES."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    d, n = x.shape[-1], x.numel() // max(1, x.shape[-1])
    _launch("normalize_rows", (n, -(-d // _block(d))), x, mean, std, out, d, d=d)
    return out


def _block(d: int) -> int:
    """Columns of one program: a power of two."""
    return min(WIDEST, max(16, 1 << (d - 1).bit_length()))


def _blocks(d: int) -> int:
    return -(-d // _block(d))


def decode(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """[N, d]: ``bias`` plus the sum of ``values[e] * W[latents[e]]`` over each row's entries."""
    n, d = len(offsets) - 1, W.shape[1]
    out = W.new_empty(n, d)
    shift = W if bias is None else bias
    tensors = (t.contiguous() for t in (latents, values, offsets, W, shift))
    _launch("decode_rows", (n, _blocks(d)), *tensors, out, d, d=d, BIAS=bias is not None)
    return out


def exact(latents: Tensor, offsets: Tensor, x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """[nnz]: pre-activations ``x[row] · W[latent] + bias[latent]`` of the listed entries alone."""
    out = x.new_empty(len(latents))
    tensors = (t.contiguous() for t in (latents, offsets, x, W, bias))
    _launch("exact_rows", (len(offsets) - 1, 1), *tensors, out, W.shape[1], d=W.shape[1])
    return out


def by_latent(latents: Tensor, offsets: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``portable.by_latent``, without ``bincount``, for whose result the CPU would wait."""
    ascending, order = latents.int().sort(stable=True)
    starts = torch.searchsorted(ascending, torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device))
    return starts, order, rows_of(offsets, len(latents))[order]


def decode_backward(
    latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, grad: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Gradients of ``decode``: of W [d_sae, d] and of values [nnz], reading each row of ``grad`` once an entry."""
    grad_W, _, dots = _sum_latents(latents, values, offsets, grad, W, len(W), chunk)
    return grad_W.to(W.dtype), (dots[0] if len(dots) == 1 else dots.sum(0)).to(values.dtype)


def scatter(
    latents: Tensor, values: Tensor, offsets: Tensor, x: Tensor, d_sae: int, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """[d_sae, d] sums of ``values[e] * x[row]`` over each latent's entries, and [d_sae] sums of values."""
    out, sums, _ = _sum_latents(latents, values, offsets, x, None, d_sae, chunk)
    return out.to(x.dtype), sums.to(values.dtype)


def _sum_latents(
    latents: Tensor, values: Tensor, offsets: Tensor, x: Tensor, W: Tensor | None, d_sae: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[d_sae, d] sums of ``values[e] * x[row]``; without ``W`` also [d_sae] sums of values, with it dots
    ``x[row] · W[latent]`` [blocks, nnz] over each block of columns. All float32."""
    nnz, d = len(latents), x.shape[1]
    blocks, n_parts = _blocks(d), nnz // chunk
    starts, order, rows = by_latent(latents, offsets, d_sae)
    part_latents, part_ends = _parts(starts, n_parts, chunk)
    out, parts = (x.new_empty(n, d, dtype=torch.float32) for n in (d_sae, n_parts))
    sums, part_sums = (x.new_empty(n, dtype=torch.float32) for n in (d_sae, n_parts))
    dots = x.new_empty(0 if W is None else blocks, nnz, dtype=torch.float32)
    x, values = x.contiguous(), values.contiguous()
    w = x if W is None else W.contiguous()
    _launch(
        "sum_latents", (n_parts + d_sae, blocks), starts, order, rows, part_latents, part_ends, values, x, w, out,
        parts, sums, part_sums, dots, nnz, n_parts, d_sae, d, chunk, d=d, DOTS=W is not None,
    )  # fmt: skip
    _launch(
        "add_parts", (n_parts, blocks), part_latents, part_ends, starts, out, parts, sums, part_sums, d_sae, d, chunk,
        d=d, DOTS=W is not None,
    )  # fmt: skip
    return out, sums, dots


def _parts(starts: Tensor, n_parts: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The latent of each chunk after a latent's first ([n_parts], d_sae beyond the last such chunk), and where each
    latent's end among them [d_sae]. ``starts`` [d_sae + 1]; there are at most ``n_parts`` = nnz // chunk of them."""
    ends = ((starts.diff() - 1).clamp_min(0) // chunk).cumsum(0)
    return torch.searchsorted(ends, torch.arange(n_parts, device=starts.device), right=True), ends
