"""Linear probes by a fixed number of gradient steps, as two papers fit theirs where L-BFGS takes too long."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from sae_lightning.registry import one_of


class Recipe(NamedTuple):
    """How a linear layer that starts at zero is trained on the cross-entropy."""

    optimizer: type[torch.optim.Adam]
    lr: float
    weight_decay: float
    epochs: int
    batch: int
    plateau: bool = False  # the learning rate falls to a tenth after ten epochs without a lower loss


RECIPES = {
    "adam": Recipe(torch.optim.Adam, 1e-2, 1e-4, 50, 2048),  # ViSAEBench App. L
    "adamw": Recipe(torch.optim.AdamW, 1e-3, 1e-2, 50, 256, plateau=True),  # MSAE §4.1, which does not say the epochs
}


def descend(
    x: np.ndarray | sparse.csr_array, target: np.ndarray, n_classes: int, solver: str, device: str = "cpu",
    seed: int = 42,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Weights [C, d] and biases [C] of a probe of C classes, of ``x`` [n, d] and ``target`` [n] int64 below C.

    ``solver`` is one of ``RECIPES``; batches are drawn by ``seed``. ValueError for another.
    """
    recipe = RECIPES[one_of(solver, RECIPES, "solver")]
    empty, d = _dense(x, np.arange(0), device), x.shape[1]
    weight, bias = (nn.Parameter(empty.new_zeros(shape)) for shape in ((n_classes, d), (n_classes,)))
    optimizer = recipe.optimizer([weight, bias], lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    y, order = torch.from_numpy(target), torch.Generator().manual_seed(seed)
    for _ in tqdm(range(recipe.epochs), f"Probe of {d:,} columns", unit="epoch", leave=False, delay=2):
        total = 0.0
        for rows in torch.randperm(len(y), generator=order).split(recipe.batch):
            loss = cross_entropy(_dense(x, rows.numpy(), device) @ weight.T + bias, y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        if recipe.plateau:
            schedule.step(total / len(y))
    return weight.detach().cpu().numpy(), bias.detach().cpu().numpy()


def _dense(x: np.ndarray | sparse.csr_array, rows: np.ndarray, device: str) -> Tensor:
    some = x[rows] if isinstance(x, np.ndarray) else x[rows].toarray()
    return torch.from_numpy(some).to(device)
