"""The samples in a tar file: members that share a key, with a picture and perhaps a label and a caption."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sae_lightning.data.errors import DataError
from sae_lightning.data.scan import SUFFIXES
from sae_lightning.data.tar_headers import Member, Window, members


@dataclass(slots=True)
class Sample:
    """A picture in a tar: where its bytes are, and what the members beside it say; ``key`` is their common name."""

    key: str
    offset: int = -1
    size: int = 0
    label: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Keys:
    """Under which keys a sample's .json holds its label and its caption, when there is no .cls or .txt."""

    label: str
    caption: str


def samples(path: Path, keys: Keys) -> list[Sample]:
    """The samples of the tar ``path`` that have a picture, in the order of their first members.

    A member's key is its path up to the first dot of its last part; what follows says what it is. Raises
    DataError naming ``path`` when a sample has two pictures, or a json or text that cannot be read.
    """
    found: dict[str, Sample] = {}
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
            elif suffix in ("cls", "txt", "json"):
                _describe(sample, suffix, path, member, window, keys)
    finally:
        window.close()
    return [sample for sample in found.values() if sample.offset >= 0]


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix (lower case) of a member: ``a/b.seg.PNG`` is ("a/b", "seg.png"); no key for hidden files."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, suffix = last.partition(".")
    return (f"{folder}{slash}{stem}" if stem else "", suffix.lower())


def _describe(sample: Sample, suffix: str, path: Path, member: Member, window: Window, keys: Keys) -> None:
    try:
        text = window.read(member.offset, member.size).decode("utf-8").strip()
        if suffix == "cls":
            sample.label = text
        elif suffix == "txt":
            sample.caption = text
        else:
            held = json.loads(text)
            if sample.label is None and held.get(keys.label) is not None:
                sample.label = str(held[keys.label])
            if sample.caption is None and held.get(keys.caption) is not None:
                sample.caption = str(held[keys.caption])
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise DataError(f"'{member.name}' in {path} cannot be read ({error}); repair or remove it.") from error
