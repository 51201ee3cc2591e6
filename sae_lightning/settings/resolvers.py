"""Functions that configs call, such as names of backbones that follow from a model's id."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf


def folder_name(model: str | None) -> str:
    """``model`` as a folder's name: what is neither letter, digit nor one of ``_.+-`` becomes ``--``.

    Of a model's own folder it is the last part of the path. Null too has a name, so that the error about it comes from
    where the model is needed.
    """
    path = Path(str(model).removeprefix("local-dir:")).expanduser()
    return re.sub(r"[^\w.+-]+", "--", path.name if path.is_dir() else str(model)).strip("-.")


# conf/backbone/timm.yaml and transformers.yaml: ${folder_name:<model id>}
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)

# conf/experiment/msae/paper.yaml: ${where:<value>,<what it is at some values>,<what it is otherwise>}
OmegaConf.register_new_resolver("where", lambda value, at, otherwise: at.get(value, otherwise), replace=True)
