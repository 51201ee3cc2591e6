"""Judgements of people as csv: what the collecting page exports and the analysis reads.

One row a choice, with a header: ``judge`` (a name), ``run_left``, ``latent_left``, ``run_right``, ``latent_right`` (a
run's folder name and a latent's number), ``choice``: left, right or unsure, the side that is more of one concept.
``pair`` and ``seconds`` may be there, and any other column is left alone. A judge whose name begins with "simulated"
is no person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

COLUMNS = ("judge", "run_left", "latent_left", "run_right", "latent_right", "choice")
CHOICES = ("left", "right", "unsure")
SIMULATED = "simulated"  # how the names of judges begin that are no people


def read_judgements(paths: Sequence[str | Path], d_sae: Mapping[str, int]) -> pd.DataFrame:
    """All choices in these files, the last where a judge chose twice; ``d_sae`` of each run that can be analysed.

    Semicolons instead of commas and a byte-order mark, as spreadsheets write them, are understood. FileNotFoundError
    and ValueError with a sentence for a file that is missing or empty, a missing column, an unknown choice, a run that
    was not opened and a latent that it does not have.
    """
    tables = [_read(Path(path), d_sae) for path in paths]
    table = pd.concat(tables, ignore_index=True)
    return table.drop_duplicates([c for c in COLUMNS if c != "choice"], keep="last").reset_index(drop=True)


def _read(path: Path, d_sae: Mapping[str, int]) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give csv files that the collecting page exported.")
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    if not header.strip():
        raise ValueError(f"{path} is empty; expected a header with {', '.join(COLUMNS)}.")
    separator = ";" if ";" in header and "," not in header else ","
    table = pd.read_csv(path, sep=separator, encoding="utf-8-sig", dtype=str, keep_default_na=False)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(missing)}; it has {', '.join(table.columns)}. Expected "
            f"{', '.join(COLUMNS)}, as the collecting page exports them."
        )
    if not len(table):
        raise ValueError(f"{path} holds no judgement, only a header.")
    for number, row in enumerate(table.to_dict("records"), start=2):
        _check(f"Line {number} of {path}", row, d_sae)
    for side in ("latent_left", "latent_right"):
        table[side] = table[side].astype(int)
    table["choice"] = table["choice"].str.strip().str.lower()
    return table


def _check(where: str, row: Mapping[str, str], d_sae: Mapping[str, int]) -> None:
    if row["choice"].strip().lower() not in CHOICES:
        raise ValueError(f"{where} has the choice '{row['choice']}'; expected one of {', '.join(CHOICES)}.")
    for side in ("left", "right"):
        run, latent = row[f"run_{side}"], row[f"latent_{side}"].strip()
        if run not in d_sae:
            raise ValueError(
                f"{where} judges a latent of the run {run}, which was not given; opened were {', '.join(d_sae)}. Name "
                "it too with run=…"
            )
        if not latent.isdecimal() or int(latent) >= d_sae[run]:
            raise ValueError(
                f"{where} judges the latent '{latent}' of {run}, which has 0 to {d_sae[run] - 1}. Is it of another run "
                "with that name?"
            )
