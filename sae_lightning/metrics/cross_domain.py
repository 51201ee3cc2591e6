"""Whether an SAE keeps what other data sets need: M6 of ViSAEBench."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_lightning.metrics import probes
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import INPUTS, Column, ImageFeatures, Options, Part, ScoredRun, Task, register
from sae_lightning.metrics.probes import Matrix
from sae_lightning.metrics.protocols import RELEASED
from sae_lightning.metrics.reconstruction import WholeFVU
from sae_lightning.metrics.sparse_probing import read_out


class Own(NamedTuple):
    """Which held-out images a representation's own probe gets ``right`` [N], and whether its solver converged."""

    right: np.ndarray
    converged: bool


def own_accuracy(
    train: Matrix, train_labels: np.ndarray | Tensor, test: Matrix, test_labels: np.ndarray | Tensor,
    C: float = 1.0, max_iter: int = 500, device: str = "cpu", solver: str | None = None,
) -> Own:  # fmt: skip
    """Fit on the ``train`` images [N, d], score on the ``test`` images; of raw features once for all SAEs.

    Test images of classes without a train image count as wrong.
    """
    model = probes.fit(train, train_labels, C, max_iter, device, solver=solver)
    return Own(probes.right(model, test, test_labels, device), model.converged_)


def cross_domain(
    name: str, raw: Own, train: ImageFeatures, test: ImageFeatures, k: int = 128, C: float = 1.0, max_iter: int = 500,
    codes: bool = True, device: str = "cpu", solver: str | None = None,
) -> list[Score]:  # fmt: skip
    """M6 on a data set ``name`` with its own train and test images [ViSAEBench §4.3, App. L].

    Each representation has its own probe: ``raw`` is ``own_accuracy`` of the raw features. In the setting
    ``data=name``: ``cross_domain_preservation`` = accuracy of the reconstruction / raw, ``cross_domain_codes_lift`` =
    codes / raw (NaN where raw is 0) and the three accuracies; in ``data=name,k=128`` the AUC and accuracy of a probe of
    the ``k`` latents with the largest F on the train images, left out when the SAE has fewer.
    Without ``codes`` the probe of all codes, which takes long for many classes, is left out with its figures.
    ``cross_domain_converged`` is the share of these probes whose solver did.
    """
    y, held = probes.as_labels(train.labels), probes.as_labels(test.labels)
    reconstruction = own_accuracy(train.reconstruction, y, test.reconstruction, held, C, max_iter, device, solver)
    converged: list[float] = [raw.converged, reconstruction.converged]
    n, one = len(held), np.ones(len(held))
    figures = {
        "preservation": (reconstruction.right, raw.right),
        "accuracy_raw": (raw.right, one),
        "accuracy_reconstruction": (reconstruction.right, one),
    }
    if codes:
        whole = own_accuracy(train.codes, y, test.codes, held, C, max_iter, device, solver)
        converged.append(whole.converged)
        figures |= {"codes_lift": (whole.right, raw.right), "accuracy_codes": (whole.right, one)}
    scores = [averaged(f"cross_domain_{metric}", top, f"data={name}", of, n=n) for metric, (top, of) in figures.items()]
    if k <= train.codes.shape[1]:
        found = read_out(train.codes, y, test.codes, held, [k], C, max_iter, device)[0]
        scores += found.scores("cross_domain_sparse_probing", f"data={name},k={k}")
        converged.append(found.converged)
    return [*scores, Score("cross_domain_converged", float(np.mean(converged)), f"data={name}")]


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """M6 on one data set."""
    name, fit = options["name"], probes.solver(options) | {"device": run.device, "solver": options.get("solver")}
    train, test = run.images(f"{name}/train"), run.images(f"{name}/test")
    raw = run.shared(
        f"raw probe {name} {options}", lambda: own_accuracy(train.raw, train.labels, test.raw, test.labels, **fit)
    )
    return cross_domain(name, raw, train, test, options["k"], codes=options.get("codes", True), **fit)


def released(run: ScoredRun, options: Options) -> list[Score]:
    """M6 as the released package has it, on a data set's train images, of which ``images`` are drawn by ``seed``.

    ``cross_domain_generalization`` is the mean of four: 1 − FVU within [0, 1], the share of latents alive on the run's
    own data that are alive here, too, the Jaccard index of both sets, and the accuracy of a probe of ``k`` latents on a
    fifth of these images, fitted on the others.
    """
    name, alive = options["name"], run.dictionary.alive.numpy()
    store = run.store(f"{name}/train")
    order, pooled, fvu = np.arange(len(store)), [], WholeFVU(store.d_in, run.frame.mean)
    if len(store) > options["images"]:
        order = np.random.RandomState(options["seed"]).permutation(len(store))[: options["images"]]
    with torch.no_grad():
        for rows in np.array_split(order, len(order) * store.n_patches // TOKENS + 1):
            features = store.features(rows).flatten(0, 1).float()
            codes = run.sae.encode(features)
            fvu.update(features, run.sae.decode(codes))
            pooled.append(codes.pool(store.n_patches).csr())
    image_codes, labels = sparse.vstack(pooled, "csr"), store.labels.numpy()[order]
    here = np.zeros(len(alive), dtype=bool)
    here[image_codes.indices[image_codes.data > 0]] = True
    train, test = probes.split_all(labels, options["test_share"], options["seed"])
    k, fit = min(options["k"], len(alive)), probes.solver(options) | {"device": run.device}
    halves = (image_codes[train], labels[train], image_codes[test], labels[test])
    missed = float(fvu.compute()["fvu"])
    parts = {
        "kept": min(1.0, max(0.0, 1 - missed)) if np.isfinite(missed) else 0.0,
        "alive": float((alive & here).sum() / max(1, alive.sum())),
        "overlap": float((alive & here).sum() / max(1, (alive | here).sum())),
        "probe": float(np.mean(read_out(*halves, [k], **fit)[0].right)),
    }
    values = {"generalization": float(np.mean(list(parts.values()))), "fvu": missed, **parts}
    return [Score(f"cross_domain_{metric}", value, f"data={name}") for metric, value in values.items()]


TOKENS = 1 << 14  # encoded at once

PART = register(Part(
    "cross_domain", scores, needs=("sets", "images"), title="M6: other data sets",
    about="Accuracy of probes of features, reconstruction and codes, each fitted on the train images of the data set.",
    undefined="the probe of the raw features is never right, or the test images are of one class",
    otherwise={"compute": released, "needs": ("sets", "train")},
    columns=(
        Column("M6 cross-domain", "cross_domain_preservation", "data=*", better=True, headline="M6",
               first="data=inaturalist", about="accuracy of probes of the reconstruction, over that of probes of the "
               "raw features, on iNaturalist; where that is not there, mean over other data sets"),
        Column("M6 cross-domain", "cross_domain_generalization", "data=*", better=True, headline="M6",
               protocol=RELEASED,
               about="mean over other data sets of 1 − FVU, latents alive, their overlap, and a probe"),
        Column("preservation", "cross_domain_preservation", "data=*", better=True, over="mean of all"),
        *(Column(given, f"cross_domain_accuracy_{given}", "data={data}", form=".1%", over="{data}")
          for given in INPUTS),
        Column("preservation", "cross_domain_preservation", "data={data}", better=True, over="{data}"),
        Column("codes / raw", "cross_domain_codes_lift", "data={data}", better=True, over="{data}"),
        Column("AUC, k = {k}", "cross_domain_sparse_probing_auc", "data={data},k={k}", better=True, over="{data}"),
    ),
    tasks=(
        Task("accuracy:{data}/{input}", "cross_domain_accuracy_{input}", "data={data}"),
        Task("probing:{data}/codes", "cross_domain_sparse_probing_auc", "data={data},k=128"),
    ),
))  # fmt: skip
