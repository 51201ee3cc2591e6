"""Two gloo processes reduce to what one process computes over all samples."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sae_lightning.metrics import L0, Firing, MonoScore, Purity, Reconstruction
from sae_lightning.saes import SparseCodes


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator) + 2
    dense = torch.relu(torch.randn(50, 12, generator=generator) - 1)
    return x, x + 0.2 * torch.randn(50, 6, generator=generator), dense


def scores(rows: slice) -> dict[str, torch.Tensor]:
    x, rebuilt, dense = (t[rows] for t in data())
    codes = SparseCodes.select(dense, dense > 0)
    sums, l0, firing = Reconstruction(6, center=torch.full((6,), 2.0)), L0(), Firing(12)
    sums.update(x, rebuilt)
    l0.update(codes)
    firing.update(codes)
    purity = Purity(12, 3)
    purity.update(codes, torch.arange(50)[rows] % 3)
    mono = MonoScore(13, 6)
    mono.update(torch.cat([dense, x[:, :1].abs() + 1], 1).double(), x)  # the last is always active
    found = [metric.compute() for metric in (sums, l0, firing, purity, mono)]
    return {name: value for each in found for name, value in each.items()}


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)  # forked: the parent's OpenMP threads do not exist here
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(scores(slice(0, 17) if rank == 0 else slice(17, None)), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_reduce_by_addition(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank_main, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    expected = scores(slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0, msg=name)
