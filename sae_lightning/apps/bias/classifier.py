"""The linear classifier that is explained: its training, how sure it may be, and how good it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from sae_lightning.apps.intervals import RESAMPLES, mean_interval
from sae_lightning.benchmark.probes import fit
from sae_lightning.saes import SAE

FOLDS = 5


class Classifier(NamedTuple):
    """logit = features · weights + intercept, for raw features of whole images; ``weights`` [d_in] float64.

    ``slope`` times the logit is calibrated, where a slope below 1 means that the logit is too sure of itself.
    """

    weights: np.ndarray
    intercept: float
    slope: float = 1.0

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[n] float64 of ``features`` [n, d_in]; positive: the positive class."""
        return features @ self.weights + self.intercept


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    lo: float
    hi: float


def train(features: np.ndarray, truth: np.ndarray, sae: SAE, strength: float = 1.0, seed: int = 42) -> Classifier:
    """Logistic regression (``strength`` is its C) on ``features`` [n, d_in] as the SAE's normaliser makes them.

    So C means the same for every encoder; the normaliser is folded into the weights. The slope is that of a logistic
    regression of ``truth`` [n] bool on logits of images left out of the fit, over 5 folds drawn by ``seed``.
    ValueError for a class of fewer than 5 images.
    """
    if min(truth.sum(), (~truth).sum()) < FOLDS:
        raise ValueError(
            f"A classifier needs {FOLDS} training images of each class or more; got {truth.sum()} positive and "
            f"{(~truth).sum()} negative ones. Choose other classes with app.positive and app.negative."
        )
    mean, std = sae.normalizer.mean.double().numpy(), float(sae.normalizer.std)
    x = (features - mean) / std
    left_out = np.empty(len(truth))
    for inside, outside in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, truth):
        left_out[outside] = _fitted(x[inside], truth[inside], strength).decision_function(x[outside])
    calibration = LogisticRegression(C=1e6).fit(left_out[:, None], truth)
    model = _fitted(x, truth, strength)
    weights = np.asarray(model.coef_[0], dtype=np.float64) / std
    slope = max(0.0, float(calibration.coef_[0, 0]))
    return Classifier(weights, float(model.intercept_[0]) - float(mean @ weights), slope)


def _fitted(x: np.ndarray, truth: np.ndarray, strength: float) -> LogisticRegression:
    return fit(x, truth.astype(np.int64), C=strength, max_iter=5000)


def direct_effects(classifier: Classifier, sae: SAE) -> np.ndarray:
    """Change of the logit [d_sae] float64 by one unit of each latent's magnitude: std · W_dec · weights."""
    rows = sae.W_dec.detach().double().numpy()
    return float(sae.normalizer.std) * (rows @ classifier.weights)


def mean_of(values: np.ndarray, seed: int = 42) -> Interval:
    """The mean of ``values`` [n] with its percentile bootstrap interval."""
    return Interval(float(np.mean(values)), *mean_interval(values, seed))


def f1_of(predicted: np.ndarray, truth: np.ndarray, seed: int = 42) -> Interval:
    """F1 of the positive class with its percentile bootstrap interval; 0 where nothing is positive.

    Resampled are the counts of the four outcomes, which is resampling the images.
    """
    counts = np.array([(predicted & truth).sum(), (predicted ^ truth).sum(), (~predicted & ~truth).sum()])
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    both, differ, _ = np.concatenate([counts[None], drawn]).T
    f1 = 2 * both / np.maximum(2 * both + differ, 1)
    lo, hi = np.quantile(f1[1:], (0.025, 0.975))
    return Interval(float(f1[0]), float(lo), float(hi))
