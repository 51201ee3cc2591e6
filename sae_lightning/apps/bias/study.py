"""One classifier explained by latents: its scores, its weights on them, and the statistics of their magnitudes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from omegaconf import ListConfig
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from sae_lightning.apps.edits import WholeImages
from sae_lightning.apps.statistics import (
    RESAMPLES,
    Association,
    auc,
    excess,
    false_discovery,
    mean_interval,
    of_latents,
)
from sae_lightning.data import DataError, ImageData, load_images
from sae_lightning.features.store import FeatureStore
from sae_lightning.metrics.probes import fit
from sae_lightning.runs.run import TOKENS, Run
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
    features: np.ndarray, truth: np.ndarray, held: WholeImages, held_truth: np.ndarray, sae: SAE, strength: float = 1.0,
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


class Task(NamedTuple):
    """``positive`` and ``negative`` are class names, ``title`` what pages call the two sides."""

    positive: list[str]
    negative: list[str]
    title: tuple[str, str]


class Members(NamedTuple):
    """The images of a split that belong to a task: ``rows`` [n] of the store, ascending, and ``truth`` [n] bool."""

    rows: np.ndarray
    truth: np.ndarray


def task_of(
    classes: Sequence[str], siblings: Mapping[str, Sequence[str]], positive: object = None, negative: object = None
) -> Task:
    """The task that ``positive`` and ``negative`` name: a class, a sibling group, or a list of these, each.

    null for positive: the second of two classes; null for negative: all classes that are not positive. ValueError for
    an unknown name, a class on both sides, or an empty side.
    """
    if positive is None and len(classes) != 2:
        raise ValueError(
            f"The data set has {len(classes)} classes ({', '.join(classes[:12])}{' …' if len(classes) > 12 else ''}); "
            "name the two sides of the task with app.positive=… and app.negative=…, each a class, a sibling group or "
            "a list of these."
        )
    yes = [classes[1]] if positive is None else _classes(positive, classes, siblings)
    no = [c for c in classes if c not in yes] if negative is None else _classes(negative, classes, siblings)
    both = sorted(set(yes) & set(no))
    if both or not yes or not no:
        raise ValueError(
            f"The two sides of the task must be different classes; app.positive names {yes} and app.negative {no}."
        )
    other = f"not {_title(positive)}" if negative is None and positive is not None else None
    return Task(yes, no, (_title(positive or yes), other or _title(negative or no)))


def _names(side: object) -> list[str]:
    return [str(name) for name in side] if isinstance(side, (list, tuple, ListConfig)) else [str(side)]


def _title(side: object) -> str:
    return " or ".join(_names(side))


def _classes(side: object, classes: Sequence[str], siblings: Mapping[str, Sequence[str]]) -> list[str]:
    found: list[str] = []
    for name in _names(side):
        if name not in classes and name not in siblings:
            groups = f", or a sibling group of {', '.join(siblings)}" if siblings else ""
            raise ValueError(f"There is no class '{name}'; choose of {', '.join(classes[:50])}{groups}.")
        found += [name] if name in classes else list(siblings[name])
    return list(dict.fromkeys(found))


def members(labels: np.ndarray, classes: Sequence[str], task: Task) -> Members:
    """The images of ``labels`` [n] (indices of ``classes``) on either side; ValueError where a side has none."""
    where = {name: i for i, name in enumerate(classes)}
    truth = np.isin(labels, [where[name] for name in task.positive])
    rows = np.flatnonzero(truth | np.isin(labels, [where[name] for name in task.negative]))
    truth = truth[rows]
    for side, count in zip(task.title, (truth.sum(), (~truth).sum()), strict=True):
        if count < 2:
            raise ValueError(f"There are {count} images of '{side}'; the task needs two of each side at least.")
    return Members(rows, truth)


def labelled(opened: Run, split: str, attribute: str | None) -> tuple[np.ndarray, list[str], dict[str, list[str]]]:
    """Labels [n] of the store of ``split``, the class names, and the sibling groups.

    With ``attribute`` labels are that column of the Hugging Face data set, whatever the SAE's run called its label.
    DataError for an attribute of another kind of data, or where its images are not found.
    """
    store = opened.store(split)
    if attribute is None:
        try:
            siblings = opened.images(split).sibling_groups
        except DataError:
            siblings = {}
        return store.labels.numpy(), list(store.class_names), siblings
    if opened.source.data["source"] != "hf":
        raise DataError(
            f"app.attribute={attribute} is a column of a Hugging Face data set, but {opened.name} was trained on "
            f"data.source={opened.source.data['source']}; use app.positive and app.negative."
        )
    images = _relabelled(opened, split, attribute, store)
    return images.labels, images.class_names, {}


def _relabelled(opened: Run, split: str, attribute: str, store: FeatureStore) -> ImageData:
    """The store's images with the labels of another column; cut off and drawn by label, they are looked up by id."""
    whole = {**opened.source.data, "label_column": attribute, "limit": None, "shuffle": False, "held_out": 0.0}
    wanted = set(store.image_ids)
    for source in dict.fromkeys((split, "train")):
        try:
            images = load_images(whole, source)
        except DataError:
            if source == "train":
                raise
            continue
        if isinstance(images, ImageData) and wanted <= set(images.image_ids):
            return images.take(images.index_of(store.image_ids))
    raise DataError(f"The images of {opened.name}'s {split} store are not all among those that have '{attribute}'.")


def batches(store: FeatureStore, rows: np.ndarray) -> Iterator[Tensor]:
    """Raw features [b, P, d_in] of the images ``rows``."""
    step = max(1, TOKENS // store.n_patches)
    return (store.features(rows[i : i + step]) for i in range(0, len(rows), step))
