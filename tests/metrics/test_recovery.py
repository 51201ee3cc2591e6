"""Progressive recovery equals decoding each sample's strongest latents by themselves, budget by budget."""

import numpy as np
import pytest
import torch

from sae_lightning.metrics import L0, Firing, Reconstruction, Recovery
from sae_lightning.metrics.cknna import cknna
from sae_lightning.metrics.recovery import recovery_cknna
from sae_lightning.saes.codes import DenseCodes, SparseCodes
from sae_lightning.saes.msae import MSAE
from sae_lightning.saes.relu import ReLU
from sae_lightning.saes.sae import Normalizer

D_IN, D_SAE = 8, 30


def sae_and_features(n: int = 50, seed: int = 0, **options) -> tuple[ReLU, torch.Tensor]:
    """An untrained SAE whose biases and normaliser are not trivial, and features off its centre."""
    g = torch.Generator().manual_seed(seed)
    normalizer = Normalizer(D_IN, torch.randn(D_IN, generator=g), 1.7)
    sae = ReLU(D_IN, D_SAE, normalizer=normalizer, seed=seed, **options)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(D_SAE, generator=g) * 0.3 - 0.2)
        sae.b_pre.copy_(torch.randn(D_IN, generator=g) * 0.2)
    return sae.eval(), torch.randn(n, D_IN, generator=g) * 2 + 1


def strongest(codes: SparseCodes, n: int) -> SparseCodes:
    """Each sample's ``n`` largest activations, by sorting the dense codes."""
    dense = codes.to_dense()
    kept = torch.zeros_like(dense)
    for row, out in zip(dense, kept, strict=True):
        for latent in sorted(range(D_SAE), key=lambda i: -float(row[i]))[:n]:
            out[latent] = row[latent]
    found = SparseCodes.select(kept, kept > 0)
    found.frame = codes.frame
    return found


@torch.no_grad()
@pytest.mark.parametrize("input_norm", ["none", "layer", "rms", "unit"])
def test_equals_a_decode_for_each_budget(input_norm):
    sae, x = sae_and_features(input_norm=input_norm)
    codes = sae.encode(x)
    metric = Recovery(sae, [1, 3, 8])
    metric.update(codes, x)
    out = metric.compute()
    assert metric.budgets == [1, 3, 8, 30]
    for g, budget in enumerate(metric.budgets):
        part = strongest(codes, budget)
        rebuilt = sae.decode(part)
        sums, l0, firing = Reconstruction(D_IN, sae.normalizer.mean), L0(), Firing(D_SAE)
        sums.update(x, rebuilt)
        l0.update(part)
        firing.update(part)
        expected = sums.compute() | l0.compute()
        del expected["r2"]
        for name, value in expected.items():
            assert float(out[f"recovery_{name}"][g]) == pytest.approx(float(value), rel=1e-5)
        assert int(out["recovery_dead"][g]) == D_SAE - int(firing.compute()["alive"])
    assert out["recovery_l0"].diff().min() > 0


@torch.no_grad()
def test_by_hand():
    """Two latents along the axes: the stronger one alone leaves the square of the weaker."""
    sae = ReLU(2, 2, normalizer=Normalizer(2))
    sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 1.0], [2.0, 1.0], [-1.0, 4.0]])
    codes = SparseCodes.select(x, x > 0)
    metric = Recovery(sae, [1])
    metric.update(codes, x)
    out = metric.compute()
    variance = ((x - x.mean(0)) ** 2).sum()
    np.testing.assert_allclose(out["recovery_fvu"], [(1 + 1 + 1) / variance, 1 / variance], rtol=1e-6)
    assert out["recovery_l0"].tolist() == pytest.approx([1, 5 / 3])
    assert out["recovery_dead"].tolist() == [0, 0]
    cosines = [3 / 10**0.5, 2 / 5**0.5, 4 / 17**0.5]
    np.testing.assert_allclose(out["recovery_cosine"], [np.mean(cosines), (2 + cosines[2]) / 3], rtol=1e-6)


@torch.no_grad()
def test_batches_parts_and_ranks_do_not_matter(monkeypatch):
    sae, x = sae_and_features()
    codes = sae.encode(x)
    whole = Recovery(sae, [1, 2, 4])
    whole.update(codes, x)
    monkeypatch.setattr("sae_lightning.metrics.recovery.PART", 3 * 4 * D_IN)
    ranks = [Recovery(sae, [1, 2, 4]) for _ in range(2)]
    for i, part in enumerate(x.split(9)):
        ranks[i % 2].update(sae.encode(part), part)
    ranks[0].merge_state(ranks[1])
    for name, value in whole.compute().items():
        torch.testing.assert_close(ranks[0].compute()[name], value, rtol=1e-6, atol=1e-9)
    assert sum(t.numel() for t in whole.metric_state.values()) == 2 + D_IN + 3 * 4 + 4 * D_SAE
    assert not list(whole.parameters())


@torch.no_grad()
def test_codes_held_as_a_matrix_and_silent_samples():
    sae, x = sae_and_features()
    dense = sae.encode(x).to_dense().clone()
    dense[3] = 0
    one, two = Recovery(sae, [1, 5]), Recovery(sae, [1, 5])
    one.update(DenseCodes(dense), x)
    two.update(SparseCodes.select(dense, dense > 0), x)
    for name, value in one.compute().items():
        torch.testing.assert_close(two.compute()[name], value)
        assert bool(value.isfinite().all())


@torch.no_grad()
def test_cknna_of_each_budget():
    sae, x = sae_and_features(60)
    codes = sae.encode(x)
    found = recovery_cknna(codes, x, [2, 5], k=4, form="centered")
    expected = [cknna(x, strongest(codes, n), 4, "centered") for n in (2, 5, 30)]
    assert found == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_msae_reconstructs_by_levels_as_it_trains():
    """With the budgets of an MSAE, the errors are those of its nested reconstructions."""
    sae = MSAE(D_IN, D_SAE, k=2, seed=0).eval()
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1))
    metric = Recovery(sae, sae.ks.tolist()[:-1])
    metric.update(sae.encode(x), x)
    residual = (sae.forward_pass(x).levels - x[:, None]).square().sum((0, 2))
    np.testing.assert_allclose(metric.residual, residual, rtol=1e-5)


def test_refuses_what_does_not_fit():
    sae, x = sae_and_features()
    for budgets in ([0, 1], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="must be positive numbers of latents that ascend"):
            Recovery(sae, budgets)
    assert Recovery(sae, [16, 32]).budgets == [16, 30]
    with pytest.raises(ValueError, match=r"features \[N, 8\] of the same samples; got 50 samples"):
        Recovery(sae).update(sae.encode(x), x[1:])
    with pytest.raises(ValueError, match="seen no sample"):
        Recovery(sae).compute()
