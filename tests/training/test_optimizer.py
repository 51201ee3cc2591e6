"""UnitRowAdam against PyTorch's Adam with the projection, the clipping and the norm written out."""

import copy

import pytest
import torch

from sae_lightning.kernels import native
from sae_lightning.saes import Gated, JumpReLU, ReLU
from sae_lightning.training.optimizer import UnitRowAdam, build_optimizer

D_IN, D_SAE = 19, 33
WAYS = {"native": (torch.float32, 1e-4), "portable": (torch.float64, 1e-9), "portable float32": (torch.float32, 1e-4)}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The float type and tolerance of one implementation."""
    if request.param == "native" and not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    if request.param == "portable float32":
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    return WAYS[request.param]


def build(dtype=torch.float32, cls=JumpReLU, **options):
    return cls(D_IN, D_SAE, seed=0, **options).to(dtype)


def give_gradients(sae, step: int, skip: tuple[str, ...] = ()) -> None:
    """Random gradients of very different sizes, the same for any type; a row of W_dec gets none."""
    generator = torch.Generator().manual_seed(step)
    for name, p in sae.named_parameters():
        size = 10.0 ** float(torch.randint(-2, 2, (), generator=generator))
        grad = size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if name == "W_dec":
            grad[3] = 0
        p.grad = None if name in skip else grad.to(p.dtype)


class ByHand:
    """Adam or AdamW on ``sae``, with what UnitRowAdam adds written out around it."""

    def __init__(self, sae, name: str, clip: float | None, **settings) -> None:
        self.sae, self.clip = sae, clip
        self.inner = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
            sae.parameters(), **{"weight_decay": 0.0} | settings
        )

    @torch.no_grad()
    def step(self) -> float:
        W = self.sae.W_dec
        for row in range(len(W)):
            W.grad[row] -= (W.grad[row] @ W[row]) * W[row]
        grads = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = float(torch.cat([g.flatten() for g in grads]).norm())
        if self.clip:
            for g in grads:
                g *= min(1.0, self.clip / (norm + 1e-6))
        self.inner.step()
        for row in range(len(W)):
            W[row] /= W[row].norm()
        return norm


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_equal_adam_with_projection_clipping_and_renormalisation(way, name, decay, clip, tied):
    dtype, tolerance = way
    settings = {"lr": 0.03, "weight_decay": decay, "betas": (0.8, 0.95), "eps": 1e-6}
    sae = build(dtype, tied=tied)
    truth = copy.deepcopy(sae).double()
    optimizer, by_hand = build_optimizer(sae, name, **settings), ByHand(truth, name, clip, **settings)
    optimizer.clip = clip
    for step in range(20):
        give_gradients(sae, step)
        give_gradients(truth, step)
        norm = by_hand.step()
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5)
    for (key, p), q in zip(sae.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=dtype))


def test_state_of_both_ways_is_the_same():
    if not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    one, other = build(), build(torch.float64)
    first, second = build_optimizer(one, lr=0.01), build_optimizer(other, lr=0.01)
    for step in range(5):
        for sae, optimizer in ((one, first), (other, second)):
            give_gradients(sae, step)
            optimizer.step()
    left, right = first.state_dict(), second.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, state in left["state"].items():
        assert state.keys() == right["state"][key].keys()
        for entry, value in state.items():
            torch.testing.assert_close(value.double(), right["state"][key][entry].double(), rtol=1e-4, atol=1e-6)


def test_a_dictionary_large_enough_for_several_threads_takes_the_same_step(monkeypatch):
    if not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    made = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "available", lambda *tensors: False)
        sae = ReLU(520, 4100, seed=0)
        optimizer = build_optimizer(sae, lr=0.01)
        optimizer.clip = 1.0
        for step in range(2):
            give_gradients(sae, step)
            optimizer.step()
        made.append((sae, optimizer.grad_norm))
    assert made[0][1] == pytest.approx(made[1][1], rel=1e-5)
    for p, q in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_loaded_state_continues_identically(way, name):
    dtype, _ = way
    sae = build(dtype)
    optimizer = build_optimizer(sae, name, lr=0.02, weight_decay=0.05)
    optimizer.clip = 1.0
    for step in range(7):
        give_gradients(sae, step)
        optimizer.step()
    again = build(dtype)
    again.load_state_dict(sae.state_dict())
    resumed = build_optimizer(again, name, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.clip = 1.0
    for step in range(7, 12):
        for one, stepper in ((sae, optimizer), (again, resumed)):
            give_gradients(one, step)
            stepper.step()
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), again.parameters(), strict=True))
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=dtype))


def test_parameters_without_a_gradient_stay(way):
    sae = build(way[0])
    before = copy.deepcopy(sae)
    optimizer = build_optimizer(sae, lr=0.1)
    optimizer.step()
    give_gradients(sae, 0, skip=("b_enc", "W_enc"))
    optimizer.step()
    assert torch.equal(sae.b_enc, before.b_enc)
    assert torch.equal(sae.W_enc, before.W_enc)
    assert not torch.equal(sae.b_pre, before.b_pre)
    assert sae.b_enc not in optimizer.state or not optimizer.state[sae.b_enc]


def test_a_gradient_along_its_row_changes_nothing_but_the_last_digits(way):
    sae = build(way[0], cls=ReLU)
    before = sae.W_dec.detach().clone()
    optimizer = build_optimizer(sae, lr=0.01, eps=1e-3)
    sae.W_dec.grad = 5 * before
    optimizer.step()
    torch.testing.assert_close(sae.W_dec.detach(), before, rtol=0, atol=1e-4)
    assert optimizer.grad_norm == pytest.approx(0, abs=0.02)


def test_step_takes_a_closure_and_returns_its_loss(way):
    sae = build(way[0], cls=Gated)
    optimizer = build_optimizer(sae, lr=0.01)

    def closure():
        give_gradients(sae, 0)
        assert torch.is_grad_enabled()
        return torch.tensor(4.5)

    before = sae.b_gate.detach().clone()
    assert optimizer.step(closure) == 4.5
    assert not torch.equal(sae.b_gate, before)


def test_a_learning_rate_scheduler_steers_all_groups(way):
    sae = build(way[0])
    optimizer = build_optimizer(sae, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for step in range(4):
        before = copy.deepcopy(sae)
        give_gradients(sae, step)
        optimizer.step()
        scheduler.step()
        moved = max(
            float((p - q).detach().abs().max()) for p, q in zip(sae.parameters(), before.parameters(), strict=True)
        )
        assert (moved > 1e-4) == (step < 2)


def test_only_the_decoder_has_unit_rows_and_every_parameter_is_in_one_group():
    for sae in (build(), build(tied=True), build(cls=Gated)):
        optimizer = build_optimizer(sae, betas=[0.7, 0.8])
        assert isinstance(optimizer, UnitRowAdam)
        unit = [p for group in optimizer.param_groups if group["unit"] for p in group["params"]]
        assert len(unit) == 1
        assert unit[0] is sae.W_dec
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in sae.parameters())
        assert {group["betas"] for group in optimizer.param_groups} == {(0.7, 0.8)}


def scaled_steps(scale: float | None, steps: int = 10, bad_at: int = -1) -> tuple[ReLU, list[float]]:
    """A fused optimiser, as on a GPU, after steps whose loss a ``GradScaler`` scales as Lightning's plugin does."""
    sae, norms = build(cls=ReLU), []
    optimizer = build_optimizer(sae, lr=0.01, fused=True)
    optimizer.clip = 0.05
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, D_IN, generator=generator)
        optimizer.zero_grad()
        scaler.scale((sae.forward_pass(x).reconstruction - x).square().mean()).backward()
        if step == bad_at:
            sae.W_enc.grad[2, 3] = torch.inf
        assert optimizer._step_supports_amp_scaling  # so that Lightning leaves the scale to it
        scaler.step(optimizer)
        scaler.update()
        norms.append(optimizer.grad_norm)
    return sae, norms


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("power", [16, 28])
def test_the_scale_of_the_loss_changes_neither_norm_nor_step(power, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    plain, norms = scaled_steps(None)
    scaled, others = scaled_steps(2.0**power)
    assert others == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.05  # which is clipped
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_with_infinite_gradients_is_left_out(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    before, _ = scaled_steps(2.0**16, 7)
    after, _ = scaled_steps(2.0**16, 8, bad_at=7)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_unknown_optimisers_are_refused():
    with pytest.raises(ValueError, match=r"Unknown optimizer\.name=sgd; choose one of adam, adamw"):
        build_optimizer(build(), "sgd")
