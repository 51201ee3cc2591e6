"""A run that is to be scored: its stores, and which parts of the benchmark it lacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lightning.data import DataError
from sae_lightning.evaluation.core import stored_scores
from sae_lightning.evaluation.parts import parts_of
from sae_lightning.evaluation.scoring_pass import Gather, ScoringPass, check_store
from sae_lightning.evaluation.similarity import Judge, Similarity
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import file_sha256
from sae_lightning.metrics.part import MAIN, Part
from sae_lightning.runs.run import LATENTS
from sae_lightning.runs.scores import scores_of
from sae_lightning.saes import SAE, ArtefactError
from sae_lightning.saes.artefact import read_cfg, tensor_names

PARTIAL = "evaluation.partial"

OWN = Similarity()

SETS = ("cross_domain", "segmentation")  # parts of the metrics that name data sets

NEEDED = ("data", "backbone")  # sections of the config that a run was trained with

VERSION = 2  # of all parts; a change of one's figures raises it


@dataclass(frozen=True)
class Settings:
    """How a call scores: ``metrics`` is the config group of that name; the rest is that of conf/evaluate.yaml."""

    metrics: DictConfig
    split: str = "test"
    similarity: Similarity = OWN
    batch_tokens: int = 4096
    memory_gb: float = 4
    checkpoint_minutes: float = 5
    again: bool = False
    device: str = "cpu"
    latents_shown: int = 12
    fingerprints: dict[str, str] = field(default_factory=dict)  # of stores, found while runs are looked at

    @cached_property
    def parts(self) -> list[Part]:
        """All parts that are asked for."""
        return parts_of(self.metrics)


class Job:
    """A run that is to be scored, with its stores by name of the pass that reads them."""

    def __init__(self, run: Path, settings: Settings) -> None:
        self.run, self.settings = run, settings
        SAE.load(run)  # says what is wrong with it before anything is computed
        config = read_cfg(run).get("config")
        config = config if isinstance(config, dict) else {}
        lacking = [name for name in NEEDED if not isinstance(config.get(name), dict)]
        if isinstance(config.get("data"), dict) and config["data"].get("source") == "store":
            lacking = [name for name in lacking if name != "extract"]  # nothing is extracted
        if lacking:
            raise ArtefactError(
                f"{run / 'cfg.json'} does not say how the SAE was trained (it lacks {', '.join(lacking)} of the "
                "config), so its features are not known; leave it out, or train it here."
            )
        self.config, self.source = OmegaConf.create(config), Source.of(config)
        self.sae_digest = file_sha256(run / "sae.safetensors")
        self.parts = [part for part in settings.parts if part.applies(self.config)]
        self._stores: dict[str, FeatureStore] = {}

    def store(self, name: str) -> FeatureStore:
        """The store that the pass ``name`` reads; extracted if it is missing."""
        if name not in self._stores:
            with self._reading(name) as (source, split):
                found = source.store(split)
            check_store(self.run, found)
            self._stores[name] = found
        return self._stores[name]

    def fingerprint(self, name: str) -> str:
        """The fingerprint of that store, which need not be there; found once for all runs that read it."""
        with self._reading(name) as (source, split):
            key = _digest([source.data, source.backbone, split, source.features, source.extraction])
            if key not in self.settings.fingerprints:
                self.settings.fingerprints[key] = source.fingerprint(split)
        return self.settings.fingerprints[key]

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[Source, str]]:
        """The source and split of the store ``name``; DataError says how to do without a data set that is not there."""
        if name == MAIN:
            yield self.source, self.settings.split
            return
        of, split = name.rsplit("/", 1)
        try:
            yield self.set_source(of), split
        except DataError as error:
            group = next(g for g in SETS if of in self._sets(g))
            raise DataError(
                f"The data set {of} of metrics.{group}: {error} Change metrics.{group}.sets.{of}, or leave it out with "
                f"'~metrics.{group}.sets.{of}'."
            ) from error

    def _sets(self, group: str) -> Any:
        return (self.settings.metrics.get(group) or {}).get("sets") or {}

    def set_source(self, name: str) -> Source:
        """The run's source with the data set ``name`` of the metrics' in place of its own."""
        # not resolved yet: its interpolations name the root's ``data``
        data = OmegaConf.to_container(next(self._sets(g)[name] for g in SETS if name in self._sets(g)))
        return self.source.replace(data=data)

    def key(self, part: Part) -> str:
        """What the scores of ``part`` depend on, as a digest."""
        stores = [self.fingerprint(name) for name in dict.fromkeys((MAIN, *part.passes, *part.reads))]
        what = [VERSION, part.name, part.options, self.sae_digest, stores]
        if part.name == "core":
            what.append(self.settings.similarity.key(self.source))
        if part.judge is not None:
            what.append(part.judge(self.config).key(self.source))
        return _digest(what)

    def missing(self) -> list[Part]:
        """The parts that have no scores for this SAE, these stores and these settings."""
        left = list(self.parts) if self.settings.again else self._missing()
        for part in left:  # what must be extracted is extracted now, not after hours
            self.judge_of(part)
            for name in (*part.passes, *part.reads):
                self.store(name)
        return left

    def _missing(self) -> list[Part]:
        split, held = self.settings.split, tensor_names(self.run / LATENTS)
        rewritten = any(p.name == "core" for p in self.parts) and stored_scores(self.run, split, []) is None
        left = []
        for part in self.parts:  # core comes first
            found = scores_of(self.run, part.name, split, self.key(part)) is not None
            if part.name == "core":
                rewritten = rewritten or not found
            if not found or not held.issuperset(part.leaves) or (rewritten and (part.leaves or part.name == "core")):
                left.append(part)
        return left

    def judge_of(self, part: Part) -> FeatureStore | None:
        """The store of the encoder that says how alike images are for ``part``; None when the scored features do."""
        if part.judge is None:
            return None
        return part.judge(self.config).open(self.source, self.settings.split)

    def judge(self) -> Judge:
        """What says how alike two images are for the MonoScore."""
        similarity = self.settings.similarity
        return Judge(self.store(MAIN), similarity.open(self.source, self.settings.split), similarity.key(self.source))

    def open_pass(self, name: str, gather: Gather, span: range | None = None, part: str = "whole") -> ScoringPass:
        """The pass ``name`` of this run over the images ``span``, where an earlier process left it."""
        store = self.store(name)
        judge = self.judge() if name == MAIN else Judge(store)
        digest = _digest([VERSION, repr(gather), self.sae_digest, store.fingerprint, judge.key])
        folder = self.run / PARTIAL / f"{name.replace('/', '-')}-{self.settings.split}-{digest[:8]}" / part
        return ScoringPass(self.run, store, judge, folder, gather, span, self.settings.device)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
