"""sae-lens: its training SAEs in ``SAETrainer.step``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.bench.peers.common import LEARNING_RATE, Step, is_bf16, load, matryoshka_widths


def _sae_lens(name: str, d_in: int, d_sae: int, batch: int, device: str, precision: str, **settings: Any) -> Step:
    """The training SAE ``name`` in the package's trainer: clip 1, no decoder constraint, firing statistics.

    Decoder rows start at unit norm; ``precision`` is the trainer's own autocast setting.
    """
    package = load("sae_lens", "sae-lens")
    trainer_class = load("sae_lens.training.sae_trainer", "sae-lens").SAETrainer
    trainer_config = load("sae_lens.config", "sae-lens").SAETrainerConfig
    config = getattr(package, f"{name}TrainingSAEConfig")
    sae = getattr(package, f"{name}TrainingSAE")(
        config(d_in=d_in, d_sae=d_sae, device=device, decoder_init_norm=1.0, **settings)
    )
    schedule = trainer_config(
        total_training_samples=batch * 1_000_000,
        train_batch_size_samples=batch,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,  # must be set, though the constant schedule ignores it
        device=device,
        autocast=is_bf16(precision),
    )
    trainer = trainer_class(schedule, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def topk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """TopK with dense codes, the default; selection and decode are rescaled by the decoder's norms."""
    return _sae_lens("TopK", d_in, d_sae, batch, device, precision, k=k)


def topk_sparse(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """TopK with ``use_sparse_activations``: codes as a COO tensor, meant for float32.

    Without the rescaling by the decoder's norms, the default: its backward fails on sparse codes (torch 2.15).
    """
    settings = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    return _sae_lens("TopK", d_in, d_sae, batch, device, precision, k=k, **settings)


def batchtopk(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """BatchTopK; the threshold's moving average is updated in every step."""
    return _sae_lens("BatchTopK", d_in, d_sae, batch, device, precision, k=k)


def relu(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """Standard: squared error summed over dimensions and the L1 norm weighted by the decoder's norms."""
    return _sae_lens("Standard", d_in, d_sae, batch, device, precision)


def jumprelu(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """JumpReLU with the ``step`` L0 loss."""
    return _sae_lens("JumpReLU", d_in, d_sae, batch, device, precision)


def gated(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """Gated: L1 on the gate and the reconstruction from the gate, which encodes a third time."""
    return _sae_lens("Gated", d_in, d_sae, batch, device, precision)


def matryoshka(d_in: int, d_sae: int, k: int, batch: int, device: str, precision: str) -> Step:
    """MatryoshkaBatchTopK: the full reconstruction, then the inner ones from differences of the levels."""
    widths = matryoshka_widths(d_sae)
    return _sae_lens("MatryoshkaBatchTopK", d_in, d_sae, batch, device, precision, k=k, matryoshka_widths=widths)
