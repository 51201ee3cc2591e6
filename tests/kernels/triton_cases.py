"""Compares the Triton kernels with the reference. As a program (``TRITON_INTERPRET=1``) it prints a JSON of the largest
differences of every case on the CPU; ``test_triton.py`` also calls it on a GPU."""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import torch
from torch import Tensor

from sae_lightning.kernels import portable, reference, sparse_decode, sparse_pre_acts
from sae_lightning.kernels import products as dispatch
from sae_lightning.kernels import triton as on_triton

N, D_SAE, CHUNK = 37, 50, 4


def entries(device: str, empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, values and offsets: latent 7 in nearly all rows, those from 40 on and a few others in none."""
    generator = torch.Generator().manual_seed(1)
    active = torch.rand(N, D_SAE, generator=generator) < torch.rand(N, 1, generator=generator) / 3
    active[:, 7], active[:, 40:] = True, False
    active[[0, 5, 6, N - 1]] = False
    active &= not empty
    latents = active.nonzero()[:, 1]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), active.sum(1).cumsum(0)])
    values = torch.randn(len(latents), generator=generator)
    return latents.to(device), values.to(device), offsets.to(device)


def matrices(d: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, d], W [D_SAE, d], and the biases [d] and [D_SAE]; small, so that 1e-5 suits every d."""
    generator = torch.Generator().manual_seed(d)
    shapes = ((N, d), (D_SAE, d), (d,), (D_SAE,))
    x, W, b, b_enc = (torch.randn(*s, generator=generator).to(device) / d**0.5 for s in shapes)
    return x, W, b, b_enc


def difference(got: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """The largest difference; infinite where shapes or types differ or a number is not finite."""
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (got, expected)), strict=True)
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype or not a.isfinite().all():
            return float("inf")
        worst = max([worst, *(a.double() - b.double()).abs().flatten().tolist()])
    return worst


def products(d: int, device: str, empty: bool = False, chunk: int = CHUNK) -> dict[str, float]:
    """Differences of the four products."""
    x, W, b, b_enc = matrices(d, device)
    latents, values, offsets = entries(device, empty)
    calls = {
        "decode": ("decode", (latents, values, offsets, W, b), {}),
        "decode without bias": ("decode", (latents, values, offsets, W, None), {}),
        "exact": ("exact", (latents, offsets, x, W, b_enc), {}),
        "decode_backward": ("decode_backward", (latents, values, offsets, W, x), {"chunk": chunk}),
        "scatter": ("scatter", (latents, values, offsets, x, D_SAE), {"chunk": chunk}),
    }
    return {
        name: difference(getattr(on_triton, f)(*given, **settings), getattr(reference, f)(*given))
        for name, (f, given, settings) in calls.items()
    }


def sorting(device: str) -> dict[str, float]:
    """Differences of the sort, and of a second run of the sums, which must be the same to the last bit."""
    latents, values, offsets = entries(device)
    x, W, _, _ = matrices(64, device)
    given = (latents, values, offsets, W, x, CHUNK)
    once, again = (torch.cat([t.flatten() for t in on_triton.decode_backward(*given)]) for _ in range(2))
    sort, expected = (m.by_latent(latents, offsets, D_SAE) for m in (on_triton, portable))
    return {"by_latent": difference(sort, expected), "again": 0.0 if torch.equal(once, again) else float("inf")}


def gradients(kernels: str, d: int, device: str) -> tuple[Tensor, ...]:
    """Reconstruction and gradients of a step's two products, encoder to decoder, with the given kernels."""
    latents, _, offsets = entries(device)
    x, W, b, b_enc = (t.requires_grad_() for t in matrices(d, device))
    with dispatch.forced(kernels):
        values = sparse_pre_acts(x, b, W, b_enc, latents, offsets)
        out = sparse_decode(latents, values.relu(), offsets, W, b)
        return out, *torch.autograd.grad(out.sin().sum(), (x, W, b, b_enc))


def normalizing(d: int, device: str) -> dict[str, float]:
    """Differences of normalising rows of every type."""
    x, _, mean, _ = matrices(d, device)
    std = torch.tensor(0.7, device=device)
    pairs = ((t, x.to(t)) for t in (torch.float16, torch.bfloat16, torch.float32))
    return {
        f"normalize {t}": difference(on_triton.normalize(rows, mean, std), (rows.float() - mean) / std)
        for t, rows in pairs
    }


def differences(device: str) -> dict[str, float]:
    """The largest difference of every case."""
    found = sorting(device)
    for d in (5, 64, 130):
        with patch.object(on_triton, "WIDEST", 64):  # the last in three blocks of columns
            cases = products(d, device) | normalizing(d, device)
            found |= {f"{name}, d {d}": worst for name, worst in cases.items()}
    found |= {f"{name}, no entries": worst for name, worst in products(64, device, empty=True).items()}
    found |= {f"{name}, in one chunk": worst for name, worst in products(130, device, chunk=on_triton.CHUNK).items()}
    step = difference(gradients("triton", 64, device), gradients("reference", 64, device))
    return found | {"step": step}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(differences(*sys.argv[1:])))
