"""Whether an SAE has found the latents that its features were made of, where these are known (``data=synthetic``)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lightning.features.synthetic import truth_of
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.saes.sae import SAE
from sae_lightning.saes.topk import TopK


def matched(directions: Tensor, decoder: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines of each of the true ``directions`` [n_true, d] with the nearest row of ``decoder`` [d_sae, d], and with
    the row that is its own when no two share one and the sum of cosines is largest (0 without any); and that row (-1).
    """
    one, other = (torch.nn.functional.normalize(t.double(), dim=1) for t in (directions, decoder))
    cosines = (one @ other.T).numpy()
    rows, latents = linear_sum_assignment(cosines, maximize=True)
    own, latent = np.zeros(len(cosines)), np.full(len(cosines), -1)
    own[rows], latent[rows] = cosines[rows, latents], latents
    return cosines.max(1), own, latent


def firing_f1(found: csr_matrix, true: csr_matrix, latent: np.ndarray) -> np.ndarray:
    """F1 [n_true] of the firing of each true latent's own one in the codes ``found`` [n, d_sae] against ``true``
    [n, n_true]; 0 without one, NaN where the true latent never fires.
    """
    has, f1 = latent >= 0, np.zeros(len(latent))
    fires, own = (true > 0)[:, has], (found > 0)[:, latent[has]]
    both, either = fires.multiply(own).sum(0).A1, fires.sum(0).A1 + own.sum(0).A1
    f1[has] = 2 * both / np.maximum(either, 1)
    return np.where((true > 0).sum(0).A1 > 0, f1, np.nan)


def codes_of(sae: SAE, batches: Iterable[Tensor]) -> csr_matrix:
    """Codes [n, d_sae] of all tokens of raw features [n, P, d_in]."""
    with torch.no_grad():
        return vstack([sae.encode(x.flatten(0, 1).float()).csr() for x in batches], format="csr")


def truth(run: ScoredRun, options: Options) -> list[Score]:
    """Recovery of the true directions and their firing; and that of an untrained TopK of the same size and L0."""
    known = truth_of(run.store())
    if known is None:
        return []
    codes = codes_of(run.sae, run.batches("Truth"))
    k = min(run.sae.d_sae, max(1, round(codes.nnz / codes.shape[0])))
    random = TopK(run.sae.d_in, run.sae.d_sae, k, normalizer=run.frame, seed=0).eval()
    scores = []
    for setting, sae in (("", run.sae), ("dictionary=random", random)):
        best, own, latent = matched(known.directions, sae.W_dec.detach())
        f1 = firing_f1(codes if sae is run.sae else codes_of(sae, run.batches("Random")), known.codes, latent)
        values = {
            "cosine": best.mean(), "matched_cosine": own.mean(), "recovered": (best > options["above"]).mean(),
            "f1": np.nanmean(f1),
        }  # fmt: skip
        parents = np.unique(known.parents[known.parents >= 0])
        if len(parents):
            values["f1_parents"] = np.nanmean(f1[parents])
        scores += [Score(f"truth_{name}", float(value), setting) for name, value in values.items()]
    return scores


def _columns(setting: str, over: str) -> tuple[Column, ...]:
    return (
        Column("cosine", "truth_cosine", setting, True, over=over, about="mean largest cosine of a true direction with "
               "a decoder row"),
        Column("one to one", "truth_matched_cosine", setting, True, over=over, about="the same where no two true "
               "directions share a row"),
        Column("recovered", "truth_recovered", setting, True, ".1%", over=over, about="share of true directions with "
               "such a cosine above a bound"),
        Column("F1", "truth_f1", setting, True, over=over, about="of the firing of the latents that were matched one "
               "to one against the true firing, mean over true latents"),
        Column("F1 of parents", "truth_f1_parents", setting, True, over=over, about="the same of those with children"),
    )  # fmt: skip


PART = register(Part(
    "truth", truth, title="The truth", about="Which of the latents that the features were made of have been found, and "
    "what a random dictionary gets.", undefined="what the features were made of is not known",
    columns=(*_columns("", "this SAE"), *_columns("dictionary=random", "random dictionary")),
))  # fmt: skip
