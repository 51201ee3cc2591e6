"""The parquet files of a local data set: which hold rows, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from sae_lightning.data.errors import DataError, brief, tell

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
