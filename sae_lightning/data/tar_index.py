"""The samples in tar files and where their bytes lie: read from the headers once, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from sae_lightning.data.contents import keep_table
from sae_lightning.data.errors import DataError, tell
from sae_lightning.data.folder import LITTER, SUFFIXES, size_and_times
from sae_lightning.data.splits import class_name
from sae_lightning.files import CacheError, cache_folder

BLOCK = 512  # bytes of a tar's header
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


class CutShortError(DataError):
    """An archive whose end is missing."""


class Member(NamedTuple):
    """A regular file in a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files in the tar ``path`` in order, links as the files they lead to.

    Raises DataError naming ``path`` when it is compressed or no tar at all, and CutShortError after the last whole
    member when its end is missing: within a member, or without the zeros that end an archive, for then nobody knows
    what followed. (tarfile takes any end for a good one.)
    """
    place: dict[str, Member] = {}
    with path.open("rb") as file:
        head, whole = file.read(BLOCK), path.stat().st_size
        if head.startswith(COMPRESSED):
            raise DataError(f"{path} is compressed; unpack it to a plain .tar, which can be read from any place.")
        if not head.strip(b"\0"):
            raise CutShortError(f"{path} is empty, not a tar file; copy it again.")
        try:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", errors="replace") as tar:
                for info in tar:
                    if info.issparse():
                        raise DataError(f"{path} holds the sparse file '{info.name}'; pack it again without --sparse.")
                    if info.islnk() or info.issym():
                        folder = posixpath.dirname(info.name) if info.issym() else ""
                        target = place.get(posixpath.normpath(posixpath.join(folder, info.linkname)))
                    else:
                        target = Member(info.name, info.offset_data, info.size) if info.isreg() else None
                    if target is not None and target.offset + target.size > whole:
                        raise _broken(path, f"inside '{info.name}'")
                    if target is not None:
                        place[info.name] = target._replace(name=info.name)
                        yield place[info.name]
                file.seek(tar.offset)
                end = file.read(BLOCK)
        except (tarfile.TarError, OSError, EOFError) as error:
            if head[257:262] != b"ustar" and len(head) == BLOCK and not place:
                raise DataError(f"{path} is truncated or no tar file ({error}); copy it again.") from error
            raise _broken(path, f"in a header ({error})") from error
    if not end:
        raise _broken(path, "without the zeros that end an archive")
    if end.strip(b"\0"):
        raise _broken(path, "in a header")


def _broken(path: Path, where: str) -> CutShortError:
    return CutShortError(f"{path} ends {where}: it is truncated; copy it again.")


def check_whole(path: Path) -> None:
    """CutShortError when the end of the tar ``path`` is missing, DataError when it is none."""
    for _ in members(path):
        pass


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
    file = path.open("rb")
    try:
        for member in members(path):
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
                text = _text(suffix, path, member, file, keys)
                if text is not None:
                    sample.texts[suffix] = text
            else:
                sample.others.append(suffix)
    except CutShortError as error:
        if not cut_short:
            raise
        fault = str(error)
    finally:
        file.close()
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


def _text(suffix: str, path: Path, member: Member, file: BinaryIO, keys: Keys) -> str | None:
    """What the member says; DataError, but None for a .txt or .json of another name, which may be anything."""
    try:
        file.seek(member.offset)
        return file.read(member.size).decode("utf-8-sig").strip()
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


FORMAT = 4

FAULTS = b"faults"  # of the table, by tar

PASSED_OVER = b"passed over"  # what may be the label of samples that have none, with how many have it

SCHEMA = pa.schema(
    {"tar": pa.int32(), "offset": pa.int64(), "size": pa.int64(), "key": pa.string(), "label": pa.string(),
     "caption": pa.string()}
)  # fmt: skip


@dataclass(frozen=True)
class TarIndex:
    """``table`` has a row a sample: tar (place in ``tars``), offset and size of the picture, key, label, caption.

    ``marks`` [n_tars, 3] int64 are the tars' sizes and times in ns (``scan.py``).
    """

    tars: list[Path]
    marks: np.ndarray
    table: pa.Table

    @property
    def passed_over(self) -> dict[str, int]:
        """What may hold the label of samples that have none, with the number of those that have it."""
        return json.loads((self.table.schema.metadata or {}).get(PASSED_OVER, b"{}"))


def index_tars(tars: Sequence[Path], keys: Keys, cut_short: bool = False) -> TarIndex:
    """The index of ``tars``, from the cache if it was made since they last changed.

    Headers are read, pictures are passed over. Raises DataError naming a tar that is broken or whose end is missing;
    with ``cut_short`` the latter are read as far as they go, and that is said.
    """
    marks = np.array([size_and_times(tar) for tar in tars], dtype=np.int64)
    places = [str(tar.resolve()) for tar in tars]
    made_from = json.dumps([FORMAT, keys.label, keys.caption, keys.member, cut_short, places, marks.tolist()])
    try:
        file = cache_folder() / "tar-index" / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.parquet"
    except CacheError:
        return _told(TarIndex(list(tars), marks, _build(tars, keys, cut_short)))
    try:
        table = pq.read_table(file)
        if table.schema.remove_metadata() != SCHEMA:
            raise pa.ArrowInvalid("another table")
    except (OSError, pa.ArrowInvalid):
        table = _build(tars, keys, cut_short)
        keep_table(table, file)
    return _told(TarIndex(list(tars), marks, table))


def _told(index: TarIndex) -> TarIndex:
    """``index``; says which of its tars are cut off, and how much was read of them."""
    faults = {
        int(tar): fault for tar, fault in json.loads((index.table.schema.metadata or {}).get(FAULTS, b"{}")).items()
    }
    if faults:
        read = pc.sum(pc.is_in(index.table["tar"], pa.array(list(faults), pa.int32()))).as_py() or 0
        tell(
            f"{len(faults)} of {len(index.tars)} tars are cut off and read as far as they go, {read} pictures; what "
            f"followed is lost. First: {next(iter(faults.values()))}"
        )
    return index


def _build(tars: Sequence[Path], keys: Keys, cut_short: bool) -> pa.Table:
    parts, faults = [], {}
    passed_over: Counter[str] = Counter()
    for number, tar in enumerate(tqdm(tars, desc="Indexing", unit="tar", leave=False, disable=len(tars) < 10)):
        found, fault = samples(tar, keys, cut_short)
        if fault is not None:
            faults[number] = fault
        passed_over.update(name for sample in found for name in sample.passed_over)
        columns = [[getattr(sample, name) for sample in found] for name in SCHEMA.names[1:]]
        parts.append(pa.table([[number] * len(found), *columns], schema=SCHEMA))
    table = pa.concat_tables(parts)
    if faults and table["label"].null_count < len(table):  # where others have one, those that lost theirs are left out
        lost = pc.and_(pc.is_in(table["tar"], pa.array(list(faults), pa.int32())), pc.is_null(table["label"]))
        table = table.filter(pc.invert(lost))
    return table.replace_schema_metadata({FAULTS: json.dumps(faults), PASSED_OVER: json.dumps(passed_over)})
