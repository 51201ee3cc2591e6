"""The MonoLoss callback: any variant, any other terms, tokens or images, resumed or on two ranks."""

import csv
import json

import pytest
import torch

from sae_lightning.features.loader import FeatureLoader
from sae_lightning.features.source import Source
from sae_lightning.metrics.monoscore import monoscore
from sae_lightning.runs.identity import run_name
from sae_lightning.saes import SAE, VARIANTS, BatchTopK
from sae_lightning.saes.monoloss import dense_mono_loss
from sae_lightning.training.fit import build_callbacks, train
from sae_lightning.training.module import SAEModule
from sae_lightning.training.monoloss import MonoLoss
from tests.configs import CONF

ON = ("callbacks=monoloss", "callbacks.monoloss.weight=1")
IMAGES = ("stream.unit=images", "batch_size=8")
FITTED = sorted(name for name, kind in VARIANTS.items() if kind.fitted)
TRAINED = sorted({path.stem for path in (CONF / "sae").glob("*.yaml")} - set(FITTED))


def history(folder) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("variant", TRAINED)
def test_it_trains_every_variant(variant, config):
    """With other terms beside it: the loss is logged and held-out latents fire on more alike tokens."""
    choice = [f"sae={variant}", "++loss.cosine=0.1"]
    runs = {on: train(config(*choice, *(ON if on else ()), "trainer.max_epochs=6")) for on in (False, True)}
    logged = [float(row["loss/mono"]) for row in history(runs[True]) if row["loss/mono"]]
    assert logged[-1] < logged[0] <= 1
    assert "loss/mono" not in history(runs[False])[0]
    store = Source.of(config()).store("test")
    features = store.features(slice(None)).reshape(-1, store.d_in)
    scores = {on: float(monoscore(SAE.load(run).encode(features), features).mean()) for on, run in runs.items()}
    assert scores[True] > scores[False]


@pytest.mark.parametrize("variant", FITTED)
def test_what_is_not_trained_refuses_it(variant, config):
    with pytest.raises(
        ValueError, match=rf"monoloss.weight=1 has nothing to act on, for sae.name={variant} is not tra"
    ):
        train(config(f"sae={variant}", *ON))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_batches_of_images_compare_images(pool, config):
    folder = train(config(*ON, *IMAGES, f"callbacks.monoloss.pool={pool}", "callbacks.monoloss.center=true"))
    assert all(float(row["loss/mono"]) < 1.2 for row in history(folder) if row["loss/mono"])


def module_and_batch(**options) -> tuple[SAEModule, MonoLoss, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    module = SAEModule(BatchTopK(12, 48, 4, seed=0).train(), {"reconstruction": 1.0})
    callback = MonoLoss(0.5, **options)
    callback.setup(None, module, "fit")  # type: ignore[arg-type]
    return module, callback, torch.randn(10, 16, 12, generator=g) + 0.5


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_the_term_is_the_loss_on_dense_activations_and_raw_features(images, center):
    module, callback, batch = module_and_batch(center=center)
    module.sae.normalizer.mean.copy_(batch.mean((0, 1)))
    features = batch.flatten(0, 1)
    run = module.sae.forward_pass(module.sae.normalizer.normalize(features))
    found = callback.term(run, batch if images else features)
    dense, like = run.codes.to_dense(), features - (batch.mean((0, 1)) if center else 0)
    if images:
        dense, like = dense.unflatten(0, (10, 16)).amax(1), like.unflatten(0, (10, 16)).mean(1)
    torch.testing.assert_close(found, dense_mono_loss(dense, like), rtol=1e-5, atol=1e-6)


def test_the_weight_warms_up_and_skipped_steps_weigh_on_the_others():
    _, callback, _ = module_and_batch(warmup=0.5)
    assert [round(callback.weight_at(step, 8), 3) for step in range(8)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    _, callback, _ = module_and_batch(every=4)
    assert [callback.weight_at(step, 8) for step in range(8)] == [2.0, 0, 0, 0, 2.0, 0, 0, 0]


@pytest.mark.slow
def test_what_it_is_set_to_makes_another_run_and_weight_zero_is_none(config, tmp_path):
    names = {run_name(config(*ON, f"callbacks.monoloss.weight={weight}")) for weight in (0, 0.1, 0.2)}
    assert len(names) == 3
    assert run_name(config(*ON)) == run_name(config("callbacks=monoloss", "callbacks.monoloss.weight=1.0"))
    assert sum("-monoloss-" in name for name in names) == 2
    assert run_name(config()) in names
    off = config("callbacks=monoloss", "callbacks.monoloss.weight=0")
    assert build_callbacks(off, tmp_path) == []
    assert isinstance(build_callbacks(config(*ON), tmp_path)[0], MonoLoss)
    assert run_name(config("+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 2}")) in names


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": -1}, "weight=-1 must be at least 0"), ({"weight": 1, "warmup": 2}, "warmup=2 a share"),
        ({"weight": 1, "every": 0}, "every=0 at least 1"),
        ({"weight": 1, "memory": 1}, "memory=1 at least 0 and below 1"),
        ({"weight": 1, "pool": "sum"}, "choose one of max, mean"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        MonoLoss(**settings)


def test_a_term_of_a_known_name_is_refused():
    module, callback, _ = module_and_batch()
    with pytest.raises(ValueError, match="a loss term 'mono' already"):
        callback.setup(None, module, "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", [(), IMAGES], ids=["tokens", "images"])
def test_the_batch_reaches_it_as_it_was_read(unit, config, monkeypatch):
    """Raw features in the store's own type: what the loader gives, before normalising."""
    seen: list[torch.Tensor] = []
    term = MonoLoss.term
    monkeypatch.setattr(MonoLoss, "term", lambda self, run, batch: seen.append(batch.clone()) or term(self, run, batch))
    cfg = config(*ON, *unit, "trainer.max_epochs=1")
    train(cfg)
    stream = {key: cfg.stream[key] for key in ("unit", "buffer_mb", "block_mb", "lanes")}
    expected = list(FeatureLoader(Source.of(cfg).store("train"), cfg.batch_size, seed=cfg.seed, **stream))
    assert seen[0].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("unit", [(), IMAGES], ids=["tokens", "images"])
def test_two_ranks_equal_one(unit, config, tmp_path, monkeypatch):
    monkeypatch.chdir(CONF.parent)
    choice = [*ON, *unit, "trainer.precision=64-true", "trainer.max_epochs=2", "callbacks.monoloss.memory=0.9"]
    folders = {n: train(config(*choice, f"trainer.devices={n}", f"paths.runs={tmp_path / str(n)}")) for n in (1, 2)}
    one, two = (SAE.load(folders[n]).state_dict() for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert json.loads((folders[2] / "result.json").read_text())["devices"] == 2
    first = [[float(row["loss/mono"]) for row in history(folders[n]) if row["loss/mono"]] for n in (1, 2)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.slow
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(config, tmp_path):
    choice = [*ON, "callbacks.monoloss.warmup=0.5", "callbacks.monoloss.every=2", "callbacks.monoloss.memory=0.9"]
    whole = SAE.load(train(config(*choice, f"paths.runs={tmp_path / 'whole'}"))).state_dict()
    with pytest.raises(RuntimeError, match="the power went out"):
        train(config(*choice, "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 2}"))
    resumed = SAE.load(train(config(*choice))).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
