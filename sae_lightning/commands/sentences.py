"""Errors as sentences: our own, those of files, and Hydra's and OmegaConf's in the words of our settings."""

from __future__ import annotations

import dis
import re

from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sae_lightning.commands.help import CONF, choices_of, groups, keys_of
from sae_lightning.settings.names import near, settings_of, unknown

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "sklearn", "pyarrow", "matplotlib", "json")
EXTRAS = {"starlette": "explorer", "uvicorn": "explorer", "peft": "finetune", "submitit": "slurm"}  # of pyproject.toml
SENTENCES = ("PackError", "RankError", "MisconfigurationException", "PartError", "ReleaseError")


def sentence_of(error: BaseException, command: str) -> str | None:
    """What ``error`` says to whoever typed the ``command``; None for one that only a traceback explains."""
    if isinstance(error, CompactHydraException):
        return of_hydra(error, command)
    if isinstance(error, OmegaConfBaseException):
        return of_omegaconf(error)
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(str(error.name).partition(".")[0])
    if isinstance(error, OSError) and error.errno is not None:
        where = f" {error.filename}" if error.filename is not None else ""
        return f"Cannot read or write{where}: {(error.strerror or str(error)).lower()}."
    if type(error).__name__ in SENTENCES or isinstance(error, FileNotFoundError):
        return str(error)
    if isinstance(error, MemoryError):
        return "There is not enough memory; lower expansion, batch_size or stream.buffer_mb."
    return str(error) if isinstance(error, ValueError) and str(error) and not _of_a_library(error) else None


def missing_extra(package: str) -> str | None:
    """How to install a ``package`` that serves a part of ours alone and is not there; None for any other."""
    extra = EXTRAS.get(package)
    return extra and f"This needs {package}, which is not installed; pip install 'sae-lightning[{extra}]'."


def _of_a_library(error: BaseException) -> bool:
    """Whether code raised ``error`` that knows nothing of settings, so that its words explain nothing.

    That is a library's, or what is not Python: then the innermost instruction is no ``raise``.
    """
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    frame, at = innermost.tb_frame, innermost.tb_lasti
    raised = dis.opname[frame.f_code.co_code[at]] in ("RAISE_VARARGS", "RERAISE")
    return not raised or str(frame.f_globals.get("__name__", "")).split(".")[0] in LIBRARIES


def of_hydra(error: CompactHydraException, command: str) -> str:
    """An error of Hydra's while it reads what was typed and composes the config."""
    text = str(error)
    if not text and isinstance(error.__cause__, OmegaConfBaseException):
        return of_omegaconf(error.__cause__)
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return (
            f"{error.override} cannot be read ({_line(text)}); put the value in quotes that the shell leaves, as in "
            f"{key}=\"'…'\"."
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(str(error.missing_cfg_file), list(error.options or ()))
    found = re.search(r"Ambiguous value for argument '(.*)'", text)
    if found:
        key, _, value = found[1].partition("=")
        return f"{found[1]} names several values; write {key}=[{value}] for a list, or add -m to run each of them."
    found = re.search(r"Could not override '([^']+)'\. No match in the defaults list", text)
    if found:
        return _no_group(found[1].split("@")[0])
    found = re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text)
    if found and "already at" in text:
        return f"{found[1]} is there already; leave out the plus."
    if found:
        name = found[1].partition("=")[0]
        if "@" in name:
            return f"{name} is not chosen here, so it cannot be changed; to add it, type +{name}=…"
        if name in settings_of(command):
            return _absent(name)
        value = re.search(rf"\+{re.escape(name)}=(\S+)", text)
        group = next((g for g in groups() if value and value[1] in choices_of(g) and near(name, [g], 0.4)), None)
        if group is not None and value:
            return f"There is no setting {name}; did you mean {group}={value[1]}?"
        return unknown(name, command, groups())
    return _line(text)


def _absent(name: str) -> str:
    """A setting of ours that the chosen groups do not have."""
    group, _, key = name.partition(".")
    having = [choice for choice in choices_of(group) if key in keys_of(group, choice)]
    other = f", or take one of {', '.join(f'{group}={choice}' for choice in having)}" if having else ""
    return f"{name} is not among the settings of what is chosen; add it with a plus, +{name}=…{other}."


def of_omegaconf(error: OmegaConfBaseException) -> str:
    """An error of OmegaConf's, with the name of the setting."""
    name = getattr(error, "full_key", None)
    said = _line(str(error)).rstrip(".")
    return f"{name}: {said}." if name and name not in said.replace("'", "").split() else f"{said}."


def _missing(path: str, options: list[str]) -> str:
    """A file of ``conf/`` that is not there."""
    group, _, name = path.removesuffix(".yaml").rpartition("/")
    if name.startswith("submitit_"):
        return str(missing_extra("submitit"))
    known = options or (choices_of(group) if group else sorted(path.stem for path in CONF.glob("*.yaml")))
    if not known:
        return _no_group(group) if group else f"There is no configuration {name} in {CONF}."
    found = near(name, known)
    hint = f"did you mean {found}? Choices: " if found else "choose one of "
    return f"There is no {group or 'configuration'}={name}; {hint}{', '.join(known)}."


def _no_group(group: str) -> str:
    found = near(group, groups())
    return f"There is no group {group}; " + (
        f"did you mean {found}?" if found else f"groups are {', '.join(groups())}."
    )


def _line(text: str) -> str:
    """The sentence in a message of several lines."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [
        line
        for line in lines
        if line and not line.startswith(("full_key", "object_type", "See http", "reference_type"))
    ]
    return " ".join(kept)
