"""Score finished runs on the held-out test split: ``python evaluate.py [metrics=visaebench] [runs=PATTERN]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from sae_lightning.analysis.lift import lift_table
    from sae_lightning.evaluation.printed import print_scores
    from sae_lightning.evaluation.suite import PartError, evaluate, scored

    failed: PartError | None = None
    try:
        evaluate(cfg)
    except PartError as error:  # the others have scores
        failed = error
    runs = scored(cfg)
    if cfg.logger:
        from sae_lightning.report.publish import publish  # with Lightning, which takes seconds

        publish(runs, cfg)
    print_scores(runs, cfg)
    if (lifts := lift_table(runs, cfg.split)) is not None:
        lifts.show()
    if failed is not None:
        raise failed
