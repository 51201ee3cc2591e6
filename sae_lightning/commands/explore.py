"""Use trained dictionaries: ``python explore.py app=naming run=FOLDER``.

Applications: naming, search, bias, stability, steering, agreement, explorer; conf/app/ holds their options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("explore")
def main(cfg: DictConfig) -> None:
    from sae_lightning.apps.app import explore
    from sae_lightning.rendering.page import headlines

    for result in explore(cfg):
        if result.headlines:
            headlines(result.headlines, result.title).show()
        print(f"Page: {result.page}")
