"""Several trainings side by side in one process, from one stream of features: ``train_packed``.

Each run has its own Trainer, callbacks, loggers and checkpoints, in a thread of its own that works while it is its
turn (``features/shared.py``); nothing of what it computes depends on the others, so that its weights are those of the
same run alone and each may go on later alone or in another pack.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm.auto import tqdm

from sae_lightning.distributed.launch import launch_ranks, n_ranks, on_gpu, wants_ranks
from sae_lightning.distributed.limits import cores, free_memory
from sae_lightning.distributed.stopping import Preempted, stop_on_signals
from sae_lightning.features.shared import SharedStream, StreamMember, StreamStoppedError
from sae_lightning.features.source import Source, looking_once
from sae_lightning.files import held, lend_cache, set_damaged_aside
from sae_lightning.runs.identity import run_name
from sae_lightning.runs.run import LOCK, PRODUCTS, is_finished
from sae_lightning.runs.state import is_a_try
from sae_lightning.training.checkpoints import repair_checkpoint
from sae_lightning.training.failed import begin_anew, worth_keeping
from sae_lightning.training.fit import check, fit
from sae_lightning.training.loggers import write_sweep_options

SHARE = 0.7  # of the free memory that a pack may take

COPIES = 4  # of the weights: themselves, their gradient, and Adam's two moments

BLOCK = 256  # MiB of pre-activations that are held at a time on the CPU, at most


def weight_bytes(cfg: DictConfig, d_in: int) -> int:
    """Weights, gradients and optimiser state of a run on features of ``d_in``; float32."""
    d_sae = int(cfg.d_sae or cfg.expansion * d_in)
    return 4 * COPIES * (2 * d_sae * d_in + 2 * d_sae + d_in)


def step_bytes(cfg: DictConfig, d_in: int, gpu: bool) -> int:
    """What a step needs beside them, while it runs: float32 copies of the batch, and pre-activations."""
    d_sae = int(cfg.d_sae or cfg.expansion * d_in)
    tokens = int(cfg.batch_size)
    dense = 4 * tokens * d_sae
    return 8 * 4 * tokens * d_in + (2 * dense if gpu else min(2 * dense, BLOCK << 20))


def free_bytes(cfg: DictConfig) -> int:
    """What a pack may take: ``pack.memory_gb``, by default a share of what is free on the device it trains on."""
    if cfg.pack.memory_gb is not None:
        return int(cfg.pack.memory_gb * 2**30)
    free = torch.cuda.mem_get_info()[0] if on_gpu(cfg) else free_memory()
    return int(SHARE * free)


def rounds(todo: dict[Path, DictConfig], d_in: int, limit: int) -> Iterator[dict[Path, DictConfig]]:
    """``todo`` cut, in its order, into packs that take at most ``limit`` bytes, of at least one run each."""
    pack: dict[Path, DictConfig] = {}
    for folder, cfg in todo.items():
        if pack and pack_bytes([*pack.values(), cfg], d_in) > limit:
            yield pack
            pack = {}
        pack[folder] = cfg
    if pack:
        yield pack


def pack_bytes(cfgs: list[DictConfig], d_in: int) -> int:
    """Memory of trainings side by side: the state of all, and the steps of the largest that run at a time."""
    steps = sorted((step_bytes(cfg, d_in, on_gpu(cfg)) for cfg in cfgs), reverse=True)
    return sum(weight_bytes(cfg, d_in) for cfg in cfgs) + sum(steps[: workers_of(cfgs[0], len(cfgs))])


def workers_of(cfg: DictConfig, members: int) -> int:
    """How many of ``members`` work at a time: ``pack.workers``, by default one a core, or two that share a GPU."""
    return max(1, min(members, cfg.pack.workers or (2 if on_gpu(cfg) else min(torch.get_num_threads(), cores()))))


class PackError(RuntimeError):
    """Some of the runs of a pack failed; the others are finished."""


def train_packed(cfgs: Sequence[DictConfig]) -> list[Path]:
    """Train the unfinished ones of ``cfgs``, which read the same features, side by side; returns all run folders.

    As many at a time as ``pack.memory_gb`` holds. A run that fails says why and leaves the others alone; PackError
    names it at the end. Under DDP, where ranks would wait for each other, the whole pack ends with the first failure.
    All stop at checkpoints when a signal asks for it (``preempt.py``).
    """
    lend_cache(Path(cfgs[0].paths.runs))
    with looking_once():
        return _train_packed({Path(cfg.paths.runs) / run_name(cfg): cfg for cfg in cfgs})


def _train_packed(folders: dict[Path, DictConfig]) -> list[Path]:
    failed: list[Path] = []
    with stop_on_signals(f"{len(folders)} runs side by side"), ExitStack() as locks:
        for folder in sorted(folders):
            locks.enter_context(worth_keeping(folder, not is_a_try(folders[folder])))
            locks.enter_context(held(folder / LOCK, f"training {folder.name}"))
        todo = {}
        for folder, cfg in folders.items():
            if is_finished(folder):
                print(f"{folder.name}: finished before, skipped.", flush=True)
                continue
            begin_anew(folder)
            try:
                check(cfg)
                set_damaged_aside([folder / name for name in PRODUCTS], f"{folder.name} is trained again")
                repair_checkpoint(folder)
            except ValueError as error:
                print(f"{folder.name}: {error}", file=sys.stderr, flush=True)
                failed.append(folder)
            else:
                todo[folder] = cfg
        if todo:
            failed += _train(todo)
    if failed:
        raise PackError(
            f"{len(failed)} of {len(folders)} runs failed, as said above: {', '.join(f.name for f in failed)}."
        )
    return list(folders)


def _train(todo: dict[Path, DictConfig]) -> list[Path]:
    """Train all of ``todo``, in rounds that fit the memory; returns those that failed."""
    first = next(iter(todo.values()))
    for cfg in todo.values():
        write_sweep_options(cfg)
    store, _ = (Source.of(first).store(split) for split in ("train", "val"))  # before every thread or rank opens them
    failed: list[Path] = []
    for members in rounds(todo, store.d_in, free_bytes(first)):
        if wants_ranks(first):
            pack = OmegaConf.create({str(f): OmegaConf.to_container(cfg, resolve=True) for f, cfg in members.items()})
            launch_ranks(pack, next(iter(members)), _fit_rank, n_ranks(first))
        else:
            failed += fit_together(members)
    return failed


def _fit_rank(pack: DictConfig, _: Path) -> None:
    """One DDP rank of a pack, whose configs stand by their folders."""
    fit_together({Path(str(folder)): cfg for folder, cfg in pack.items()}, int(os.environ["WORLD_SIZE"]))


def fit_together(members: dict[Path, DictConfig], world: int = 1) -> list[Path]:
    """Train ``members`` (folder: config) in threads of this process; returns the folders of those that failed.

    Raises Preempted when a signal has stopped them, and the first failure when this is one of ``world`` > 1 ranks.
    """
    cfg = next(iter(members.values()))
    workers = 1 if world > 1 else workers_of(cfg, len(members))
    stream = SharedStream(len(members), workers)
    failures: dict[Path, BaseException] = {}
    preempted: list[Preempted] = []

    def run(member: int, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            stream.enter(member)
            fit(members[folder], folder, StreamMember(stream, member))
        except Preempted as error:
            preempted.append(error)
        except BaseException as error:
            failures[folder] = error
            _report(folder, error)
            if world > 1:
                stream.stop(error)
        finally:
            stream.leave(member)

    with _bar(stream, members), _threads(workers) as each:
        threads = [
            threading.Thread(target=run, args=(i, folder, each), name=folder.name) for i, folder in enumerate(members)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            stream.stop()
            for thread in threads:
                thread.join()
            raise
    if failures and world > 1:
        raise next(iter(failures.values()))
    if preempted:
        raise Preempted(preempted[0].signum, *(step for error in preempted for step in error.steps))
    return list(failures)


@contextmanager
def _threads(workers: int):  # type: ignore[no-untyped-def]
    """The threads of computation that each of ``workers`` has; those of this process are restored afterwards."""
    whole = torch.get_num_threads()
    try:
        yield max(1, whole // workers)
    finally:
        torch.set_num_threads(whole)


@contextmanager
def _bar(stream: SharedStream, members: dict[Path, DictConfig]):  # type: ignore[no-untyped-def]
    """One progress bar for the pack, which counts batches."""
    cfg = next(iter(members.values()))
    shown = cfg.trainer.enable_progress_bar and os.environ.get("RANK", "0") == "0"
    with tqdm(desc=f"{cfg.backbone.name}: {len(members)} runs", unit="batch", disable=not shown) as bar:

        def advance(position: int, steps: int) -> None:
            trainers = [c.trainer for c in members.values()]
            bar.total = max(t.max_steps if t.max_steps > 0 else (t.max_epochs or 0) * steps for t in trainers)
            bar.update(position + 1 - bar.n)

        stream.on_batch = advance
        yield


def _report(folder: Path, error: BaseException) -> None:
    """Say which run failed and why, with the traceback of anything but a plain sentence."""
    lines = [] if isinstance(error, ValueError | StreamStoppedError) else traceback.format_exception(error)[:-1]
    print("".join([*lines, f"{folder.name}: {error or type(error).__name__}"]), file=sys.stderr, flush=True)
