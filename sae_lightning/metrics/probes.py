"""Linear probes: the split of the images, logistic regression as scikit-learn fits it, and what a probe predicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy import sparse, special
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import ThreadpoolController
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.metrics import descent, logistic
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Options, ScoredRun

Matrix: TypeAlias = "np.ndarray | Tensor | sparse.csr_array | sparse.csr_matrix"

SMALL = 1 << 30  # multiplications of a product below which scikit-learn fits, on one thread

BLOCK = 1 << 27  # logits held at once

ENTRIES = 1 << 23  # active latents of probes that are fitted at once


class Split(NamedTuple):
    """Positions of the images to fit on, ``train``, and of those held out, ``test``; int64, ascending."""

    train: np.ndarray
    test: np.ndarray


def split(labels: np.ndarray | Tensor, test_share: float = 0.2, seed: int = 42) -> Split:
    """The stratified split of N images that all probes of a backbone share [ViSAEBench Table 2, M3].

    ``labels`` [N] int64. scikit-learn's, so that each class is divided by ``test_share`` up to rounding; a class of two
    images may have none held out. Classes with a single image are in neither part; where each part would still have
    fewer images than there are classes, nor are those with two, three … until it works (``left_out`` tells which).
    ValueError when no class is left.
    """
    labels = as_labels(labels)
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    for least in np.unique([2, *counts[counts > 1]]):
        kept = np.flatnonzero(counts[place] >= least)
        held, n_classes = int(np.ceil(test_share * len(kept))), int((counts >= least).sum())
        if 0 < n_classes <= min(held, len(kept) - held):
            parts = train_test_split(kept, test_size=test_share, random_state=seed, stratify=labels[kept])
            return Split(*(np.sort(part) for part in parts))
    single, n, n_classes = classes[counts < 2].tolist(), int(counts[counts > 1].sum()), int((counts > 1).sum())
    some = ""
    if single:
        some = f"{len(single)} of {len(classes)} classes have a single image (the first is class {single[0]}). "
    raise ValueError(
        f"{some}A share of {test_share} of {n} images is {int(np.ceil(test_share * n))} held out, but a stratified "
        f"split of {n_classes} classes needs {n_classes} images or more in each part; give more images."
    )


def split_all(labels: np.ndarray | Tensor, test_share: float = 0.2, seed: int = 42) -> Split:
    """The released package's split of all N images: stratified, unless a label up to the largest has fewer than two.

    ValueError where scikit-learn cannot stratify, as for more classes than images held out.
    """
    labels = as_labels(labels)
    by = labels if np.bincount(labels).min() >= 2 else None
    parts = train_test_split(np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=by)
    return Split(*(np.sort(part) for part in parts))


def left_out(labels: np.ndarray | Tensor, split: Split) -> np.ndarray:
    """The classes among ``labels`` [N] that have no image in either part of ``split``, ascending."""
    labels = as_labels(labels)
    return np.setdiff1d(labels, labels[np.concatenate(split)])


def as_matrix(x: Matrix) -> np.ndarray | sparse.csr_array:
    """``x`` [N, d] as a NumPy array or a ``csr_array``; float64 stays, all else becomes float32.

    ValueError when it does not have two dimensions.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu().float().numpy() if x.dtype != torch.float64 else x.detach().cpu().numpy()
    x = sparse.csr_array(x) if sparse.issparse(x) else np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"Expected a matrix [N, d], one row an image; got the shape {list(x.shape)}.")
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def as_codes(codes: Matrix) -> sparse.csr_array:
    """Codes [N, d_sae] as a ``csr_array`` of floats; dense ones are compressed."""
    return sparse.csr_array(as_matrix(codes))


def as_labels(labels: np.ndarray | Tensor) -> np.ndarray:
    """``labels`` as an int64 array [N]."""
    return np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels, dtype=np.int64)


def check_rows(labels: np.ndarray, **matrices: Matrix) -> None:
    """ValueError unless every matrix has one row a label."""
    for name, x in matrices.items():
        if x.shape[0] != len(labels):
            raise ValueError(f"There are {x.shape[0]} rows of {name}, but {len(labels)} labels; give one a row.")


def fit(
    x: Matrix, y: np.ndarray | Tensor, C: float = 1.0, max_iter: int = 1000, device: str = "cpu",
    start: LogisticRegression | None = None, solver: str | None = None,
) -> LogisticRegression:  # fmt: skip
    """A fitted ``LogisticRegression(C=C, max_iter=max_iter)``: L-BFGS, L2, no class weights [ViSAEBench App. C].

    ``x`` [N, d] dense or CSR, ``y`` [N] int64. Two classes make one binary probe, more a multinomial one. On the CPU
    scikit-learn fits where that takes no time; else, and on another ``device``, ``logistic`` minimises the same
    objective, closer to the optimum, and from the weights of ``start`` where given: a probe of the same classes and
    the first of these columns. ``solver`` names a recipe of ``descent`` that fits instead, without C.
    No warning where the solver stops early: ``converged_`` tells, beside ``n_iter_``.
    ValueError for rows that do not fit the labels, a single class, or values that are not finite.
    """
    x, y = as_matrix(x), as_labels(y)
    check_rows(y, features=x)
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(f"A probe needs images of two classes or more; got {len(y)} images of {len(classes)}.")
    if not np.isfinite(x.data if sparse.issparse(x) else x).all():
        raise ValueError("Features to fit a probe on hold values that are not finite; look for overflow in the store.")
    model = LogisticRegression(C=C, max_iter=max_iter)
    if solver is not None:
        _descend(model, x, y, solver, device)
    elif sparse.issparse(x):  # weights of latents that are silent on all images stay zero
        active = np.flatnonzero(np.bincount(sparse.csr_array(x).indices, minlength=x.shape[1]))
        active = active if len(active) else np.arange(1)
        _fit(model, x[:, active], y, device, start, active)
        whole = np.zeros((len(model.coef_), x.shape[1]), model.coef_.dtype)
        whole[:, active] = model.coef_
        model.coef_, model.n_features_in_ = whole, x.shape[1]
    else:
        _fit(model, x, y, device, start, np.arange(x.shape[1]))
    return model


def _descend(
    model: LogisticRegression, x: np.ndarray | sparse.csr_array, y: np.ndarray, solver: str, device: str
) -> None:
    """Sets what ``model.fit`` would, by a recipe of ``descent``."""
    model.classes_, target = np.unique(y, return_inverse=True)
    weight, bias = descent.descend(x, target, len(model.classes_), solver, device)
    binary = len(model.classes_) == 2
    model.coef_, model.intercept_ = (part[1:] - part[:1] if binary else part for part in (weight, bias))
    model.n_iter_, model.n_features_in_ = np.array([descent.RECIPES[solver].epochs]), x.shape[1]
    model.converged_ = True


def small(n: int, d: int, n_classes: int, device: str = "cpu") -> bool:
    """Whether scikit-learn fits a probe of n images, d columns and so many classes."""
    return torch.device(device).type == "cpu" and n * d * n_classes < SMALL


def _fit(
    model: LogisticRegression, x: np.ndarray | sparse.csr_array, y: np.ndarray, device: str,
    start: LogisticRegression | None, columns: np.ndarray,
) -> None:  # fmt: skip
    if small(x.shape[0], x.shape[1], len(np.unique(y)), device):
        _fit_by_scikit_learn(model, x, y)
    else:
        _fit_by_torch(model, x, y, device, start, columns)


@cache
def _libraries() -> ThreadpoolController:
    """What computes products here; looking for it takes as long as fitting a small probe."""
    return ThreadpoolController()


def _fit_by_scikit_learn(model: LogisticRegression, x: np.ndarray | sparse.csr_array, y: np.ndarray) -> None:
    with warnings.catch_warnings(record=True) as caught, _libraries().limit(limits=1, user_api="blas"):
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    model.converged_ = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            model.converged_ = False
        else:
            warnings.warn(warning.message, warning.category, stacklevel=3)


def _fit_by_torch(
    model: LogisticRegression, x: np.ndarray | sparse.csr_array, y: np.ndarray, device: str,
    start: LogisticRegression | None, columns: np.ndarray,
) -> None:  # fmt: skip
    """Sets what ``model.fit`` would; ``columns`` [d] of ``x`` have these numbers in ``start``, ascending."""
    model.classes_, target, counts = np.unique(y, return_inverse=True, return_counts=True)
    n_classes, decay = len(counts), 1 / (model.C * len(y))
    objective: logistic.Multinomial | logistic.Binary
    if n_classes > 2:
        objective = logistic.Multinomial(x, target, n_classes, decay, device)
    else:
        objective = logistic.Binary([x], target[None] == 1, decay, device)
    coef = np.zeros((n_classes if n_classes > 2 else 1, x.shape[1]), x.dtype)
    intercept = np.zeros(len(coef), x.dtype)
    if start is not None:
        known = columns[columns < start.coef_.shape[1]]
        coef[:, : len(known)], intercept = start.coef_[:, known], start.intercept_
    title = f"Probe of {x.shape[1]:,} columns"
    found = logistic.minimise(
        objective, objective.flat(coef, intercept), float(tolerance(counts.min() / len(y))), model.max_iter, title
    )
    model.coef_, model.intercept_ = objective.found(found.weights)
    model.n_iter_, model.n_features_in_ = found.steps.cpu().numpy().astype(np.int32), x.shape[1]
    model.converged_ = bool(found.converged)


def fit_each(
    xs: Iterable[sparse.csc_array], positive: Sequence[np.ndarray], C: float, max_iter: int, device: str,
    start: Sequence[LogisticRegression | None],
) -> Iterator[LogisticRegression]:  # fmt: skip
    """Binary probes of as many columns ``xs`` [N, k] of the same images each, some at once, by ``logistic``.

    ``positive`` [N] bool each; ``start`` holds a probe of the first of these columns each, or None.
    """
    bar = tqdm(xs, "Probes", len(positive), unit="class", leave=False, delay=2)
    waiting: list[sparse.csc_array] = []
    done = 0
    for x in bar:
        waiting.append(x)
        entries, width = sum(each.nnz for each in waiting), len(waiting) * x.shape[0]
        if done + len(waiting) < len(positive) and max(entries, width) < ENTRIES:
            continue
        some = slice(done, done + len(waiting))
        y = np.stack(positive[some])
        weights = np.zeros((len(y), x.shape[1] + 1), x.dtype)
        for row, model in zip(weights, start[some], strict=True):
            if model is not None:
                row[: model.coef_.shape[1]], row[-1] = model.coef_[0], model.intercept_[0]
        limits = torch.from_numpy(tolerance(y.mean(1))).to(device)
        found = logistic.minimise(
            logistic.Binary(waiting, y, 1 / (C * y.shape[1]), device),
            torch.from_numpy(weights).to(device),
            limits,
            max_iter,
        )
        for row, steps, converged in zip(*(part.cpu().numpy() for part in found), strict=True):
            model = LogisticRegression(C=C, max_iter=max_iter)
            model.classes_, model.coef_, model.intercept_ = np.array([False, True]), row[None, :-1], row[-1:]
            model.n_iter_, model.n_features_in_, model.converged_ = np.array([steps]), x.shape[1], bool(converged)
            yield model
        done, waiting = some.stop, []


def tolerance(share: np.ndarray) -> np.ndarray:
    """The largest entry of a gradient at which a search ends, of a probe whose rarest class has this share of images.

    A third of scikit-learn's default; less with many classes, whose gradients are smaller to begin with.
    """
    return np.minimum(3e-5, 1e-2 * share)


def to_tensor(x: np.ndarray | sparse.sparray, device: str) -> Tensor:
    """``x`` as a dense or CSR tensor on ``device``."""
    if not sparse.issparse(x):
        return torch.from_numpy(np.require(x, requirements=["C", "W"])).to(device)
    x = sparse.csr_array(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        offsets, columns, values = (torch.from_numpy(np.array(part)) for part in (x.indptr, x.indices, x.data))
        return torch.sparse_csr_tensor(offsets, columns, values, size=x.shape, check_invariants=False).to(device)


def logits(model: LogisticRegression, x: Matrix, device: str = "cpu") -> np.ndarray:
    """The probe's decision function: [N, n_classes], or [N] for the second of two classes; in x's float type."""
    x = as_matrix(x)
    if torch.device(device).type == "cpu":
        return model.decision_function(x)
    coef, intercept = to_tensor(model.coef_.T, device), to_tensor(model.intercept_, device)
    found = (to_tensor(x[rows], device) @ coef + intercept for rows in _blocks(len(coef[0]), x.shape[0]))
    z = torch.cat([block.cpu() for block in found]).numpy()
    return z[:, 0] if z.shape[1] == 1 else z


def _blocks(width: int, n: int) -> Iterator[slice]:
    step = max(1, BLOCK // width)
    return (slice(i, i + step) for i in range(0, n, step))


def log_probabilities(z: np.ndarray) -> np.ndarray:
    """log of the class distributions [N, n_classes] float64 of ``logits`` z [N, n_classes], or [N] for two classes."""
    z = np.asarray(z, dtype=np.float64)
    return special.log_softmax(z if z.ndim == 2 else np.stack([np.zeros_like(z), z], axis=1), axis=1)


def predict(model: LogisticRegression, x: Matrix, device: str = "cpu") -> np.ndarray:
    """The most probable class of each of N images, [N] int64; of equals the lower one."""
    x = as_matrix(x)
    found = []
    for rows in _blocks(len(model.classes_), x.shape[0]):
        z = logits(model, x[rows], device)
        found.append(model.classes_[z.argmax(1) if z.ndim == 2 else (z > 0).astype(int)])
    return np.concatenate(found)


def accuracy(model: LogisticRegression, x: Matrix, y: np.ndarray | Tensor, device: str = "cpu") -> float:
    """Share of the images that the probe puts in their class; images of classes it was not fitted on count as wrong."""
    return float(right(model, x, y, device).mean())


def right(model: LogisticRegression, x: Matrix, y: np.ndarray | Tensor, device: str = "cpu") -> np.ndarray:
    """Which images the probe puts in their class, [N] bool."""
    x, y = as_matrix(x), as_labels(y)
    check_rows(y, features=x)
    return predict(model, x, device) == y


def ratio(value: float, whole: float) -> float:
    """value / whole; NaN where whole is 0."""
    return value / whole if whole else float("nan")


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of ``scores`` [N] for the images that are ``positive`` [N] bool; ties count half.

    NaN without a positive or without a negative.
    """
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return float("nan")
    ordered = np.sort(scores[~positive])
    wins = sum(np.searchsorted(ordered, scores[positive], side).sum() for side in ("left", "right")) / 2
    return float(wins / (p * n))


def aucs(scores: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The one-vs-rest AUC of each class, of ``scores`` [N, n_classes], column c for ``classes[c]``.

    Classes without a positive or without a negative among ``labels`` [N] are left out.
    """
    found = np.array([auc(scores[:, c], labels == name) for c, name in enumerate(classes)])
    return found[~np.isnan(found)]


# --- what the parts that probe share ----------------------------------------------------------------------
def solver(options: Options) -> dict[str, Any]:
    """Of a part's options those of ``fit``."""
    return {"C": options["C"], "max_iter": options["max_iter"]}


def split_of(run: ScoredRun, options: Options) -> Split:
    """The one split of the images that all probes share; says once which classes are too small for it."""
    share, seed, always = options["test_share"], options["seed"], options.get("stratify") != "if_possible"

    def make() -> Split:
        images = run.images()
        if not always:
            return split_all(images.labels, share, seed)
        found = split(images.labels, share, seed)
        names = [images.class_names[c] for c in left_out(images.labels, found)]
        if names:
            classes = f"{len(names)} of {len(np.unique(images.labels))} classes"
            say = f"{classes} have too few images for probes and are left out: {listed(names)}."
            tqdm.write(f"{run.store().split}: {say}")
        return found

    return run.shared(f"split {share} {seed} {always}", make)


def classes_left_out(run: ScoredRun, options: Options, part: str) -> list[Score]:
    """How many classes have too few images for the probes of ``part``, with their names; nothing where none has."""
    images = run.images()
    names = [images.class_names[c] for c in left_out(images.labels, split_of(run, options))]
    return [Score(f"{part}_classes_left_out", len(names), why=f"too few images of {listed(names)}")] if names else []


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names as a sentence has them, of many the first ``most``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
