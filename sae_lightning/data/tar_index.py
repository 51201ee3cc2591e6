"""An index of the samples in tar files, made once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from sae_lightning.data.contents import keep_table
from sae_lightning.data.errors import tell
from sae_lightning.data.scan import size_and_times
from sae_lightning.data.tar_samples import Keys, samples
from sae_lightning.kernels.build import CacheError, cache_folder

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
