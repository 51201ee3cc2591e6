"""The samples in a tar file: members that share a key, with a picture and perhaps a label and a caption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lightning.data.errors import DataError
from sae_lightning.data.labels import class_name
from sae_lightning.data.scan import LITTER, SUFFIXES
from sae_lightning.data.tar_headers import CutShortError, Member, Window, members

LISTED = 8  # keys of a .json that are listed where none is the label


@dataclass(slots=True)
class Sample:
    """A picture in a tar: where its bytes are, and what the members beside it say; ``key`` is their common name.

    ``passed_over`` names what may hold the label of a sample that has none: members, and keys of a .json.
    """

    key: str
    offset: int = -1
    size: int = 0
    label: str | None = None
    caption: str | None = None
    passed_over: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)  # members that can be read, by suffix
    others: list[str] = field(default_factory=list)  # suffixes of those that cannot


@dataclass(frozen=True)
class Keys:
    """Which ``member`` holds the label, and where .json holds label and caption if there is no such member or .txt."""

    label: str
    caption: str
    member: str = "cls"


def samples(path: Path, keys: Keys, cut_short: bool = False) -> tuple[list[Sample], str | None]:
    """The samples of the tar ``path`` that have a picture, in the order of their first members.
    With ``cut_short`` also those of an archive whose end is missing, and what is wrong with it; the last one is left
    out where it has fewer members than the one before.

    A member's key is its path up to the first dot of its last part; what follows the last dot says what it is. Raises
    DataError naming ``path`` when a sample has two pictures or two labels, or a json or text that cannot be read.
    """
    found: dict[str, Sample] = {}
    fault = None
    window = Window(path)
    try:
        for member in members(path, window):
            key, suffix = split_name(member.name)
            if not key:
                continue
            sample = found.get(key)
            if sample is None:
                sample = found[key] = Sample(key)
            if suffix.rpartition(".")[2] in SUFFIXES:
                if sample.offset >= 0:
                    raise DataError(
                        f"{path} holds two pictures of sample '{key}'; pack one picture a sample, or give each its "
                        "own key (the name up to the first dot)."
                    )
                sample.offset, sample.size = member.offset, member.size
            elif suffix.rpartition(".")[2] in (keys.member.rpartition(".")[2], "txt", "json"):
                text = _text(suffix, path, member, window, keys)
                if text is not None:
                    sample.texts[suffix] = text
            else:
                sample.others.append(suffix)
    except CutShortError as error:
        if not cut_short:
            raise
        fault = str(error)
    finally:
        window.close()
    if fault is not None and len(found) > 1 and _lacks(*list(found.values())[-2:]):
        found.popitem()
    pictured = [sample for sample in found.values() if sample.offset >= 0]
    for sample in pictured:
        _describe(sample, path, keys)
    return pictured, fault


def _lacks(whole: Sample, last: Sample) -> bool:
    """Whether ``last`` has fewer members than the one before."""
    return len(last.texts) + len(last.others) + (last.offset >= 0) < (
        len(whole.texts) + len(whole.others) + (whole.offset >= 0)
    )


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix (lower case) of a member: ``a/b.seg.PNG`` is ("a/b", "seg.png"); no key for hidden files."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, suffix = last.partition(".")
    if last in LITTER or (folder and not LITTER.isdisjoint(folder.split("/"))):
        return "", suffix.lower()
    return (f"{folder}{slash}{stem}" if stem else "", suffix.lower())


def _text(suffix: str, path: Path, member: Member, window: Window, keys: Keys) -> str | None:
    """What the member says; DataError, but None for a .txt or .json of another name, which may be anything."""
    try:
        return window.read(member.offset, member.size).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if suffix in ("txt", "json") or _holds_label(suffix, keys.member):
            raise _unreadable(member.name, path, error) from error
        return None


def _holds_label(suffix: str, member: str) -> bool:
    """Whether ``member`` is the last of the suffix, but perhaps for .txt: cls, v2.cls, cls.txt."""
    return f".{suffix.removesuffix('.txt')}".endswith(f".{member}")


def _describe(sample: Sample, path: Path, keys: Keys) -> None:
    """Take label and caption from the sample's texts, and note what may be meant where there is no label."""
    texts, sample.texts = sample.texts, {}
    labels = {suffix: text for suffix, text in texts.items() if _holds_label(suffix, keys.member)}
    captions = {s: text for s, text in texts.items() if s not in labels and s.rpartition(".")[2] == "txt"}
    held = {s: _parsed(s, text, sample.key, path) for s, text in texts.items() if s.rpartition(".")[2] == "json"}
    if keys.member in labels or len(set(labels.values())) == 1:
        sample.label = class_name(labels.get(keys.member, next(iter(labels.values()))))
    elif labels:
        one, two = list(labels)[:2]
        raise DataError(
            f"Sample '{sample.key}' in {path} has two labels, .{one} and .{two}; choose with data.label_suffix={one}."
        )
    sample.caption = captions.get("txt", next(iter(captions.values())) if len(captions) == 1 else None)
    for suffix in sorted(held, key=lambda s: s != "json"):
        if sample.label is None and held[suffix].get(keys.label) is not None:
            sample.label = _label_of_json(held[suffix][keys.label], suffix, sample.key, path, keys)
        if sample.caption is None and held[suffix].get(keys.caption) is not None:
            sample.caption = str(held[suffix][keys.caption])
    if sample.label is None:
        names = [f".{suffix}" for suffix in (*sample.others, *captions)]
        names += [f"key '{key}' of .{s}" for s in held for key in list(held[s])[:LISTED] if key != keys.caption]
        sample.passed_over = tuple(names)
    sample.others = []


def _parsed(suffix: str, text: str, key: str, path: Path) -> Mapping[str, Any]:
    """The object in a .json; DataError for another content, but an empty one for a .json of another name."""
    try:
        held = json.loads(text)
        if not isinstance(held, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        if suffix == "json":
            raise _unreadable(f"{key}.json", path, error) from error
        return {}
    return held


def _label_of_json(value: Any, suffix: str, key: str, path: Path, keys: Keys) -> str:
    if isinstance(value, dict | list) or (isinstance(value, float) and not value.is_integer()):
        raise DataError(
            f"'{key}.{suffix}' in {path} holds {str(value)[:60]} under '{keys.label}'; labels must be whole numbers or "
            "texts. Name another key with data.label_key."
        )
    return str(value) if isinstance(value, bool) else class_name(value)


def _unreadable(name: str, path: Path, error: Exception) -> DataError:
    return DataError(f"'{name}' in {path} cannot be read ({error}); repair or remove it.")
