"""Scoring many runs: what is missing of each, one read of a store for all that want it, and a table that grows.

A run's scores come in *parts* (``parts.py``), each with a key of what determines it. Parts that are there are left
alone. For the others, runs of one backbone are taken together, as many as fit the memory; they see each store once, in
passes that are brought to the disk every few minutes in ``<run>/evaluation.partial``; then each missing part is
computed and written. A killed call loses at most the minutes since the last checkpoint or the part it was at.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.distributed.launch import launch_ranks
from sae_lightning.distributed.ranks import Ranks, ranks
from sae_lightning.evaluation.core import stored_scores
from sae_lightning.evaluation.evaluated import Evaluated
from sae_lightning.evaluation.job import PARTIAL, Job, Settings
from sae_lightning.evaluation.scoring_pass import Gather, ScoringPass, stream
from sae_lightning.evaluation.similarity import similarity_of
from sae_lightning.files import file_sha256, held, lend_cache
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.dictionary import stability
from sae_lightning.metrics.part import MAIN, Part
from sae_lightning.runs.identity import same_but_seed, short_hash
from sae_lightning.runs.run import LATENTS, find_runs
from sae_lightning.runs.scores import put_scores, scores_of
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import read_tensors

PART = "stability"

Dictionary = tuple[Tensor, Tensor, Tensor]  # decoder and encoder [d_sae, d_in], and which latents are alive


def score_stability(runs: Sequence[Path], split: str, again: bool = False) -> None:
    """Write the mean ``stability`` of each run with its siblings among ``runs``, of decoders and encoders.

    Latents that are alive on ``split`` count. Nothing is written for a run without siblings.
    """
    for group in same_but_seed(runs):
        digests = {run: file_sha256(run / "sae.safetensors") for run in group}

        @cache
        def read(run: Path) -> Dictionary:
            sae = SAE.load(run)
            return sae.W_dec.detach(), sae.W_enc.detach(), read_tensors(run / LATENTS)[0]["counts"] > 0

        for run in group:
            others = [other for other in group if other != run]
            key = short_hash({"run": digests[run], "others": sorted(digests[other] for other in others)})
            if again or scores_of(run, PART, split, key) is None:
                put_scores(run, PART, split, key, _mean_stability(run, others, read))


def _mean_stability(run: Path, others: Sequence[Path], read: Callable[[Path], Dictionary]) -> list[Score]:
    found: list[dict[str, float]] = []
    for other in others:
        (W_dec, W_enc, alive), (V_dec, V_enc, living) = read(run), read(other)
        of_encoders = stability(W_enc, V_enc, alive, living)
        found.append(stability(W_dec, V_dec, alive, living) | {name + "_encoder": v for name, v in of_encoders.items()})
    means = [Score(name, float(np.mean([each[name] for each in found]))) for name in found[0]]
    return [*means, Score("stability_siblings", len(others))]


ALONE = Ranks()

T = TypeVar("T")

R = TypeVar("R")


class PartError(ValueError):
    """Parts of the benchmark that could not be computed."""


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

    A run that cannot be read, or whose stores can be neither found nor extracted, and a part that cannot be computed
    of a run, says why and leaves the others alone; PartError names these at the end. Where no run is left the first
    one's error is raised (ArtefactError, StoreError, DataError or BackboneError), before anything is computed.
    """
    assert settings.parts or not runs  # ValueError for parts that are unknown, which is no run's fault
    jobs, failed = _each(runs, lambda run: Job(run, settings), lambda run: run, ranks.first)
    with ExitStack() as locks:
        for job in sorted(jobs, key=lambda job: job.run.name) if ranks.first else ():
            locks.enter_context(scoring_lock(job.run))
        found: list[tuple[str, list[str]]] = []
        if ranks.first:
            bar = tqdm(jobs, "Looking at runs", unit="run", leave=False)
            found, cannot = _each(bar, lambda job: (job.run.name, [p.name for p in job.missing()]), lambda job: job.run)
            failed += cannot
        missing = dict(ranks.share(found))
        jobs = [job for job in jobs if job.run.name in missing]
        wanted = [(job, missing[job.run.name]) for job in jobs if missing[job.run.name]]
        todo = [(job, [part for part in job.parts if part.name in names]) for job, names in wanted]
        for group in _groups(todo):
            shared: dict[str, Any] = {}
            for chunk in _chunks(group, settings, ranks):
                failed += _score_chunk(chunk, settings, shared, ranks)
        ranks.barrier()
        if ranks.first and settings.metrics.get("stability"):
            score_stability([job.run for job in jobs], settings.split, settings.again)
    if failed:
        what = "runs or parts of them" if any(" of " not in name for name in failed) else "parts"
        raise PartError(f"{len(failed)} {what} could not be computed, as said above: {', '.join(failed)}.")


def _each(
    items: Iterable[T], do: Callable[[T], R], run_of: Callable[[T], Path], say: bool = True
) -> tuple[list[R], list[str]]:
    """What ``do`` gives of each item, and the names of the runs for which it cannot, which say why.

    Raises the first error where it can for none.
    """
    done, failed, errors = [], [], []
    for item in items:
        try:
            done.append(do(item))
        except (ValueError, OSError) as error:
            errors.append(error)
            failed.append(run_of(item).name)
            if say:
                tqdm.write(f"{run_of(item).name} is left out. {error}", file=sys.stderr)
    if errors and not done:
        raise errors[0]
    return done, failed


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
    """The passes that ``parts`` need.

    Each gathers what any part of the run wants of it, finished or not, so that a later call can go on with it.
    """
    gathers: dict[str, Gather] = {}
    for name in dict.fromkeys(name for part in parts for name in part.passes):
        wanted = (part.wants for part in job.parts if name in part.passes)
        gathers[name] = reduce(or_, wanted, Gather(core=False, top=1))
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
            for why, names in undefined(scores).items():
                bar.write(f"{job.run.name}: {part.name}: {', '.join(names)} cannot be computed: {why}.")
        bar.update()
    for each in whole.values():
        each.close()
    if not failed:
        shutil.rmtree(job.run / PARTIAL, ignore_errors=True)
    return failed


def undefined(scores: Sequence[Score]) -> dict[str, list[str]]:
    """Names of the figures that are NaN, by the reason."""
    found: dict[str, list[str]] = {}
    for score in scores:
        if math.isnan(score.value) and score.metric not in found.setdefault(score.why, []):
            found[score.why].append(score.metric)
    return found


@contextmanager
def scoring_lock(run: Path) -> Iterator[None]:
    """Keep other processes from scoring ``run``; says once that it waits for one that does."""
    with held(run / "evaluation.lock", f"scoring {run.name}"):
        yield


def _rank_name(rank: int, world: int) -> str:
    return f"rank-{rank}-of-{world}"


def settings_of(cfg: DictConfig, alone: Ranks) -> Settings:
    """What the config says of how to score."""
    return Settings(
        cfg.metrics, cfg.split, similarity_of(cfg), cfg.batch_tokens, cfg.memory_gb, cfg.checkpoint_minutes, cfg.again,
        alone.device(cfg.device), cfg.latents_shown,
    )  # fmt: skip


def evaluate(cfg: DictConfig) -> list[Path]:
    """Score the finished runs that ``cfg.runs`` names, where something is missing; returns them.

    With ``cfg.devices`` above 1 further processes do the work. FileNotFoundError when no run matches; StoreError,
    DataError, BackboneError or ValueError with a sentence for what cannot be done.
    """
    lend_cache(Path(cfg.paths.runs))
    runs = find_runs(cfg.runs, Path(cfg.paths.runs))
    if cfg.devices > 1:
        with tempfile.TemporaryDirectory() as folder:
            # interpolations of judges and data sets are those of each run's config
            launch_ranks(cfg, Path(folder), _evaluate_rank, cfg.devices, resolve=False)
        return runs
    with ranks() as here:
        evaluate_runs(runs, settings_of(cfg, here), here)
    return runs


def scored(cfg: DictConfig) -> list[Path]:
    """The runs that ``cfg.runs`` names and that have scores on ``cfg.split``."""
    runs = find_runs(cfg.runs, Path(cfg.paths.runs))
    return [run for run in runs if stored_scores(run, cfg.split, []) is not None]


def _evaluate_rank(cfg: DictConfig, _: Path) -> None:
    """One of several processes."""
    cfg.devices = 1
    try:
        evaluate(cfg)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
