"""The LightningDataModule: shuffled features for training, ordered ones for validation, resumable at any step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L
from torch import Tensor

from sae_lightning.distributed.ranks import rank, world_size
from sae_lightning.features.loader import FeatureLoader
from sae_lightning.features.shared import SharedLoader, StreamMember
from sae_lightning.features.store import FeatureStore


class FeatureDataModule(L.LightningDataModule):
    """Raw features of ``train``, shuffled by a ``FeatureLoader`` with ``options``, and of ``val``, in order.

    ``batch_size`` counts rows (tokens, or images with ``unit="images"``) a step over all ranks. Its state, which a
    checkpoint holds, is the epoch and step of the next batch: training goes on there, also with another number of
    ranks; ValueError when the checkpoint was made from another store or with other settings of the order. In
    validation every token is seen once by one rank; ranks may take different numbers of steps, which sums over
    ranks do not mind. With a ``member`` the batches come from a stream that other trainings share.
    """

    def __init__(
        self, train: FeatureStore, val: FeatureStore, batch_size: int, seed: int = 42,
        member: StreamMember | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.train, self.val, self.batch_size, self.member = train, val, batch_size, member
        self.options = {"seed": seed} | options
        self._loader: FeatureLoader | SharedLoader | None = None
        self._start: tuple[int, int] | None = None

    @property
    def wait_seconds(self) -> float:
        """Time that training has waited for batches."""
        return self._loader.wait_seconds if self._loader is not None else 0.0

    def clock(self) -> float:
        """Seconds, of which those while other trainings have their turn do not count."""
        return time.monotonic() if self.member is None else self.member.clock()

    def train_dataloader(self) -> FeatureLoader | SharedLoader:
        device = None if self.trainer is None else self.trainer.strategy.root_device
        options: dict[str, Any] = {"rank": rank(), "world": world_size(), "device": device, **self.options}
        loader = FeatureLoader(self.train, self.batch_size, **options)
        if self.member is None:
            self._loader = loader
        else:
            assert device is not None
            self._loader = SharedLoader(loader, self.member, device)
        if self._start is not None:
            self._loader.seek(*self._start)
        return self._loader

    def val_dataloader(self) -> InOrder:
        world = world_size()
        rows = self.batch_size * (self.train.n_patches if self.options.get("unit") == "images" else 1)
        return InOrder(self.val, max(1, rows // world), rank(), world)

    # --- where training stands ------------------------------------------------------------------------
    def _signature(self) -> dict[str, Any]:
        order = FeatureLoader(self.train, self.batch_size, pinned=False, **self.options).order
        return {"store": self.train.fingerprint, "rows": order.n_rows, "batch_size": order.batch_size,
                "block": order.block, "window": order.window, "lanes": order.lanes, "seed": order.seed}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step after the last batch that was trained on, and what the order depends on."""
        if self.trainer is None:
            return {}
        epoch, step = next_batch(self.trainer)
        return {"epoch": epoch, "step": step, "order": self._signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        if not state:
            return
        ours = self._signature()
        changed = {k: (v, ours.get(k)) for k, v in state["order"].items() if ours.get(k) != v}
        if changed:
            what = ", ".join(f"{name} {was} there, {now} now" for name, (was, now) in changed.items())
            raise ValueError(
                f"The checkpoint was made with another order of the features ({what}); go on with the same settings, "
                "or delete the run's checkpoints to begin anew."
            )
        self._start = (state["epoch"], state["step"])
        if self._loader is not None:
            self._loader.seek(*self._start)


def next_batch(trainer: L.Trainer) -> tuple[int, int]:
    """Epoch and step of the batch after the last one that ``trainer`` has trained on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    epoch, done = trainer.current_epoch, progress.processed
    return (epoch + 1, 0) if done >= trainer.num_training_batches else (epoch, done)


class InOrder:
    """About ``tokens`` raw features [n, d_in] a batch in the store's order, whole images, dealt to the ranks."""

    def __init__(self, store: FeatureStore, tokens: int, rank: int = 0, world: int = 1) -> None:
        self.store, self.images = store, max(1, tokens // store.n_patches)
        self.starts = range(rank * self.images, len(store), world * self.images)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Tensor]:
        def read(start: int) -> Tensor:
            return self.store.features(slice(start, start + self.images)).reshape(-1, self.store.d_in)

        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Tensor] | None = None  # the next batch
            for start in self.starts:
                ready, ahead = ahead, pool.submit(read, start)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()
