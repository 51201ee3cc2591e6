"""A composed config against the table: every mistake as a sentence. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

import sae_lightning.settings.resolvers  # noqa: F401
from sae_lightning.settings.combinations import COMBINATIONS
from sae_lightning.settings.kinds import Callbacks, Chosen, Kind, Maybe, Named, Plus, Rule, registered
from sae_lightning.settings.names import did_you_mean, misfit, near, settings_of, shown, unknown
from sae_lightning.settings.table import COMMANDS

LATER = ("evaluate", "explore")  # commands whose judges and data sets refer to settings of the runs that they open


class SettingsError(ValueError):
    """One or several settings that cannot be, in a sentence each."""

    def __init__(self, found: list[str]) -> None:
        self.mistakes = found
        several = f"{len(found)} settings cannot be:\n" + "\n".join(f"- {sentence}" for sentence in found)
        super().__init__(found[0] if len(found) == 1 else several)


def check_settings(command: str, cfg: DictConfig, hydra: Any = None) -> None:
    """SettingsError with all ``mistakes`` in ``cfg``, if there are any."""
    found = mistakes(command, cfg, hydra)
    if found:
        raise SettingsError(found)


def mistakes(command: str, cfg: DictConfig, hydra: Any = None) -> list[str]:
    """Sentences about the settings of ``command`` in ``cfg`` that cannot be; whole floats become ints in ``cfg``.

    ``hydra`` is Hydra's own section, where there is one: it tells what was typed from what config files bring. A key
    that a file brings beside ours is the user's own; a typed one must be read by something.
    """
    walk = _Walk(command, cfg, hydra)
    walk.section(cfg, COMMANDS[command], "")
    for name in [name for name, raw in walk.refers.items() if any(f"${{{bad}}}" in raw for bad in walk.found)]:
        walk.found.pop(name, None)  # said of the setting that it refers to
    for reads, sentence in COMBINATIONS.get(command, ()):
        if not any(
            f"{name}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{name}.") for name in reads for bad in walk.found
        ):
            said = sentence(*(_select(cfg, name) for name in reads))
            if said:
                walk.found[f"{reads[0]} {len(walk.found)}"] = said
    if "expansion" in walk.typed and "d_sae" not in walk.typed and cfg.get("d_sae") is not None:
        walk.found["expansion"] = (
            f"expansion={cfg.expansion} has no effect beside d_sae={cfg.d_sae}, which the experiment brings; "
            "add d_sae=null, or leave it out."
        )
    return list(walk.found.values())


def _select(cfg: DictConfig, name: str) -> Any:
    """The value at ``name`` as plain Python; None where there is none, unresolved where it leads to another config."""
    try:
        value = OmegaConf.select(cfg, name)
    except OmegaConfBaseException:
        return None
    try:
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return _raw(value)


class _Walk:
    """Sentences ``found`` by the name of the setting that is wrong."""

    def __init__(self, command: str, cfg: DictConfig, hydra: Any) -> None:
        self.command, self.cfg, self.found = command, cfg, dict[str, str]()
        self.refers: dict[str, str] = {}
        overrides = [] if hydra is None else list(hydra.overrides.task)
        self.typed = {re.split(r"[.@=]", override.lstrip("+~"))[0] for override in overrides}
        self.groups = {str(key).split("/")[0] for key in ({} if hydra is None else hydra.runtime.choices)}
        swept = "" if hydra is None else str(_raw(hydra.sweeper.get("params")))
        self.text = str(_raw(cfg)) + swept

    def section(self, node: DictConfig, rules: Mapping[str, Rule], path: str, registry: str | None = None) -> None:
        """Each key of ``node`` by its rule."""
        for key in map(str, node):
            name = f"{path}.{key}" if path else key
            if key in rules:
                self.entry(node, key, rules[key], name)
            elif not (registry and key in registered(registry)) and not (path == "" and self._own(key, rules)):
                self.found[name] = unknown(name, self.command)

    def entry(self, node: DictConfig, key: str, rule: Rule, name: str) -> None:
        """The value of ``node[key]`` by its rule."""
        if OmegaConf.is_missing(node, key):
            self.found[name] = f"{name} has to be set; give {name}=…"
            return
        if OmegaConf.is_interpolation(node, key):
            self.refers[name] = str(_raw(node)[key])
        try:
            value = node[key]
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) and _leaf(rule) else value
        except InterpolationToMissingValueError:
            return
        except OmegaConfBaseException as error:
            if self.command not in LATER:
                self.found[name] = f"{name}={shown(_raw(node)[key])} leads nowhere: {str(error).splitlines()[0]}."
            return
        while isinstance(rule, Maybe):
            if plain is None or (rule.flags and isinstance(plain, bool)):
                return
            rule = rule.rule
        if isinstance(rule, Kind):
            self.value(node, key, rule, name, plain)
        elif not isinstance(value, DictConfig):
            takes = ", ".join(inner) if (inner := _inner(rule, node)) else "entries by name"
            self.found[name] = (
                f"{name}={shown(value)} must be a section of {takes}; in a shell put it in quotes: "
                f"'{name}={{{next(iter(inner), 'name')}: …}}'."
            )
        elif isinstance(rule, Named):
            for inner_key in map(str, value):
                self.entry(value, inner_key, rule.rule, f"{name}.{inner_key}")
        elif isinstance(rule, Callbacks):
            self.callbacks(value, rule, name)
        elif isinstance(rule, Plus):
            self.section(value, rule.rules, name, rule.registry)
        elif isinstance(rule, Chosen):
            choice = _chosen(rule, value, node)
            chosen = rule.sections.get(str(choice))
            if isinstance(chosen, Mapping):
                self.section(value, chosen, name)
            elif rule.kind is not None and not rule.kind.fits(choice):
                self.found[f"{name}.{rule.by}"] = misfit(f"{name}.{rule.by}", choice, rule.kind)
        else:
            self.section(value, rule, name)

    def value(self, node: DictConfig, key: str, kind: Kind, name: str, plain: Any) -> None:
        """One value by its kind."""
        if not kind.fits(plain):
            target = self.refers.get(name, "").removeprefix("${").removesuffix("}")
            self.found[name] = misfit(target if target in settings_of(self.command) else name, plain, kind)
        elif kind.whole and isinstance(plain, float) and not OmegaConf.is_interpolation(node, key):
            with flag_override(node, "readonly", False):
                node[key] = int(plain)

    def callbacks(self, node: DictConfig, rule: Callbacks, name: str) -> None:
        """Entries by the class under ``_target_``; one of ours that has none is not switched on."""
        names = rule.names()
        for key in map(str, node):
            inner, entry = f"{name}.{key}", node[key]
            if entry is None:
                continue
            if not isinstance(entry, DictConfig):
                self.found[inner] = (
                    f"{inner}={shown(entry)} must be a section with the _target_ of a callback, or null."
                )
            elif entry.get("_target_") in rule.ours:
                self.section(entry, rule.ours[entry["_target_"]], inner)
            elif "_target_" not in entry and key in names:
                self.section(entry, names[key], inner)
            elif "_target_" not in entry:
                hint = did_you_mean(key, names)
                self.found[inner] = f"{inner} has no _target_; give the class of the callback, or null{hint}."

    def _own(self, key: str, rules: Mapping[str, Rule]) -> bool:
        """Whether a key at the top is the user's own: a group, referred to, or of a file and unlike any of ours."""
        if key in self.groups or f"${{{key}" in self.text:
            return True
        return key not in self.typed and near(key, rules, 0.75) is None


def _leaf(rule: Rule) -> bool:
    return isinstance(rule.rule if isinstance(rule, Maybe) else rule, Kind)


def _raw(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _chosen(rule: Chosen, section: DictConfig, around: DictConfig) -> Any:
    for node in (section, around):
        try:
            if rule.by in node:
                return node[rule.by]
        except OmegaConfBaseException:
            return None
    return None


def _inner(rule: Rule, around: DictConfig) -> list[str]:
    """The keys that a section with this rule takes."""
    if isinstance(rule, Maybe):
        return _inner(rule.rule, around)
    if isinstance(rule, Plus):
        return list(rule.rules)
    if isinstance(rule, Chosen):
        chosen = rule.sections.get(str(around.get(rule.by))) if rule.by in around else None
        return _inner(chosen or next(iter(rule.sections.values())), around)
    return list(rule) if isinstance(rule, Mapping) else []
