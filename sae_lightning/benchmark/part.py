"""A part of the benchmark: figures of an SAE that are computed and written together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.benchmark.scoring_pass import Gather
from sae_lightning.benchmark.similarity import Similarity
from sae_lightning.benchmark.table import Score

if TYPE_CHECKING:
    from sae_lightning.benchmark.evaluated import Evaluated

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
