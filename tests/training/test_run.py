"""A whole training through its public function: artefact, scores, skipping, resuming, refusing."""

import csv
import json
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

from sae_lightning.features.source import Source
from sae_lightning.metrics import L0, Reconstruction
from sae_lightning.saes import SAE, VARIANTS
from sae_lightning.training.fit import train
from tests.configs import CONF

CHOICES = sorted(path.stem for path in (CONF / "sae").glob("*.yaml"))
TRAINED = [name for name in CHOICES if name not in VARIANTS or not VARIANTS[name].fitted]


@pytest.mark.slow
@pytest.mark.parametrize("variant", CHOICES)
def test_the_artefact_gives_the_logged_scores_from_raw_features(variant, config, alone):
    cfg, folder = config(f"sae={variant}"), alone(f"sae={variant}")
    result = json.loads((folder / "result.json").read_text())
    sae, store = SAE.load(folder), Source.of(cfg).store("val")
    features = store.features(slice(None)).reshape(-1, store.d_in)
    codes = sae.encode(features)
    fvu, l0 = Reconstruction(store.d_in), L0()
    fvu.update(features.float(), sae.decode(codes))
    l0.update(codes)
    assert result["val"]["explained_variance"] == pytest.approx(float(fvu.compute()["explained_variance"]), abs=1e-4)
    assert result["val"]["l0"] == pytest.approx(float(l0.compute()["l0"]), abs=1e-3)
    if variant in ("topk", "batchtopk", "matryoshka"):
        assert result["val"]["l0"] == pytest.approx(8, abs=0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))
    made = json.loads((folder / "cfg.json").read_text())
    assert made["backbone"] == "deit (tiny)"
    assert made["store"]["val"] == store.fingerprint
    assert made["config"]["batch_size"] == 256


def test_training_lowers_the_loss_and_writes_its_history(config):
    folder = train(config("trainer.max_epochs=20"))
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(r["loss/reconstruction"]) for r in rows if r["loss/reconstruction"]]
    assert losses[-1] < 0.7 * losses[0]
    validated = [r for r in rows if r["val/explained_variance"]]
    assert len(validated) == 20
    assert int(rows[-1]["step"]) == json.loads((folder / "result.json").read_text())["steps"]


def test_a_finished_run_is_skipped_and_another_setting_is_another_run(config, capsys):
    folder = train(config())
    before = (folder / "sae.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert train(config()) == folder
    assert "finished before, skipped" in capsys.readouterr().out
    assert (folder / "sae.safetensors").stat().st_mtime_ns == before
    assert train(config("seed=43")) != folder
    assert train(config("trainer.devices=1", "logger=csv")) == folder  # neither changes the result


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*TRAINED, "annealed"])
def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(variant, config, alone, capsys):
    special = [
        "sae=topk", "schedule.k_from=20", "schedule.k_share=0.6", "schedule.warmup=0.2", "schedule.shape=cosine",
        "resample.every=3", "dead_after=300",
    ]  # fmt: skip
    choice = special if variant == "annealed" else [f"sae={variant}"]
    whole = SAE.load(alone(*choice))
    with pytest.raises(RuntimeError, match="power went out"):
        train(config(*choice, "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 2}"))
    folder = train(config(*choice))
    assert "resuming from its last checkpoint" in capsys.readouterr().out
    resumed = SAE.load(folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    with (folder / "history.csv").open() as file:
        steps = [int(r["step"]) for r in csv.DictReader(file)]
    assert steps == sorted(steps)
    assert len([s for s in steps if s == steps[-1]]) <= 2
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sae.name=unheard"], "choose one of"),  # tests/settings/ has what the config alone tells
        (["k=-3", "expansion=0"], "2 settings cannot be"),
        (["+callbacks.mine._target_=tests.no_such.Callback"], "no_such"),
        (["trainer.accelerator=gpu", "trainer.devices=4"], "GPUs are visible"),
        (["data.path=/no/such/folder"], "There is no folder"),
        (["backbone.layer=9"], "layers are 0 to 5"),
    ],
)
def test_impossible_settings_fail_with_a_sentence(overrides, sentence, config):
    cfg = config(*overrides)
    with pytest.raises((ValueError, InstantiationException), match=sentence):
        train(cfg)
    runs = Path(cfg.paths.runs)
    assert not runs.exists() or list(runs.iterdir()) == []


def test_a_step_of_several_batches_is_one_row(config):
    accumulate = "trainer.accumulate_grad_batches=3"
    folder = train(config(accumulate, "trainer.log_every_n_steps=1", "trainer.max_epochs=2", "resample.every=2"))
    with (folder / "history.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(1, 1 + json.loads((folder / "result.json").read_text())["steps"]))


def test_dead_latents_restart_once_a_step(monkeypatch):
    from types import SimpleNamespace

    from sae_lightning.training import callbacks

    calls = []
    monkeypatch.setattr(callbacks, "resample", lambda *_: calls.append(trainer.global_step) or 0)
    sae = SimpleNamespace(inputs=lambda x: (x, None))
    trainer = SimpleNamespace(
        global_step=0, estimated_stepping_batches=9, optimizers=[None], is_global_zero=True, logger=None
    )
    callback = callbacks.Resample(2, 100, until=1)
    callback.on_train_start(trainer, None)
    for step in (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4):  # after each of the batches, three a step
        trainer.global_step = step
        callback.on_train_batch_end(trainer, SimpleNamespace(sae=sae), None, torch.zeros(2, 3), 0)
    assert calls == [2, 4]


def test_checkpoints_of_the_user_s_own_are_kept(config):
    own = "_target_: lightning.pytorch.callbacks.ModelCheckpoint"
    folder = train(config(
        f"+callbacks.best={{{own}, monitor: val/explained_variance, mode: max, filename: best, save_last: true}}",
        f"+callbacks.all={{{own}, filename: last, save_top_k: -1, enable_version_counter: false}}",
    ))  # fmt: skip  # the second has all settings and the file name of the package's own
    kept = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))
    assert kept == ["checkpoints/all/last.ckpt", "checkpoints/best/best.ckpt", "checkpoints/best/last.ckpt"]


def test_a_single_process_logs_whatever_rank_its_environment_names(config, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning has it after an import with RANK=1
    for name in ("RANK", "LOCAL_RANK", "JSM_NAMESPACE_RANK", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    folder = train(config("logger=csv", "trainer.max_epochs=1"))
    assert (folder / "csv" / "metrics.csv").is_file()
    assert json.loads((folder / "result.json").read_text())["devices"] == 1
