"""A whole fine-tuning through its public function: artefact, scores, skipping, resuming, refusing."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.features.source import plain
from sae_lightning.finetuning.classifier import build, load
from sae_lightning.finetuning.data import AugmentedPictures, EpochBatches
from sae_lightning.finetuning.fit import finetune, load_split, predict, run_name
from sae_lightning.finetuning.module import schedule_of
from tests.backbones.models import CLIP

DEIT = ("model.library=tiny", "model.model=deit", "model.image_size=null", "model.pretrained=true")


@pytest.mark.slow
def test_a_run_ends_as_an_artefact_with_scores_and_history(settings, capsys):
    cfg = settings("mono_weight=0.1", "data.limit=32")
    folder = finetune(cfg)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert (result["epochs"], result["steps"], result["devices"]) == (3, 12, 1)
    assert result["seconds_an_epoch"] > 0
    classifier, preprocess, made = load(folder)
    assert (made["mono_weight"], made["layer"], made["similarity"]) == (0.1, "added", "clip (tiny)")
    images = load_split(cfg, "test")
    found = predict(classifier, images, preprocess.evaluation(cfg.augment))
    accuracy = (found.logits.argmax(1) == torch.from_numpy(images.labels)).float().mean()
    assert result["test"]["accuracy"] == pytest.approx(float(accuracy))
    assert (result["test"]["units"], result["test"]["images"]) == (classifier.n_units, 8)
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [r for r in rows if r["train/loss"]]
    for row in trained:
        total = float(row["loss/cross_entropy"]) + 0.1 * float(row["loss/mono"])
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)
    assert [r["step"] for r in rows if r["val/accuracy"]] == ["4", "8", "12"]
    assert not (folder / "checkpoints").exists()
    capsys.readouterr()
    assert finetune(cfg) == folder
    assert "finished before, skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_names_follow_what_determines_the_result(settings):
    base = run_name(settings())
    for same in (
        "trainer.devices=2",
        "logger=csv",
        "paths.stores=elsewhere",
        "validate=null",
        "data.k=3",
        "data.name=x",
    ):
        assert run_name(settings(same)) == base, same
    for other in (
        "mono_weight=0.05", "seed=1", "layer=embedding", "optimizer.momentum=0", "augment=none", "epochs=4",
        "similarity.name=siglip", "model.lora.r=4", "trainer.precision=bf16-mixed", "model.model=deit",
    ):  # fmt: skip
        assert run_name(settings(other)) != base, other
    assert base.startswith("vit-mono0.1-s42-")


def test_a_try_leaves_nothing_and_a_part_says_so(settings):
    cfg = settings("++trainer.fast_dev_run=true", "data.limit=16")
    assert not finetune(cfg).exists()
    folder = finetune(settings("++trainer.limit_train_batches=1", "epochs=1", "data.limit=16"))
    assert json.loads((folder / "result.json").read_text())["in_part"] == {"limit_train_batches": 1}


def test_weight_zero_is_plain_cross_entropy(settings):
    cfg = settings("mono_weight=0", "validate=null", "epochs=2")
    folder = finetune(cfg)
    images = load_split(cfg, "train")
    classifier, preprocess = build(plain(cfg.model), 2, seed=42)
    pictures = AugmentedPictures(images, preprocess.training("crop"), 42)
    plan = schedule_of(dict(cfg.schedule), 2)
    optimizer = torch.optim.SGD(classifier.parameters(), **cfg.optimizer)
    batches = EpochBatches(len(images), 8, 42)
    for step, batch in enumerate([batch for _ in range(2) for batch in batches]):
        pixels, labels, _ = (
            torch.utils.data.default_collate(x) for x in zip(*[pictures[i] for i in batch], strict=True)
        )
        for group in optimizer.param_groups:
            group["lr"] = cfg.optimizer.lr * plan.lr_factor(step, 2 * len(batches))
        optimizer.zero_grad()
        F.cross_entropy(classifier(pixels).logits, labels).backward()
        optimizer.step()
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, classifier.state_dict()[name], msg=name)


@pytest.mark.slow
def test_training_learns_to_tell_rows_from_columns(settings):
    folder = finetune(settings(*DEIT, "epochs=14", "validate=null"))
    with (folder / "history.csv").open() as file:
        losses = [float(r["loss/cross_entropy"]) for r in csv.DictReader(file)]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads((folder / "result.json").read_text())["test"]["accuracy"] >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    "crash", ["tests.training.crash.Crash, epoch: 2", "tests.finetuning.crash.CrashAfter, steps: 6"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(crash, workers, settings, tmp_path, capsys):
    choice = ["checkpoint.every_steps=3", f"num_workers={workers}"]
    whole = finetune(settings(*choice, f"paths.runs={tmp_path / 'whole'}"))
    with pytest.raises(RuntimeError, match="power went out"):
        finetune(settings(*choice, f"+callbacks.crash={{_target_: {crash}}}"))
    folder = finetune(settings(*choice))
    assert "resuming from its last checkpoint" in capsys.readouterr().out
    resumed = load_file(folder / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(resumed[name], tensor), name
    one, two = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
    assert one["test"] == two["test"]
    assert one["steps"] == two["steps"]


def test_a_run_killed_while_it_is_scored_is_not_trained_again(settings, monkeypatch):
    cfg = settings("epochs=1", "validate=null")
    with monkeypatch.context() as patch:
        patch.setattr("sae_lightning.finetuning.fit.scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(cfg)
    monkeypatch.setattr("sae_lightning.finetuning.fit.fit", lambda *_: pytest.fail("trained again"))
    assert json.loads((finetune(cfg) / "result.json").read_text())["status"] == "finished"


def test_checkpoints_of_the_user_s_own_are_kept_and_a_single_process_logs(settings, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning has it after an import with RANK=1
    own = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/accuracy, filename: best}"
    folder = finetune(settings("epochs=1", "data.limit=16", "logger=csv", f"+callbacks.best={own}"))
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.ckpt")] == ["checkpoints/best/best.ckpt"]
    assert (folder / "csv" / "metrics.csv").is_file()


@pytest.mark.slow
def test_the_same_code_fine_tunes_clip_with_adapters(settings):
    choice = ["model.name=clip", "model.library=transformers", "model.model=org/clip", "model.image_size=null"]
    cfg = settings("finetune_model=clip_vit_b32", *choice, "epochs=1", "validate=null")
    cfg.model.architecture = CLIP
    folder = finetune(cfg)
    made = load(folder)
    start, _ = build(plain(cfg.model), 2, seed=42)
    changed = {n for n, t in made.classifier.state_dict().items() if not torch.equal(t, start.state_dict()[n])}
    assert all("lora" in name or name.startswith(("added", "head")) for name in changed)
    assert any("lora_B" in name for name in changed)
    assert json.loads((folder / "result.json").read_text())["trained_parameters"] == sum(
        p.numel() for p in start.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["layer=encoder.block"], r"There is no layer=encoder\.block; choose one of"),
        (["model.pretrained=true", "model.weights=/no/such/file"], r"model\.weights=/no/such/file does not exist"),
        (["mono_weight=-1"], "mono_weight=-1"),
        (["batch_size=64"], "exceeds the 32 images"),
        (["batch_size=7", "trainer.devices=2"], "multiple of the 2 devices"),
        (["epochs=0"], "epochs=0"),
        (["augment=blur"], "Unknown augment=blur"),
        (["schedule.shape=square"], "schedule.shape=square"),
        (["data=store", "data.train=x"], "fine-tuning needs pictures"),
        (["data.path=/no/such/folder"], "There is no folder"),
        (["+logger.paper={}"], "logger.paper"),
        (["similarity_store.train=/no/such/store"], "/no/such/store"),
        (["features=patch"], "Unknown features=patch"),
        (["trainer.accelerator=gpu", "trainer.devices=4"], "GPUs are visible"),
    ],
)
def test_impossible_settings_fail_with_a_sentence(overrides, sentence, settings):
    if overrides[0] == "data=store":
        cfg = settings()
        cfg.data.source = "store"
    else:
        cfg = settings(*overrides)
    with pytest.raises(ValueError, match=sentence):
        finetune(cfg)


def test_a_tiny_encoder_is_what_training_starts_from(settings):
    cfg = settings(*DEIT)
    classifier, _ = build(plain(cfg.model), 2)
    encoder = load_backbone({"name": "deit", "size": "tiny", "layer": None, "tiny": {"pretrained": True}}).model
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(classifier.encoder.state_dict()[name], tensor)
