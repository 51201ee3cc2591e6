"""Named loss terms: functions of an SAE and one pass, summed by the training module with weights from the config."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae_lightning.kernels import sparse_decode
from sae_lightning.saes.base import SAE, Pass
from sae_lightning.saes.ranks import mean_over_ranks
from sae_lightning.saes.topk import topk_codes

LossTerm = Callable[..., Tensor]


def reconstruction(sae: SAE, run: Pass) -> Tensor:
    """Mean squared error over samples and dimensions; in normalised space about the FVU."""
    return (run.reconstruction - run.x).square().mean()


def sparsity(sae: SAE, run: Pass) -> Tensor:
    """L1 norm of the codes, each latent weighted by its decoder row's norm, mean over samples, per input dimension."""
    weighted = run.codes.values * sae.W_dec.norm(dim=1)[run.codes.latents]
    return weighted.abs().sum() / (run.codes.n_samples * sae.d_in)


def aux(sae: SAE, run: Pass, k_aux: int | None = None, dead_after: int = 100_000) -> Tensor:
    """AuxK [Gao et al. 2024, §A.2]: the error reconstructed by the ``k_aux`` largest dead latents a sample.

    A latent is dead when it has not fired for ``dead_after`` tokens. ``k_aux`` defaults to d_in / 2.
    Mean squared error relative to the error's own mean square over all ranks, so the term lies near 1 when dead
    latents explain nothing; 0 when none is dead.
    """
    dead = (sae.tokens_since_fired >= dead_after).nonzero().squeeze(1)
    if len(dead) == 0:
        return run.pre_acts.new_zeros(())
    error = (run.x - run.reconstruction).detach()
    codes = topk_codes(run.pre_acts.index_select(1, dead), min(k_aux or max(1, sae.d_in // 2), len(dead)))
    rebuilt = sparse_decode(codes.latents, codes.values, codes.offsets, sae.W_dec.index_select(0, dead))
    return (rebuilt - error).square().mean() / mean_over_ranks(error.square().mean()).clamp_min(1e-12)


TERMS: dict[str, LossTerm] = {"reconstruction": reconstruction, "sparsity": sparsity, "aux": aux}


def check_terms(weights: dict[str, float]) -> None:
    """ValueError for a name that is no loss term."""
    unknown = set(weights) - set(TERMS)
    if unknown:
        raise ValueError(f"Unknown loss term {sorted(unknown)}; known terms: {', '.join(sorted(TERMS))}.")


def loss_terms(
    sae: SAE, run: Pass, weights: dict[str, float], options: dict[str, dict] | None = None
) -> dict[str, Tensor]:
    """The terms that ``weights`` names with a weight other than 0, unweighted, by name.

    Raises ValueError for a name that is no loss term.
    """
    check_terms(weights)
    options = options or {}
    return {name: TERMS[name](sae, run, **options.get(name, {})) for name, weight in weights.items() if weight}


def total_loss(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of the terms."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
