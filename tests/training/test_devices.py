"""What a GPU would refuse or get wrong, on devices that a CPU has, too."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sae_lightning.features import loader
from sae_lightning.saes import BatchTopK, Normalizer
from sae_lightning.training import fit
from sae_lightning.training import module as training
from sae_lightning.training.data import FeatureDataModule, InOrder
from sae_lightning.training.module import SAEModule
from tests.conftest import D_IN

META = torch.device("meta")
GPU = torch.device("cuda", 1)


def module_on(device: torch.device, **options) -> SAEModule:
    sae = BatchTopK(D_IN, 40, 3, seed=0)
    return SAEModule(sae, {"reconstruction": 1.0, "sparsity": 0.1}, target_l0=3.0, **options).to(device)


def test_what_ranks_average_lies_on_their_device_and_goes_in_one_operation(monkeypatch):
    """NCCL takes no tensor of the host, and each operation is a round of all ranks."""
    module, averaged, logged = module_on(META), [], {}
    monkeypatch.setattr(training, "mean_over_ranks", lambda value: averaged.append(value) or value)
    monkeypatch.setattr(module, "log_dict", lambda values, **options: logged.setdefault(str(options), values))
    x = torch.zeros(5, D_IN, device=META)
    step = SimpleNamespace(x=x, reconstruction=x, codes=SimpleNamespace(nnz=15))
    module._log_step(step, torch.zeros((), device=META), {"reconstruction": torch.zeros((), device=META)})
    assert [(value.device, value.ndim) for value in averaged] == [(META, 1)]
    reduced, bar = logged.values()
    assert {value.device for value in reduced.values()} == {META}
    assert {"train/loss", "train/l0", "train/explained_variance", "train/dead_share", "train/threshold",
            "train/sparsity_weight", "loss/reconstruction"} == reduced.keys()  # fmt: skip
    assert float(bar["l0"]) == 3  # known to the host, which the bar need not wait for
    assert "sync_dist" not in str(logged.keys())


def test_the_threshold_is_calibrated_where_the_run_trained_and_on_the_ranks_share(monkeypatch, stores):
    seen = []
    monkeypatch.setattr(BatchTopK, "calibrate", lambda self, batches, n: seen.append((self.W_enc.device, batches, n)))
    monkeypatch.setattr(fit, "rank", lambda: 1)
    monkeypatch.setattr(fit, "world_size", lambda: 3)
    cfg = SimpleNamespace(sae={"threshold": "calibrated"})
    fit.calibrate(cfg, module_on(torch.device("cpu")), stores["val"], META)
    ((device, batches, n),) = seen
    assert (device, n) == (META, stores["val"].n_tokens)
    assert batches.starts == InOrder(stores["val"], 8192, 1, 3).starts


# --- ranks share the calibration --------------------------------------------------------------------
def calibrated(folder: Path, share: slice, shift: float, double: bool) -> None:
    x = 2 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)) + 1
    x = x.double() if double else x
    sae = BatchTopK(D_IN, 40, 2.6, seed=0, normalizer=Normalizer(D_IN, torch.ones(D_IN), 2.0)).to(x.dtype)
    sae.b_enc.data -= shift
    sae.threshold.fill_(0.4)
    sae.calibrate(list(x.split(50))[share], 300)
    torch.save(sae.threshold, folder / f"{share}.pt")
    with pytest.raises(ValueError, match=r"promised 301 held-out samples \(at least one\) and got 300"):
        sae.calibrate(list(x.split(50))[share], 301)


def of_rank(rank: int, port: int, folder: str, shares: list[slice], shift: float, double: bool) -> None:
    torch.set_num_threads(1)  # forked: the parent's OpenMP threads do not exist here
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(shares))
    calibrated(Path(folder), shares[rank], shift, double)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shares", "shift", "double"),
    [
        ([slice(0, None, 2), slice(1, None, 2)], 0.0, False),
        ([slice(0, None, 2), slice(1, None, 2)], 0.0, True),
        ([slice(None), slice(0, 0)], 0.0, False),  # a rank without a batch
        ([slice(0, None, 2), slice(1, None, 2)], 3.0, False),  # fewer positive entries than k a sample
    ],
)
def test_ranks_find_the_threshold_of_one_process(shares, shift, double, tmp_path):
    calibrated(tmp_path, slice(None, None, 1), shift, double)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, str(tmp_path), shares, shift, double)
    mp.start_processes(of_rank, args=arguments, nprocs=len(shares), start_method="fork")
    expected = torch.load(tmp_path / f"{slice(None, None, 1)}.pt", weights_only=True)
    for share in shares:
        assert torch.equal(torch.load(tmp_path / f"{share}.pt", weights_only=True), expected)
    assert (float(expected) > 0) == (shift == 0)


# --- the reading thread's device --------------------------------------------------------------------
def test_the_reading_thread_waits_for_the_gpu_that_its_batches_go_to(monkeypatch):
    waited: list = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    pool = loader.BufferPool(64, pinned=False, device=GPU)
    stopped = SimpleNamespace(is_set=lambda: False)
    buffer = pool.take(stopped, stopped)
    buffer.give_back()
    pool.pinned = True  # as far as can be, without a driver that pins memory
    assert pool.take(stopped, stopped) is buffer
    assert waited == [GPU]


@pytest.mark.parametrize(("device", "pinned"), [(GPU, True), (torch.device("cpu"), False)])
def test_batches_are_pinned_for_the_device_of_the_trainer(device, pinned, stores, monkeypatch):
    """Also where there are GPUs that the trainer does not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = FeatureDataModule(stores["train"], stores["val"], 64)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=device))
    pool = data.train_dataloader()._pool
    assert (pool.device, pool.pinned) == (device, pinned)
