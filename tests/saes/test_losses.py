"""Loss terms against dense, obvious computations."""

import pytest
import torch

from sae_lightning.saes import ReLU, TopK
from sae_lightning.saes.losses import aux, loss_terms, reconstruction, sparsity, total_loss


def make(k: int = 3):
    torch.manual_seed(0)
    sae = TopK(10, 30, k, seed=0)
    x = torch.randn(50, 10)
    return sae, sae.run(x), x


def test_reconstruction_is_the_mean_squared_error():
    sae, run, x = make()
    dense = run.codes.to_dense() @ sae.W_dec + sae.b_pre
    torch.testing.assert_close(reconstruction(sae, run), torch.nn.functional.mse_loss(dense, x))


def test_sparsity_weights_each_latent_by_its_decoder_norm():
    sae = ReLU(10, 30, seed=0)
    sae.W_dec.data *= torch.linspace(0.5, 2, 30).unsqueeze(1)
    run = sae.run(torch.randn(50, 10))
    expected = (run.codes.to_dense().abs() * sae.W_dec.norm(dim=1)).sum(1).mean() / 10
    torch.testing.assert_close(sparsity(sae, run), expected)


def test_aux_reconstructs_the_error_from_dead_latents_only():
    sae, run, x = make()
    sae.tokens_since_fired[[4, 9, 21]] = 1000
    error = (x - run.reconstruction).detach()
    pre = torch.relu(run.pre_acts[:, [4, 9, 21]])
    rows = torch.zeros_like(pre)
    for i, row in enumerate(pre):
        best = row.argsort(descending=True)[:2]
        rows[i, best] = row[best]
    expected = (rows @ sae.W_dec[[4, 9, 21]] - error).square().mean() / error.square().mean()
    got = aux(sae, run, k_aux=2, dead_after=1000)
    torch.testing.assert_close(got, expected)
    got.backward()
    live = torch.ones(30, dtype=torch.bool).index_fill(0, torch.tensor([4, 9, 21]), False)
    assert (sae.W_dec.grad[live] == 0).all()
    assert (sae.W_dec.grad[~live] != 0).any()


def test_aux_is_zero_while_all_latents_live():
    sae, run, _ = make()
    assert aux(sae, run, dead_after=1) == 0


def test_weights_choose_and_scale_the_terms():
    sae, run, _ = make()
    weights = {"reconstruction": 2.0, "sparsity": 0.5, "aux": 0.0}
    terms = loss_terms(sae, run, weights)
    assert set(terms) == {"reconstruction", "sparsity"}
    torch.testing.assert_close(total_loss(terms, weights), 2 * terms["reconstruction"] + 0.5 * terms["sparsity"])
    with pytest.raises(ValueError, match="monosomething"):
        loss_terms(sae, run, {"monosomething": 1.0})
