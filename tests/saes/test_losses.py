"""Loss terms against dense, obvious computations."""

import pytest
import torch
import torch.nn.functional as F

from sae_lightning.saes import MSAE, VARIANTS, Gated, JumpReLU, Matryoshka, ReLU, TopK
from sae_lightning.saes.gated import gate
from sae_lightning.saes.losses import (
    TERMS,
    absolute,
    aux,
    check_terms,
    cosine,
    hoyer,
    loss_terms,
    nested,
    orthogonality,
    reconstruction,
    sparsity,
    total_loss,
    unselected,
)

TRAINED = [name for name, cls in VARIANTS.items() if not (cls.fitted or cls.frozen)]  # as a whole


def make(k: int = 3):
    torch.manual_seed(0)
    sae = TopK(10, 30, k, seed=0)
    x = torch.randn(50, 10)
    return sae, sae.forward_pass(x), x


def test_reconstruction_absolute_and_cosine_are_means_over_the_batch():
    sae, run, x = make()
    rebuilt = run.codes.to_dense() @ sae.W_dec + sae.b_pre
    torch.testing.assert_close(reconstruction(sae, run), (rebuilt - x).square().sum() / (50 * 10))
    torch.testing.assert_close(absolute(sae, run), (rebuilt - x).abs().sum() / (50 * 10))
    cosines = [(a @ b) / (a.norm() * b.norm()) for a, b in zip(rebuilt, x, strict=True)]
    torch.testing.assert_close(cosine(sae, run), 1 - torch.stack(cosines).mean())


@pytest.mark.parametrize("weighted", [True, False])
def test_sparsity_weights_each_latent_by_its_decoder_norm(weighted):
    sae = ReLU(10, 30, seed=0)
    sae.W_dec.data *= torch.linspace(0.5, 2, 30).unsqueeze(1)
    run = sae.forward_pass(torch.randn(50, 10))
    norms = sae.W_dec.norm(dim=1) if weighted else torch.ones(30)
    expected = (run.codes.to_dense().abs() * norms).sum(1).mean() / 10
    torch.testing.assert_close(sparsity(sae, run, decoder_norms=weighted), expected)


def test_sparsity_of_a_jumprelu_is_its_l0_and_of_a_gated_its_gates_l1():
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    jump = JumpReLU(10, 30, threshold=0.3, bandwidth=0.5, seed=0)
    run = jump.forward_pass(x)
    torch.testing.assert_close(sparsity(jump, run), (x @ jump.W_enc.T > 0.3).sum() / (50 * 10))
    gated = Gated(10, 30, seed=0)
    gated.b_enc.data += 5
    gated.b_gate.data -= 0.2
    run = gated.forward_pass(x)
    torch.testing.assert_close(sparsity(gated, run), torch.relu(x @ gated.W_enc.T - 0.2).sum() / (50 * 10))


def test_nested_is_the_weighted_mean_of_the_levels_errors():
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    for sae in (Matryoshka(10, 32, 4, seed=0), MSAE(10, 32, 4, weighting="reverse", seed=0)):
        run = sae.forward_pass(x)
        errors = [(run.levels[:, level] - x).square().mean() for level in range(run.levels.shape[1])]
        expected = sum(w * e for w, e in zip(run.level_weights, errors, strict=True))
        torch.testing.assert_close(nested(sae, run), expected)


def test_the_gates_own_reconstruction_does_not_train_the_decoder():
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    sae = Gated(10, 30, seed=0)
    sae.b_enc.data += 1.0
    got = gate(sae, sae.forward_pass(x))
    torch.testing.assert_close(got, F.mse_loss(torch.relu(x @ sae.W_enc.T) @ sae.W_dec, x))
    got.backward()
    assert sae.W_dec.grad is None or (sae.W_dec.grad == 0).all()
    assert (sae.W_enc.grad != 0).any()
    assert (sae.b_gate.grad != 0).any()
    assert sae.r_mag.grad is None or (sae.r_mag.grad == 0).all()


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"matryoshka", "matryoshka_topk", "msae"}))
def test_nested_on_a_variant_without_levels_says_what_to_set(variant):
    sae = VARIANTS[variant](10, 20, **({} if variant in ("relu", "jumprelu", "gated") else {"k": 3}))
    with pytest.raises(ValueError, match=rf"sae\.name={variant} has no loss term nested; set loss\.nested=0"):
        loss_terms(sae, sae.forward_pass(torch.randn(5, 10)), {"nested": 1.0})


def test_gate_on_a_variant_without_one_says_what_to_set():
    sae, run, _ = make()
    with pytest.raises(ValueError, match=r"sae\.name=topk has no loss term gate; set loss\.gate=0, or choose gated\."):
        loss_terms(sae, run, {"gate": 1.0})


@pytest.mark.parametrize("variant", TRAINED)
def test_aux_reconstructs_the_error_from_dead_latents_only(variant):
    sae = VARIANTS[variant](10, 30, seed=0, **({} if variant in ("relu", "jumprelu", "gated") else {"k": 3}))
    x, dead = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 9, 21])
    run = sae.forward_pass(x)
    sae.tokens_since_fired[dead] = 1000
    error = (x - run.reconstruction).detach()
    pre = torch.relu(sae.pre_acts(x, dead))
    rows = torch.zeros_like(pre)
    for i, row in enumerate(pre):
        best = row.argsort(descending=True)[:2]
        rows[i, best] = row[best]
    expected = (rows @ sae.W_dec[dead] - error).square().mean() / error.square().mean()
    wanted = torch.autograd.grad(expected, (sae.W_enc, sae.W_dec, sae.b_enc), retain_graph=True)
    got = aux(sae, run, k_aux=2, dead_after=1000)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got, (sae.W_enc, sae.W_dec, sae.b_enc))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)
    live = torch.ones(30, dtype=torch.bool).index_fill(0, dead, False)
    assert (grads[1][live] == 0).all()
    assert (grads[1][~live] != 0).any()


def test_aux_is_zero_while_all_latents_live():
    sae, run, _ = make()
    assert aux(sae, run, dead_after=1) == 0


def test_aux_takes_half_the_dimensions_or_all_dead_latents():
    sae, run, _ = make()
    sae.tokens_since_fired += 1000
    torch.testing.assert_close(aux(sae, run, dead_after=1000), aux(sae, run, k_aux=5, dead_after=1000))
    sae.tokens_since_fired[3:] = 0
    torch.testing.assert_close(aux(sae, run, dead_after=1000), aux(sae, run, k_aux=3, dead_after=1000))


def test_orthogonality_is_the_mean_squared_cosine_of_all_pairs():
    sae, run, _ = make()
    sae.W_dec.data *= torch.linspace(0.5, 2, 30).unsqueeze(1)
    rows, pairs = sae.W_dec.detach().double(), []
    for i in range(30):
        for j in range(30):
            if i != j:
                pairs.append(((rows[i] @ rows[j]) / (rows[i].norm() * rows[j].norm())) ** 2)
    got = orthogonality(sae, run)
    assert float(got.detach()) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-4)
    got.backward()
    along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1)
    torch.testing.assert_close(along, torch.zeros(30), atol=1e-7, rtol=0)  # a row's length changes nothing


def test_orthogonality_of_an_orthonormal_dictionary_and_of_one_latent_is_zero():
    sae = ReLU(10, 10)
    sae.W_dec.data = torch.linalg.qr(torch.randn(10, 10))[0]
    assert float(orthogonality(sae, None).detach()) == pytest.approx(0, abs=1e-6)
    assert float(orthogonality(ReLU(10, 1), None).detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.5])  # candidates as a matrix, and as lists
@pytest.mark.parametrize("variant", TRAINED)
def test_regularisers_are_of_positive_pre_acts_of_units_that_the_batch_selects(variant, shift):
    sae = VARIANTS[variant](10, 30, seed=0, **({} if variant in ("relu", "jumprelu", "gated") else {"k": 3}))
    bias = sae.b_gate if variant == "gated" else sae.b_enc
    bias.data += shift
    if variant == "gated":
        sae.b_enc.data -= 0.7
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(1))
    run = sae.forward_pass(x)
    selected = run.codes.to_dense().detach() > 0
    used = selected.any(0)
    assert variant in ("relu", "gated", "msae", "jumprelu") or 0 < used.sum() < 30
    z = torch.relu((x - sae.b_pre) @ sae.W_enc.T + bias) * used
    left_out = sum(z[i][~selected[i]].sum() for i in range(8)) / (8 * 10)
    ratios = [row.sum() / row.norm() if row.any() else row.sum() for row in z]
    for term, expected in ((unselected, left_out), (hoyer, torch.stack(ratios).mean())):
        got = term(sae, run)
        torch.testing.assert_close(got, expected)
        if not got.requires_grad:  # nothing is left out
            assert variant == "relu"
            continue
        leaves = (sae.W_enc, bias, sae.b_pre)
        wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
        for one, other in zip(torch.autograd.grad(got, leaves, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        assert sae.W_dec.grad is None


def test_hoyer_does_not_see_the_scale_and_counts_equal_units():
    sae, run, x = make(k=2)
    sae.W_enc.data, sae.b_enc.data = torch.zeros(30, 10), torch.ones(30)
    run = sae.forward_pass(x)
    equal = hoyer(sae, run)
    torch.testing.assert_close(equal, torch.tensor(float(run.codes.fired().sum()) ** 0.5))
    sae.b_enc.data *= 7
    torch.testing.assert_close(hoyer(sae, sae.forward_pass(x)), equal)


def test_weights_choose_and_scale_the_terms():
    sae, run, _ = make()
    weights = {"reconstruction": 2.0, "sparsity": 0.5, "aux": 0.0, "gate": 0.0}
    terms = loss_terms(sae, run, weights)
    assert set(terms) == {"reconstruction", "sparsity"}
    torch.testing.assert_close(total_loss(terms, weights), 2 * terms["reconstruction"] + 0.5 * terms["sparsity"])


def test_options_reach_their_term():
    sae, run, _ = make()
    sae.W_dec.data *= 2
    terms = loss_terms(sae, run, {"sparsity": 1.0}, {"sparsity": {"decoder_norms": False}, "aux": {"k_aux": 3}})
    torch.testing.assert_close(terms["sparsity"], run.codes.values.sum() / 500)


def test_unknown_terms_are_named_with_the_known_ones():
    sae, run, _ = make()
    with pytest.raises(ValueError, match=r"Unknown loss term=monosomething; choose one of .*reconstruction, absolute"):
        loss_terms(sae, run, {"monosomething": 1.0})
    check_terms(sae, dict.fromkeys(set(TERMS) - {"nested", "gate"}, 1.0) | {"nested": 0.0})
