"""Train, val and test: which of them a data set brings along, and how the others are cut from its train."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.images import ImageData
from sae_lightning.registry import one_of

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
    one_of(split, SPLITS, "split", DataError)


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


def arrange(images: ImageData, cfg: Mapping[str, Any]) -> ImageData:
    """At most ``limit`` images, a fair share of every class, shuffled if ``shuffle``; both keys may be absent.

    Both draw from ``seed``, by default 0. Raises DataError for a limit below 1.
    """
    limit, seed = checked_limit(cfg.get("limit")), cfg.get("seed", 0)
    if limit is not None and limit < len(images):
        images = images.take(stratified_sample(images.labels, limit, seed))
    if cfg.get("shuffle"):
        rng = np.random.default_rng([seed, SPLITS.index(images.split)])
        images = images.take(rng.permutation(len(images)))
    return images


def checked_limit(limit: int | None) -> int | None:
    """``limit`` itself; DataError unless it is null or a whole number of at least 1."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError(f"data.limit={limit} must be null or a whole number of at least 1.")
    return limit


def stratified_sample(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sorted indices [size] of ``labels`` [n], of every class its share of them, rounded up or down."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(labels.size)  # a random order …
    order = order[np.argsort(labels[order], kind="stable")]  # … within each class
    counts = np.bincount(labels)
    exact = counts * size / labels.size
    quota = np.floor(exact).astype(np.int64)
    most_cut = np.argsort(-(exact - quota), kind="stable")
    quota[most_cut[: size - quota.sum()]] += 1
    place = np.arange(labels.size) - np.repeat(np.cumsum(counts) - counts, counts)  # of an image within its class
    return np.sort(order[place < np.repeat(quota, counts)])


UNLABELLED = "unlabelled"  # the one class of images without labels

WITHHELD = ("-1", "")  # what stands for a label that is not given, unless train has such a class


def class_name(label: object) -> str:
    """A label as the name of its class: composed Unicode (NFC), so that é is é however it was typed; 2.0 is 2."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return unicodedata.normalize("NFC", str(label))


def sorted_names(values: Iterable[object]) -> list[str]:
    """Different labels as class names: in numerical order if all are whole numbers, else by text."""
    names = {str(value) for value in values}
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def as_text(labels: pa.Array | pa.ChunkedArray, column: str) -> pa.Array:
    """Labels [n] as names of classes; missing ones stay missing, NaN is missing, whole-valued floats are numbers.

    DataError naming ``column`` when floats are not whole.
    """
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.combine_chunks()
    if pa.types.is_floating(labels.type):
        labels = labels.cast(pa.float64())
        labels = pc.if_else(pc.is_nan(labels), pa.scalar(None, pa.float64()), labels)
        try:
            labels = labels.cast(pa.int64())
        except pa.ArrowInvalid as error:
            broken = next(x for x in labels.to_pylist() if x is not None and not float(x).is_integer())
            raise DataError(
                f"{column} holds {broken:g}; numbers that are labels must be whole. Name another column with "
                "data.label_column, or say data.label_column=none."
            ) from error
    return pc.utf8_normalize(labels.cast(pa.string()), "NFC")


def positions(labels: pa.Array, class_names: Sequence[str]) -> np.ndarray:
    """The place [n] int64 of each label (a text) among the class names, all of which are known."""
    return pc.index_in(labels, value_set=pa.array(class_names, pa.string())).to_numpy().astype(np.int64)


def without_withheld(labels: pa.Array, of_train: Iterable[str]) -> pa.Array:
    """Labels [n] (texts), those that are withheld made missing: -1 and empty, where train has no such class."""
    classes = set(of_train)
    withheld = [text for text in pc.unique(labels).to_pylist() if text is not None and text.strip() in WITHHELD]
    none = pa.array([text for text in withheld if text not in classes], pa.string())
    return pc.if_else(pc.is_in(labels, none), pa.scalar(None, pa.string()), labels) if len(none) else labels


def tell_blank(where: str, of_train: Iterable[str]) -> None:
    """Say that some labels of train are empty: a class like any other, but hardly a meant one."""
    if any(not label.strip() for label in of_train):
        tell(f"Some labels in the train split of '{where}' are empty; they are taken for a class of their own.")


def tell_unseen(where: str, split: str, labels: Iterable[str], of_train: Iterable[str]) -> None:
    """Say which classes of ``split`` train lacks."""
    unseen = sorted_names(set(labels) - set(of_train))
    if unseen:
        tell(
            f"Of the classes in the {split} split of '{where}', train lacks {len(unseen)}: "
            f"{', '.join(unseen[:10])}{' …' if len(unseen) > 10 else ''}."
        )
