"""Use trained dictionaries: ``python explore.py app=naming run=FOLDER``.

Applications: naming, search, bias, stability, steering, agreement, explorer; conf/app/ holds their options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from sae_lightning.runs.results import Result


@command("explore")
def main(cfg: DictConfig) -> None:
    from rich.console import Console

    from sae_lightning.apps.app import explore

    console = Console()
    for result in explore(cfg):
        if result.headlines:
            console.print(table_of(result))
        console.print(f"Page: {result.page}", highlight=False)


def table_of(result: Result) -> Table:
    """The headline figures beside their baselines."""
    from rich.table import Table

    table = Table(title=result.title)
    for column in ("", "value", "95 % interval", "baseline", "of"):
        table.add_column(column, justify="left" if column in ("", "of") else "right")
    for line in result.headlines:
        interval = "" if line.interval is None else f"{line.interval[0]:.3g} to {line.interval[1]:.3g}"
        baseline = "" if line.baseline is None else f"{line.baseline:.3g}"
        table.add_row(line.what, f"{line.ours:.3g}", interval, baseline, line.against)
    return table
