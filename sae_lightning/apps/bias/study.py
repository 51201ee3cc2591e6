"""One classifier explained by latents: its scores, its weights on them, and the statistics of their magnitudes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from sae_lightning.apps.bias.classifier import Classifier, Interval, direct_effects, f1_of, mean_of, train
from sae_lightning.apps.bias.edits import Wholes
from sae_lightning.apps.bias.statistics import Association, auc, excess, false_discovery, of_latents
from sae_lightning.saes import SAE

LEVEL = 0.05  # of the false discovery rate
FIRES = 10  # images that a latent fires on at least to be tested


class Study(NamedTuple):
    """A classifier on held-out images.

    ``table`` has one row a latent: ``images`` (that it fires on), ``effect`` (of one unit on the logit), ``auc`` (of
    the predicted classes' magnitudes), ``truth`` (of the true classes'), ``errors`` (of the predicted classes' within
    each true one) and ``excess`` (see ``bias_statistics.excess``), each of these with _lo, _hi and _q; NaN in latents
    that fire on fewer than 10 images.
    """

    classifier: Classifier
    effects: np.ndarray
    logits: np.ndarray
    truth: np.ndarray
    accuracy: Interval
    f1: Interval
    table: pd.DataFrame

    @property
    def predicted(self) -> np.ndarray:
        """[n] bool."""
        return self.logits > 0

    @property
    def tested(self) -> np.ndarray:
        """Latents that fire often enough, by number."""
        return np.flatnonzero(self.table["images"] >= FIRES)

    @property
    def found(self) -> np.ndarray:
        """Latents with a bias beyond the task at a false discovery rate of 5 %, the surest first."""
        return self.ranked[(self.table["excess_q"].to_numpy() < LEVEL)[self.ranked]]

    @property
    def ranked(self) -> np.ndarray:
        """Tested latents by how many standard errors their excess is from zero."""
        error = (self.table["excess_hi"] - self.table["excess_lo"]).to_numpy()
        z = np.abs(self.table["excess"].to_numpy()) / error
        known = np.flatnonzero(~np.isnan(z))
        return known[np.argsort(-z[known], kind="stable")]

    def associated(self, each: int) -> np.ndarray:
        """The ``each`` latents that go most with the positive prediction, then those that go most with the negative."""
        value, q = self.table["auc"].to_numpy(), self.table["auc_q"].to_numpy()
        order = np.argsort(np.where(np.isnan(value), 0.5, value), kind="stable")
        sure = q[order] < LEVEL
        return np.concatenate(
            [order[sure & (value[order] > 0.5)][::-1][:each], order[sure & (value[order] < 0.5)][:each]]
        )


def study(
    features: np.ndarray, truth: np.ndarray, held: Wholes, held_truth: np.ndarray, sae: SAE, strength: float = 1.0,
    seed: int = 42,
) -> Study:  # fmt: skip
    """Train on ``features`` [n, d_in] of ``truth`` [n], explain on the ``held`` images; ``strength`` is C."""
    classifier = train(features, truth, sae, strength, seed)
    logits, effects = classifier.logits(held.features), direct_effects(classifier, sae)
    fires = np.asarray((held.magnitudes > 0).sum(0)).ravel()
    table = pd.DataFrame({"latent": np.arange(sae.d_sae), "images": fires, "effect": effects})
    columns = {
        "auc": auc(held.magnitudes, logits > 0),
        "truth": auc(held.magnitudes, held_truth),
        "errors": auc(held.magnitudes, logits > 0, held_truth),
        "excess": excess(held.magnitudes, classifier.slope * logits, held_truth),
    }
    for name, association in columns.items():
        table = table.assign(**_columns(name, of_latents(association, fires >= FIRES)))
    predicted = logits > 0
    return Study(
        classifier, effects, logits, held_truth, mean_of(predicted == held_truth, seed),
        f1_of(predicted, held_truth, seed), table,
    )  # fmt: skip


def _columns(name: str, found: Association) -> dict[str, np.ndarray]:
    return {name: found.value, f"{name}_lo": found.lo, f"{name}_hi": found.hi, f"{name}_q": false_discovery(found.p)}
