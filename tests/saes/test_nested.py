"""Prefixes of Matryoshka, levels of MSAE, thresholds of JumpReLU: what belongs to one variant alone."""

import math

import pytest
import torch

from sae_lightning.saes import MSAE, Gated, JumpReLU, Matryoshka, MatryoshkaTopK, TopK
from sae_lightning.saes.jumprelu import kernel
from tests.saes import dense

D_IN, D_SAE = 12, 40


def features(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def test_fixed_prefixes_end_at_the_fractions_of_the_dictionary():
    assert Matryoshka(D_IN, D_SAE, 5, fractions=[0.1, 0.25, 1]).prefixes().tolist() == [4, 10, 40]
    assert Matryoshka(D_IN, 32, 5).prefixes().tolist() == [2, 6, 14, 32]


@pytest.mark.parametrize("cls", [Matryoshka, MatryoshkaTopK])
@pytest.mark.parametrize("sampled", [1, 2, 5, 40])
def test_sampled_prefixes_ascend_to_the_whole_dictionary(cls, sampled):
    sae = cls(D_IN, D_SAE, 5, sampled=sampled).train()
    for _ in range(5):
        ends = sae.prefixes()
        assert len(ends) == sampled
        assert ends[-1] == D_SAE
        assert (ends.diff() > 0).all()
        assert ends[0] > 0
        assert sae.forward_pass(features()).levels.shape == (64, sampled, D_IN)


def test_sampled_prefixes_change_with_training_only_and_resume_from_the_state():
    sae = Matryoshka(D_IN, D_SAE, 5, seed=0, sampled=4).train()
    drawn = []
    for _ in range(6):
        drawn.append(sae.prefixes().tolist())
        sae.forward_pass(features())
    assert len(set(map(tuple, drawn))) > 3
    before = sae.prefixes().tolist()
    sae.eval().forward_pass(features())
    assert sae.prefixes().tolist() == before
    resumed = Matryoshka(D_IN, D_SAE, 5, seed=9, sampled=4)
    resumed.load_state_dict(sae.state_dict())
    assert resumed.prefixes().tolist() == before


def test_short_prefixes_are_drawn_more_often():
    sae = Matryoshka(D_IN, D_SAE, 5, sampled=2)
    lengths = []
    for step in range(2000):
        sae.draws.fill_(step)
        lengths.append(int(sae.prefixes()[0]))
    weights = torch.arange(1, D_SAE).double() ** -1.5
    shares = torch.tensor(lengths).bincount(minlength=D_SAE)[1:] / 2000
    torch.testing.assert_close(shares.double()[:4], (weights / weights.sum())[:4], rtol=0.15, atol=0.02)


def test_msae_levels_are_powers_of_two_up_to_the_dictionary():
    assert MSAE(D_IN, D_SAE, 3).ks.tolist() == [3, 6, 12, 24, 40]
    assert MSAE(D_IN, 32, 4).ks.tolist() == [4, 8, 16, 32]
    assert MSAE(D_IN, D_SAE, 3, ks=[2, 9]).ks.tolist() == [2, 9]


def test_msae_weights_sum_to_one_uniform_or_reverse():
    uniform = MSAE(D_IN, D_SAE, 3, ks=[1, 2, 4, 8]).level_weights
    reverse = MSAE(D_IN, D_SAE, 3, ks=[1, 2, 4, 8], weighting="reverse").level_weights
    torch.testing.assert_close(uniform, torch.tensor([0.25, 0.25, 0.25, 0.25]))
    torch.testing.assert_close(reverse, torch.tensor([0.4, 0.3, 0.2, 0.1]))


def test_msae_levels_are_topk_reconstructions():
    sae, x = MSAE(D_IN, D_SAE, 2, ks=[2, 4, 9], seed=0).train(), features()
    run = sae.forward_pass(x)
    for level, k in enumerate([2, 4, 9]):
        topk = TopK(D_IN, D_SAE, k, seed=0).train().forward_pass(x)
        torch.testing.assert_close(run.levels[:, level], topk.reconstruction)
        torch.testing.assert_close(run.codes.top(k).to_dense(), topk.codes.to_dense())


def test_a_soft_cap_bounds_the_codes():
    sae = MSAE(D_IN, D_SAE, 5, seed=0, soft_cap=0.8)
    for mode in (True, False):
        codes = sae.train(mode).forward_pass(features() * 3).codes
        pre = torch.relu(dense.pre_acts(sae, features() * 3))
        torch.testing.assert_close(codes.to_dense(), 0.8 * torch.tanh(pre / 0.8))


@pytest.mark.parametrize("name", ["rectangle", "gaussian", "silverman"])
def test_kernels_integrate_to_one_and_match_their_formulas(name):
    u = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    density = kernel(name, u)
    assert float(torch.trapezoid(density, u)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(density[::7], dense.density(name, u[::7]))


@pytest.mark.parametrize("name", ["rectangle", "gaussian", "silverman"])
def test_a_threshold_moves_by_the_error_of_entries_on_both_sides_of_it(name):
    sae = JumpReLU(1, 1, bandwidth=0.1, kernel_name=name, threshold=3.0, seed=0).double().train()
    sae.W_dec.data.fill_(1)
    sae.W_enc.data.fill_(1)
    for pre in (2.97, 3.03):  # just silent, just active
        sae.zero_grad()
        run = sae.forward_pass(torch.tensor([[pre]], dtype=torch.float64))
        run.reconstruction.sum().backward()
        expected = -3.0 / 0.1 * float(kernel(name, torch.tensor((pre - 3.0) / 0.1, dtype=torch.float64))) * 3.0
        assert run.codes.nnz == int(pre > 3)
        assert float(sae.log_threshold.grad) == pytest.approx(expected, rel=1e-6)


def test_silvermans_rule_follows_the_batch():
    sae, x = JumpReLU(D_IN, D_SAE, bandwidth="silverman", seed=0), features(100)
    expected = 1.06 * float(dense.pre_acts(sae, x).detach().std()) * 100**-0.2
    assert sae._width(x) == pytest.approx(expected, rel=1e-5)
    assert sae._width(3 * x) == pytest.approx(3 * expected, rel=1e-5)


def test_a_jumprelu_starts_at_its_threshold_and_keeps_what_exceeds_it():
    sae, x = JumpReLU(D_IN, D_SAE, threshold=0.25, seed=0), features()
    torch.testing.assert_close(sae.log_threshold.detach(), torch.full((D_SAE,), math.log(0.25)))
    pre = dense.pre_acts(sae, x)
    for mode in (True, False):
        torch.testing.assert_close(sae.train(mode).forward_pass(x).codes.to_dense(), pre * (pre > 0.25))


def test_gates_decide_which_latents_are_active_and_magnitudes_how_much():
    sae, x = Gated(D_IN, D_SAE, seed=0), features()
    assert (sae.forward_pass(x).codes.to_dense() == sae.forward_pass(x).extra["gate"].to_dense()).all()
    sae.b_enc.data += 0.5
    sae.r_mag.data += math.log(2)
    path = x @ sae.W_enc.T
    torch.testing.assert_close(sae.forward_pass(x).codes.to_dense(), (path > 0) * (2 * path + 0.5))
    sae.b_gate.data -= 100
    assert sae.forward_pass(x).codes.nnz == 0
