"""Public SAEs by name, the facts of ``assets/pretrained.yaml``: where each lies, its format, and where it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).resolve().parents[1] / "assets" / "pretrained.yaml"


@dataclass(frozen=True)
class Pretrained:
    """One entry, of which None is what its release does not say: ``path`` on the hub (None: it is not there), the
    choice of ``backbone`` with its ``model`` where that does not name one, and what is stated of the SAE.
    """

    name: str
    path: str | None
    format: str | None
    backbone: str | None = None
    model: str | None = None
    layer: int | None = None
    features: str | None = None
    site: str = "block"
    inputs: str = "raw"
    preprocessing: str | None = None
    k: int | None = None
    explained_variance: float | None = None
    l0: float | None = None
    dead_share: float | None = None
    paper: str | None = None
    note: str | None = None
    opened: bool = False

    @property
    def stated(self) -> dict[str, float]:
        """What its release says of explained variance, L0 and dead share; k stands for L0."""
        l0 = self.k if self.l0 is None else self.l0
        said = {"explained_variance": self.explained_variance, "l0": l0, "dead_share": self.dead_share}
        return {name: float(value) for name, value in said.items() if value is not None}


@cache
def all_pretrained() -> tuple[Pretrained, ...]:
    """Every entry of the file, in its order."""
    quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return tuple(entry for node in yaml.load(FILE.read_text(encoding="utf-8"), quick) for entry in _entries(node))


def _entries(node: Mapping[str, Any]) -> list[Pretrained]:
    made, known = [], {field.name for field in fields(Pretrained)}
    for chosen in product(*node.get("each", [])):
        values = {name: value for choice in chosen for name, value in choice.items()}
        said = {name: value for name, value in node.items() if name in known} | values
        name = node["name"].format_map(values)
        said |= {"name": name, "path": node.get("path", name)}
        made.append(Pretrained(**{key: value for key, value in said.items() if key in known}))
    return made


def pretrained(name: str) -> Pretrained | None:
    """The entry that ``name`` is of; None where there is none."""
    return next((entry for entry in all_pretrained() if fnmatchcase(name, entry.name)), None)
