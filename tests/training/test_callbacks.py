"""Dead latents started anew: what changes, what stays, and when."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from sae_lightning.kernels import native
from sae_lightning.saes import Gated, JumpReLU, Normalizer, ReLU, TopK
from sae_lightning.training.callbacks import ENCODER_SHARE, Resample, resample
from sae_lightning.training.optimizer import build_optimizer

D_IN, D_SAE, DEAD = 10, 30, torch.tensor([2, 7, 11, 29])

KINDS = {
    "relu": lambda: ReLU(D_IN, D_SAE, seed=0),
    "topk": lambda: TopK(D_IN, D_SAE, 4, seed=0),
    "jumprelu": lambda: JumpReLU(D_IN, D_SAE, seed=0),
    "gated": lambda: Gated(D_IN, D_SAE, seed=0),
    "tied": lambda: TopK(D_IN, D_SAE, 4, seed=0, tied=True),
}


def features(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def trained(kind: str):
    """An SAE after two steps, with its optimiser, whose latents DEAD have not fired for 1000 tokens."""
    sae = KINDS[kind]().train()
    optimizer = build_optimizer(sae, lr=0.01)
    for seed in range(2):
        run = sae.forward_pass(features(seed=seed))
        ((run.reconstruction - run.x).square().mean() + sae.sparsity(run) * 1e-3).backward()
        optimizer.step()
        optimizer.zero_grad()
    sae.tokens_since_fired.fill_(3)
    sae.tokens_since_fired[DEAD] = 1000
    return sae, optimizer


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim > 0 and len(tensor) == D_SAE and name != "b_pre"


@pytest.mark.parametrize("kind", KINDS)
def test_dead_latents_take_unit_directions_of_real_errors(kind):
    sae, optimizer = trained(kind)
    x = features(seed=9)
    with torch.no_grad():
        codes = copy.deepcopy(sae).eval().code(x)
        error = x - codes.decode(sae.W_dec, sae.b_pre)
        living = torch.ones(D_SAE, dtype=torch.bool).index_fill(0, DEAD, False)
        norm = sae.W_enc[living].norm(dim=1).mean()
    assert resample(sae, x, 1000, optimizer, drawn()) == len(DEAD)
    directions = sae.W_dec.detach()[DEAD]
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(DEAD)))
    cosines = directions @ torch.nn.functional.normalize(error, dim=1).T
    torch.testing.assert_close(cosines.max(dim=1).values, torch.ones(len(DEAD)))
    assert len(set(cosines.argmax(dim=1).tolist())) == len(DEAD)  # each from an input of its own
    if sae.tied:
        assert sae.W_enc is sae.W_dec
    else:
        torch.testing.assert_close(sae.W_enc.detach()[DEAD], ENCODER_SHARE * norm * directions)
    assert sae.training


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_biases_states_and_counters_start_anew_at_those_rows_only(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    sae, optimizer = trained(kind)
    before, states = copy.deepcopy(sae), copy.deepcopy(optimizer.state_dict()["state"])
    resample(sae, features(seed=9), 1000, optimizer, drawn())
    living = torch.ones(D_SAE, dtype=torch.bool).index_fill(0, DEAD, False)
    old = dict(before.named_parameters())
    for name, p in sae.named_parameters():
        if rows_of(name, p):
            assert torch.equal(p[living], old[name][living])
            if name in ("b_enc", "b_gate", "r_mag"):
                assert (p[DEAD] == 0).all()
        else:
            assert torch.equal(p, old[name])
    names = {id(p): name for name, p in sae.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    for place, state in optimizer.state_dict()["state"].items():
        name, reset = order[place], ("W_dec", "W_enc", "b_enc", "b_gate", "r_mag")
        assert state["step"] == 2
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = states[place][moment]
            if name in reset:
                expected = expected.clone().index_fill(0, DEAD, 0)
            assert torch.equal(state[moment], expected)
    assert (sae.tokens_since_fired[DEAD] == 0).all()
    assert (sae.tokens_since_fired[living] == 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_resample(kind):
    sae, optimizer = trained(kind)
    resample(sae, features(seed=9), 1000, optimizer, drawn())
    run = sae.forward_pass(features(seed=9))
    (run.reconstruction - run.x).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in sae.parameters())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_the_generator_decides_the_draw():
    made = []
    for seed in (5, 5, 6):
        sae, optimizer = trained("topk")
        resample(sae, features(seed=9), 1000, optimizer, drawn(seed))
        made.append(sae.W_dec.detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_inputs_are_drawn_by_their_squared_error_squared():
    x = torch.eye(D_IN)[:2] * torch.tensor([[1.0], [2.0]])  # errors of 1 and 2: chances of 1 to 16
    counts = torch.zeros(2)
    for seed in range(400):
        sae = ReLU(D_IN, D_SAE, seed=0).eval()
        sae.b_enc.data -= 100
        sae.tokens_since_fired[4] = 1000
        resample(sae, x, 1000, None, drawn(seed))
        counts[int(sae.W_dec[4].argmax())] += 1
    assert counts[0] / 400 == pytest.approx(1 / 17, abs=0.04)


def test_nothing_happens_while_all_live_and_more_dead_latents_than_inputs_share_them():
    sae, optimizer = trained("topk")
    before = copy.deepcopy(sae.state_dict())
    assert resample(sae, features(), 1001, optimizer, drawn()) == 0
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    sae.tokens_since_fired.fill_(5000)
    assert resample(sae, features(3), 1001, optimizer, drawn()) == D_SAE
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_enc.detach(), ENCODER_SHARE * sae.W_dec.detach())


# --- the callback -----------------------------------------------------------------------------------
def step_through(callback: Resample, steps: list[int], sae, optimizer, batch) -> list[int]:
    """Steps at which the callback resampled, of a training of 10; every latent of DEAD dies anew each time."""
    seen, logged = [], []
    module = SimpleNamespace(sae=sae, log=lambda name, value, **_: logged.append((name, value)))
    for step in steps:
        sae.tokens_since_fired[DEAD] = 1000
        trainer = SimpleNamespace(
            global_step=step,
            estimated_stepping_batches=10,
            optimizers=[optimizer],
            is_global_zero=True,
            logger=object(),
        )
        before = callback.resampled
        callback.on_train_batch_end(trainer, module, None, batch, step - 1)
        if callback.resampled > before:
            seen.append(step)
    assert logged == [("train/resampled", float(len(DEAD)))] * len(seen)
    return seen


def test_the_callback_resamples_every_so_many_steps_up_to_its_share():
    sae, optimizer = trained("topk")
    callback = Resample(every=2, dead_after=1000, until=0.6)
    assert step_through(callback, list(range(1, 11)), sae, optimizer, features()) == [2, 4, 6]
    assert callback.resampled == 3 * len(DEAD)
    again = Resample(every=2, dead_after=1000)
    again.load_state_dict(callback.state_dict())
    assert again.resampled == callback.resampled


@pytest.mark.parametrize("kind", ["none", "layer", "rms", "unit"])
def test_the_callback_takes_raw_features_as_training_does(kind):
    raw = features() * 4 + 3
    sae = TopK(D_IN, D_SAE, 4, seed=0, input_norm=kind, normalizer=Normalizer(D_IN, raw.mean(0), raw.std())).train()
    other = copy.deepcopy(sae)
    other.tokens_since_fired[DEAD] = 1000
    step_through(Resample(every=3, dead_after=1000), [3], sae, None, raw)
    resample(other, sae.inputs(raw)[0], 1000, None, drawn(3))
    assert torch.equal(sae.W_dec, other.W_dec)


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 5, "until": 0.0}, {"every": 5, "until": 1.5}])
def test_impossible_settings_fail_with_a_sentence(settings):
    with pytest.raises(ValueError, match="must be at least 1 and"):
        Resample(dead_after=10, **settings)
