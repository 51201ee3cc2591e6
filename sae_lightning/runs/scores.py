"""Scores as a table: one row a run, metric and setting, in a parquet file beside the run's SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae_lightning.files import write_table
from sae_lightning.saes.artefact import ArtefactError

if TYPE_CHECKING:
    from sae_lightning.metrics.base import Score

TABLE = "scores.parquet"

SCHEMA = pa.schema(
    [
        ("run", pa.string()), ("metric", pa.string()), ("setting", pa.string()), ("value", pa.float64()),
        ("part", pa.string()), ("split", pa.string()), ("key", pa.string()), ("why", pa.string()),
        ("data", pa.string()), ("n", pa.int64()), ("unit", pa.string()), ("low", pa.float64()), ("high", pa.float64()),
        ("protocol", pa.string()),
    ]
)  # fmt: skip

BEFORE = {"data": "", "n": None, "unit": "", "low": None, "high": None, "protocol": "paper"}
KNOWN = tuple(SCHEMA.names[: len(SCHEMA) - i] for i in (0, 1, 5, 6))  # BEFORE is of tables without the last columns


def read_rows(
    run: Path, strict: bool = False, data: str | None = "", protocol: str | None = "paper"
) -> list[dict[str, Any]]:
    """The rows of a run's table of the data set ``data`` ("": its own) under a ``protocol``, as their columns of that
    name have it; None: all of them.

    None where there is no table, or one that cannot be read (it is then made anew).

    With ``strict`` ArtefactError for one that cannot be read.
    """
    try:
        table = pq.read_table(run / TABLE)
        if table.schema.names not in KNOWN:
            raise pa.ArrowInvalid("it has other columns")
        rows = [BEFORE | row for row in table.to_pylist()]
        return [row for row in rows if data in (None, row["data"]) and protocol in (None, row["protocol"])]
    except FileNotFoundError:
        return []
    except (pa.ArrowException, OSError) as error:
        if strict:
            raise ArtefactError(
                f"{run / TABLE} cannot be read ({error}); make it anew: python evaluate.py runs={run.name}, with the "
                "metrics that it had."
            ) from error
        return []


def scores_of(
    run: Path, part: str, split: str, key: str, data: str = "", protocol: str = "paper"
) -> list[Score] | None:
    """The scores of a ``part`` on ``split`` of ``data``; None unless made by what ``key`` stands for."""
    rows = read_rows(run, data=data, protocol=protocol)
    found = [r for r in rows if (r["part"], r["split"], r["key"]) == (part, split, key)]
    from sae_lightning.metrics.base import Score  # with torchmetrics, which takes seconds

    return [Score(*(r[name] for name in Score._fields)) for r in found] or None


def put_scores(
    run: Path, part: str, split: str, key: str, scores: Iterable[Score], data: str = "", protocol: str = "paper"
) -> None:
    """Write the scores of a ``part`` on ``split`` of ``data`` in place of earlier ones, atomically.

    ValueError where two rows would have the same metric and setting.
    """
    rows = [
        r for r in read_rows(run, data=None, protocol=None)
        if (r["part"], r["split"], r["data"], r["protocol"]) != (part, split, data, protocol)
    ]  # fmt: skip
    made = [
        {**s._asdict(), "run": run.name, "value": float(s.value), "part": part, "split": split, "key": key,
         "data": data, "protocol": protocol}
        for s in scores
    ]  # fmt: skip
    names = [(r["metric"], r["setting"], r["split"], r["data"], r["protocol"]) for r in (*rows, *made)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two scores of {run.name} are called {twice}; give them different settings.")
    rows = sorted((*rows, *made), key=lambda r: (r["data"], r["protocol"], r["part"], r["split"]))
    write_table(run / TABLE, pa.Table.from_pylist(rows, SCHEMA))


def value_of(rows: Iterable[Mapping[str, Any]], metric: str, setting: str = "", split: str | None = None) -> float:
    """The value of one row; NaN where there is none."""
    for r in rows:
        if r["metric"] == metric and r["setting"] == setting and split in (None, r["split"]):
            return r["value"]
    return float("nan")
