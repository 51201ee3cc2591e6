"""Our own contenders: a whole training step of this package, and the same step written densely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.peers.common import Step, autocast, matryoshka_widths
from sae_lightning.saes import SAE, VARIANTS, SparseCodes
from sae_lightning.saes.losses import loss_terms, total_loss
from sae_lightning.training.optimizer import build_optimizer

L1 = 2.0
LOSSES: dict[str, dict[str, float]] = {
    "topk": {"reconstruction": 1.0, "aux": 1 / 32},
    "batchtopk": {"reconstruction": 1.0, "aux": 1 / 32},
    "relu": {"reconstruction": 1.0, "sparsity": L1},
    "jumprelu": {"reconstruction": 1.0, "sparsity": 1.0},
    "gated": {"reconstruction": 1.0, "sparsity": 1.0, "gate": 1.0},
    "matryoshka": {"nested": 1.0, "aux": 1 / 32},
    "msae": {"nested": 1.0},
}


def settings(variant: str, d_sae: int, k: int) -> dict[str, Any]:
    """What builds ``variant`` here with the widths and levels that the peers get."""
    if variant == "matryoshka":
        return {"k": k, "fractions": [width / d_sae for width in matryoshka_widths(d_sae)]}
    if variant == "msae":
        return {"k": k, "ks": [k // 4, k // 2, k, 2 * k]}
    return {"k": k} if variant in ("topk", "batchtopk") else {}


def ours(
    variant: str, mono: Callable[[SparseCodes, Tensor], Tensor] | None = None, **given: Any
) -> Callable[..., Step]:
    """Builder of our step: forward, losses, dead-latent counters, backward, clipping, Adam with unit rows.

    ``mono``: a further loss term of codes and float16 features, weighted 0.1. ``given``: other settings of the SAE.
    """

    def build(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
        sae = VARIANTS[variant](d_in, d_sae, seed=0, **settings(variant, d_sae, k) | given).to(device).train()
        started = variant != "jumprelu"
        optimizer = build_optimizer(sae, lr=1e-3)
        optimizer.clip = 1.0
        weights = LOSSES[variant]
        raw: dict[int, Tensor] = {}

        def step(x: Tensor) -> None:
            nonlocal started
            if mono is not None and id(x) not in raw:
                raw[id(x)] = x.half()  # what a store gives
            if not started:
                sae.start(sae.inputs(x)[0], k)
                started = True
            with autocast(device, precision):
                run = sae.forward_pass(sae.inputs(x)[0])
                loss = total_loss(loss_terms(sae, run, weights, {"aux": {"dead_after": 10_000_000}}), weights)
                if mono is not None:
                    loss = loss + 0.1 * mono(run.codes, raw[id(x)])
            sae.count_firing(run.codes.fired(), len(x))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return step

    return build


def dense(variant: str) -> Callable[..., Step] | None:
    """Builder of the dense reference: the same mathematics with [B, d_sae] matrices and PyTorch's fused Adam."""
    if variant not in DENSE:
        return None

    def build(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
        sae = VARIANTS["relu"](d_in, d_sae, seed=0).to(device).train()
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        codes, widths = DENSE[variant], matryoshka_widths(d_sae)

        def step(x: Tensor) -> None:
            with autocast(device, precision):
                pre = F.linear(x - sae.b_pre, sae.W_enc, sae.b_enc)
                z = codes(pre, k)
                if variant == "matryoshka":
                    levels = [z[:, :width] @ sae.W_dec[:width] + sae.b_pre for width in widths]
                    loss = torch.stack([F.mse_loss(level, x) for level in levels]).mean()
                elif variant == "msae":
                    loss = _dense_msae(sae, pre, x, k)
                else:
                    loss = F.mse_loss(z @ sae.W_dec + sae.b_pre, x)
                if variant == "relu":
                    loss = loss + L1 * z.sum() / (len(x) * d_in)
            sae.count_firing((z.detach() > 0).any(0), len(x))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            sae.W_dec.grad.sub_((sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec.detach())  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            sae.normalize_decoder()

        return step

    return build


def _topk(pre: Tensor, k: int) -> Tensor:
    values, latents = torch.relu(pre).topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter(1, latents, values)


def _batchtopk(pre: Tensor, k: int) -> Tensor:
    positive = torch.relu(pre).flatten()
    values, entries = positive.topk(k * len(pre), sorted=False)
    return torch.zeros_like(positive).scatter(0, entries, values).view_as(pre)


def _dense_msae(sae: SAE, pre: Tensor, x: Tensor, k: int) -> Tensor:
    levels = [_topk(pre, n) @ sae.W_dec + sae.b_pre for n in (k // 4, k // 2, k, 2 * k)]
    return torch.stack([F.mse_loss(level, x) for level in levels]).mean()


DENSE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "topk": _topk,
    "batchtopk": _batchtopk,
    "relu": lambda pre, k: torch.relu(pre),
    "matryoshka": _batchtopk,
    "msae": _topk,
}


def encoder_product(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """The encoder's product alone, as PyTorch does it: what a whole step is measured by."""
    W = torch.randn(d_sae, d_in, device=device)

    def step(x: Tensor) -> None:
        with torch.no_grad(), autocast(device, precision):
            F.linear(x, W)

    return step
