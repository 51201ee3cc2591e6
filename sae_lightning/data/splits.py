"""Train, val and test: which of them a data set brings along, and how the others are cut from its train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sae_lightning.data.errors import DataError, tell

SPLITS = ("train", "val", "test")
USUAL = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
OTHER = {"train": ("training",), "val": ("dev",), "test": ("testing", "eval", "evaluation")}  # taken, and said
BESIDE = ("set", "data", "images", "imgs", "split")  # words that a split's name may have beside it


def split_of_name(name: str) -> str | None:
    """The split that a folder or a data set's split is called by: Train, training, val_images, train2017; else None."""
    split, rest = _split_and_rest(name)
    return None if rest else split


def _split_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The split that one of the name's words means, and its other words but for numbers and such as ``images``."""
    words = [word.rstrip("0123456789") for word in re.split(r"[\s_.-]+", name.casefold())]
    words = [word for word in words if word and word not in BESIDE]
    for place, word in enumerate(words):
        split = next((s for s in SPLITS if word.removesuffix("set") in USUAL[s] + OTHER[s]), None)
        if split is not None:
            return split, (*words[:place], *words[place + 1 :])
    return None, tuple(words)


def by_split(names: Iterable[str]) -> dict[str, str]:
    """The splits that ``names`` call, each with its name: the usual one, or else the only other one.

    Where none calls train so, also names that differ by the split alone: seg_train, seg_test.
    """
    names = list(names)
    found = _by_split(names, ())
    if "train" in found:
        return found
    rests = dict.fromkeys(rest for split, rest in map(_split_and_rest, names) if split == "train")
    alike = [pair for pair in (_by_split(names, rest) for rest in rests) if "train" in pair and len(pair) > 1]
    return alike[0] if len(alike) == 1 else found


def _by_split(names: Sequence[str], rest: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for split in SPLITS:
        usual = [name for name in USUAL[split] if name in names and not rest]
        others = [name for name in names if _split_and_rest(name) == (split, rest)]
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
        if name == called.get(split) and name not in (given.get(split), *USUAL[split]):
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
    """Indices [m] of ``split`` when the shares ``held_out`` of every class are cut from ``labels`` [n].

    Says how many images the splits have where classes are so small that shares are not kept. DataError when ``split``
    has none.
    """
    shares = {"train": train_share(held_out), **held_out}
    parts = split_indices(labels, shares, seed)
    sizes = np.unique(labels, return_counts=True)[1]
    found = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
    wanted = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
    of = f"{len(labels)} images of {len(sizes)} class{'es' if len(sizes) > 1 else ''}"
    if not len(parts[split]):
        raise DataError(
            f"Cutting {of} into the shares {wanted} gives {found}, so {split} is empty; change data.shares or "
            "data.held_out, or bring more images."
        )
    if held_out and not _rounding_serves(sizes, list(shares.values())):
        tell(f"Of {of} (the smallest has {sizes.min()}), the shares {wanted} cut {found}.")
    return parts[split]


def split_indices(labels: np.ndarray, shares: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Disjoint, stratified, seeded parts of ``range(len(labels))``: each class is divided by ``shares``.

    Of a class of three or more every part has at least one, unless its share is 0.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in shares}
    order = np.argsort(labels, kind="stable")  # members of a class side by side, each class in ascending order
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    counts = class_counts(sizes, list(shares.values()), seed)
    for group, count in zip(np.split(order, starts[1:]), counts, strict=True):
        pieces = np.split(rng.permutation(group), np.cumsum(count)[:-1])
        for name, piece in zip(shares, pieces, strict=True):
            parts[name].append(piece)
    return {name: np.sort(np.concatenate(pieces)) for name, pieces in parts.items()}


def class_counts(sizes: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """How many of each class (of ``sizes`` [C]) go to each part, [C, n_parts].

    Rounded class by class where that serves, else by largest remainders over the whole set.
    """
    return _rounded(sizes, shares) if _rounding_serves(sizes, shares) else _by_largest_remainders(sizes, shares, seed)


def _rounded(sizes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    inner = np.round(np.cumsum(shares)[:-1] * sizes[:, None]).astype(np.int64)
    return np.diff(inner, axis=1, prepend=0, append=sizes[:, None])


def _rounding_serves(sizes: np.ndarray, shares: Sequence[float]) -> bool:
    """Whether rounding in each class leaves every part one of each class of three, and within a tenth of its share."""
    counts, wanted = _rounded(sizes, shares), np.array(shares) > 0
    lacking = (counts[sizes >= 3][:, wanted] == 0).any()
    exact = sizes.sum() * np.array(shares)
    return not lacking and bool((np.abs(counts.sum(0) - exact) <= np.maximum(0.1 * exact, 1)).all())


def _by_largest_remainders(sizes: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """[C, n_parts]: the whole shares of each class, at least one of three; the rest goes to parts that the set owes.

    Of it the largest fractions come first, and equal ones as ``seed`` draws them.
    """
    rng = np.random.default_rng(seed)
    exact = sizes[:, None] * np.array(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    wanted = np.array(shares) > 0
    counts[(sizes >= 3)[:, None] & wanted & (counts == 0)] = 1
    while (excess := counts.sum(1) > sizes).any():  # where there are more parts to serve than images above the shares
        counts[excess, counts[excess].argmax(1)] -= 1
    left = sizes - counts.sum(1)
    owed = np.maximum(_apportioned(int(sizes.sum()), shares) - counts.sum(0), 0)
    open_to = wanted & (counts < exact - 1e-9)
    rows, columns = np.nonzero(open_to)
    order = np.lexsort((rng.random(len(rows)), -np.round((exact - counts)[rows, columns], 9)))
    for within in (True, False):  # first as the set's totals have it, then what they leave
        for c, part in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
            if left[c] and open_to[c, part] and (owed[part] or not within):
                counts[c, part] += 1
                left[c] -= 1
                owed[part] -= within
                open_to[c, part] = False
    return counts


def _apportioned(total: int, shares: Sequence[float]) -> np.ndarray:
    """``total`` divided by ``shares`` into whole numbers, those with the largest fractions rounded up."""
    exact = total * np.array(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
