"""Hydra's own sweeper, but that settings are checked first, and runs which read the same features become one job.

Only ``hydra_plugins`` imports this file: Hydra runs the modules of its own sweeper and launcher anew when it looks for
plugins, and a class made of them before is none of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class CheckedSweeper(BasicSweeper):
    """Hydra's own sweeper, but that the settings of all jobs are checked before the first one starts."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.command = getattr(task_function, "command", None)

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        batch = super().get_job_batch()
        self.composed(batch)
        return batch

    def composed(self, batch: Sequence[Sequence[str]]) -> list[DictConfig]:
        """The configs of all jobs with absolute paths, without Hydra's section; SettingsError with all mistakes."""
        from sae_lightning.commands.paths import located
        from sae_lightning.settings import SettingsError, mistakes
        from sae_lightning.settings.places import check_places

        assert self.hydra_context is not None
        assert self.config is not None
        loader, here = self.hydra_context.config_loader, Path(self.config.hydra.runtime.cwd)
        cfgs, found = [], dict[str, None]()
        for overrides in batch:
            whole = loader.load_sweep_config(self.config, list(overrides))
            cfgs.append(_of_the_job(whole))
            if self.command is not None:
                found |= dict.fromkeys(mistakes(self.command, cfgs[-1], whole.hydra))
        if found:
            raise SettingsError(list(found))
        for cfg in cfgs:
            located(cfg, here)
            if self.command is not None:
                check_places(self.command, cfg)
        return cfgs


class PackedSweeper(CheckedSweeper):
    """Groups the runs of a sweep as ``pack`` of the config says, and notes in ``paths.runs`` what was planned.

    A job of several runs gets the overrides of the first, and ``pack.file`` with the configs of all, as Hydra has
    composed them.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """All jobs; where one has failed, which the others do not mind, the closing table is shown all the same."""
        try:
            return super().sweep(arguments)
        except Exception as error:
            from sae_lightning.settings import SettingsError

            if not isinstance(error, SettingsError) and self.hydra_context is not None and self.config is not None:
                self.hydra_context.callbacks.on_multirun_end(config=self.config, config_name=None)
            raise

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        batch = [list(overrides) for overrides in BasicSweeper.get_job_batch(self)]
        assert self.config is not None
        cfgs = self.composed(batch)
        from sae_lightning.runs.packs import grouped  # after the check, which answers at once
        from sae_lightning.runs.state import note_plan

        sweep = Path(self.config.hydra.runtime.cwd) / self.config.hydra.sweep.dir
        note_plan(cfgs, batch, sweep)
        alone = isinstance(self.launcher, BasicLauncher)
        return [self._job(batch, cfgs, members, sweep) for members in grouped(cfgs, alone)]

    def _job(
        self, batch: Sequence[Sequence[str]], cfgs: Sequence[DictConfig], members: Sequence[int], sweep: Path
    ) -> Sequence[str]:
        from sae_lightning.runs.packs import write_pack

        first = list(batch[members[0]])
        if len(members) == 1:
            return first
        file = write_pack([cfgs[i] for i in members], sweep / "packs")
        return [*first, f"pack.file={QuotedString(str(file), Quote.single).with_quotes()}"]


def _of_the_job(cfg: DictConfig) -> DictConfig:
    """Without Hydra's own section, which cannot be resolved before the job runs."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
