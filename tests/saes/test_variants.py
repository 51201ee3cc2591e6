"""Every variant's training loss, gradients and evaluation against dense references, and what the base promises."""

import copy

import pytest
import torch

from sae_lightning.kernels import native, selection
from sae_lightning.saes import MSAE, VARIANTS, BatchTopK, DenseCodes, JumpReLU, Matryoshka, Normalizer, ReLU, TopK
from sae_lightning.saes.fitted import KMeans
from sae_lightning.saes.losses import loss_terms, total_loss
from tests.saes import dense

D_IN, D_SAE, K, N = 12, 40, 5, 60

CASES = {
    "relu, many active": ("relu", {}, 0.0),
    "relu, few active": ("relu", {}, -3.0),
    "relu tied": ("relu", {"tied": True}, -3.0),
    "relu, layer": ("relu", {"input_norm": "layer"}, 0.0),
    "topk": ("topk", {"k": K}, 0.0),
    "topk of all": ("topk", {"k": D_SAE}, 0.0),
    "topk, few positive": ("topk", {"k": K}, -2.0),
    "topk tied, unit": ("topk", {"k": K, "tied": True, "input_norm": "unit"}, 0.0),
    "batchtopk": ("batchtopk", {"k": K}, 0.0),
    "batchtopk, fraction": ("batchtopk", {"k": 2.25, "input_norm": "layer"}, 0.0),
    "batchtopk, k a batch": ("batchtopk", {"k": 70, "k_per": "batch", "tied": True}, 0.0),
    "batchtopk, few positive": ("batchtopk", {"k": K}, -2.0),
    "jumprelu, rectangle": ("jumprelu", {"bandwidth": 0.2}, 0.0),
    "jumprelu, gaussian": ("jumprelu", {"bandwidth": 0.05, "kernel_name": "gaussian"}, 0.0),
    "jumprelu, silverman": ("jumprelu", {"bandwidth": 0.015, "kernel_name": "silverman", "tied": True}, 0.0),
    "jumprelu, his rule": ("jumprelu", {"bandwidth": "silverman", "input_norm": "unit"}, 0.0),
    "jumprelu, narrow": ("jumprelu", {"bandwidth": 1e-3}, -0.5),
    "gated, many active": ("gated", {}, 0.0),
    "gated, few active": ("gated", {"input_norm": "layer"}, -3.0),
    "gated tied": ("gated", {"tied": True}, -3.0),
    "matryoshka": ("matryoshka", {"k": K}, 0.0),
    "matryoshka, sampled": ("matryoshka", {"k": 2.5, "sampled": 4, "input_norm": "unit"}, 0.0),
    "matryoshka_topk": ("matryoshka_topk", {"k": K, "fractions": [0.1, 0.5, 1], "tied": True}, 0.0),
    "msae": ("msae", {"k": 3}, 0.0),
    "msae, reverse": ("msae", {"k": 2, "ks": [2, 5, 11], "weighting": "reverse", "input_norm": "layer"}, 0.0),
    "msae, capped": ("msae", {"k": 2, "soft_cap": 1.5, "tied": True}, -0.5),
    "msae, few levels": ("msae", {"k": 4, "ks": [4], "soft_cap": 3.0}, -3.0),
}  # fmt: skip


SIZES = {"pca": 2 * D_IN, "neurons": 2 * D_IN}  # of which no others are possible
UNTIED = ("frozen_decoder", "frozen_encoder", "kmeans", "nmf")  # which refuse tied weights


def options(variant: str) -> dict:
    return {} if variant in ("relu", "jumprelu", "gated") else {"k": K}


def build(variant: str, **more):
    return VARIANTS[variant](D_IN, SIZES.get(variant, D_SAE), **{"seed": 0} | options(variant) | more)


@torch.no_grad()
def perturbed(sae, shift: float = 0.0, seed: int = 3):
    """``sae`` with parameters as if after some training; ``shift`` moves the pre-activations."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sae.named_parameters():
        p += (0.3 if name.startswith("W") else 0.1) * torch.randn(p.shape, generator=generator)
        if name in ("b_enc", "b_gate"):
            p += shift
        if name == "log_threshold":
            p.copy_(0.7 + 0.2 * torch.rand(p.shape, generator=generator)).log_()
    return sae


def features(n: int = N, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_for(variant: str) -> dict[str, float]:
    weights = {"reconstruction": 1.0, "sparsity": 0.3}
    if variant in ("matryoshka", "matryoshka_topk", "msae"):
        weights["nested"] = 0.7
    return weights | ({"gate": 0.5} if variant == "gated" else {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_training_loss_and_all_gradients_equal_the_papers_formulas(case, dtype):
    variant, settings, shift = CASES[case]
    sae = perturbed(VARIANTS[variant](D_IN, D_SAE, seed=0, **settings), shift).to(dtype).train()
    truth, x, weights = copy.deepcopy(sae).double(), features(dtype=dtype), weights_for(variant)
    got = total_loss(loss_terms(sae, sae.forward_pass(sae.inputs(x)[0]), weights), weights)
    expected = dense.loss(truth, x.double(), weights)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)
    got.backward()
    expected.backward()
    for (name, p), (_, q) in zip(sae.named_parameters(), truth.named_parameters(), strict=True):
        wanted = torch.zeros_like(q) if q.grad is None else q.grad
        atol = tolerance * float(wanted.abs().max())
        torch.testing.assert_close(
            p.grad.double(), wanted, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_codes_are_the_same_by_bfloat16_candidates(case, low, monkeypatch):
    monkeypatch.setattr(selection, "fast_bf16", lambda: low)
    variant, settings, shift = CASES[case]
    sae = perturbed(VARIANTS[variant](D_IN, D_SAE, seed=0, **settings), shift).train()
    expected = dense.codes_of(sae, dense.normed(sae.input_norm, features()))
    torch.testing.assert_close(sae.forward_pass(sae.inputs(features())[0]).codes.to_dense(), expected)


@pytest.mark.parametrize(("shift", "kind"), [(0.0, DenseCodes), (-3.0, None)])
@pytest.mark.parametrize("variant", ["relu", "gated"])
def test_many_active_latents_are_held_as_a_matrix(variant, shift, kind):
    assert isinstance(perturbed(build(variant), shift).forward_pass(features()).codes, DenseCodes) == (kind is not None)


# --- evaluation -------------------------------------------------------------------------------------
EVALUATED = [*VARIANTS, "topk relu"]


def evaluated(name: str):
    """A variant with calibrated thresholds, in evaluation."""
    sae = perturbed(build("topk", inference="relu") if name == "topk relu" else build(name), -0.3)
    if isinstance(sae, BatchTopK):
        sae.calibrate([features()], N)
    return sae.eval()


def evaluation_codes(sae, x: torch.Tensor) -> torch.Tensor:
    """Dense codes of one variant in evaluation, from its definition."""
    pre = dense.pre_acts(sae, x)
    if isinstance(sae, KMeans):  # without its fit W_enc has the centres' directions, and b_enc no squares
        squares = (x - sae.b_pre).square().sum(1, keepdim=True) - 2 * pre
        near = 1 / torch.where(pre >= pre.topk(K, 1).values[:, -1:], squares.clamp_min(1e-6), torch.inf)
        return near / near.sum(1, keepdim=True) * sae.W_enc.norm(dim=1)
    if isinstance(sae, BatchTopK):
        return pre * (pre > sae.threshold)
    if isinstance(sae, JumpReLU):
        return pre * (pre > sae.log_threshold.exp())
    if isinstance(sae, TopK) and sae.inference == "topk":
        return dense.largest_of_rows(pre, K)
    return dense.codes_of(sae, x) if sae.variant == "gated" else torch.relu(pre)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_codes_follow_their_definition(name):
    sae, x = evaluated(name), features(seed=5)
    torch.testing.assert_close(sae.encode(x).to_dense(), evaluation_codes(sae, x))
    torch.testing.assert_close(sae.forward_pass(sae.inputs(x)[0]).codes.to_dense(), evaluation_codes(sae, x))


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_codes_do_not_depend_on_the_batch(name):
    sae, x = evaluated(name), features(seed=5)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    together = sae.encode(x).to_dense()
    torch.testing.assert_close(torch.cat([sae.encode(row).to_dense() for row in x]), together)
    torch.testing.assert_close(sae.encode(x.flip(0)).to_dense().flip(0), together)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("variant", ["matryoshka", "matryoshka_topk", "msae"])
def test_the_last_level_is_the_reconstruction(variant):
    for sae in (evaluated(variant), evaluated(variant).train()):
        run = sae.forward_pass(sae.inputs(features())[0])
        torch.testing.assert_close(run.reconstruction, run.codes.decode(sae.W_dec, sae.b_pre))
        assert torch.equal(run.levels[:, -1], run.reconstruction)
        torch.testing.assert_close(run.level_weights.sum(), torch.tensor(1.0))


# --- raw features -----------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_flattens_leading_dimensions_and_forward_restores_them(variant):
    sae = evaluated(variant)
    images = features(6 * 4).reshape(2, 3, 4, D_IN)
    assert sae.encode(images).n_samples == 24
    assert sae.encode(images[0, 0, 0]).n_samples == 1
    torch.testing.assert_close(sae(images), sae(images.reshape(24, D_IN)).reshape(images.shape))


@pytest.mark.parametrize("variant", VARIANTS)
def test_raw_features_are_normalised_inside(variant):
    raw = features() * 7 + 3
    sae = evaluated(variant)
    outside = copy.deepcopy(sae)
    sae.normalizer = Normalizer(D_IN, raw.mean(0), raw.std())
    x = (raw - raw.mean(0)) / raw.std()
    torch.testing.assert_close(sae(raw), outside(x) * raw.std() + raw.mean(0), rtol=1e-4, atol=1e-4)
    assert sae(raw.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["layer", "rms", "unit"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_norm_is_taken_before_the_encoder_and_given_back_after_the_decoder(variant, kind):
    sae = evaluated(variant)
    sae.input_norm, plain = kind, copy.deepcopy(sae)
    raw = features() * torch.linspace(0.1, 9, N)[:, None] + 4
    rebuilt = plain.forward_pass(dense.normed(kind, raw)).reconstruction
    shift = raw.mean(1, keepdim=True) if kind == "layer" else 0
    scale = (raw - shift).norm(dim=1, keepdim=True) / (1 if kind == "unit" else D_IN**0.5)
    torch.testing.assert_close(sae(raw), rebuilt * scale + shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(raw).to_dense(), sae.encode(3 * raw).to_dense(), rtol=1e-4, atol=1e-4)


# --- construction and counters ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variant", "tied"), [(v, t) for v in VARIANTS for t in (True, False) if not (t and v in UNTIED)]
)
def test_the_encoder_starts_as_the_unit_norm_decoder(variant, tied):
    sae = build(variant, tied=tied)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert (sae.W_enc is sae.W_dec) == tied
    assert torch.equal(sae.W_dec, build(variant).W_dec)  # the seed decides
    assert not torch.equal(sae.W_dec, build(variant, seed=1).W_dec)


def test_normalize_decoder_scales_rows_to_unit_norm_and_keeps_their_directions():
    sae = build("relu")
    before = sae.W_dec.detach().clone()
    sae.W_dec.data *= torch.linspace(0.2, 5, D_SAE)[:, None]
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), before)


def test_dead_latent_counters_follow_firing():
    sae = build("topk")
    fired = sae.forward_pass(sae.inputs(features(8))[0]).codes.fired()
    sae.count_firing(fired, 8)
    sae.count_firing(torch.zeros_like(fired), 5)
    assert torch.equal(sae.tokens_since_fired, torch.where(fired, 5, 13))


def test_pre_acts_of_some_latents_are_columns_of_all():
    sae, x = perturbed(build("relu")), features()
    some = torch.tensor([3, 0, 17])
    torch.testing.assert_close(sae.pre_acts(x, some), dense.pre_acts(sae, x)[:, some])
    torch.testing.assert_close(sae.pre_acts(x), dense.pre_acts(sae, x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_without_compiled_kernels_gives_the_same_gradients(variant, monkeypatch):
    sae, x, weights = perturbed(build(variant), -0.3).train(), features(), weights_for(variant)
    grads = []
    for _ in range(2):
        total_loss(loss_terms(sae, sae.forward_pass(sae.inputs(x)[0]), weights), weights).backward()
        grads.append([p.grad.clone() for p in sae.parameters() if p.requires_grad])
        sae.zero_grad()
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(D_IN, D_SAE, 0), "k must be a whole number between 1 and"),
        (lambda: TopK(D_IN, D_SAE, 2.5), "whole number"),
        (lambda: TopK(D_IN, D_SAE, D_SAE + 1), "raise expansion"),
        (lambda: TopK(D_IN, D_SAE, 3, inference="all"), "Unknown inference=all"),
        (lambda: BatchTopK(D_IN, D_SAE, -1), "k must lie above 0"),
        (lambda: BatchTopK(D_IN, D_SAE, 0, k_per="batch"), "k must be positive"),
        (lambda: BatchTopK(D_IN, D_SAE, 1, k_per="epoch"), "choose one of sample, batch"),
        (lambda: JumpReLU(D_IN, D_SAE, kernel_name="box"), "choose one of rectangle"),
        (lambda: JumpReLU(D_IN, D_SAE, bandwidth=0), "bandwidth must be a positive number or silverman"),
        (lambda: JumpReLU(D_IN, D_SAE, bandwidth="wide"), "bandwidth must be a positive number or silverman"),
        (lambda: JumpReLU(D_IN, D_SAE, threshold=0.0), "threshold must be positive"),
        (lambda: Matryoshka(D_IN, D_SAE, K, fractions=[0.5, 0.2, 1]), "must ascend to 1"),
        (lambda: Matryoshka(D_IN, D_SAE, K, fractions=[0.2, 0.5]), "must ascend to 1"),
        (lambda: Matryoshka(D_IN, D_SAE, K, fractions=[0.01, 1]), "at least one"),
        (lambda: Matryoshka(D_IN, D_SAE, K, fractions=[]), "must ascend to 1"),
        (lambda: Matryoshka(D_IN, D_SAE, K, sampled=-1), "number of prefixes"),
        (lambda: MSAE(D_IN, D_SAE, 0), "whole number between 1"),
        (lambda: MSAE(D_IN, D_SAE, 2, ks=[4, 2]), "must ascend"),
        (lambda: MSAE(D_IN, D_SAE, 2, ks=[2, D_SAE + 1]), "must ascend"),
        (lambda: MSAE(D_IN, D_SAE, 2, weighting="odd"), "choose one of uniform, reverse"),
        (lambda: MSAE(D_IN, D_SAE, 2, soft_cap=0), "soft_cap must be positive"),
        (lambda: ReLU(0, 4), "at least 1"),
        (lambda: ReLU(D_IN, D_SAE, input_norm="batch"), "choose one of none, layer, rms, unit"),
        (lambda: Normalizer(D_IN, torch.zeros(D_IN), 0.0), "positive deviation"),
        (lambda: Normalizer(D_IN, torch.full((D_IN,), torch.nan)), "finite mean"),
        (lambda: build("topk").encode(torch.zeros(2, D_IN + 1)), "another backbone or layer"),
    ],
)  # fmt: skip
def test_impossible_settings_fail_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
