"""Dictionaries that are not trained, and SAEs of which a part is not, against scikit-learn and plain formulas."""

import pytest
import torch
from sklearn import cluster, decomposition

from sae_lightning.saes import SAE, VARIANTS
from sae_lightning.saes.fitted import semi_nmf
from sae_lightning.training.optimizer import build_optimizer

D_IN, K, N = 12, 4, 600
SIZES = {"random": 40, "pca": 24, "neurons": 24, "nmf": 30, "kmeans": 20}
FITTED = sorted(name for name, variant in VARIANTS.items() if variant.fitted)
FROZEN = ("frozen_decoder", "frozen_encoder", "soft_frozen_decoder")


def features(n: int = N, seed: int = 1) -> torch.Tensor:
    """Samples about 20 centres, with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(20, D_IN, generator=torch.Generator().manual_seed(0))
    of = torch.randint(20, (n,), generator=generator)
    return centres[of] + 0.3 * torch.randn(n, D_IN, generator=generator) + 1


def made(variant: str, d_sae: int | None = None, k: float = K, x: torch.Tensor | None = None) -> SAE:
    x = features() if x is None else x
    sae = VARIANTS[variant](D_IN, d_sae or SIZES[variant], k=k, seed=0)
    with torch.no_grad():
        sae.b_pre.copy_(x.mean(0))
    sae.fit(x, 3)
    sae.finish([x], len(x), "calibrated")
    return sae.eval()


def test_these_are_all_that_are_not_trained():
    assert sorted(SIZES) == FITTED


@pytest.mark.parametrize("variant", FITTED)
def test_k_latents_a_sample_are_active_and_the_rows_have_unit_norm(variant, tmp_path):
    sae = made(variant)
    assert float(sae.encode(features()).counts().float().mean()) == pytest.approx(K, abs=0.02)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))
    sae.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path)(features(50, 2)), sae(features(50, 2)))
    again, other = made(variant), VARIANTS[variant](D_IN, sae.d_sae, k=K, seed=1)
    assert torch.equal(again.W_dec, sae.W_dec)  # the seed decides
    assert not torch.equal(other.W_dec, sae.W_dec)


def test_a_random_dictionary_stays_as_it_was_drawn():
    sae, drawn = made("random"), VARIANTS["random"](D_IN, SIZES["random"], k=K, seed=0)
    assert torch.equal(sae.W_dec, drawn.W_dec)
    assert torch.equal(sae.W_enc, drawn.W_dec)
    products = (features() - features().mean(0)) @ drawn.W_dec.T
    kept = products >= products.flatten().topk(K * N).values.min()
    torch.testing.assert_close(sae.encode(features()).to_dense(), products * kept)


@pytest.mark.parametrize("axes", [3, 12])
def test_pca_of_all_axes_reconstructs_as_scikit_learn_does(axes):
    x = features()
    sae, truth = made("pca", 2 * axes, k=axes), decomposition.PCA(axes).fit(x.double().numpy())
    expected = torch.from_numpy(truth.inverse_transform(truth.transform(x.double().numpy()))).float()
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)


def test_pca_keeps_the_largest_by_magnitude():
    x = features()
    sae, truth = made("pca", k=2), decomposition.PCA().fit(x.double().numpy())
    shares = torch.from_numpy(truth.transform(x.double().numpy())).float()
    kept = shares.abs() >= shares.abs().flatten().topk(2 * N).values.min()
    expected = (shares * kept) @ torch.from_numpy(truth.components_).float() + x.mean(0)
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sides", [1, 2])
def test_neurons_are_the_channels_about_their_mean(sides):
    x = features()
    centred = x - x.mean(0)
    codes = made("neurons", sides * D_IN, k=sides * D_IN).encode(x).to_dense()
    expected = torch.cat([centred, -centred], 1)[:, : sides * D_IN].clamp_min(0)
    torch.testing.assert_close(codes, expected)


def test_k_means_with_one_latent_reconstructs_the_nearest_centre():
    x = features()
    sae = made("kmeans", k=1)
    centres = (sae.W_enc + sae.b_pre).detach()
    truth = cluster.KMeans(20, init=centres.double().numpy(), n_init=1, max_iter=1).fit(x.double().numpy())
    nearest = torch.cdist(x, centres).argmin(1)
    assert torch.equal(nearest, torch.from_numpy(cluster.KMeans.predict(truth, x.double().numpy())).long())
    torch.testing.assert_close(sae(x), centres[nearest], rtol=1e-4, atol=1e-4)
    inertia = float((sae(x) - x).square().sum())
    best = cluster.KMeans(20, n_init=10, random_state=0).fit(x.numpy()).inertia_
    assert inertia < 2 * best < 0.2 * float((x - x.mean(0)).square().sum())


def test_k_means_with_several_weighs_the_nearest_by_their_distance():
    sae, x = made("kmeans", k=3), features(40, 5)
    centres = (sae.W_enc + sae.b_pre).detach()
    squares = torch.cdist(x, centres).square()
    near = squares.topk(3, largest=False)
    weights = 1 / near.values / (1 / near.values).sum(1, keepdim=True)
    expected = (weights[:, :, None] * centres[near.indices]).sum(1)
    torch.testing.assert_close(sae(x), expected, rtol=1e-3, atol=1e-3)


def test_semi_nmf_follows_its_formulas_and_lowers_the_error():
    x, start = features(200) - features(200).mean(0), torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    codes, rows = semi_nmf(x, start, rounds=6)
    G, F = (torch.relu(x @ start.T) + 1e-3).double(), None
    errors = []
    for _ in range(6):
        F = torch.linalg.lstsq(G, x.double()).solution
        XF, FF = x.double() @ F.T, F @ F.T
        up, down = (lambda A: (A.abs() + A) / 2), (lambda A: (A.abs() - A) / 2)
        G = G * torch.sqrt((up(XF) + G @ down(FF)) / (down(XF) + G @ up(FF)))
        errors.append(float((x - G @ F).square().sum()))
    torch.testing.assert_close((codes @ rows).double(), G @ F, rtol=1e-2, atol=1e-2)
    assert errors == sorted(errors, reverse=True)
    assert (codes >= 0).all()


def test_nmf_reads_codes_by_least_squares():
    x = features()
    sae, plain = made("nmf", d_sae=30, k=30), VARIANTS["nmf"](D_IN, 30, k=30, seed=0)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))[: 8 * 30]
    some = x[order] - x.mean(0)
    codes, rows = semi_nmf(some, plain.W_dec.detach())
    codes = codes * rows.norm(dim=1)
    with_one = torch.cat([some, torch.ones(len(some), 1)], 1).double()
    read = torch.linalg.lstsq(with_one, codes.double()).solution.float()
    torch.testing.assert_close(sae.pre_acts(some + x.mean(0)), (with_one.float() @ read), rtol=1e-2, atol=2e-2)


# --- a part is frozen -----------------------------------------------------------------------------------
def trained(variant: str, steps: int = 12, **options) -> tuple[SAE, SAE]:
    """An SAE as it started, and after some steps."""
    start, sae = (VARIANTS[variant](D_IN, 40, k=K, seed=0, **options) for _ in range(2))
    optimizer, x = build_optimizer(sae.train(), lr=0.1), features()
    for _ in range(steps):
        optimizer.zero_grad()
        (sae.forward_pass(x).reconstruction - x).square().mean().backward()
        optimizer.step()
    return start, sae


@pytest.mark.parametrize("variant", FROZEN)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(variant):
    start, sae = trained(variant)
    for name, weights in sae.named_parameters():
        assert torch.equal(weights, start.get_parameter(name)) == (name in sae.frozen), name


@pytest.mark.parametrize("native", [True, False])
def test_soft_frozen_rows_keep_near_their_start(native, monkeypatch):
    if not native:
        monkeypatch.setattr("sae_lightning.kernels.native.available", lambda *tensors: False)
    start, sae = trained("soft_frozen_decoder")
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec, start.W_dec, dim=1)
    assert float(cosines.min()) > 0.8 - 1e-5
    assert float((cosines < 0.801).float().mean()) > 0.2  # many would have gone further
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    free = torch.nn.functional.cosine_similarity(trained("batchtopk")[1].W_dec, start.W_dec, dim=1)
    assert float(free.min()) < 0.7


def test_a_row_that_goes_too_far_comes_back_within_its_plane():
    sae = VARIANTS["soft_frozen_decoder"](2, 3, k=1, seed=0)
    sae.W_start.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[0.0, 1], [0.96, 0.28], [-0.6, -0.8]]))
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.detach(), torch.tensor([[0.8, 0.6], [0.96, 0.28], [-0.6, 0.8]]))


# --- what cannot be -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variant", "d_sae", "options", "sentence"),
    [
        ("pca", 26, {}, "expansion=2, or d_sae to an even number up to 24"),
        ("pca", 7, {}, "even number"),
        ("neurons", 36, {}, "expansion=1 or 2"),
        ("random", 40, {"k_per": "batch"}, "leave k_per out"),
        ("random", 40, {"encoder_norm": 0.3}, "leave out sae.settings.encoder_norm"),
        ("kmeans", 20, {"tied": True}, "sae.settings.tied"),
        ("kmeans", 20, {"inference": "relu"}, "leave inference out"),
        ("nmf", 20, {"tied": True}, "sae.settings.tied"),
        ("frozen_decoder", 20, {"tied": True}, "sae.settings.tied=false"),
        ("frozen_encoder", 20, {"tied": True}, "sae.settings.tied=false"),
    ],
)
def test_impossible_settings_fail_with_a_sentence(variant, d_sae, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        VARIANTS[variant](D_IN, d_sae, k=K, **options)


def test_more_centres_than_tokens_are_refused():
    with pytest.raises(ValueError, match="d_sae=700 centres"):
        VARIANTS["kmeans"](D_IN, 700, k=2, seed=0).fit(features(), 0)
