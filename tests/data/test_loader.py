"""Worker processes hand pictures over wherever the machine lets them, and end in a sentence where it does not."""

import multiprocessing
import os
import shutil
import signal
import tempfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from sae_lightning.data import DataError
from sae_lightning.data.loader import PictureLoader, as_arrays, as_tensors, pixel_bytes
from sae_lightning.distributed import processes
from tests.features.jobs import Job


class Numbers(Dataset):
    """Picture i, all of whose pixels are i; at ``bad`` it does ``act`` first."""

    def __init__(self, bad: int = -1, act: str = "") -> None:
        self.bad, self.act = bad, act

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i == self.bad and self.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == self.bad and self.act == "refuse":
            raise DataError("Picture 7 cannot be read; delete it.")
        return torch.full((3, 4, 4), float(i)), i


LONG = "/tmp" + "/." * 40  # for a socket's address


def unpicklable(samples: list) -> object:
    return lambda: samples


def read(dataset: Dataset = Numbers(), collate=None, **settings: bool) -> None:  # noqa: B008
    """Read everything by two workers and check it."""
    options = {} if collate is None else {"collate_fn": collate}
    loader = PictureLoader(dataset, pixel_bytes(4, 3), 2, "extract.num_workers", batch_size=3, **options, **settings)
    batches = list(loader)
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(12))
    assert torch.equal(torch.cat([pixels for pixels, _ in batches])[:, 2, 1, 3], torch.arange(12.0))


# --- what a machine may be like ---------------------------------------------------------------------------
def temporary_files(folder: str, elsewhere: tuple[str, ...] = processes.ELSEWHERE) -> None:
    tempfile.tempdir, processes.ELSEWHERE = folder, elsewhere
    multiprocessing.current_process()._config.pop("tempdir", None)  # that of the process which started this one


def small_shared_memory() -> None:
    shutil.disk_usage = lambda path: SimpleNamespace(free=2000)  # type: ignore[assignment]


def no_semaphores() -> None:
    def lock(self: object) -> None:
        raise OSError(28, "No space left on device")

    multiprocessing.context.BaseContext.Lock = lock  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (None, ""),
        (partial(temporary_files, LONG), ""),
        (partial(temporary_files, "/proc"), ""),
        (partial(temporary_files, LONG, ("/proc", LONG)), "AF_UNIX path too long); a shorter TMPDIR may help"),
        (small_shared_memory, "/dev/shm has 0 MB free, expected 0 (docker run --shm-size)"),
        (no_semaphores, "read by one process, as no other can be started: [Errno 28] No space left on device"),
    ],
)
def test_pictures_are_read_and_it_says_what_is_in_the_way(machine, said, tmp_path):
    job = Job(tmp_path / "log", read, before=machine)
    assert job.end() == 0, job.said()
    assert said in job.said()
    assert bool(said) == bool(job.said())


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (partial(read, Numbers(7, "die")), "A process that reads pictures ended by itself"),
        (partial(read, collate=unpicklable), "A process that reads pictures ended by itself"),
        (partial(read, Numbers(7, "refuse")), "DataError: Picture 7 cannot be read; delete it."),
    ],
)
def test_a_worker_s_error_is_a_sentence(work, sentence, tmp_path):
    """Also that of the thread which hands a batch over: PyTorch prints it, and its loader waits for ever."""
    assert sentence in Job(tmp_path / "log", work).sentence()


def test_batches_keep_their_shape_on_the_way():
    error = DataError("no picture")
    batch = (torch.ones(2, 3), {1: error}, [torch.arange(2), "caption"], None)
    pixels, errors, (numbers, text), none = as_tensors(as_arrays(batch))
    assert torch.equal(pixels, torch.ones(2, 3))
    assert torch.equal(numbers, torch.arange(2))
    assert (errors, text, none) == ({1: error}, "caption", None)
