"""The figures printed in the ViSAEBench paper, to be shown beside those of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "paper"

SCALE = "ViT-B, ImageNet-1K"  # what they are of


def read_paper(folder: Path = FOLDER) -> dict[str, pd.DataFrame] | None:
    """The tables of ``folder`` by the names of their csv files; its README says what each is.

    Names of metrics, backbones and tasks are those of ``read_grid``. None where the folder is not there or is empty.
    """
    return {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))} or None


PAPER = f"paper: {SCALE}"

SPELLED = {"dinov2": "DINOv2", "clip": "CLIP", "siglip": "SigLIP", "mae": "MAE", "deit": "DeiT"}


@dataclass(frozen=True)
class Paper:
    """The paper's ``files`` by name, as ``read_paper`` gives them; without them every answer is empty."""

    files: Mapping[str, pd.DataFrame]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file, None in empty cells."""
        frame = self.files.get(name)
        if frame is None:
            return []
        return [{str(k): None if pd.isna(v) else v for k, v in row.items()} for row in frame.to_dict("records")]

    def variance(self, without: str | None = None) -> dict[str, dict[str, float]]:
        """Table 3: by metric, η² of backbone, hp and residual; those that are printed ``without`` a backbone."""
        return {
            row["metric"]: {name: row[f"eta_{name}"] for name in ("backbone", "hp", "residual")}
            for row in self._rows("table3_variance") if row["without"] == without
        }  # fmt: skip

    def hypotheses(self) -> dict[str, dict[str, Any]]:
        """§4.5 and §5: by name, the task, ρ, p and verdict of a hypothesis."""
        return {row["name"]: row for row in self._rows("hypotheses")}

    def thresholds(self) -> dict[tuple[float, float], dict[str, float]]:
        """Table 7: by α and β, the rates of backbones."""
        return {
            (row["alpha"], row["beta"]): {SPELLED[name]: row[name] for name in SPELLED}
            for row in self._rows("table7_absorption")
        }

    def lifts(self) -> list[dict[str, Any]]:
        """Table 8: tasks with ρ, p and the lowest and highest lift."""
        return [
            row | {end: f"{SPELLED[row[end]]} {row[f'{end}_lift']:.2f}" for end in ("lowest", "highest")}
            for row in self._rows("table8_codes_lift")
        ]

    def ranks(self) -> dict[str, dict[str, Any]]:
        """Table 9: by metric, both rankings, ρ and p."""
        return {
            row["metric"]: row
            | {side: ", ".join(map(spelled, row[side].split())) for side in ("batchtopk", "jumprelu")}
            for row in self._rows("table9_rank_consistency")
        }

    def correlations(self) -> list[dict[str, Any]]:
        """ρ of metrics and tasks printed anywhere in the text."""
        return [row for row in self._rows("correlations") if not row["task"].startswith("M")]

    def means(self) -> dict[tuple[str, str], float]:
        """Means of M1–M7 by backbone and metric, those printed anywhere in the text."""
        return {(row["backbone"], row["quantity"]): row["value"] for row in self._rows("backbone_means")}

    def raw_moran(self) -> dict[str, float]:
        """Table 4: Moran's I of a backbone's own channels."""
        return {row["backbone"]: row["raw_moran"] for row in self._rows("table4_raw_moran")}

    def cross_domain(self) -> dict[tuple[str, str], dict[str, float]]:
        """Table 6: by backbone and data set, accuracies and preservation with their deviations."""
        return {(row["backbone"], row["data"]): row for row in self._rows("table6_cross_domain")}


def spelled(backbone: str) -> str:
    """A backbone as the paper writes it."""
    return SPELLED.get(backbone, backbone)
