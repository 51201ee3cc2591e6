"""The figures printed in the ViSAEBench paper, to be shown beside those of a grid."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "paper"
SCALE = "ViT-B, ImageNet-1K"  # what they are of


def read_paper(folder: Path = FOLDER) -> dict[str, pd.DataFrame] | None:
    """The tables of ``folder`` by the names of their csv files; its README says what each is.

    Names of metrics, backbones and tasks are those of ``read_grid``. None where the folder is not there or is empty.
    """
    return {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))} or None
