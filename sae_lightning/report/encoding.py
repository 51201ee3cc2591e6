"""What tells SAEs apart in the figures of a page: colours, dashes, marks and depths, however many runs there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lightning.report.figures import COLOURS
from sae_lightning.report.visaebench_tables import Scored

DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))  # of expansions, the largest first
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # of kinds of SAE


@dataclass(frozen=True)
class Encoding:
    """``colours`` by backbone, or by kind of SAE where all are on one; dashes by expansion, the deeper the larger k.

    ``kinds`` are told apart by marks where colours are the backbones'; all in the order of the page.
    """

    colours: dict[str, str]
    backbones: list[str]
    kinds: list[str]
    expansions: list[float]
    ks: list[float]

    @property
    def _by_kind(self) -> bool:
        return len(self.backbones) == 1 and len(self.kinds) > 1

    def key(self, sae: Scored) -> str:
        """What the colour of an SAE stands for: its backbone, or its kind."""
        return sae.kind if self._by_kind else sae.backbone

    def groups(self, saes: Iterable[Scored]) -> dict[str, list[Scored]]:
        """SAEs by what their colour stands for."""
        found: dict[str, list[Scored]] = {}
        for sae in saes:
            found.setdefault(self.key(sae), []).append(sae)
        return found

    def line(self, sae: Scored) -> dict[str, Any]:
        """How a line of an SAE is drawn."""
        dashes = DASHES[self.expansions[::-1].index(sae.run["cfg"]["expansion"]) % len(DASHES)]
        return {
            "color": self.colours[self.key(sae)], "alpha": self._depth(sae), "ls": (0, dashes) if dashes else "-",
        }  # fmt: skip

    def mark(self, sae: Scored) -> dict[str, Any]:
        """How a point of an SAE is drawn."""
        marker = "o" if self._by_kind else list(MARKS)[self.kinds.index(sae.kind) % len(MARKS)]
        return {"color": self.colours[self.key(sae)], "alpha": self._depth(sae), "marker": marker}

    def _depth(self, sae: Scored) -> float:
        k = sae.run["cfg"]["k"]
        return 1.0 if k not in self.ks or len(self.ks) < 2 else 0.4 + 0.6 * self.ks.index(k) / (len(self.ks) - 1)

    def legend(self) -> dict[str, Any]:
        """What the page's legend says; only what differs."""
        dashes = {f"×{e:g}": DASHES[i % len(DASHES)] for i, e in enumerate(self.expansions[::-1])}
        marks = {kind: list(MARKS.values())[i % len(MARKS)] for i, kind in enumerate(self.kinds)}
        return {
            "colours": self.colours,
            "dashes": {title: " ".join(map(str, d)) for title, d in reversed(dashes.items()) if len(dashes) > 1},
            "marks": marks if len(marks) > 1 and not self._by_kind else {},
            "k": [f"{k:g}" for k in self.ks] if len(self.ks) > 1 else [],
        }  # fmt: skip

    def of_backbones(self) -> dict[str, str]:
        """Colours by backbone; none where colours stand for something else."""
        return {} if self._by_kind else self.colours


def encoding(saes: Sequence[Scored]) -> Encoding:
    """The encoding of all figures of these SAEs."""
    backbones, kinds = (list(dict.fromkeys(of)) for of in zip(*((sae.backbone, sae.kind) for sae in saes), strict=True))
    coloured = kinds if len(backbones) == 1 and len(kinds) > 1 else backbones
    colours = {title: COLOURS[i % len(COLOURS)] for i, title in enumerate(coloured)}
    settings = [sae.run["cfg"] for sae in saes]
    ks = sorted({cfg["k"] for cfg in settings if cfg["k"] is not None})
    return Encoding(colours, backbones, kinds, sorted({cfg["expansion"] for cfg in settings}), ks)
