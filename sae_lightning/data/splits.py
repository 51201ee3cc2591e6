"""Train, val and test: which of them a data set brings along, and how the others are cut from its train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from sae_lightning.data.errors import DataError

SPLITS = ("train", "val", "test")
USUAL = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def check_split(split: str) -> None:
    """DataError unless ``split`` is train, val or test."""
    if split not in SPLITS:
        raise DataError(f"Unknown split '{split}'; choose one of {', '.join(SPLITS)}.")


def choose_splits(wanted: Mapping[str, str | None], present: Iterable[str], where: str) -> dict[str, str]:
    """The data set's own name for each of our splits; a split that is to be cut from train has the name of train.

    ``wanted`` maps our splits to names, or to null: then the usual names are looked for among ``present``, less
    those that another split has taken. DataError when a wanted name or train is not among ``present``.
    """
    present = list(present)
    missing = [name for name in wanted.values() if name is not None and name not in present]
    if missing:
        raise DataError(f"{where} has no split '{missing[0]}'; it has {present}. Change data.splits.")
    train = wanted.get("train") or next((name for name in USUAL["train"] if name in present), None)
    if train is None:
        raise DataError(f"{where} has no split 'train'; it has {present}. Name one with data.splits.train.")
    names = {"train": train}
    taken = {train, *wanted.values()}
    for split in SPLITS[1:]:
        free = [name for name in USUAL[split] if name in present and name not in taken]
        names[split] = wanted.get(split) or (free[0] if free else train)
    return names


def missing_splits(names: Mapping[str, str]) -> list[str]:
    """The splits that are cut from train: val, test, both or none."""
    return [split for split in SPLITS[1:] if names[split] == names["train"]]


def train_share(held_out: Mapping[str, float]) -> float:
    """What the shares ``held_out`` leave of train; DataError when one is impossible or nothing is left."""
    rest = 1.0 - sum(held_out.values())
    if min(held_out.values(), default=0.0) < 0 or rest <= 1e-9:
        shares = ", ".join(f"{split} {share:g}" for split, share in held_out.items())
        raise DataError(f"The shares to cut from train ({shares}) must be at least 0 and add up to less than 1.")
    return rest


def cut(labels: np.ndarray, held_out: Mapping[str, float], split: str, seed: int) -> np.ndarray:
    """Indices [m] of ``split`` when the shares ``held_out`` of every class are cut from ``labels`` [n]."""
    shares = {"train": train_share(held_out), **held_out}
    return split_indices(labels, shares, seed)[split]


def split_indices(labels: np.ndarray, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Disjoint, stratified, seeded parts of ``range(len(labels))``: each class is divided by ``shares``."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in shares}
    edges = np.cumsum(list(shares.values()))[:-1]
    order = np.argsort(labels, kind="stable")  # members of a class side by side, each class in ascending order
    _, starts = np.unique(labels[order], return_index=True)
    for group in np.split(order, starts[1:]):
        members = rng.permutation(group)
        cuts = np.round(edges * len(members)).astype(int)
        for name, piece in zip(shares, np.split(members, cuts), strict=True):
            parts[name].append(piece)
    return {name: np.sort(np.concatenate(pieces)) for name, pieces in parts.items()}
