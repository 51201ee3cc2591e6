"""What ViSAEBench's paper and its released package each choose, as data that the metrics' one implementation reads.

Under ``paper`` the options are those of ``conf/metrics``. Another protocol sets the options below over them, whatever a
config says, since its figures are to be those of others; docs/fidelity.md says what each difference changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lightning.registry import one_of

PAPER, RELEASED = "paper", "released"  # the text with its Table 2; the package visaebench 0.1.0

_PROBE = {"test_share": 0.2, "seed": 42, "C": 1.0, "stratify": "if_possible"}

CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    PAPER: {"cross_domain": {"without": ["eurosat"]}},
    RELEASED: {
        "core": {},  # M2: of all numbers of a store alike
        "moran": {
            "contiguity": "queen", "row_standardized": False, "min_active": 5, "max_share": 0.9, "min_spread": 1e-10,
            "min_images": 50, "images": 200, "group": 64, "latents": 500, "seed": 42,
        },
        "preservation": {**_PROBE, "pool": "mean", "codes": False, "retrain": False, "most": 2.0, "max_iter": 1000},
        "sparse_probing": {
            **_PROBE, "budgets": [1, 5, 10, 20, 50, 100], "ranking": "joint", "ranked_on": "all", "max_iter": 500,
        },
        "monosemanticity": {
            "images": 16, "latents": 1000, "seed": 42, "floor": False, "features": "patch",
            "pairing": {"dinov2": "clip", "clip": "dinov2", "siglip": "dinov2", "deit": "clip", "mae": "clip"},
            "other": "dinov2",
        },
        "cross_domain": {**_PROBE, "without": ["inaturalist", "cub200"], "k": 10, "images": 10_000, "max_iter": 500},
        "absorption": {
            **_PROBE, "siblings": "released", "min_group": 3, "min_images": 10, "min_class": 3, "top": 10, "gap": 0.1,
            "overlap": 0.5, "max_iter": 500,
        },
    },
}  # fmt: skip


def protocols_of(metrics: Mapping[str, Any]) -> list[str]:
    """Those that a config asks for, ``paper`` first and by default; ValueError for an unknown one."""
    asked = metrics.get("protocol", PAPER)
    names: Sequence[str] = [asked] if isinstance(asked, str) else list(asked)
    return sorted({one_of(name, tuple(CHOICES), "metrics.protocol") for name in names})
