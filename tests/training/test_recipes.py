"""Trainings by the presets of papers end where plain programs end that are written from the papers' formulas."""

import copy

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from sae_lightning.saes import SAE, VARIANTS
from sae_lightning.saes.losses import loss_terms
from sae_lightning.training.module import SAEModule
from tests.configs import composed

D_IN, D_SAE, K, BATCH, STEPS = 24, 96, 6, 128, 200

PRESETS = {
    "batchtopk": "experiment=monoloss/batchtopk", "topk tied": "experiment=monoloss/topk",
    "vanilla": "experiment=monoloss/vanilla", "jumprelu": "experiment=monoloss/jumprelu",
    "matryoshka": "sae=matryoshka", "msae uniform": "experiment=msae", "msae reverse": "experiment=msae",
}  # fmt: skip


def features(n: int, unit: bool) -> Tensor:
    """Sparse sums of fixed directions [n, D_IN]; ``unit``: of norm 1, as MonoLoss's data set hands them over."""
    generator = torch.Generator().manual_seed(n)
    directions = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(1))
    amounts = torch.rand(n, 60, generator=generator) * (torch.rand(n, 60, generator=generator) < 0.08)
    x = amounts @ directions + 0.05 * torch.randn(n, D_IN, generator=generator)
    return x / x.norm(dim=1, keepdim=True) if unit else x


# --- ours: the preset's SAE, loss terms and optimiser ----------------------------------------------
def module_of(name: str) -> SAEModule:
    weighting = ["sae.settings.weighting=reverse"] if name.endswith("reverse") else []
    data = ["data=imagenet", "data.path=x"] if "monoloss" in PRESETS[name] else []
    cfg = composed("config", *data, PRESETS[name], "optimizer.lr=0.001", f"k={K}", *weighting)
    plain = OmegaConf.to_container(OmegaConf.create({key: cfg[key] for key in ("sae", "loss", "loss_options")}))
    optimizer = OmegaConf.to_container(cfg.optimizer)
    settings = plain["sae"]["settings"] | ({"k": K} if "k" in plain["sae"]["settings"] else {})
    for term in plain["loss_options"].values():
        if "dead_after" in (term or {}):
            term["dead_after"] = 10**9  # AuxK is tested by itself
    sae = VARIANTS[plain["sae"]["name"]](D_IN, D_SAE, seed=0, **settings)
    return SAEModule(sae, plain["loss"], plain["loss_options"], optimizer, {"decay": 0.0})


def trained(module: SAEModule, batches: list[Tensor]) -> SAE:
    trainer = L.Trainer(
        max_epochs=1, gradient_clip_val=1.0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=STEPS,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.sae


# --- a plain program: dense codes, autograd, torch's Adam -------------------------------------------
class Jump(torch.autograd.Function):
    """z · 1(z > θ), whose gradient for θ is that of a rectangle [Rajamanoharan et al. 2024, eq. 11]."""

    @staticmethod
    def forward(ctx, z, theta, width):
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return z * (z > theta)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.width / 2) / ctx.width
        return grad * (z > theta), (-theta * near * grad).sum(0), None


class Step(torch.autograd.Function):
    """1(z > θ) with the same stand-in [eq. 12]."""

    @staticmethod
    def forward(ctx, z, theta, width):
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.width / 2) / ctx.width
        return None, (-near * grad).sum(0), None


def plain_pass(name: str, sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's loss, the dense codes [n, D_SAE] and the reconstruction, of x [n, D_IN] as the SAE sees it."""
    z = torch.relu((x - sae.b_pre) @ sae.W_enc.T + sae.b_enc)
    if name == "topk tied":
        z = z * torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0)
    elif name in ("batchtopk", "matryoshka"):
        z = z * (z >= z.flatten().topk(K * len(x)).values[-1])
    elif name == "jumprelu":
        z = Jump.apply(z, sae.log_threshold.exp(), 1e-3)
    rebuilt = z @ sae.W_dec + sae.b_pre
    error = (rebuilt - x).square().mean()  # over samples and dimensions
    if name == "topk tied":
        return ((rebuilt - x).square().sum(1) / x.square().sum(1)).mean(), z, rebuilt
    if name == "vanilla":
        return error + 1e-4 * z.sum(1).mean(), z, rebuilt
    if name == "jumprelu":
        pre = torch.relu((x - sae.b_pre) @ sae.W_enc.T + sae.b_enc)
        return error + 1e-3 * Step.apply(pre, sae.log_threshold.exp(), 1e-3).sum(1).mean(), z, rebuilt
    if name == "matryoshka":
        ends = [round(share * D_SAE) for share in (0.0625, 0.1875, 0.4375, 1)]
        nested = [(z[:, :end] @ sae.W_dec[:end] + sae.b_pre - x).square().mean() for end in ends]
        return torch.stack(nested).mean(), z, rebuilt
    if name.startswith("msae"):
        ks = [6, 12, 24, 48, 96]
        weights = torch.tensor([5.0, 4, 3, 2, 1] if name.endswith("reverse") else [1.0] * 5)
        ranks = z.argsort(dim=1, descending=True).argsort(dim=1)
        nested = [((z * (ranks < k)) @ sae.W_dec + sae.b_pre - x).square().mean() for k in ks]
        return torch.stack(nested) @ (weights / weights.sum()), z, rebuilt
    return error, z, rebuilt


def plainly_trained(name: str, sae: SAE, batches: list[Tensor]) -> SAE:
    eps = 1e-8 if name.startswith(("ma", "msae")) else 6.25e-10
    tied = name == "topk tied"
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, eps=eps)
    for x in batches:
        loss, _, _ = plain_pass(name, sae, x)
        optimizer.zero_grad()
        loss.backward()
        if not tied:
            along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1, keepdim=True)
            sae.W_dec.grad -= along * sae.W_dec.detach()
        torch.nn.utils.clip_grad_norm_([p for p in sae.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@torch.no_grad()
def outcome(name: str, sae: SAE, x: Tensor) -> tuple[float, float]:
    """Explained variance, and latents above zero a sample."""
    _, z, rebuilt = plain_pass(name, sae, x)
    left = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()
    return 1 - float(left), float((z > 0).sum(1).float().mean())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_as_the_paper_says(name):
    unit = "monoloss" in PRESETS[name]
    batches = list(features(STEPS * BATCH, unit).split(BATCH))
    module = module_of(name)
    reference = plainly_trained(name, copy.deepcopy(module.sae), batches)
    held_out = features(1000, unit)
    start = outcome(name, module.sae, held_out)[0]
    found, expected = outcome(name, trained(module, batches), held_out), outcome(name, reference, held_out)
    assert expected[0] > start + 0.1  # they have learnt
    assert found[0] == pytest.approx(expected[0], abs=0.005)
    assert found[1] == pytest.approx(expected[1], rel=0.03)


# --- the scale of each term on a known batch --------------------------------------------------------
def known(norm: str) -> tuple[SAE, Tensor]:
    """An SAE whose latents 0 … 5 are the first six axes, and samples of ten times the first of them."""
    sae = VARIANTS["relu"](D_IN, D_SAE, seed=0, input_norm=norm)
    with torch.no_grad():
        sae.W_dec.zero_()[:, D_IN - 1] = 1
        sae.W_enc.zero_()
        sae.W_enc[0, 0] = 0.5
        sae.W_dec[0] = torch.eye(D_IN)[0]
    return sae, torch.full((4, 1), 10.0) * torch.eye(D_IN)[0]


@pytest.mark.parametrize(("norm", "square"), [("unit", 1.0), ("rms", float(D_IN)), ("none", 100.0)])
def test_terms_have_the_scale_of_the_features_that_the_sae_sees(norm, square):
    sae, x = known(norm)
    output = sae.forward_pass(sae.inputs(x)[0])  # code half of the sample's length: a quarter of its square is left
    options = {"sparsity": {"per_dimension": False}, "reconstruction": {}}
    found = loss_terms(sae, output, {"reconstruction": 1, "sparsity": 1}, options)
    assert float(found["reconstruction"]) == pytest.approx(square / 4 / D_IN, rel=1e-5)
    assert float(found["sparsity"]) == pytest.approx(square**0.5 / 2, rel=1e-5)
    relative = loss_terms(sae, output, {"reconstruction": 1}, {"reconstruction": {"relative": True}})
    assert float(relative["reconstruction"]) == pytest.approx(1 / 4, rel=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_aux_may_be_relative_to_the_error_or_not(relative):
    sae, x = known("unit")
    sae.tokens_since_fired[1:] = 10**6
    term = loss_terms(sae, sae.forward_pass(sae.inputs(x)[0]), {"aux": 1}, {"aux": {"relative": relative}})["aux"]
    assert float(term) == pytest.approx(1.0 if relative else 1 / 4 / D_IN, rel=1e-5)  # dead latents rebuild nothing


@pytest.mark.parametrize("variant", ["matryoshka", "msae"])
def test_nested_may_be_relative_to_each_sample(variant):
    x = features(64, unit=False)
    sae = VARIANTS[variant](D_IN, D_SAE, k=K, seed=0)
    output = sae.forward_pass(x)
    levels = output.levels.detach()
    shares = (levels - x[:, None]).square().sum(2) / x.square().sum(1, keepdim=True)
    expected = float((shares.mean(0) * output.level_weights).sum())
    term = loss_terms(sae, output, {"nested": 1}, {"nested": {"relative": True}})["nested"]
    assert float(term) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", sorted(name for name, cls in VARIANTS.items() if not cls.fitted))
def test_the_encoder_may_start_shorter_than_the_decoder(variant):
    options = {"k": K} if "k" in VARIANTS[variant].__init__.__code__.co_varnames else {}
    sae = VARIANTS[variant](D_IN, D_SAE, seed=0, encoder_norm=0.1, **options)
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.full((D_SAE,), 0.1))
    torch.testing.assert_close(sae.W_enc, 0.1 * sae.W_dec)
    for wrong in ({"encoder_norm": 0.0}, {"encoder_norm": 0.1, "tied": True}):
        with pytest.raises(ValueError, match="encoder_norm="):
            VARIANTS[variant](D_IN, D_SAE, **options, **wrong)
