"""sparsify (eai-sparsify): SparseCoder with the hook and the step of ``Trainer.fit``."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from experiments.bench.peers.common import LEARNING_RATE, Step, autocast, load


def _sparsify(activation: str, d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """SparseCoder with loss_fn="fvu", auxk_alpha 0 and Adam; no clipping; its Trainer is bound to language models.

    Its forward asks for bfloat16 on every CUDA device; for "32" the undecorated one is taken. ``fit``
    also allows TF32 ("high") for the whole process, which is left to the benchmark.
    """
    if torch.device(device).type != "cuda":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    package = load("sparsify", "sparsify")
    config = package.SparseCoderConfig(activation=activation, num_latents=d_sae, k=k)
    sae = package.SparseCoder(d_in, config, device, dtype=torch.float32)
    forward = type(sae).forward.__wrapped__
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    tokens_since_fired = torch.zeros(d_sae, device=device, dtype=torch.long)
    did_fire = torch.zeros(d_sae, device=device, dtype=torch.bool)
    context = autocast(device, precision)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        with context:
            out = forward(sae, x, x, dead_mask=None, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # the trainer reads it in every step
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[did_fire] = 0
        did_fire.zero_()

    return step


def topk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """TopK: fused encoder whose backward is sparse, decoder as an embedding bag (a Triton kernel on CUDA)."""
    return _sparsify("topk", d_in, d_sae, k, batch, device, precision)


def groupmax(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """The same with the largest of each of k groups of latents in place of TopK; k must divide d_sae."""
    return _sparsify("groupmax", d_in, d_sae, k, batch, device, precision)
