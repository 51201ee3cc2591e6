"""How much memory trainings take together, before they start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig

from sae_lightning.limits import cores, free_memory

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


def on_gpu(cfg: DictConfig) -> bool:
    """Whether ``cfg`` trains on CUDA devices."""
    return torch.cuda.is_available() and str(cfg.trainer.accelerator) in ("auto", "gpu", "cuda")


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
