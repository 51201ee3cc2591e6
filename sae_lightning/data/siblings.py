"""Which classes are siblings: ImageNet's by WordNet's hypernyms, any others by a file of one's own.

``assets/siblings/imagenet.json`` is made by ``experiments/siblings``.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sae_lightning.data.errors import DataError, brief

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "siblings" / "imagenet.json"
KNOWN = 0.95  # share of class names that are ImageNet's, from which a data set is taken to be (a part of) it
SMALLEST = 3  # ViSAEBench §4.4

Groups = dict[str, list[Any]]  # names of classes, or labels where a name is not one class's alone


def sibling_groups(class_names: Sequence[str], path: str | None = None) -> Groups:
    """The groups in the file ``path`` (``data.siblings``), else ImageNet's; none where neither is to be had."""
    return imagenet_groups(class_names) if path is None else own_groups(path, class_names)


def own_groups(path: str, class_names: Sequence[str]) -> Groups:
    """A JSON object from groups' names to lists of class names.

    DataError when the file cannot be read, is something else, or names a class twice in a group or one that
    ``class_names`` lack.
    """
    try:
        groups = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"data.siblings={path} cannot be read ({brief(error)}); it must be a JSON file.") from error
    if not isinstance(groups, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups.values()
    ):
        raise DataError(f'data.siblings={path} must be an object such as {{"cats": ["lion", "tiger", "lynx"]}}.')
    twice = next((group for group, names in groups.items() if len(set(names)) < len(names)), None)
    if twice is not None:
        raise DataError(f"data.siblings={path} names a class twice in its group '{twice}'; name each once.")
    known = set(class_names)
    unknown = sorted({name for names in groups.values() for name in names} - known)
    if unknown:
        raise DataError(
            f"data.siblings={path} names classes that the data set lacks: {', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. Its classes are called "
            f"{', '.join(class_names[:5])}{' …' if len(class_names) > 5 else ''}."
        )
    return groups


def imagenet_groups(class_names: Sequence[str]) -> Groups:
    """WordNet's sibling groups among ``class_names``, as the names are given; each with at least three classes.

    Classes may be called by wnid (``n01440764``), by all their words (``tench, Tinca tinca``) or by the first
    (``tench``), with blanks or underscores. Classes of the same name (there are two called ``crane``) are taken to be
    in the order of their wnids, and are given by their label. Empty unless 95 % of the names are ImageNet-1K's.
    """
    wnids = imagenet_wnids(class_names)
    if not wnids or sum(wnid is not None for wnid in wnids) < KNOWN * len(wnids):
        return {}
    often = Counter(class_names)
    called: dict[str, str | int] = {}
    for label, (wnid, name) in enumerate(zip(wnids, class_names, strict=True)):
        if wnid is not None:
            called[wnid] = name if often[name] == 1 else label
    found = {
        group["name"]: [called[wnid] for wnid in group["classes"] if wnid in called]
        for group in _shipped()["groups"].values()
    }
    return {name: classes for name, classes in found.items() if len(classes) >= SMALLEST}


def imagenet_wnids(class_names: Sequence[str]) -> list[str | None]:
    """The wnid of each class name, or None where it is none of ImageNet-1K's."""
    called = _called()
    found: list[str | None] = []
    taken: set[str] = set()
    for name in class_names:
        free = [wnid for wnid in called.get(name.replace("_", " ").strip(), ()) if wnid not in taken]
        found.append(free[0] if free else None)
        taken.update(free[:1])
    return found


def released_groups(class_names: Sequence[str]) -> Groups:
    """The groups of the package ``visaebench``, by label; none unless 95 % of ``class_names`` are ImageNet-1K's.

    They are read from its files, where it is installed. A class that is not there is in its group by wnid. DataError
    where the package, or its list, is not there.
    """
    wnids = imagenet_wnids(class_names)
    if not wnids or sum(wnid is not None for wnid in wnids) < KNOWN * len(wnids):
        return {}
    found = importlib.util.find_spec("visaebench")  # does not import it
    path = Path(str(found.origin)).parent / "data" / "wordnet_pairs.json" if found else None
    if path is None or not path.is_file():
        raise DataError(
            "The sibling groups of metrics.protocol=released are those of the package visaebench, which is not "
            "installed; pip install 'visaebench>=0.1', or leave the part out with metrics.absorption=null."
        )
    groups = json.loads(path.read_text(encoding="utf-8"))["sibling_groups"]
    label_of = {wnid: label for label, wnid in enumerate(wnids) if wnid is not None}
    order = sorted(_shipped()["names"])  # of ImageNet's numbers
    return {
        name: [label_of.get(order[number], order[number]) for number in group["class_indices"]]
        for name, group in groups.items()
    }


@cache
def _shipped() -> dict[str, Any]:
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


@cache
def _called() -> dict[str, list[str]]:
    """The wnids that a name may mean, the likelier first: the wnid itself, all of a class's words, the first one."""
    names: dict[str, str] = _shipped()["names"]
    called = {wnid: [wnid] for wnid in names}
    for text_of in (str, lambda words: words.partition(", ")[0]):
        for wnid, words in names.items():
            meant = called.setdefault(text_of(words), [])
            meant.extend([] if wnid in meant else [wnid])
    return called
