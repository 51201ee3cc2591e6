"""Scoring many runs: what is missing of each, one read of a store for all that want it, and a table that grows.

A run's scores come in *parts* (``metrics/part.py``), each with a key of what determines it. Parts that are there are
left alone. For the others, runs of one backbone are taken together, as many as fit the memory; they see each store
once, in passes that are brought to the disk every few minutes in ``<run>/evaluation.partial``; then each missing part
is computed and written. A killed call loses at most the minutes since the last checkpoint or the part it was at.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from sae_lightning.data import NotGivenError
from sae_lightning.distributed.launch import launch_ranks
from sae_lightning.distributed.ranks import Ranks, ranks
from sae_lightning.evaluation.core import stored_scores
from sae_lightning.evaluation.job import PARTIAL, Job, Settings
from sae_lightning.evaluation.scoring_pass import ScoringPass, stream
from sae_lightning.evaluation.similarity import similarity_of
from sae_lightning.files import held, lend_cache
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import MAIN, Part
from sae_lightning.runs.identity import same_but_seed, short_hash
from sae_lightning.runs.run import find_runs
from sae_lightning.runs.scores import put_scores, scores_of

ALONE = Ranks()

T = TypeVar("T")

R = TypeVar("R")


class PartError(ValueError):
    """Parts of the benchmark that could not be computed."""


@dataclass
class _Work:
    """A run, what is missing of it, and its passes over this rank's images."""

    job: Job
    parts: list[Part]
    passes: dict[str, ScoringPass]

    def bytes(self) -> int:
        """Memory that its passes hold."""
        return sum(each.bytes() for each in self.passes.values())

    def whole(self, name: str, world: int) -> ScoringPass:
        """The pass over all images, from what the ranks gathered."""
        if world == 1 or self.passes[name].finished_whole:
            return self.passes[name]
        whole = self.job.open_pass(name, range(0))
        images = len(self.job.store(name))
        for rank in range(world):
            other = self.job.open_pass(name, Ranks(rank, world).span(images), _rank_name(rank, world))
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
    jobs, failed = _each(runs, lambda run: Job(run, settings), lambda run: run.name, ranks.first)
    with ExitStack() as locks:
        for job in sorted(jobs, key=lambda job: job.name) if ranks.first else ():
            locks.enter_context(scoring_lock(job.folder))
        found: list[tuple[str, list[str], list[str]]] = []
        if ranks.first:
            bar = tqdm(jobs, "Looking at runs", unit="run", leave=False)
            found, cannot = _each(bar, _look, lambda job: job.name)
            failed += cannot + _without([job for job in jobs if job.name not in cannot])
        found = ranks.share(found)
        missing, without = ({each[0]: each[i] for each in found} for i in (1, 2))
        jobs = [job for job in jobs if job.name in missing]
        for job in jobs:
            job.drop(without[job.name])
        wanted = [(job, missing[job.name]) for job in jobs if missing[job.name]]
        todo = [(job, [part for part in job.parts if part.name in names]) for job, names in wanted]
        for group in _groups(todo):
            shared: dict[str, Any] = {}
            for chunk in _chunks(group, settings, ranks):
                failed += _score_chunk(chunk, settings, shared, ranks)
        ranks.barrier()
        if ranks.first:
            failed += _score_siblings(jobs)
    if failed:
        what = "runs or parts of them" if any(" of " not in name for name in failed) else "parts"
        raise PartError(f"{len(failed)} {what} could not be computed, as said above: {', '.join(failed)}.")


def _look(job: Job) -> tuple[str, list[str], list[str]]:
    """A run's name, the parts that it lacks, and those that it does without."""
    missing = [part.name for part in job.missing()]
    return job.name, missing, list(job.without)


def _without(jobs: Sequence[Job]) -> list[str]:
    """Say which parts are left out, each reason once; the names of those of runs that should have been there.

    Data sets of which nothing says where they lie are left out in one line, and are no failure.
    """
    failed: list[str] = []
    reasons: dict[str, tuple[str, Exception]] = {}
    for job in jobs:
        for part, error in job.without.items():
            reasons.setdefault(str(error), (part, error))
            failed += [] if isinstance(error, NotGivenError) else [f"{part} of {job.name}"]
    absent = dict.fromkeys(
        part.partition("@")[0] for part, error in reasons.values() if isinstance(error, NotGivenError)
    )
    if absent:
        group, _, name = next(iter(absent)).partition("/")
        said = (
            f"Left out, as nothing says where their data lie: {', '.join(absent)} (metrics.{group}.sets.{name}.path=…)."
        )
        tqdm.write(said, file=sys.stderr)
    for part, error in reasons.values():
        if not isinstance(error, NotGivenError):
            tqdm.write(f"{part} is left out. {error}", file=sys.stderr)
    return failed


def _each(
    items: Iterable[T], do: Callable[[T], R], name: Callable[[T], str], say: bool = True
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
            failed.append(name(item))
            if say:
                tqdm.write(f"{name(item)} is left out. {error}", file=sys.stderr)
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
    """The passes that ``parts`` need."""
    passes = {}
    for name in dict.fromkeys(name for part in parts for name in part.passes):
        passes[name] = job.open_pass(name)
        if ranks.world > 1 and not passes[name].finished_whole:
            passes[name].close()
            span = ranks.span(len(job.store(name)))
            passes[name] = job.open_pass(name, span, _rank_name(ranks.rank, ranks.world))
    return _Work(job, parts, passes)


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
    job.passes, job.kept = {name: work.whole(name, ranks.world) for name in work.passes}, shared
    for part in work.parts:
        bar.set_description(f"{job.name}: {part.name}")
        failed += _score_part(job, part, job.key(part))
        bar.update()
    for each in job.passes.values():
        each.close()
    job.release()
    if not failed:
        shutil.rmtree(job.out / PARTIAL, ignore_errors=True)
    return failed


def _score_part(job: Job, part: Part, key: str) -> list[str]:
    """Compute and write one part; its name where it cannot be, which is said."""
    try:
        scores = part.scores(job)
    except ValueError as error:
        tqdm.write(f"{job.name}: {part.name} cannot be computed. {error}")
        return [f"{part.name} of {job.name}"]
    put_scores(job.folder, part.base, job.settings.split, key, scores, job.on, part.protocol)
    for why, names in undefined(scores).items():
        tqdm.write(f"{job.name}: {part.name}: {', '.join(names)} cannot be computed: {why}.")
    return []


def _score_siblings(jobs: Sequence[Job]) -> list[str]:
    """Compute and write the parts of runs that differ by seed, where something is missing; returns which failed.

    Nothing is written for a run without siblings.
    """
    failed, by_folder = [], {job.folder: job for job in jobs}
    for group in same_but_seed([job.folder for job in jobs if any("siblings" in part.needs for part in job.parts)]):
        members = [by_folder[folder] for folder in group]
        for job in members:
            job.others = [other for other in members if other is not job]
            key = short_hash({"run": job.sae_digest, "others": sorted(other.sae_digest for other in job.others)})
            for part in (part for part in job.parts if "siblings" in part.needs):
                if job.settings.again or scores_of(job.folder, part.base, job.settings.split, key) is None:
                    failed += _score_part(job, part, key)
        for job in members:
            job.release()
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
    """What the config says of how to score; interpolations of its data set stay for a run's config."""
    other: Any = cfg.get("data")  # which a group that is null does not leave
    if other is not None:
        other = OmegaConf.to_container(other, resolve=False)
    return Settings(
        cfg.metrics, cfg.split, similarity_of(cfg), cfg.batch_tokens, cfg.memory_gb, cfg.checkpoint_minutes, cfg.again,
        alone.device(cfg.device), cfg.latents_shown, None if cfg.paths.stores is None else Path(cfg.paths.stores),
        other, cfg.get("features"), cfg.get("inference"),
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


def scored(cfg: DictConfig) -> dict[Path, str]:
    """The runs that ``cfg.runs`` names and that have scores on ``cfg.split`` of the data set which it asks for.

    With the data set's name in their tables, which is empty where it is a run's own.
    """
    found, how = {}, settings_of(cfg, ALONE)
    for run in find_runs(cfg.runs, Path(cfg.paths.runs)):
        with suppress(ValueError):  # said before, as it was left out
            job = Job(run, how) if (how.data, how.features, how.inference) != (None, None, None) else None
            if stored_scores(run, cfg.split, [], out=job.out if job else None) is not None:
                found[run] = job.on if job else ""
    return found


def _evaluate_rank(cfg: DictConfig, _: Path) -> None:
    """One of several processes."""
    cfg.devices = 1
    try:
        evaluate(cfg)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
