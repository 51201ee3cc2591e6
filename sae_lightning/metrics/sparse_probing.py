"""How well classes are read out of a few latents: M4 of ViSAEBench, and the F statistics that rank the latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.files import read_json, write_json
from sae_lightning.metrics import probes
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.metrics.probes import Matrix
from sae_lightning.metrics.protocols import RELEASED
from sae_lightning.registry import one_of

BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

RANKINGS = ("joint", "per_class")


class ClassSums(NamedTuple):
    """Sums over images from which F statistics follow: everything in float64.

    ``counts`` [n_classes] images and ``totals`` CSR [n_classes, d_sae] of each of ``classes``; ``total`` and
    ``squares`` [d_sae] are Σz and Σz² over all images.
    """

    classes: np.ndarray
    counts: np.ndarray
    totals: sparse.csr_array
    total: np.ndarray
    squares: np.ndarray


def class_sums(codes: Matrix, labels: np.ndarray | Tensor) -> ClassSums:
    """Sums of ``codes`` [N, d_sae] with ``labels`` [N]; one pass over the active latents."""
    codes, labels = probes.as_codes(codes), probes.as_labels(labels)
    probes.check_rows(labels, codes=codes)
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    member = sparse.csr_array((np.ones(len(labels)), (place, np.arange(len(labels)))), (len(classes), len(labels)))
    values = codes.data.astype(np.float64)
    total, squares = (np.bincount(codes.indices, w, codes.shape[1]) for w in (values, np.square(values)))
    return ClassSums(classes, counts, member @ codes.astype(np.float64), total, squares)


def f_statistics(sums: ClassSums) -> np.ndarray:
    """ANOVA's F of each latent over all classes, [d_sae] float64, as ``sklearn.feature_selection.f_classif`` gives it.

    F = (Σ_c n_c (z̄_c - z̄)² / (G - 1)) / (Σ_c Σ_{i in c} (z_i - z̄_c)² / (N - G)) for G classes. NaN for a latent that is
    constant, inf for one that is constant within each class; sums of squares that are no larger than their rounding
    count as zero.
    """
    between = sparse.diags_array(1 / sums.counts) @ sums.totals.power(2)
    return _f(sums, between.sum(0), len(sums.classes))


def f_statistics_of(sums: ClassSums, c: int) -> np.ndarray:
    """The same for two groups: the images of ``sums.classes[c]`` and all others."""
    n, own = sums.counts[c], sums.totals[[c]].toarray()[0]
    return _f(sums, own**2 / n + (sums.total - own) ** 2 / (sums.counts.sum() - n), 2)


def _f(sums: ClassSums, squared_means: np.ndarray, groups: int) -> np.ndarray:
    n = int(sums.counts.sum())
    shared = sums.total**2 / n
    rounding = n * np.finfo(np.float64).eps * sums.squares
    spread, between = sums.squares - shared, np.clip(squared_means - shared, 0, None)
    within = spread - between
    constant, apart = spread <= rounding, within <= rounding
    f = np.where(constant, np.nan, np.inf)
    np.divide(between * (n - groups), within * (groups - 1), out=f, where=~constant & ~apart)
    return f


def ranked(f: np.ndarray) -> np.ndarray:
    """Latents by descending F, [d_sae] int64; of equals the lower first, those without F (NaN) last."""
    return np.argsort(-np.nan_to_num(f, nan=-1.0, posinf=np.inf), kind="stable")


class Readout(NamedTuple):
    """What the probe of ``k`` latents does on held-out images: which are ``right``, and the ``aucs`` of classes.

    Of several probes the share that ``converged``, and of no image whether it is right.
    """

    k: int
    right: list[bool]
    aucs: list[float]
    converged: float

    def scores(self, prefix: str, setting: str) -> list[Score]:
        """Mean AUC and accuracy."""
        return [averaged(f"{prefix}_auc", self.aucs, setting, unit="classes"),
                averaged(f"{prefix}_accuracy", self.right, setting)]  # fmt: skip


def read_out(
    train: Matrix, train_labels: np.ndarray, test: Matrix, test_labels: np.ndarray,
    budgets: Sequence[int] = BUDGETS, C: float = 1.0, max_iter: int = 500, device: str = "cpu",
    kept: Path | None = None, order: np.ndarray | None = None,
) -> list[Readout]:  # fmt: skip
    """One multinomial probe for each budget, of codes ranked once for all classes on the ``train`` images, or given in
    an ``order``.

    Large probes start from the one before. What is found is kept in the file ``kept``; of budgets that are there
    nothing is computed.
    """
    train, test = probes.as_codes(train), probes.as_codes(test)
    budgets = _checked(budgets, train.shape[1])
    order = (ranked(f_statistics(class_sums(train, train_labels))) if order is None else order)[: max(budgets)]
    dense = probes.small(len(train_labels), len(order), len(np.unique(train_labels)), device)
    x, held = (part[:, order].toarray() if dense else part[:, order].tocsc() for part in (train, test))
    model: LogisticRegression | None = None

    def at(k: int) -> Readout:
        nonlocal model
        model = probes.fit(x[:, :k], train_labels, C, max_iter, device, start=model)
        p = probes.log_probabilities(probes.logits(model, held[:, :k], device))
        right = model.classes_[p.argmax(1)] == test_labels
        areas = probes.aucs(p, test_labels, model.classes_)
        return Readout(k, right.tolist(), areas.tolist(), model.converged_)

    return _each_budget(budgets, at, kept)


def _each_budget(budgets: Sequence[int], at: Callable[[int], Readout], kept: Path | None) -> list[Readout]:
    """What ``at`` gives of each, with a bar where it takes long; see ``read_out``."""
    done = {}
    if kept is not None and kept.is_file():
        done = {int(k): Readout(**row) for k, row in read_json(kept, "remove it").items()}
    for k in tqdm([k for k in budgets if k not in done], "Sparse probing", unit="budget", leave=False, delay=2):
        done[k] = at(k)
        if kept is not None:
            write_json(kept, {str(k): found._asdict() for k, found in done.items()})
    return [done[k] for k in budgets]


def _checked(budgets: Sequence[int], d_sae: int) -> list[int]:
    if not budgets or min(budgets) < 1:
        raise ValueError(f"Budgets are numbers of latents, 1 or more; got {list(budgets)}.")
    if min(budgets) > d_sae:
        raise ValueError(f"The smallest budget is {min(budgets)} latents, but the SAE has {d_sae}; add a smaller one.")
    return sorted({k for k in budgets if k <= d_sae})


def sparse_probing(
    codes: Matrix, labels: np.ndarray | Tensor, split: probes.Split | None = None, budgets: Sequence[int] = BUDGETS,
    ranking: str = "joint", C: float = 1.0, max_iter: int = 500, device: str = "cpu", kept: Path | None = None,
    ranked_on: str = "train",
) -> list[Score]:  # fmt: skip
    """M4: probes of the ``k`` most discriminative latents, k in ``budgets`` [ViSAEBench §4.3, Table 2, App. I].

    ``codes`` [N, d_sae] max-pooled, ``labels`` [N] int64, ``split`` by default ``probes.split(labels)``. Latents are
    ranked on the train part by F, or with ``ranked_on="all"`` on all images. ``ranking="joint"`` [Table 2] ranks them
    once by F over all classes, for multinomial probes: ``sparse_probing_accuracy`` on the held-out images,
    ``sparse_probing_area``, the area under it from the smallest budget to k over their distance (M4; without a setting
    to the largest), and ``sparse_probing_auc``, the mean over classes of the one-vs-rest ROC AUC of the probabilities.
    ``"per_class"`` [§4.3] ranks them for each class by F against the rest, for
    a binary probe each: the mean of their AUC. Settings are ``k=128`` or ``k=128,ranking=per_class``; budgets above
    d_sae are left out. A constant latent, ranked last, adds nothing. ``sparse_probing_converged`` is the share of
    probes whose solver did. ``kept`` as in ``read_out``. ValueError for an unknown ranking or no possible budget, and
    as in ``probes.split``.
    """
    one_of(ranking, RANKINGS, "ranking")
    codes, labels = probes.as_codes(codes), probes.as_labels(labels)
    probes.check_rows(labels, codes=codes)
    train, test = probes.split(labels) if split is None else split
    if ranking == "per_class":
        return _per_class(codes[train], labels[train], codes[test], labels[test], budgets, C, max_iter, device, kept)
    order = ranked(f_statistics(class_sums(codes, labels))) if ranked_on == "all" else None
    parts = (codes[train], labels[train], codes[test], labels[test])
    found = read_out(*parts, budgets, C, max_iter, device, kept, order)
    areas = [area(found[: i + 1]) for i in range(len(found))]
    return [*(score for each, under in zip(found, areas, strict=True) for score in (
        *each.scores("sparse_probing", f"k={each.k}"), averaged("sparse_probing_area", under, f"k={each.k}"),
        Score("sparse_probing_converged", float(each.converged), f"k={each.k}"),
    )), averaged("sparse_probing_area", areas[-1])]  # fmt: skip


def area(found: Sequence[Readout]) -> np.ndarray:
    """Each image's part [N] in the area under the accuracy over budgets, by trapezoids, over their range.

    The mean is the area; of a single budget it is the accuracy.
    """
    k, right = [each.k for each in found], np.array([each.right for each in found], dtype=np.float64)
    return np.asarray(np.trapezoid(right, k, axis=0) / (k[-1] - k[0]) if len(k) > 1 else right[0])


def _per_class(
    train: sparse.csr_array, train_labels: np.ndarray, test: sparse.csr_array, test_labels: np.ndarray,
    budgets: Sequence[int], C: float, max_iter: int, device: str, kept: Path | None,
) -> list[Score]:  # fmt: skip
    budgets = _checked(budgets, train.shape[1])
    sums, train, test = class_sums(train, train_labels), train.tocsc(), test.tocsc()
    held = [test_labels == name for name in sums.classes]
    told = [c for c, positive in enumerate(held) if positive.any() and not positive.all()]
    best = np.array([ranked(f_statistics_of(sums, c))[: max(budgets)] for c in told])
    targets = [train_labels == sums.classes[c] for c in told]
    models: list[LogisticRegression | None] = [None] * len(told)

    def at(k: int) -> Readout:
        if probes.small(train.shape[0], k, len(told), device):
            models[:] = (
                probes.fit(train[:, b[:k]].toarray(), y, C, max_iter) for b, y in zip(best, targets, strict=True)
            )
        else:
            models[:] = probes.fit_each((train[:, b[:k]] for b in best), targets, C, max_iter, device, models)
        areas = [probes.auc(probes.logits(m, test[:, b[:k]]), held[c])
                 for m, b, c in zip(models, best, told, strict=True)]  # fmt: skip
        converged = [m.converged_ for m in models if m is not None]
        return Readout(k, [], areas, float(np.mean(converged)) if told else np.nan)

    return [score for each in _each_budget(budgets, at, kept) for score in (
        each.scores("sparse_probing", f"k={each.k},ranking=per_class")[0],
        Score("sparse_probing_converged", float(each.converged), f"k={each.k},ranking=per_class"),
    )]  # fmt: skip


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """M4 at every budget."""
    images, split = run.images(), probes.split_of(run, options)
    budgets, ranking, fit = options["budgets"], options["ranking"], probes.solver(options)
    how = {"kept": run.unfinished("sparse probing", options), "ranked_on": options.get("ranked_on", "train")}
    found = sparse_probing(images.codes, images.labels, split, budgets, ranking, **fit, device=run.device, **how)
    return [*found, *probes.classes_left_out(run, options, "sparse_probing")]


PART = register(Part(
    "sparse_probing", scores, needs=("images", "labels"), title="M4: sparse probing",
    about="By the number of latents k that a probe sees.", undefined="the images held out are of one class",
    columns=(
        Column("M4 probing", "sparse_probing_area", "k=128", better=True, headline="M4", about="area under the "
               "accuracy of probes over the number of latents that they see, those of the largest F, up to 128"),
        Column("M4 probing", "sparse_probing_area", better=True, headline="M4", protocol=RELEASED,
               about="area under the accuracy of probes over the number of latents, from 1 to 100"),
        Column("{k}", "sparse_probing_accuracy", "k={k}", better=True, over="accuracy at k"),
        Column("{k}", "sparse_probing_area", "k={k}", better=True, over="area up to k"),
        Column("{k}", "sparse_probing_auc", "k={k}", better=True, over="ROC AUC at k"),
    ),
))  # fmt: skip
