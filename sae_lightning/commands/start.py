"""What every command does first."""

from __future__ import annotations

import os

from omegaconf import DictConfig

from sae_lightning.commands.paths import located
from sae_lightning.distributed.limits import heed_cores

RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "JSM_NAMESPACE_RANK", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


def started(cfg: DictConfig) -> DictConfig:
    """``cfg`` with absolute paths; this process is no rank, whatever its environment says, and heeds its cores.

    Job platforms set such variables for single processes too, and only processes that this package starts are ranks.
    """
    for name in RANKS:
        os.environ.pop(name, None)
    heed_cores()
    return located(cfg)
