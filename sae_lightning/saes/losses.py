"""Named loss terms: functions of an SAE and one pass, summed by the training module with weights from the config.

Each is a mean over samples (tokens) in the space that the SAE sees: after the normaliser, where the features' variance
a dimension is about 1, and after ``input_norm``. With ``input_norm=unit`` a sample's squares sum to 1, so that squared
errors a dimension are d_in times smaller than with ``rms``, against which weights of penalties are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_lightning.distributed.ranks import any_over_ranks, mean_over_ranks
from sae_lightning.kernels import level_errors
from sae_lightning.saes.artefact import VARIANTS
from sae_lightning.saes.codes import DenseCodes, SparseCodes
from sae_lightning.saes.sae import SAE, TERMS, ForwardOutput
from sae_lightning.saes.topk import topk_codes


def reconstruction(sae: SAE, output: ForwardOutput, relative: bool = False) -> Tensor:
    """Mean squared error over samples and dimensions; in normalised space about the FVU.

    ``relative``: mean over samples of each one's squared error divided by its squared norm.
    """
    if relative:
        squares = output.x.square().sum(1).clamp_min(1e-12)
        return ((output.reconstruction - output.x).square().sum(1) / squares).mean()
    return F.mse_loss(output.reconstruction, output.x)


def absolute(sae: SAE, output: ForwardOutput) -> Tensor:
    """Mean absolute error over samples and dimensions: with ``reconstruction`` the L1 + L2 loss."""
    return F.l1_loss(output.reconstruction, output.x)


def cosine(sae: SAE, output: ForwardOutput) -> Tensor:
    """1 - cosine of sample and reconstruction, mean over samples."""
    return 1 - F.cosine_similarity(output.reconstruction, output.x, dim=1).mean()


def nested(sae: SAE, output: ForwardOutput, relative: bool = False) -> Tensor:
    """Weighted mean over levels of their squared errors, a mean over samples and dimensions [MSAE §3.2].

    ``relative``: each sample's error divided by its mean square, as in ``reconstruction`` (the NMSE of MSAE's own
    training). For variants with ``levels``.
    """
    assert output.levels is not None and output.level_weights is not None  # noqa: PT018
    levels, x = output.levels, output.x
    if relative:
        scale = x.square().mean(1, keepdim=True).clamp_min(1e-12).rsqrt()
        levels, x = levels * scale.unsqueeze(2), x * scale
    return level_errors(levels, x) @ output.level_weights


def sparsity(sae: SAE, output: ForwardOutput, decoder_norms: bool = True, per_dimension: bool = True) -> Tensor:
    """What the variant penalises (L1 of the codes or of the gate, L0 for jumprelu): its sum over latents, a mean over
    samples, divided by d_in as the reconstruction's error is.

    ``per_dimension=False``: not divided, as in the papers that fix its weight.
    """
    return sae.sparsity(output, decoder_norms) / (output.codes.n_samples * (sae.d_in if per_dimension else 1))


def aux(
    sae: SAE, output: ForwardOutput, k_aux: int | None = None, dead_after: int = 100_000, relative: bool = True
) -> Tensor:
    """AuxK [Gao et al. 2024, §A.2]: the error reconstructed by the ``k_aux`` largest dead latents a sample.

    A latent is dead when it has not fired for ``dead_after`` tokens. ``k_aux`` defaults to d_in / 2, and shrinks with
    the number of dead latents below that.
    Mean squared error relative to the error's own mean square over all ranks, so the term lies near 1 when dead
    latents explain nothing; 0 when none is dead. ``relative=False``: a mean over samples and dimensions, like
    ``reconstruction`` [Bussmann et al. 2024].
    """
    dead = (sae.tokens_since_fired >= dead_after).nonzero().squeeze(1)
    if len(dead) == 0:
        return output.x.new_zeros(())
    error = (output.x - output.reconstruction).detach()
    codes = topk_codes(sae.pre_acts(output.x, dead), min(k_aux or max(1, sae.d_in // 2), len(dead)))
    whole = SparseCodes(dead[codes.latents], codes.values, codes.offsets, sae.d_sae)
    rebuilt = whole.decode(sae.W_dec)
    found = (rebuilt - error).square().mean()
    return found / mean_over_ranks(error.square().mean()).clamp_min(1e-12) if relative else found


def orthogonality(sae: SAE, output: ForwardOutput) -> Tensor:
    """Mean squared cosine of different decoder rows, from the [d_in, d_in] Gram matrix: O(d_sae · d_in²)."""
    W = F.normalize(sae.W_dec, dim=1)
    squares = (W.T @ W).square().sum() - sae.d_sae
    return squares / max(1, sae.d_sae * (sae.d_sae - 1))


def unselected(sae: SAE, output: ForwardOutput) -> Tensor:
    """L1 of what selection left out [arXiv 2606.27321]: a sample's positive pre-activations of latents that it does not
    use but another of the global batch does, their sum over latents, a mean over samples, divided by d_in as
    ``sparsity`` is. 0 for variants that keep every positive pre-activation.

    A second product of the encoder; without a matrix [N, d_sae] where fewer than a tenth of its entries is positive.
    """
    whole, codes = sae.candidates(output), output.codes
    if whole is codes:
        return output.x.new_zeros(())
    if isinstance(whole, DenseCodes):
        chosen = whole.dense.flatten().gather(0, codes.rows() * sae.d_sae + codes.latents)
    else:
        here, there = (c.rows() * sae.d_sae + c.latents for c in (whole, codes))
        chosen = whole.values[torch.isin(here, there, assume_unique=True)]
    used = any_over_ranks(codes.fired()).to(chosen.dtype)
    return (whole.total(used) - chosen.sum()) / (codes.n_samples * sae.d_in)


def hoyer(sae: SAE, output: ForwardOutput) -> Tensor:
    """L1 / L2 of a sample's positive pre-activations, selected or not, of the latents that any sample of the global
    batch uses; a mean over samples [Hoyer 2004; arXiv 2606.27321].

    Without a unit, blind to the activations' scale: between 1 for one such latent and √n for n equal ones; 0 for a
    sample without any. Costs what ``unselected`` costs.
    """
    whole, used = sae.candidates(output), any_over_ranks(output.codes.fired()).to(output.x.dtype)
    if isinstance(whole, DenseCodes):
        ones, squares = whole.dense @ used, whole.dense.square() @ used
    else:
        values, nothing = whole.values * used[whole.latents], output.x.new_zeros(whole.n_samples)
        ones, squares = (nothing.index_add(0, whole.rows(), v) for v in (values, values.square()))
    return (ones / squares.clamp_min(1e-12).sqrt()).mean()


for term in (reconstruction, absolute, cosine, sparsity, aux, orthogonality, unselected, hoyer):
    TERMS.add(term.__name__, term)


def check_terms(sae: SAE | type[SAE], weights: Mapping[str, float]) -> None:
    """ValueError for a name that is no loss term, or with a weight a term that this variant does not have."""
    for name, weight in weights.items():
        TERMS[name]
        having = [variant for variant, cls in VARIANTS.items() if name in cls.losses]
        if weight and having and name not in sae.losses:
            raise ValueError(
                f"sae.name={sae.variant} has no loss term {name}; set loss.{name}=0, or choose {' or '.join(having)}."
            )


def loss_terms(
    sae: SAE, output: ForwardOutput, weights: dict[str, float], options: dict[str, dict] | None = None
) -> dict[str, Tensor]:
    """The terms that ``weights`` names with a weight other than 0, unweighted, by name; ValueError as above."""
    check_terms(sae, weights)
    options = options or {}
    return {name: TERMS[name](sae, output, **options.get(name, {})) for name, weight in weights.items() if weight}


def total_loss(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of the terms."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
