"""Train, val and test: which of them a data set brings along, and how the others are cut from its train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from sae_lightning.data.errors import DataError, tell

SPLITS = ("train", "val", "test")
USUAL = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
OTHER = {"train": ("training",), "val": ("dev",), "test": ("testing", "eval", "evaluation")}  # taken, and said
BESIDE = ("set", "data", "images", "imgs", "split")  # words that a split's name may have beside it


def split_of_name(name: str) -> str | None:
    """The split that a folder or a data set's split is called by: Train, training, val_images …; None for others."""
    words = [word for word in re.split(r"[\s_.-]+", name.casefold()) if word and word not in BESIDE]
    word = words[0].removesuffix("set") if len(words) == 1 else ""
    return next((split for split in SPLITS if word in USUAL[split] + OTHER[split]), None)


def by_split(names: Iterable[str]) -> dict[str, str]:
    """The splits that ``names`` call, each with its name: the usual one, or else the only other one."""
    names = list(names)
    found = {}
    for split in SPLITS:
        usual = [name for name in USUAL[split] if name in names]
        others = [name for name in names if split_of_name(name) == split]
        if usual or len(others) == 1:
            found[split] = (usual or others)[0]
    return found


def check_split(split: str) -> None:
    """DataError unless ``split`` is train, val or test."""
    if split not in SPLITS:
        raise DataError(f"Unknown split '{split}'; choose one of {', '.join(SPLITS)}.")


def choose_splits(
    wanted: Mapping[str, str | None], present: Iterable[str], where: str, setting: str = "data.splits"
) -> dict[str, str]:
    """The data set's own name for each of our splits; a split that is to be cut from train has the name of train.

    ``wanted`` maps our splits to names, or to null: then the usual names are looked for among ``present``, less
    those that another split has taken; a name that is less usual (Train, training) is said. DataError, which names
    ``setting``, when a wanted name or train is not among ``present``.
    """
    present = list(present)
    given = {split: name for split, name in wanted.items() if name is not None}
    taken = {name for name in given.values() if name in present}
    called = by_split(present) | by_split(name for name in present if name not in taken)
    called = {split: name for split, name in called.items() if split == "train" or name not in taken}
    for split, name in given.items():
        if name not in present and not (split in called and name in USUAL[split]):
            raise DataError(f"{where} has no split '{name}'; it has {present}. Change {setting}.")
    train = given.get("train") if given.get("train") in present else called.get("train")
    if train is None:
        raise DataError(f"{where} has no split 'train'; it has {present}. Name one with {setting}.train.")
    names = {"train": train}
    for split in SPLITS[1:]:
        own = given.get(split) if given.get(split) in present else called.get(split)
        names[split] = own if own is not None else train
    for split, name in names.items():
        if name == called.get(split) and name not in USUAL[split]:
            tell(f"'{name}' of {where} is taken for its {split} split; name another with {setting}.{split}.")
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
