"""A part of the benchmark: figures of an SAE that are computed and written together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from sae_lightning.evaluation.scoring_pass import Gather
from sae_lightning.evaluation.similarity import Similarity
from sae_lightning.metrics.base import Score

if TYPE_CHECKING:
    from sae_lightning.evaluation.evaluated import Evaluated

MAIN = "main"  # the pass over the run's own data; those over other data sets are called "<set>/<split>"

OF_IMAGES = Gather(core=False, images=True)


def everywhere(config: DictConfig) -> bool:
    """Of every run."""
    return True


def on_patches(config: DictConfig) -> bool:
    """Of runs on patch tokens."""
    return config.get("features", "patch") == "patch"


@dataclass(frozen=True)
class Part:
    """``compute(run, options)`` gives the scores of a run whose ``passes`` have gathered what this part ``wants``.

    ``reads`` names stores that it reads itself; ``applies`` says of which runs (by their config) it is;
    ``leaves`` names what it writes into latents.safetensors; ``judge`` gives the encoder, if any, that says how alike
    images are. ``undefined`` says why a figure is NaN, where the score itself does not.
    """

    name: str
    compute: Callable[[Evaluated, Mapping[str, Any]], list[Score]]
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] = (MAIN,)
    reads: tuple[str, ...] = ()
    wants: Gather = OF_IMAGES
    applies: Callable[[DictConfig], bool] = everywhere
    leaves: tuple[str, ...] = ()
    judge: Callable[[DictConfig], Similarity] | None = None
    undefined: str = "there is nothing to compute it from"

    def scores(self, run: Evaluated) -> list[Score]:
        """The scores of ``run``, those that are NaN with the reason; a row that says so where it has none."""
        found = self.compute(run, self.options) or [Score(f"{self.name}_left_out", 1, why=self.undefined)]
        return [s if s.why or not math.isnan(s.value) else s._replace(why=self.undefined) for s in found]


def plain(node: Any) -> dict[str, Any]:
    """A config node's content, its interpolations unresolved."""
    return dict(OmegaConf.to_container(node, resolve=False)) if OmegaConf.is_config(node) else dict(node or {})  # type: ignore[arg-type]


class Headline(NamedTuple):
    """One of the seven: its ``title``, the ``metric`` and ``setting`` of its row, and whether more is ``better``.

    A setting ``data=*`` stands for all data sets, whose values are averaged.
    """

    title: str
    metric: str
    setting: str = ""
    better: bool = True


HEADLINES = (
    Headline("M1 Moran's I", "moran"),
    Headline("M2 FVU", "fvu", better=False),
    Headline("M3 preservation", "preservation"),
    Headline("M4 probing AUC", "sparse_probing_auc", "k=128"),
    Headline("M5 monosemanticity", "monosemanticity"),
    Headline("M6 cross-domain", "cross_domain_preservation", "data=*"),
    Headline("M7 absorption", "absorption", "alpha=0.8,beta=0.5", better=False),
)


def headline(rows: Iterable[Mapping[str, Any]], which: Headline) -> float:
    """The value of one headline among a run's ``rows`` of one split; NaN where there is none."""
    found = [r["value"] for r in rows if r["metric"] == which.metric and fits(r["setting"], which.setting)]
    return float(np.mean(found)) if found else float("nan")


def fits(setting: str, wanted: str) -> bool:
    """Whether a row's ``setting`` is the ``wanted`` one, or of the data sets that it stands for."""
    return setting == wanted or (wanted.endswith("*") and setting.startswith(wanted[:-1]) and "," not in setting)
