"""What a classifier of the raw features still knows of their reconstruction: M3 of ViSAEBench, LP of MSAE."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sae_lightning.metrics import probes
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.metrics.probes import Matrix
from sae_lightning.metrics.protocols import RELEASED


class RawProbe(NamedTuple):
    """The classifier φ of a backbone's raw features, fitted once for all of its SAEs.

    ``train`` and ``test`` are positions of images (int64); ``right`` [n_test] (of which images φ tells the class) and
    ``logits`` [n_test, n_classes] (or [n_test] for two classes) are those of φ on the raw features held out.
    """

    model: LogisticRegression
    train: np.ndarray
    test: np.ndarray
    right: np.ndarray
    logits: np.ndarray


def fit_raw(
    raw: Matrix, labels: np.ndarray | Tensor, split: probes.Split | None = None,
    C: float = 1.0, max_iter: int = 1000, device: str = "cpu", solver: str | None = None,
) -> RawProbe:  # fmt: skip
    """φ on the train part of ``raw`` [N, d_in], max-pooled and normalised, of images with ``labels`` [N] int64.

    ``split`` is by default ``probes.split(labels)``. ValueError as in ``probes.split`` and ``probes.fit``.
    """
    raw, labels = probes.as_matrix(raw), probes.as_labels(labels)
    probes.check_rows(labels, raw=raw)
    train, test = probes.split(labels) if split is None else split
    model = probes.fit(raw[train], labels[train], C, max_iter, device, solver=solver)
    right = probes.right(model, raw[test], labels[test], device)
    return RawProbe(model, train, test, right, probes.logits(model, raw[test], device))


def preservation(
    probe: RawProbe, reconstruction: Matrix, labels: np.ndarray | Tensor, codes: Matrix | None = None,
    retrain: bool = False, C: float = 1.0, max_iter: int = 1000, device: str = "cpu", solver: str | None = None,
) -> list[Score]:  # fmt: skip
    """M3 of an SAE, ``preservation`` = acc(φ(x̂)) / acc(φ(x)) on the images held out [ViSAEBench §4.2].

    ``reconstruction`` [N, d_in], ``codes`` [N, d_sae] of the same images as ``labels`` [N], all of them. Also given are
    both accuracies; ``lp_kl``, the mean of KL(φ(x) ‖ φ(x̂)) in nats, and ``lp_accuracy``, how often φ's most probable
    class stays the same [MSAE §5], each with its deviation over images (``…_std``); for codes, the accuracy of their
    own probe and ``codes_lift`` = accuracy_codes / accuracy_raw [ViSAEBench App. O]; with ``retrain`` those of a probe
    fitted on the reconstruction. Ratios are NaN where φ is never right. ``probes_converged`` is the share of the probes
    in use whose solver did.
    """
    x, labels = probes.as_matrix(reconstruction), probes.as_labels(labels)
    probes.check_rows(labels, reconstruction=x)
    if x.shape[1] != probe.model.coef_.shape[1]:
        raise ValueError(
            f"The raw probe was fitted on {probe.model.coef_.shape[1]} dimensions, but the reconstruction has "
            f"{x.shape[1]}; give both as the same features."
        )
    z = probes.logits(probe.model, x[probe.test], device)
    p, q = probes.log_probabilities(probe.logits), probes.log_probabilities(z)
    right = probe.model.classes_[q.argmax(1)] == labels[probe.test]
    kl, same = (np.exp(p) * (p - q)).sum(1), p.argmax(1) == q.argmax(1)
    scores = [
        averaged("preservation", right, of=probe.right, n=len(right)),
        averaged("accuracy_raw", probe.right),
        averaged("accuracy_reconstruction", right),
        averaged("lp_kl", kl),
        averaged("lp_accuracy", same),
        Score("lp_kl_std", float(kl.std())),
        Score("lp_accuracy_std", float(same.std())),
    ]
    converged = [probe.model.converged_]

    def own(name: str, features: Matrix, lift: str) -> None:
        model = probes.fit(features[probe.train], labels[probe.train], C, max_iter, device, solver=solver)
        found = probes.right(model, features[probe.test], labels[probe.test], device)
        scores.extend([averaged(name, found), averaged(lift, found, of=probe.right, n=len(found))])
        converged.append(model.converged_)

    if codes is not None:
        codes = probes.as_matrix(codes)
        probes.check_rows(labels, codes=codes)
        own("accuracy_codes", codes, "codes_lift")
    if retrain:
        own("accuracy_reconstruction_retrained", x, "preservation_retrained")
    return [*scores, Score("probes_converged", float(np.mean(converged)))]


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """M3, LP-KL and LP-Acc; the raw probe is fitted once for all SAEs of a backbone."""
    images, fit = run.images(pool=options.get("pool", "max")), probes.solver(options) | {"device": run.device}
    fit["solver"] = options.get("solver")
    split = probes.split_of(run, options)
    probe = run.shared(f"raw probe {options}", lambda: fit_raw(images.raw, images.labels, split, **fit))
    codes = images.codes if options["codes"] else None
    found = preservation(probe, images.reconstruction, images.labels, codes, options.get("retrain", False), **fit)
    most = options.get("most", float("inf"))
    found = [s._replace(value=min(s.value, most)) if s.metric == "preservation" else s for s in found]
    return [*found, *probes.classes_left_out(run, options, "preservation")]


OWN = "probes of their own"
MSAE = "Metrics of MSAE"
PART = register(Part(
    "preservation", scores, needs=("images", "labels"), title="M3: preservation",
    about="One linear probe, fitted on raw features, reads the reconstructions of images held out; the codes have a "
    "probe of their own. LP-KL is in nats.",
    undefined="the probe of the raw features is never right on the images held out",
    otherwise={"needs": ("images", "means", "labels")},
    columns=(
        Column("M3 preservation", "preservation", better=True, headline="M3", protocol=RELEASED, about="the same of "
               "features and reconstructions averaged over patches"),
        Column("M3 preservation", "preservation", better=True, headline="M3", about="accuracy of the raw features' "
               "linear probe on the reconstruction, over its accuracy on the raw features"),
        Column("raw", "accuracy_raw", form=".1%", over="accuracy"),
        Column("reconstruction", "accuracy_reconstruction", form=".1%", over="accuracy"),
        Column("preservation", "preservation", better=True),
        Column("LP-KL", "lp_kl", better=False), Column("LP-Acc", "lp_accuracy", better=True),
        Column("codes", "accuracy_codes", form=".1%", over=OWN),
        Column("codes / raw", "codes_lift", better=True, over=OWN),
        Column("reconstruction", "accuracy_reconstruction_retrained", form=".1%", over=OWN),
        Column("preservation", "preservation_retrained", better=True, over=OWN),
        Column("converged", "probes_converged", form=".0%", about="share of the solvers that converged"),
        Column("LP-KL", "lp_kl", better=False, table=MSAE, spread="lp_kl_std"),
        Column("LP-Acc", "lp_accuracy", better=True, table=MSAE, spread="lp_accuracy_std"),
    ),
))  # fmt: skip
