"""Hydra's own sweeper, but that runs of a sweep which read the same features become one job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf


class PackedSweeper(BasicSweeper):
    """Groups the runs of a sweep as ``pack`` of the config says, and notes in ``paths.runs`` what was planned.

    A job of several runs gets the overrides of the first, and ``pack.file`` with the configs of all, as Hydra has
    composed them.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """All jobs; where one has failed, which the others do not mind, the closing table is shown all the same."""
        try:
            return super().sweep(arguments)
        except Exception:
            from sae_lightning.training.closing_table import ClosingTable

            if self.config is not None:
                ClosingTable().on_multirun_end(self.config)
            raise

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        from sae_lightning.commands.paths import located
        from sae_lightning.training.packing import grouped
        from sae_lightning.training.plan import note_plan

        batch = [list(overrides) for overrides in super().get_job_batch()]
        assert self.hydra_context is not None
        assert self.config is not None
        loader, here = self.hydra_context.config_loader, Path(self.config.hydra.runtime.cwd)
        cfgs = [
            located(_of_the_job(loader.load_sweep_config(self.config, overrides)), here) for overrides in batch
        ]  # fmt: skip
        sweep = here / self.config.hydra.sweep.dir
        note_plan(cfgs, batch, sweep)
        alone = isinstance(self.launcher, BasicLauncher)
        return [self._job(batch, cfgs, members, sweep) for members in grouped(cfgs, alone)]

    def _job(
        self, batch: Sequence[Sequence[str]], cfgs: Sequence[DictConfig], members: Sequence[int], sweep: Path
    ) -> Sequence[str]:
        from sae_lightning.training.packing import write_pack

        first = list(batch[members[0]])
        if len(members) == 1:
            return first
        file = write_pack([cfgs[i] for i in members], sweep / "packs")
        return [*first, f"pack.file={QuotedString(str(file), Quote.single).with_quotes()}"]


def _of_the_job(cfg: DictConfig) -> DictConfig:
    """Without Hydra's own section, which cannot be resolved before the job runs."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
