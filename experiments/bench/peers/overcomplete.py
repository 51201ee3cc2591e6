"""overcomplete: its SAEs in the loop of ``train_sae`` (monitoring=0)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from experiments.bench.peers.common import LEARNING_RATE, Step, autocast, load


def _overcomplete() -> ModuleType:
    """The package; it asks matplotlib at import for ``cm.get_cmap``, which is gone since 3.9 and is put back."""
    colours = load("matplotlib", "overcomplete").colormaps
    cm = load("matplotlib.cm", "overcomplete")
    if not hasattr(cm, "get_cmap"):
        cm.get_cmap = colours.__getitem__  # type: ignore[attr-defined]
    return load("overcomplete.sae", "overcomplete")


def _mse(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    """The criterion of the package's README, which has no default one."""
    return (x - x_hat).square().mean()


def _overcomplete_step(sae: Any, criterion: Callable[..., Tensor], device: str, precision: str) -> Step:
    """``train_sae``'s step; its AMP twin is fp16 with a loss scaler, which bfloat16 does not need.

    The decoder is set to unit norm inside ``get_dictionary``, which forward and criterion each call.
    """
    tracker = load("overcomplete.sae.trackers", "overcomplete").DeadCodeTracker(sae.nb_concepts, device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    sae.train()
    context = autocast(device, precision)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with context:
            pre_codes, codes, x_hat = sae(x)
            loss = criterion(x, x_hat, pre_codes, codes, sae.get_dictionary())
        tracker.update(codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return step


def topk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """TopKSAE, mean squared error."""
    sae = _overcomplete().TopKSAE(d_in, d_sae, top_k=k, device=device)
    return _overcomplete_step(sae, _mse, device, precision)


def batchtopk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """BatchTopKSAE, whose top_k counts a batch: k * batch; mean squared error."""
    sae = _overcomplete().BatchTopKSAE(d_in, d_sae, top_k=k * batch, device=device)
    return _overcomplete_step(sae, _mse, device, precision)


def relu(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """SAE with ``mse_l1``; that sums the codes over the batch, so the penalty is 1e-2 a sample and dimension."""
    package = _overcomplete()
    criterion = partial(package.mse_l1, penalty=1e-2 / (batch * d_in))
    return _overcomplete_step(package.SAE(d_in, d_sae, device=device), criterion, device, precision)


def jumprelu(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """JumpSAE with the package's ``heaviside`` as the L0 penalty [Rajamanoharan et al. 2024]."""
    package = _overcomplete()
    sae = package.JumpSAE(d_in, d_sae, device=device)

    def criterion(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        l0 = package.heaviside(pre_codes, sae.thresholds.exp(), sae.kernel_fn, sae.bandwidth).sum(1).mean()
        return (x - x_hat).square().mean() + 1e-3 / d_in * l0

    return _overcomplete_step(sae, criterion, device, precision)
