"""Scoring many runs: what is missing of each, one read of a store for all that want it, and a table that grows.

A run's scores come in *parts* (``parts.py``), each with a key of what determines it. Parts that are there are left
alone. For the others, runs of one backbone are taken together, as many as fit the memory; they see each store once, in
passes that are brought to the disk every few minutes in ``<run>/evaluation.partial``; then each missing part is
computed and written. A killed call loses at most the minutes since the last checkpoint or the part it was at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from sae_lightning.benchmark.across_seeds import score_stability
from sae_lightning.benchmark.evaluate import stored_scores
from sae_lightning.benchmark.evaluated import Evaluated
from sae_lightning.benchmark.latents import LATENTS, tensor_names
from sae_lightning.benchmark.part import MAIN, Part
from sae_lightning.benchmark.parts import parts_of
from sae_lightning.benchmark.ranks import Ranks
from sae_lightning.benchmark.scoring_pass import Gather, ScoringPass, check_store
from sae_lightning.benchmark.similarity import Judge, Similarity
from sae_lightning.benchmark.streaming import stream
from sae_lightning.benchmark.table import put_scores, scores_of
from sae_lightning.features.ensure import ensure_store
from sae_lightning.features.store import FeatureStore, file_sha256
from sae_lightning.saes.artefact import read_cfg

PARTIAL = "evaluation.partial"
ALONE = Ranks()
OWN = Similarity()
VERSION = 1  # of all parts; a change of one's figures raises it


class PartError(ValueError):
    """Parts of the benchmark that could not be computed."""


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

    @cached_property
    def parts(self) -> list[Part]:
        """All parts that are asked for."""
        return parts_of(self.metrics)


class Job:
    """A run that is to be scored, with its stores by name of the pass that reads them."""

    def __init__(self, run: Path, settings: Settings) -> None:
        self.run, self.settings = run, settings
        self.config = OmegaConf.create(read_cfg(run)["config"])
        self.sae_digest = file_sha256(run / "sae.safetensors")
        self.parts = [part for part in settings.parts if part.applies(self.config)]
        self._stores: dict[str, FeatureStore] = {}

    def store(self, name: str) -> FeatureStore:
        """The store that the pass ``name`` reads; extracted if it is missing."""
        if name not in self._stores:
            if name == MAIN:
                found = ensure_store(self.config, self.settings.split)
            else:
                found = self.set_store(*name.rsplit("/", 1))
            check_store(self.run, found)
            self._stores[name] = found
        return self._stores[name]

    def set_config(self, name: str) -> DictConfig:
        """The run's config with the data set ``name`` of the metrics' in place of its own."""
        for group in ("cross_domain", "segmentation"):
            sets = (self.settings.metrics.get(group) or {}).get("sets") or {}
            if name in sets:
                config = self.config.copy()
                # not resolved yet: its interpolations name the root's ``data``
                config.data = OmegaConf.to_container(sets[name], resolve=False)
                return config
        raise KeyError(name)

    def set_store(self, name: str, split: str) -> FeatureStore:
        """The store of ``split`` of a data set of the metrics'."""
        return ensure_store(self.set_config(name), split)

    def key(self, part: Part) -> str:
        """What the scores of ``part`` depend on, as a digest."""
        config: dict[str, Any] = OmegaConf.to_container(self.config)  # type: ignore[assignment]
        stores = [self.store(name).fingerprint for name in (MAIN, *part.passes, *part.reads)]
        what = [VERSION, part.name, part.options, self.sae_digest, stores]
        if part.name == "core":
            what.append(self.settings.similarity.key(config))
        if part.judge is not None:
            what.append(part.judge(self.config).key(config))
        return _digest(what)

    def missing(self) -> list[Part]:
        """The parts that have no scores for this SAE, these stores and these settings."""
        if self.settings.again:
            return list(self.parts)
        split, held = self.settings.split, tensor_names(self.run / LATENTS)
        rewritten = any(p.name == "core" for p in self.parts) and stored_scores(self.run, split, []) is None
        left = []
        for part in self.parts:  # core comes first
            found = scores_of(self.run, part.name, split, self.key(part)) is not None
            if part.name == "core":
                rewritten = rewritten or not found
            if not found or not held.issuperset(part.leaves) or (rewritten and (part.leaves or part.name == "core")):
                left.append(part)
        for part in left:
            self.judge_of(part)  # extracted now, if it must be
        return left

    def judge_of(self, part: Part) -> FeatureStore | None:
        """The store of the encoder that says how alike images are for ``part``; None when the scored features do."""
        if part.judge is None:
            return None
        config: dict[str, Any] = OmegaConf.to_container(self.config)  # type: ignore[assignment]
        return part.judge(self.config).open(config, self.settings.split)

    def judge(self) -> Judge:
        """What says how alike two images are for the MonoScore."""
        plain: dict[str, Any] = OmegaConf.to_container(self.config)  # type: ignore[assignment]
        similarity = self.settings.similarity
        return Judge(self.store(MAIN), similarity.open(plain, self.settings.split), similarity.key(plain))

    def open_pass(self, name: str, gather: Gather, span: range | None = None, part: str = "whole") -> ScoringPass:
        """The pass ``name`` of this run over the images ``span``, where an earlier process left it."""
        store = self.store(name)
        judge = self.judge() if name == MAIN else Judge(store)
        digest = _digest([VERSION, repr(gather), self.sae_digest, store.fingerprint, judge.key])
        folder = self.run / PARTIAL / f"{name.replace('/', '-')}-{self.settings.split}-{digest[:8]}" / part
        return ScoringPass(self.run, store, judge, folder, gather, span, self.settings.device)


@dataclass
class _Work:
    """A run, what is missing of it, and what its passes gather."""

    job: Job
    parts: list[Part]
    gathers: dict[str, Gather]
    passes: dict[str, ScoringPass]  # of this rank's images

    def bytes(self) -> int:
        """Memory that its passes hold."""
        return sum(each.bytes() for each in self.passes.values())

    def whole(self, name: str, world: int) -> ScoringPass:
        """The pass over all images, from what the ranks gathered."""
        if world == 1 or self.passes[name].finished_whole:
            return self.passes[name]
        whole = self.job.open_pass(name, self.gathers[name], range(0))
        images = len(self.job.store(name))
        for rank in range(world):
            span = Ranks(rank, world).span(images)
            other = self.job.open_pass(name, self.gathers[name], span, _rank_name(rank, world))
            whole.merge(other)
            other.close()
        whole.save()
        return whole


def evaluate_runs(runs: Sequence[Path], settings: Settings, ranks: Ranks = ALONE) -> None:
    """Compute and write what is missing of all ``runs``; see above. All ``ranks`` call it alike.

    Raises StoreError, DataError or BackboneError with a sentence before anything is computed where a store that some
    part needs can be neither found nor extracted. A part that cannot be computed of one run says why and leaves the
    others alone; PartError names these parts at the end.
    """
    jobs = [Job(run, settings) for run in runs]
    with ExitStack() as locks:
        for job in sorted(jobs, key=lambda job: job.run.name) if ranks.first else ():
            locks.enter_context(scoring_lock(job.run))
        found = [job.missing() for job in tqdm(jobs, "Looking at runs", unit="run", leave=False)] if ranks.first else []
        missing = ranks.share([[part.name for part in parts] for parts in found])
        todo = [
            (job, [part for part in job.parts if part.name in names])
            for job, names in zip(jobs, missing, strict=True) if names
        ]  # fmt: skip
        failed: list[str] = []
        for group in _groups(todo):
            shared: dict[str, Any] = {}
            for chunk in _chunks(group, settings, ranks):
                failed += _score_chunk(chunk, settings, shared, ranks)
        ranks.barrier()
        if ranks.first and settings.metrics.get("stability"):
            score_stability(runs, settings.split, settings.again)
    if failed:
        raise PartError(f"{len(failed)} parts could not be computed, as said above: {', '.join(failed)}.")


def _groups(todo: Sequence[tuple[Job, list[Part]]]) -> Iterator[list[tuple[Job, list[Part]]]]:
    """Runs that read the same store."""
    by_store: dict[str, list[tuple[Job, list[Part]]]] = {}
    for job, parts in todo:
        by_store.setdefault(job.store(MAIN).fingerprint, []).append((job, parts))
    yield from by_store.values()


def _chunks(group: Sequence[tuple[Job, list[Part]]], settings: Settings, ranks: Ranks) -> Iterator[list[_Work]]:
    """Runs whose passes fit the memory together, at least one."""
    chunk: list[_Work] = []
    for job, parts in group:
        work = _open(job, parts, ranks)
        if chunk and sum(w.bytes() for w in (*chunk, work)) > settings.memory_gb * 2**30:
            yield chunk
            chunk = []
        chunk.append(work)
    if chunk:
        yield chunk


def _open(job: Job, parts: list[Part], ranks: Ranks) -> _Work:
    """The passes that ``parts`` need, each gathering what all of them want of it."""
    gathers: dict[str, Gather] = {}
    for part in parts:
        for name in part.passes:
            gathers[name] = part.wants | gathers.get(name, Gather(core=False, top=1))
    passes = {}
    for name, gather in gathers.items():
        passes[name] = job.open_pass(name, gather)
        if ranks.world > 1 and not passes[name].finished_whole:
            passes[name].close()
            span = ranks.span(len(job.store(name)))
            passes[name] = job.open_pass(name, gather, span, _rank_name(ranks.rank, ranks.world))
    return _Work(job, parts, gathers, passes)


def _score_chunk(chunk: Sequence[_Work], settings: Settings, shared: dict[str, Any], ranks: Ranks) -> list[str]:
    """Stream each store for all that want it, then compute and write the parts one run after another.

    Returns which parts failed; what was gathered for their runs stays.
    """
    for name in dict.fromkeys(name for work in chunk for name in work.passes):
        passes = [work.passes[name] for work in chunk if name in work.passes]
        title = f"{chunk[0].job.config.backbone.name} {name}, {len(passes)} SAEs"
        stream(passes, settings.batch_tokens, settings.checkpoint_minutes, title)
    ranks.barrier()
    mine = chunk[ranks.rank :: ranks.world]
    failed = []
    with tqdm(total=sum(len(work.parts) for work in mine), unit="part", leave=False) as bar:
        for work in mine:
            failed += _score_parts(work, shared, ranks, bar)
    ranks.barrier()
    for work in chunk:
        for each in work.passes.values():
            each.close()
    return failed


def _score_parts(work: _Work, shared: dict[str, Any], ranks: Ranks, bar: tqdm) -> list[str]:
    """Compute and write the parts of one run; returns which failed."""
    job, failed = work.job, []
    whole = {name: work.whole(name, ranks.world) for name in work.passes}
    evaluated = Evaluated(job, whole, shared)
    for part in work.parts:
        bar.set_description(f"{job.run.name}: {part.name}")
        try:
            scores = part.scores(evaluated)
        except ValueError as error:
            bar.write(f"{job.run.name}: {part.name} cannot be computed. {error}")
            failed.append(f"{part.name} of {job.run.name}")
        else:
            put_scores(job.run, part.name, job.settings.split, job.key(part), scores)
        bar.update()
    for each in whole.values():
        each.close()
    if not failed:
        shutil.rmtree(job.run / PARTIAL, ignore_errors=True)
    return failed


@contextmanager
def scoring_lock(run: Path) -> Iterator[None]:
    """Keep other processes from scoring ``run``; says once that it waits for one that does."""
    lock = FileLock(run / "evaluation.lock")
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        print(f"Another job is scoring {run.name}; waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _rank_name(rank: int, world: int) -> str:
    return f"rank-{rank}-of-{world}"


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
