"""Many evaluated runs as one table: their settings, M1–M7, and the downstream tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sae_lightning.benchmark.table import read_rows, value_of
from sae_lightning.benchmark.visaebench import HEADLINES, headline
from sae_lightning.saes.artefact import ArtefactError, read_cfg
from sae_lightning.training.identity import monoloss_of, same_but


class About(NamedTuple):
    """A metric's ``title``, and whether more of it is ``better``."""

    title: str
    better: bool


METRICS = {h.title.split()[0]: About(h.title, h.better) for h in HEADLINES}
INPUTS = ("raw", "reconstruction", "codes")
ENDS = tuple(f"/{name}" for name in INPUTS)
SETTINGS = (
    "run", "data", "backbone", "title", "features", "layer", "variant", "monoloss", "expansion", "k", "seed", "d_in",
    "d_sae", "l0", "dead_share", "recipe",
)  # fmt: skip
OTHER_COLUMNS = (  # leaves of a run's identity that the table has as columns
    "data.*", "backbone", "layer", "features", "sae.name", "callbacks.MonoLoss", "callbacks.MonoLoss.weight",
    "expansion", "d_sae", "sae.settings.k", "sae.target_l0", "seed",
)  # fmt: skip
FLOATS = ("layer", "monoloss", "expansion", "k", "l0", "dead_share")
# rows that are downstream tasks, as metric and setting; whose column they are, as groups of the match
TASKS = [
    (re.compile(r"retrieval_(?P<input>raw|reconstruction|codes) k=1"), "retrieval"),
    (re.compile(r"segmentation_miou data=(?P<data>[^,]+),input=(?P<input>\w+)"), "segmentation:{data}"),
    (re.compile(r"cross_domain_accuracy_(?P<input>raw|reconstruction|codes) data=(?P<data>[^,]+)"), "accuracy:{data}"),
    (re.compile(r"cross_domain_sparse_probing_auc data=(?P<data>[^,]+),k=128"), "probing:{data}"),
]


def read_grid(runs: Sequence[Path], split: str = "test") -> pd.DataFrame:
    """One row a run: ``SETTINGS``, ``M1`` … ``M7``, and ``TASK/raw``, ``TASK/reconstruction``, ``TASK/codes`` of each
    downstream task found in any run.

    ``backbone`` is the short name (``dinov2``), ``title`` that of the tables (``dinov2 (tiny)``). ``monoloss`` is the
    weight, 0 without, and ``recipe`` is equal for runs whose other settings are equal. TASK is ``retrieval`` (R@1),
    ``segmentation:DATA`` (mIoU), ``accuracy:DATA`` (linear probes on another data set) or ``probing:DATA`` (sparse
    probing AUC at k = 128 on another data set, codes alone). NaN stands where a run has no such score on ``split``.
    ArtefactError for a folder without a readable cfg.json.
    """
    rows = [_row(run, split) for run in runs]
    found = {name for row in rows for name in row} - {*SETTINGS, *METRICS}
    table = pd.DataFrame(rows, columns=[*SETTINGS, *METRICS, *sorted(found)])
    numbers = [*FLOATS, *METRICS, *sorted(found)]
    return table.astype(dict.fromkeys(numbers, float))


def tasks(table: pd.DataFrame) -> list[str]:
    """The downstream tasks of which the table has a value, sorted."""
    return sorted({c.rpartition("/")[0] for c in table if c.endswith(ENDS) and table[c].notna().any()})


def _row(run: Path, split: str) -> dict[str, Any]:
    cfg = read_cfg(run)
    if "config" not in cfg:
        raise ArtefactError(
            f"{run / 'cfg.json'} holds no config: that SAE was not trained here. Leave it out of the grid."
        )
    scores = [r for r in read_rows(run, strict=True) if r["split"] == split]
    config = cfg["config"]
    settings = {
        "run": run.name, "data": cfg["data"], "backbone": config["backbone"]["name"], "title": cfg["backbone"],
        "features": cfg["features"], "layer": cfg["layer"], "variant": cfg["variant"],
        "monoloss": monoloss_of(config)[0], "expansion": cfg["expansion"], "k": cfg["k"], "seed": cfg["seed"],
        "d_in": cfg["d_in"], "d_sae": cfg["d_sae"], "l0": value_of(scores, "l0"),
        "dead_share": value_of(scores, "dead_share"), "recipe": same_but(cfg, *OTHER_COLUMNS),
    }  # fmt: skip
    return settings | {h.title.split()[0]: headline(scores, h) for h in HEADLINES} | dict(_tasks(scores))


def _tasks(scores: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, float]]:
    for row in scores:
        for pattern, name in TASKS:
            if match := pattern.fullmatch(f"{row['metric']} {row['setting']}"):
                of = match.groupdict()
                yield f"{name.format(**of)}/{of.get('input', 'codes')}", row["value"]
