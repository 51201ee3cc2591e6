"""Which images a binary task is about, and what is true of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from omegaconf import ListConfig
from torch import Tensor

from sae_lightning.apps.opened import TOKENS, Opened
from sae_lightning.data import DataError, ImageData, load_images
from sae_lightning.features.ensure import plain
from sae_lightning.features.store import FeatureStore


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


def labelled(opened: Opened, split: str, attribute: str | None) -> tuple[np.ndarray, list[str], dict[str, list[str]]]:
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
    if opened.config.data.source != "hf":
        raise DataError(
            f"app.attribute={attribute} is a column of a Hugging Face data set, but {opened.name} was trained on "
            f"data.source={opened.config.data.source}; use app.positive and app.negative."
        )
    images = _relabelled(opened, split, attribute, store)
    return images.labels, images.class_names, {}


def _relabelled(opened: Opened, split: str, attribute: str, store: FeatureStore) -> ImageData:
    """The store's images with the labels of another column; cut off and drawn by label, they are looked up by id."""
    whole = plain(opened.config.data) | {"label_column": attribute, "limit": None, "shuffle": False, "held_out": 0.0}
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
