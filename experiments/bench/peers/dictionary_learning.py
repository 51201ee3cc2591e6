"""dictionary-learning: its trainers' ``update``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from experiments.bench.peers.common import LEARNING_RATE, MATRYOSHKA_FRACTIONS, Step, autocast, is_bf16, load


def _dictionary_learning(
    module: str, name: str, d_in: int, d_sae: int, device: str, precision: str, **settings: Any
) -> Step:
    """Trainer ``name``; as in ``trainSAE``, bfloat16 casts x and runs the whole update under autocast.

    The decoder's gradient loses the part along each row and the rows are set to unit norm in every step.
    Updates are counted from 1: number 0 would also set the bias to the batch's geometric median.
    """
    trainer = getattr(load(f"dictionary_learning.trainers.{module}", "dictionary-learning"), name)(
        steps=1_000_000,
        activation_dim=d_in,
        dict_size=d_sae,
        layer=0,
        lm_name="",
        lr=LEARNING_RATE,
        warmup_steps=0,
        device=device,
        **settings,
    )
    context, bf16 = autocast(device, precision), is_bf16(precision)
    numbers = itertools.count(1)

    def step(x: Tensor) -> None:
        x = x.to(torch.bfloat16) if bf16 else x
        with context:
            trainer.update(next(numbers), x)

    return step


def topk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """TopKTrainer: clip 1; the threshold's moving average starts after 1000 updates."""
    return _dictionary_learning("top_k", "TopKTrainer", d_in, d_sae, device, precision, k=k)


def batchtopk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """BatchTopKTrainer: clip 1; the threshold's moving average starts after 1000 updates."""
    return _dictionary_learning("batch_top_k", "BatchTopKTrainer", d_in, d_sae, device, precision, k=k)


def relu(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """StandardTrainer: L1 penalty 0.1 from the first update, ConstrainedAdam, no clipping."""
    settings = {"sparsity_warmup_steps": None}
    return _dictionary_learning("standard", "StandardTrainer", d_in, d_sae, device, precision, **settings)


def jumprelu(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """JumpReluTrainer: squared distance of L0 from k, from the first update; clip 1."""
    settings = {"sparsity_warmup_steps": None, "target_l0": float(k)}
    return _dictionary_learning("jumprelu", "JumpReluTrainer", d_in, d_sae, device, precision, **settings)


def gated(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """GatedSAETrainer: L1 on the gate, reconstruction from the gate, ConstrainedAdam, no clipping."""
    settings = {"sparsity_warmup_steps": None}
    return _dictionary_learning("gdm", "GatedSAETrainer", d_in, d_sae, device, precision, **settings)


def matryoshka(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """MatryoshkaBatchTopKTrainer: reconstructions summed level by level, equal weights; clip 1."""
    settings = {"k": k, "group_fractions": list(MATRYOSHKA_FRACTIONS)}
    return _dictionary_learning(
        "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", d_in, d_sae, device, precision, **settings
    )
