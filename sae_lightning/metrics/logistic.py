"""Logistic regression by L-BFGS where the data are: one multinomial probe, or many binary ones at once.

Weights, gradients and their history are float32 tensors of one device, between steps too; losses are sums in float64.
The objective is scikit-learn's, mean cross-entropy + decay/2 · ‖coef‖² with a free intercept, and strictly convex in
what it penalises: wherever a search starts, it ends at the same optimum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from sae_lightning.kernels.products import choose

Function = Callable[[Tensor], tuple[Tensor, Tensor]]

BLOCK = 1 << 27  # logits held at once

CACHE = 1 << 21  # logits that a CPU goes over several times before it goes on

TILE = 128  # classes whose weights of all latents a CPU's cache holds

MEMORY = 10  # steps that the search remembers

TRIES = 20  # lengths of one step


class Matrix:
    """``xs`` along a diagonal, [n, d] each, one dense or all compressed, on ``device``, as both products want them."""

    def __init__(self, device: str, *xs: np.ndarray | sparse.sparray) -> None:
        self.dense: Tensor | None = None
        if not sparse.issparse(xs[0]):
            self.dense = torch.from_numpy(np.require(xs[0], requirements="W")).to(device)
            return
        n, d = xs[0].shape
        self.rows = [part.to(device) for part in _lists([sparse.csr_array(x) for x in xs], d)]
        self.columns = [part.to(device) for part in _lists([sparse.csc_array(x) for x in xs], n)]
        self.density = len(self.rows[1]) / max(1, n * d * len(xs) ** 2)

    def times(self, w: Tensor) -> Tensor:
        """``x`` · ``w``, of [d, c] [n, c]."""
        return self._product(self.rows, w) if self.dense is None else self.dense @ w

    def back(self, r: Tensor) -> Tensor:
        """``x``ᵀ · ``r``, of [n, c] [d, c]."""
        return self._product(self.columns, r) if self.dense is None else self.dense.T @ r

    def _product(self, entries: Sequence[Tensor], w: Tensor) -> Tensor:
        indices, values, offsets = entries
        return choose(values, w, density=self.density).decode(indices, values, offsets, w.contiguous(), None)


def _lists(xs: Sequence[sparse.csr_array | sparse.csc_array], width: int) -> list[Tensor]:
    """Indices, values and offsets of all, the indices of each ``width`` above those of the one before."""
    ends = np.cumsum([0, *(x.nnz for x in xs)])
    offsets = [x.indptr[:-1] + end for x, end in zip(xs, ends, strict=False)]
    indices = np.concatenate([x.indices + np.int64(i * width) for i, x in enumerate(xs)])
    parts = indices, np.concatenate([x.data for x in xs]), np.concatenate([*offsets, ends[-1:]])
    return [torch.from_numpy(part) for part in parts]


class Multinomial:
    """Loss [1] and gradient of a probe of C classes, in weights [1, tiles · (d + 1) · classes a tile].

    ``x`` [n, d], ``target`` [n] int64 below C. In compressed products on a CPU the classes are taken some at a time,
    whose weights its cache holds.
    """

    def __init__(
        self, x: np.ndarray | sparse.csr_array, target: np.ndarray, n_classes: int, decay: float, device: str
    ) -> None:
        (self.n, self.d), self.classes, self.decay = x.shape, n_classes, decay
        tiled = sparse.issparse(x) and torch.device(device).type == "cpu"
        self.tiles = -(-n_classes // TILE) if tiled else 1
        self.each = -(-n_classes // self.tiles)
        starts = range(0, self.n, max(1, BLOCK // n_classes))
        self.blocks = [Matrix(device, x[i : i + starts.step]) for i in starts]
        self.targets = torch.from_numpy(target).to(device)[:, None].split(starts.step)

    def __call__(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        w = flat.view(self.tiles, self.d + 1, self.each)
        loss, gradient = flat.new_zeros((), dtype=torch.float64), torch.zeros_like(w)
        for x, y in zip(self.blocks, self.targets, strict=True):
            z = [x.times(tile[:-1]) for tile in w]
            loss += self._residuals(z, w[:, -1].reshape(-1), y)
            for tile, residual in zip(gradient, z, strict=True):
                tile[:-1] += x.back(residual)
                tile[-1] += residual.sum(0)
        gradient /= self.n
        gradient[:, :-1].add_(w[:, :-1], alpha=self.decay)
        squares = torch.stack([torch.linalg.vector_norm(tile[:-1], dtype=torch.float64) ** 2 for tile in w]).sum()
        return (loss / self.n + self.decay / 2 * squares)[None], gradient.view(1, -1)

    def _residuals(self, z: list[Tensor], bias: Tensor, y: Tensor) -> Tensor:
        """The sum of cross-entropies; products ``z`` become probabilities less the truth."""
        loss = bias.new_zeros((), dtype=torch.float64)
        step = max(1, (CACHE if bias.device.type == "cpu" else BLOCK) // self.classes)
        for target, *some in zip(y.split(step), *(tile.split(step) for tile in z), strict=True):
            logits = torch.cat(some, 1) + bias if len(some) > 1 else some[0] + bias
            logits[:, self.classes :] = -torch.inf
            logits = logits.log_softmax(1)
            loss -= logits.gather(1, target).double().sum()
            p = logits.exp_().scatter_add_(1, target, logits.new_tensor(-1.0).expand(target.shape))
            for tile, part in zip(some, p.split(self.each, 1), strict=True):
                tile.copy_(part)
        return loss

    def flat(self, coef: np.ndarray, intercept: np.ndarray) -> Tensor:
        """Weights from ``coef`` [C, d] and ``intercept`` [C]."""
        w = torch.zeros(self.tiles * self.each, self.d + 1, dtype=torch.from_numpy(coef).dtype)
        w[: self.classes] = torch.from_numpy(np.concatenate([coef, intercept[:, None]], 1))
        return w.unflatten(0, (self.tiles, self.each)).mT.reshape(1, -1).to(self.targets[0].device)

    def found(self, flat: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of ``flat``."""
        w = flat.view(self.tiles, self.d + 1, self.each).mT.flatten(0, 1)[: self.classes].cpu().numpy()
        return np.ascontiguousarray(w[:, :-1]), w[:, -1].copy()


class Binary:
    """Losses [b] and gradients of b probes of as many columns of the same n images, in weights [b, k + 1].

    ``xs`` b matrices [n, k], compressed or, of one probe, dense; ``positive`` [b, n] bool.
    """

    def __init__(
        self, xs: Sequence[np.ndarray | sparse.sparray], positive: np.ndarray, decay: float, device: str
    ) -> None:
        self.x, self.decay = Matrix(device, *xs), decay
        dtype = torch.from_numpy(np.zeros(0, xs[0].dtype)).dtype
        self.y = torch.from_numpy(positive).to(device, dtype)

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        b, n = self.y.shape
        z = self.x.times(w[:, :-1].reshape(-1, 1)).view(b, n) + w[:, -1:]
        losses = (softplus(z) - self.y * z).sum(1, dtype=torch.float64) / n
        residual = z.sigmoid_().sub_(self.y)
        of_coef = self.x.back(residual.view(-1, 1)).view(b, -1)
        gradient = torch.cat([of_coef, residual.sum(1, keepdim=True)], 1) / n
        gradient[:, :-1].add_(w[:, :-1], alpha=self.decay)
        return losses + self.decay / 2 * w[:, :-1].square().sum(1, dtype=torch.float64), gradient

    def flat(self, coef: np.ndarray, intercept: np.ndarray) -> Tensor:
        """Weights from ``coef`` [b, k] and ``intercept`` [b]."""
        return torch.from_numpy(np.concatenate([coef, intercept[:, None]], 1)).to(self.y)

    def found(self, flat: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of ``flat``."""
        w = flat.cpu().numpy()
        return np.ascontiguousarray(w[:, :-1]), w[:, -1]


class Found(NamedTuple):
    """Where the searches ended: ``weights`` [b, p], accepted ``steps`` [b] and whether they ``converged`` [b]."""

    weights: Tensor
    steps: Tensor
    converged: Tensor


def minimise(
    function: Function, start: Tensor, tolerance: float | Tensor, max_iter: int, title: str | None = None
) -> Found:
    """The minima of b strictly convex functions of p numbers each, which ``function`` evaluates at once.

    From ``start`` [b, p] by L-BFGS with steps that Armijo's rule accepts, each function's by itself, until no entry of
    its gradient exceeds ``tolerance`` (a number or [b]) or ``max_iter`` steps are done. A ``title`` is a bar's.
    """
    x, (value, gradient) = start, function(start)
    steps, tries = (torch.zeros(len(x), dtype=torch.long, device=x.device) for _ in range(2))
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    length = 1 / torch.linalg.vector_norm(gradient, dim=1, keepdim=True).clamp_min(1)
    direction, scale = -gradient, torch.ones_like(gradient[:, 0])
    with tqdm(total=max_iter, desc=title, unit="step", leave=False, delay=2, disable=title is None) as bar:
        while True:
            converged = gradient.abs().amax(1) <= tolerance
            going = ~converged & (steps < max_iter) & (tries < TRIES)
            if not bool(going.any()):
                return Found(x, steps, converged)
            moved = length * direction
            trial_value, trial_gradient = function(x + moved)
            slope, change = _dot(gradient, moved).double(), trial_value - value
            accepted = going & (change <= 1e-4 * slope + 1e-7 * value.abs())
            if len(x) > 1:
                moved, difference = (torch.where(accepted[:, None], t, 0) for t in (moved, trial_gradient - gradient))
                x, gradient = x + moved, torch.where(accepted[:, None], trial_gradient, gradient)
            elif bool(accepted):
                difference, x, gradient = trial_gradient - gradient, x + moved, trial_gradient
            value = torch.where(accepted, trial_value, value)
            steps, tries = steps + accepted, torch.where(accepted, 0, tries + 1)
            shorter = (-slope / (2 * (change - slope)).clamp_min(1e-30)).clamp(0.1, 0.5).to(x.dtype)
            length = torch.where(accepted, torch.ones_like(shorter), length[:, 0] * shorter)[:, None]
            if bool(accepted.any()):
                bar.update(int(steps.max()) - bar.n)
                curved, squares = _dot(moved, difference), _dot(difference, difference)
                scale = torch.where(curved > 0, curved / squares, scale)
                pairs.append((moved, difference, torch.where(curved > 0, 1 / curved, 0)))
                towards = _towards(gradient, pairs, scale)
                direction = towards if len(x) == 1 else torch.where(accepted[:, None], towards, direction)


def _towards(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """The quasi-Newton direction [b, p] by the last ``pairs`` of steps and differences, each with 1 / their product, or
    0 where a function did not take the step; ``scale`` [b] is what the inverse curvature is taken for at first."""
    found, weights = -gradient, []
    for step, difference, inverse in reversed(pairs):
        weights.append(inverse * _dot(step, found))
        found.addcmul_(weights[-1][:, None], difference, value=-1)
    found *= scale[:, None]
    for (step, difference, inverse), weight in zip(pairs, reversed(weights), strict=True):
        found.addcmul_((weight - inverse * _dot(difference, found))[:, None], step)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products [b] of the rows of ``a`` and ``b`` [b, p]."""
    return torch.einsum("bp,bp->b", a, b)
