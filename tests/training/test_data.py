"""The datamodule under a real Trainer: every token trained on once, resumed at any step, by any number of ranks."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from sae_lightning.training.data import FeatureDataModule, InOrder
from sae_lightning.training.module import SAEModule

ORDER = {"buffer_mb": 0.02, "block_mb": 0.001, "readers": 2}


class Recorder(L.LightningModule):
    """Keeps the sum of every batch; its one weight follows the batches, so that their order matters."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.sums: list[float] = []
        self.stop_after = stop_after

    def training_step(self, batch, index):
        if len(self.sums) == self.stop_after:
            raise KeyboardInterrupt
        self.sums.append(float(batch.double().sum()))
        return (self.weight - batch.float().mean()) ** 2

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def data(stores, **options):
    return FeatureDataModule(stores["train"], stores["val"], batch_size=128, seed=3, **(ORDER | options))


def trainer(folder, epochs=3, **options):
    every = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    ends = L.pytorch.callbacks.ModelCheckpoint(
        folder, save_on_train_epoch_end=True, save_top_k=-1, filename="end-{epoch}"
    )
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[every, ends], enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(stores, tmp_path_factory):
    """A run of 3 epochs of 50 steps, with checkpoints every 7 steps."""
    folder = tmp_path_factory.mktemp("whole")
    module = Recorder()
    trainer(folder).fit(module, data(stores))
    assert len(module.sums) == 150
    return folder, module


@pytest.mark.parametrize("name", ["step=7", "step=49", "step=56", "end-epoch=0", "end-epoch=1", "step=147"])
def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_with_the_next_batch(name, whole, stores, tmp_path):
    folder, module = whole
    again = Recorder()
    path = folder / f"{name}.ckpt"
    step = torch.load(path, weights_only=True)["global_step"]
    trainer(tmp_path).fit(again, data(stores), ckpt_path=path, weights_only=True)
    assert again.sums == module.sums[step:]
    assert torch.equal(again.weight, module.weight)


def test_an_exception_in_the_middle_of_a_step_repeats_that_step_alone(whole, stores, tmp_path):
    _, module = whole
    broken = Recorder(stop_after=61)
    first = trainer(tmp_path)
    with pytest.raises(SystemExit):
        first.fit(broken, data(stores))
    first.save_checkpoint(tmp_path / "now.ckpt")
    again = Recorder()
    trainer(tmp_path).fit(again, data(stores), ckpt_path=tmp_path / "now.ckpt", weights_only=True)
    assert broken.sums + again.sums == module.sums


def test_limited_epochs_resume_with_the_next_one(stores, tmp_path):
    module, again = Recorder(), Recorder()
    trainer(tmp_path, limit_train_batches=5).fit(module, data(stores))
    assert len(module.sums) == 15
    path = tmp_path / "end-epoch=1.ckpt"
    trainer(tmp_path, limit_train_batches=5).fit(again, data(stores), ckpt_path=path, weights_only=True)
    assert again.sums == module.sums[10:]


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"seed": 4}, "seed 3 there, 4 now"), ({"lanes": 4}, "lanes 8 there, 4 now"), ({"buffer_mb": 0.05}, "window")],
)
def test_a_checkpoint_of_another_order_is_refused(changes, what, whole, stores, tmp_path):
    options = {"seed": 3} | ORDER | changes
    other = FeatureDataModule(stores["train"], stores["val"], batch_size=128, **options)
    with pytest.raises(ValueError, match=f"another order of the features.*{what}"):
        trainer(tmp_path).fit(Recorder(), other, ckpt_path=whole[0] / "step=7.ckpt", weights_only=True)


def test_a_checkpoint_of_another_store_is_refused(whole, stores, tmp_path):
    other = FeatureDataModule(stores["train"].subset(images=390), stores["val"], batch_size=128, seed=3, **ORDER)
    with pytest.raises(ValueError, match=r"another order of the features.*store"):
        trainer(tmp_path).fit(Recorder(), other, ckpt_path=whole[0] / "step=7.ckpt", weights_only=True)


def test_the_number_of_readers_and_ranks_is_no_part_of_the_state(whole, stores, tmp_path, monkeypatch):
    """Two ranks go on where one stopped: together they read the batches that it would have read."""
    folder, module = whole
    parts = []
    for rank in range(2):
        monkeypatch.setattr("sae_lightning.training.data.world_size", lambda: 2)
        monkeypatch.setattr("sae_lightning.training.data.rank", lambda rank=rank: rank)
        again = Recorder()
        other = data(stores, readers=1)
        trainer(tmp_path, epochs=1).fit(again, other, ckpt_path=folder / "step=14.ckpt", weights_only=True)
        parts.append(again.sums)
    together = [a + b for a, b in zip(*parts, strict=True)]
    assert together == pytest.approx(module.sums[14:50], rel=1e-12)


def test_batches_of_images_train_as_batches_of_their_tokens(stores, tmp_path):
    from sae_lightning.saes import TopK

    store = stores["train"]
    images = FeatureDataModule(store, stores["val"], batch_size=16, unit="images", **ORDER)
    module = SAEModule(TopK(store.d_in, 24, 3, seed=0), {"reconstruction": 1.0})
    trainer(tmp_path, epochs=1).fit(module, images)
    assert next(iter(images.train_dataloader())).shape == (16, store.n_patches, store.d_in)
    assert torch.isfinite(module.sae.W_dec).all()


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_validation_sees_every_token_once(world, stores):
    store = stores["val"]
    parts = [batch for rank in range(world) for batch in InOrder(store, 40, rank, world)]
    got = torch.cat(parts) if parts else torch.empty(0)
    whole = store.features(slice(None)).reshape(-1, store.d_in)
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, whole.tolist()))
    if world == 1:
        assert torch.equal(got, whole)
