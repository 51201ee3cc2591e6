"""What every command does first: its paths are made absolute once, when its config is composed, and said in a line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import escape, glob
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

PATHS = (
    "paths.*", "data.path", "data.train", "data.val", "data.test", "*.sets.*.path", "*.siblings", "similarity_store*",
    "metrics.*.store", "out", "app.judgements*", "callbacks.*.dirpath", "logger.wandb.folder",
)  # fmt: skip
NAMES_OR_PATHS = (  # paths where such a file exists, or where they look like one
    "data.id", "*.sets.*.id", "*.published.model", "*.published.weights", "model.model", "model.weights",
    "app.vlm.model", "app.vlm.weights", "app.vocabulary*", "data.classes*", "app.queries*",
)  # fmt: skip
PATTERNS = ("run", "run.*")  # of folders, or of names in paths.runs
ALL = (*PATHS, *NAMES_OR_PATHS, *PATTERNS)
LOOKS = ("~", "./", "../")

RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "JSM_NAMESPACE_RANK", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
_said: set[str] = set()


def started(cfg: DictConfig) -> DictConfig:
    """``cfg`` with absolute paths; this process is no rank, whatever its environment says, and uses its own cores.

    Job platforms set such variables for single processes too, and only processes that this package starts are ranks.
    """
    from sae_lightning.distributed.limits import use_allowed_cores  # with PyTorch

    for name in RANKS:
        os.environ.pop(name, None)
    use_allowed_cores()
    return located(cfg)


def located(cfg: DictConfig, base: str | Path | None = None) -> DictConfig:
    """``cfg`` with all its paths absolute, counted from ``base``, by default the folder where the command was typed.

    ``~`` and environment variables are expanded. Changes ``cfg``, and says once where stores and runs are. ValueError
    for the home folder of somebody who is not known.
    """
    if base is None:
        base = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else Path.cwd()
    with open_dict(cfg):
        for key, value in list(_leaves(cfg)):
            found = _absolute(key, value, Path(base))
            if found != value:
                _keep_names(cfg, key)
                OmegaConf.update(cfg, key, found)
    said = ", ".join(f"{name} in {where}" for name, where in cfg.get("paths", {}).items() if where)
    if said and said not in _said:
        _said.add(said)
        print(said[0].upper() + said[1:], flush=True)
    return cfg


def absolute(path: str, base: Path, key: str = "a path") -> str:
    """``path`` without ``~``, variables, ``.`` and ``..``, from ``base``; addresses (``https://…``) as they are."""
    if "://" in path:
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise ValueError(
            f"{key}={path} begins with a home folder that is not known here; write it out, or "
            f"./{path} where a folder is really called so."
        )
    return os.path.normpath(base / expanded)


def _absolute(key: str, value: str, base: Path) -> str:
    if _among(key, PATHS):
        return absolute(value, base, key)
    if _among(key, NAMES_OR_PATHS) and (value.startswith(LOOKS) or os.path.exists(base / value)):
        return absolute(value, base, key)
    if _among(key, PATTERNS) and (value.startswith(LOOKS) or ("/" in value and glob(value, root_dir=base))):
        return absolute(value, Path(escape(str(base))), key)
    return value


def _among(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Text in the config by its dotted key, that of lists too; nothing twice by way of interpolations."""
    entries: Any = node.items_ex(resolve=False) if isinstance(node, DictConfig) else enumerate(node._content or ())
    for name, raw in entries:
        key = f"{prefix}{name}"
        if isinstance(raw, DictConfig | ListConfig):
            if not (raw._is_none() or raw._is_missing() or raw._is_interpolation()):
                yield from _leaves(raw, f"{key}.")
        elif _among(key, ALL) and not OmegaConf.is_missing(node, name) and isinstance(node[name], str):
            yield key, node[name]


def _keep_names(cfg: DictConfig, key: str) -> None:
    """Settle names that follow from the path at ``key`` (``data.name: ${data.id}``), before it becomes a longer one."""
    while "." in key:
        key = key.rpartition(".")[0]
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig) and "name" in node and OmegaConf.is_interpolation(node, "name"):
            node.name = node.name
