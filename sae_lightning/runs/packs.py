"""Runs of a sweep that are one job, as they read the same features: which those are, and the file that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.files import write_text

SECTIONS = ("data", "backbone", "features", "extract", "subset", "seed", "batch_size", "stream", "paths", "pack")
TRAINER_KEYS = ("accelerator", "devices", "num_nodes", "strategy")


def stream_key(cfg: DictConfig) -> str:
    """What runs must have in common to share a stream: the features, their order, and the processes."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {name: plain[name] for name in SECTIONS} | {name: plain["trainer"][name] for name in TRAINER_KEYS}
    return json.dumps(kept, sort_keys=True)


def grouped(cfgs: Sequence[DictConfig], in_turn: bool) -> list[list[int]]:
    """Indices of ``cfgs``, those of a group being one job; ``in_turn`` says that jobs run one after another here.

    Groups and their members come in the order of ``cfgs``. A run with a profiler, which watches its whole process, is
    alone.
    """
    groups: dict[str, list[int]] = {}
    for i, cfg in enumerate(cfgs):
        alone = cfg.pack.when == "never" or cfg.trainer.num_nodes > 1 or cfg.trainer.get("profiler") is not None
        packed = not alone and (cfg.pack.when == "always" or in_turn)
        groups.setdefault(stream_key(cfg) if packed else str(i), []).append(i)
    return [part for group in groups.values() for part in _parts(group, cfgs[group[0]].pack.members)]


def _parts(group: list[int], most: int | None) -> list[list[int]]:
    """The group in parts of nearly equal size, of at most ``most`` members."""
    count = -(-len(group) // (most or len(group)))
    size, more = divmod(len(group), count)
    starts = [i * size + min(i, more) for i in range(count + 1)]
    return [group[a:b] for a, b in pairwise(starts)]


def write_pack(cfgs: Sequence[DictConfig], folder: Path) -> Path:
    """Write the configs of one job's runs into a file of ``folder`` that is named by what it holds."""
    text = OmegaConf.to_yaml([OmegaConf.to_container(cfg, resolve=False) for cfg in cfgs])
    file = folder / f"{len(cfgs)}-runs-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return file


def read_pack(file: Path) -> list[DictConfig]:
    """What ``write_pack`` wrote: configs as Hydra composes them, which take no new keys."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    cfgs = [DictConfig(one) for one in plain]
    for cfg in cfgs:
        OmegaConf.set_struct(cfg, True)
    return cfgs


def members_of(cfg: DictConfig) -> list[DictConfig]:
    """The configs of the pack that ``cfg`` is a job of, as the sweeper wrote them; ``[cfg]`` where it is none."""
    return [cfg] if cfg.pack.file is None else read_pack(Path(cfg.pack.file))
