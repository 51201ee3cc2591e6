"""Training and scoring of what is planned: whatever is finished is skipped, whatever is broken goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.recipes.plan import Planned, places
from sae_lightning.commands.help import CONF
from sae_lightning.commands.paths import located
from sae_lightning.evaluation.suite import evaluate
from sae_lightning.features.source import looking_once
from sae_lightning.runs.identity import run_name
from sae_lightning.runs.packs import grouped
from sae_lightning.runs.run import is_finished
from sae_lightning.training.packed import PackError, train_packed

RECOVERED = (32, 128)  # of a token's strongest latents, for MSAE's claim


class Places(NamedTuple):
    """Where the photographs, the folder of both encoders, stores and runs lie."""

    data: Path
    encoders: Path
    stores: Path
    runs: Path


def config(run: Planned, lies: Places) -> DictConfig:
    """What ``train.py`` would compose of a planned run."""
    where = places(*(path.resolve() for path in lies), run.features)
    quiet = ("trainer.enable_progress_bar=false", "pack.when=always")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return located(compose("config", [*where, *run.overrides, *quiet]))


def finished(plan: Iterable[Planned], lies: Places, train: bool = True) -> Iterator[list[tuple[Planned, Path]]]:
    """The runs of one seed of one set after another, with their folders, once they are trained and scored."""
    for _, members in groupby(plan, lambda run: (run.seed, run.features)):
        some = list(members)
        cfgs = [config(run, lies) for run in some]
        with looking_once():
            folders = [lies.runs.resolve() / run_name(cfg) for cfg in cfgs]
        if train:
            for pack in grouped(cfgs, in_turn=True):
                try:
                    train_packed([cfgs[i] for i in pack])
                except PackError as error:  # the others are finished
                    print(error, flush=True)
            score(sorted({folder.name for folder in folders if is_finished(folder)}), lies.runs)
        yield list(zip(some, folders, strict=True))


def score(names: Sequence[str], runs: Path) -> None:
    """MonoScore, purity and the rest on the test split, and what the strongest latents alone give back."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        budgets = f"+metrics.recovery={{budgets:{list(RECOVERED)},images:200,samples:2000,seed:42}}"
        cfg = compose("evaluate", [f"runs={list(names)}", f"paths.runs='{runs.resolve()}'", budgets])
    evaluate(located(cfg))
