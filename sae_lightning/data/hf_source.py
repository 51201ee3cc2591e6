"""Opening a Hugging Face data set: by its id on the hub, or what lies under a local path."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_lightning.data.contents import Contents
from sae_lightning.data.errors import DataError, brief, tell
from sae_lightning.data.folder import LITTER, level, size_and_times, suffix_of, tell_left_out, walk
from sae_lightning.data.splits import by_split, split_of_name
from sae_lightning.data.tar_index import check_whole

PARQUET = (".parquet", ".geoparquet", ".pq", ".gpq")

AT_ONCE = 512  # rows that are read at once; the library takes as many as the first row group has, which may be none


def with_rows(files: Mapping[str, Sequence[str]], where: str) -> dict[str, list[str]]:
    """The files of each split that hold rows; splits without any are left out.

    Only the ends of files are read. DataError naming a file that is no whole parquet file, or that has other columns
    than the rest, and when no file holds a row.
    """
    kept: dict[str, list[str]] = {}
    empty: list[str] = []
    first: tuple[str, list[str]] | None = None
    for split, names in files.items():
        for file in names:
            if not _is_plain(file):
                kept.setdefault(split, []).append(file)
                continue
            about = _footer(file)
            if about.metadata.num_rows == 0:
                empty.append(file)
                continue
            columns = about.schema_arrow.names
            first = first or (file, columns)
            if sorted(columns) != sorted(first[1]):
                raise DataError(
                    f"{file} has the columns {columns}, but {first[0]} has {first[1]}; all parquet files of a data "
                    "set need the same. Rename what differs, or move that file elsewhere."
                )
            kept.setdefault(split, []).append(file)
    if not kept:
        raise DataError(f"None of the {len(empty)} parquet files of '{where}' holds a row; copy them again.")
    if empty:
        tell(f"Of the parquet files of '{where}', {len(empty)} without rows are passed over (first: {empty[0]}).")
    return kept


def _is_plain(file: str) -> bool:
    """Whether this is a parquet file itself, and no archive with some, which the library unpacks."""
    return file.endswith(PARQUET) and os.path.isfile(file)


def _footer(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole parquet file ({brief(error)}); copy it again, or remove it to do without its rows."
        ) from error


def check_rows(files: Mapping[str, Sequence[str]]) -> None:
    """DataError naming the first of ``files`` that cannot be read to its end, or has columns of other types."""
    first: tuple[str, pa.Schema] | None = None
    for file in (file for names in files.values() for file in names if _is_plain(file)):
        about = _footer(file)
        try:
            for _ in about.iter_batches(AT_ONCE):
                pass
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} is damaged ({brief(error)}); copy it again, or remove it to do without its rows."
            ) from error
        first = first or (file, about.schema_arrow)
        other = next(
            (c for c in about.schema_arrow.names if about.schema_arrow.field(c).type != first[1].field(c).type), None
        )
        if other is not None:
            raise DataError(
                f"Column '{other}' of {file} holds {about.schema_arrow.field(other).type}, but that of {first[0]} "
                f"{first[1].field(other).type}; all parquet files of a data set need the same types."
            )


ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst")  # the library looks into them


@dataclass(frozen=True)
class OpenedData:
    """``splits`` maps the data set's own split names to Dataset or IterableDataset.

    ``mark`` changes when the data do and is the same in every process: what local files hold, the commit on the hub.
    (A Dataset's own fingerprint hashes paths, so it is not used.) ``files`` are the local parquet files of each split,
    where there are some.
    """

    name: str
    splits: Mapping[str, Any]
    mark: str
    files: Mapping[str, list[str]] = field(default_factory=dict)


def open_source(cfg: Mapping[str, Any]) -> OpenedData:
    """All splits of the data set ``id``, ``config``, ``revision``; undownloaded if ``streaming``.

    ``id`` may be a path: a folder of parquet files or pictures, one parquet file, or a folder of save_to_disk.
    Raises DataError with the file and what is wrong with it, or what the library says, when it cannot be loaded.
    """
    path = Path(str(cfg["id"])).expanduser()
    local = path.exists()
    streaming = bool(cfg.get("streaming"))
    if local and path.is_file() and path.suffix != ".parquet":
        raise DataError(f"{path} is no parquet file; data.id takes a parquet file, a folder or an id on the hub.")
    files: dict[str, list[str]] = {}
    with _overheard() as heard:
        try:
            if local and _is_saved(path):
                splits, mark = _load_saved(path, streaming), None
            else:
                splits, mark, files = _load_built(path.resolve() if local else None, cfg, streaming)
        except DataError:
            raise
        except Exception as error:
            advice = "" if local else ", or the connection; a local path works offline"
            raise DataError(
                f"The data set '{cfg['id']}' cannot be loaded: {heard[-1] if heard else brief(_cause(error))}. Check "
                f"data.id, data.config and data.revision{advice}."
            ) from error
    if not local:
        return OpenedData(cfg["name"], splits, f"{cfg['id']}@{mark}")
    name = path.resolve().name if str(cfg["name"]) == str(cfg["id"]) else cfg["name"]
    return OpenedData(name, splits, _files_mark(path), files)


def _cause(error: BaseException) -> BaseException:
    """What was wrong at first: the library says of all errors that an error occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What the library logs as errors, such as the file that it could not read; kept from the screen."""
    from datasets.utils.logging import get_logger

    heard: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            heard.append(" ".join(record.getMessage().split())[:300])
        return record.levelno < logging.ERROR

    handlers = get_logger("datasets").handlers
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # local folders need no card
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield heard
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def _files_mark(path: Path) -> str:
    """Hex digest of relative paths and contents of all files below ``path`` (or of that one file's)."""
    files = [("", path)] if path.is_file() else list(walk(path))
    names, marks = [name for name, _ in files], np.array([size_and_times(file) for _, file in files], dtype=np.int64)
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(b"".join(Contents(path, names, marks.reshape(-1, 3)).of(range(len(names)))))
    return digest.hexdigest()


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_saved(path: Path, streaming: bool) -> dict[str, Any]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if streaming:
        return {s: data.to_iterable_dataset(max(1, len(data.cache_files))) for s, data in splits.items()}
    return splits


def _load_built(
    path: Path | None, cfg: Mapping[str, Any], streaming: bool
) -> tuple[dict[str, Any], str, dict[str, list[str]]]:
    """The splits, what tells the library's versions of the data apart, and the local parquet files of each split."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList

    if path is not None and path.is_file():
        builder = datasets.load_dataset_builder("parquet", data_files={"train": str(path)})
    elif path is not None:
        builder = datasets.load_dataset_builder(str(path), cfg.get("config"))
        if _of_pictures(builder):
            builder = _without_litter(_with_split_folders(builder, path), path)
    else:
        builder = datasets.load_dataset_builder(cfg["id"], cfg.get("config"), revision=cfg.get("revision"))
    files: dict[str, list[str]] = {}
    if builder.name == "parquet":
        builder.config.batch_size = builder.config.batch_size or AT_ONCE
        if path is not None:
            files = with_rows(builder.config.data_files, str(path))
            kept = {split: DataFilesList(names, []) for split, names in files.items()}
            builder.config.data_files = DataFilesDict(kept)
    if builder.name == "webdataset" and path is not None:  # the library takes any end for a good one
        for file in (file for held in builder.config.data_files.values() for file in held if file.endswith(".tar")):
            check_whole(Path(file))
    try:
        if not streaming:
            builder.download_and_prepare()
        splits = dict(builder.as_streaming_dataset() if streaming else builder.as_dataset())
    except Exception:
        check_rows(files)
        raise
    return (_without_split_labels(splits) if _of_pictures(builder) else splits), builder.hash, files


def _of_pictures(builder: Any) -> bool:
    """Whether the library makes the data set of a folder of pictures, with their folders' names for labels."""
    return builder.name == "imagefolder"


def _with_split_folders(builder: Any, path: Path) -> Any:
    """The builder, told which folders of pictures are splits where it does not know their names (Train, Val)."""
    import datasets

    folders = level(path)[0]
    found = by_split(folders)
    if len(builder.config.data_files) >= len(found) or not ("train" in found or len(found) == len(folders)):
        return builder
    for split, folder in found.items():
        tell(
            f"The folder '{folder}' of {path} is taken for its {split} split; read it as data=folder to choose others."
        )
    known = {"train": "train", "val": "validation", "test": "test"}
    files = {known[split]: f"{glob.escape(folder)}/**" for split, folder in found.items()}
    return datasets.load_dataset_builder(str(path), data_files=files)


def _without_litter(builder: Any, path: Path) -> Any:
    """The builder without what systems leave in folders, such as thumbnails in @eaDir; says what else is left out.

    And with labels where train has a single class: the library gives none to splits before it has met a second one.
    """
    import datasets

    taken = {*builder.EXTENSIONS, *ARCHIVES}
    names = (entry.name for _, entry in walk(path) if entry.name not in builder.METADATA_FILENAMES)
    tell_left_out(path, Counter(suffix_of(name) for name in names if f".{suffix_of(name)}" not in taken))
    files = {str(split): [Path(file) for file in held] for split, held in builder.config.data_files.items()}
    kept = {split: [file for file in held if LITTER.isdisjoint(file.parts)] for split, held in files.items()}
    folders = [{file.parent for file in held if file.suffix.lower() in builder.EXTENSIONS} for held in kept.values()]
    every = set().union(*folders)
    classes, depths = {folder.name for folder in every}, {len(folder.parts) for folder in every}
    described = any(file.name in builder.METADATA_FILENAMES for held in kept.values() for file in held)
    unmet = len({folder.name for folder in folders[0]}) == 1 < len(classes) and len(depths) == 1 and not described
    if kept == files and (not unmet or _are_splits(classes)):
        return builder
    names_of = {split: list(map(str, held)) for split, held in kept.items()}
    return datasets.load_dataset_builder(builder.name, data_files=names_of, drop_labels=False if unmet else None)


def _are_splits(names: Iterable[str]) -> bool:
    """Whether all ``names`` are those of splits, so that they are no classes."""
    names = set(names)
    return all(map(split_of_name, names)) or set(by_split(names).values()) == names


def _without_split_labels(splits: dict[str, Any]) -> dict[str, Any]:
    """Without a column of labels whose classes are the names of splits: the pictures lie in train/ and test/ alone."""
    names = {name for data in splits.values() for name in getattr((data.features or {}).get("label"), "names", ())}
    if not names or not _are_splits(names):
        return splits
    return {s: data.remove_columns("label") for s, data in splits.items()}
