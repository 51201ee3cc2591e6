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
    if cfg.logger and not any(runs.values()):  # trainings' loggers are told of their own data
        from sae_lightning.report.publish import publish  # with Lightning, which takes seconds

        publish(list(runs), cfg)
    for data in sorted(set(runs.values())):
        print_scores([run for run, on in runs.items() if on == data], cfg, data)
    if (lifts := lift_table([run for run, on in runs.items() if not on], cfg.split)) is not None:
        lifts.show()
    if failed is not None:
        raise failed
