"""Every variant's training loss by whole matrices and autograd, written from the papers' formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae_lightning.saes import SAE


def normed(kind: str, x: Tensor) -> Tensor:
    """x [N, d] after its input norm."""
    if kind == "layer":
        x = x - x.mean(1, keepdim=True)
    length = 1.0 if kind == "unit" else math.sqrt(x.shape[1])
    return x if kind == "none" else x * length / x.norm(dim=1, keepdim=True)


def pre_acts(sae: SAE, x: Tensor) -> Tensor:
    return (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc


def largest_of_rows(values: Tensor, k: int) -> Tensor:
    """Each row's k largest entries where they are positive, else 0."""
    kept = torch.zeros_like(values)
    for row, source in enumerate(values):
        best = source.detach().argsort(descending=True, stable=True)[:k]
        kept = kept.index_put((torch.tensor(row).expand(len(best)), best), torch.relu(source[best]))
    return kept


def largest_of_all(values: Tensor, budget: int) -> Tensor:
    """The ``budget`` largest entries of the matrix where they are positive, else 0."""
    return largest_of_rows(values.view(1, -1), budget).view(values.shape)


def density(name: str, u: Tensor) -> Tensor:
    """The kernels that stand in for a step's derivative."""
    if name == "rectangle":
        return ((u > -0.5) & (u < 0.5)).to(u.dtype)
    if name == "gaussian":
        return torch.distributions.Normal(0, 1).log_prob(u).exp()
    return torch.exp(-u.abs() / 2**0.5) * torch.sin(u.abs() / 2**0.5 + math.pi / 4) / 2


def through(slope: Tensor, theta: Tensor) -> Tensor:
    """Zero, with ``slope`` as its gradient for ``theta``."""
    return slope.detach() * (theta - theta.detach())


def jumprelu(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the number of active latents, with their straight-through gradients [eq. 11 and 12]."""
    pre, theta = pre_acts(sae, x), sae.log_threshold.exp()
    width = sae.bandwidth if sae.bandwidth != "silverman" else float(1.06 * pre.detach().std() * len(x) ** -0.2)
    near = density(sae.kernel_name, (pre - theta) / width) / width * (pre > 0)
    active = (pre > theta).to(pre.dtype)
    return pre * active + through(-theta * near, theta), (active + through(-near, theta)).sum()


def budget_of(sae: SAE, x: Tensor) -> int:
    return round(sae.k * (len(x) if sae.k_per == "sample" else 1))


def codes_of(sae: SAE, x: Tensor) -> Tensor:
    """Dense codes [N, d_sae] in training of features after the input norm."""
    pre = pre_acts(sae, x)
    if sae.variant in ("topk", "matryoshka_topk"):
        return largest_of_rows(pre, sae.k)
    if sae.variant in ("batchtopk", "matryoshka"):
        return largest_of_all(pre, budget_of(sae, x))
    if sae.variant == "jumprelu":
        return jumprelu(sae, x)[0]
    if sae.variant == "gated":
        path = (x - sae.b_pre) @ sae.W_enc.T
        return (path + sae.b_gate > 0) * torch.relu(sae.r_mag.exp() * path + sae.b_enc)
    if sae.variant == "msae":
        z = torch.relu(pre)
        z = z if sae.soft_cap is None else sae.soft_cap * torch.tanh(z / sae.soft_cap)
        return largest_of_rows(z, int(sae.ks[-1]))
    return torch.relu(pre)


def levels_of(sae: SAE, codes: Tensor) -> tuple[list[Tensor], list[float]]:
    """Reconstructions of a nested variant, coarse to fine, and their weights."""
    if sae.variant == "msae":
        parts = [largest_of_rows(codes, int(k)) for k in sae.ks]
        weights = torch.ones(len(parts)) if sae.weighting == "uniform" else torch.arange(len(parts), 0, -1.0)
    else:
        lengths = [torch.arange(sae.d_sae) < end for end in sae.prefixes()]
        parts, weights = [codes * kept for kept in lengths], torch.ones(len(lengths), dtype=codes.dtype)
    return [part @ sae.W_dec + sae.b_pre for part in parts], (weights / weights.sum()).tolist()


def loss(sae: SAE, x: Tensor, weights: dict[str, float]) -> Tensor:
    """The weighted loss of normalised features x [N, d_in]."""
    x = normed(sae.input_norm, x)
    codes = codes_of(sae, x)
    total = weights.get("reconstruction", 0) * (codes @ sae.W_dec + sae.b_pre - x).square().mean()
    if weights.get("nested"):
        levels, shares = levels_of(sae, codes)
        total = total + weights["nested"] * sum(
            share * (level - x).square().mean() for level, share in zip(levels, shares, strict=True)
        )
    if weights.get("gate"):
        gate = torch.relu((x - sae.b_pre) @ sae.W_enc.T + sae.b_gate)
        rebuilt = gate @ sae.W_dec.detach() + sae.b_pre.detach()
        total = total + weights["gate"] * (rebuilt - x).square().mean()
    if weights.get("sparsity"):
        penalised = torch.relu((x - sae.b_pre) @ sae.W_enc.T + sae.b_gate) if sae.variant == "gated" else codes
        amount = jumprelu(sae, x)[1] if sae.variant == "jumprelu" else (penalised * sae.W_dec.norm(dim=1)).sum()
        total = total + weights["sparsity"] * amount / x.numel()
    return total
