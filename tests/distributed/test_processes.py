"""Functions side by side in processes of their own: environment, output, failures, and none that is left over."""

import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sae_lightning.distributed.processes import run_together
from tests.processes import Command, wait_for


def report(folder: Path, number: int) -> None:
    """Write what this process finds about itself."""
    threads = torch.get_num_threads()
    said = f"{os.getcwd()} {os.environ.get('GREETING')} {os.environ.get('HOME')} {threads} {np.arange(3).sum()}"
    (folder / f"report-{number}").write_text(said)
    print(f"process {number}")
    print(f"error {number}", file=sys.stderr)


def wait_then_fail(folder: Path, number: int) -> None:
    """The second fails; the first waits for ever."""
    if number == 1:
        wait_for((folder / "0").exists)
        raise ValueError("the second one's sentence")
    (folder / "0").touch()
    wait_for(lambda: False)


def refuse(folder: Path, number: int) -> None:
    sys.exit("one sentence")


def die(folder: Path, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stay(folder: Path, number: int) -> None:
    """Leave the process id, and wait for ever."""
    (folder / str(os.getpid())).touch()
    wait_for(lambda: False)


def together(work, folder: Path, **variables: str) -> dict[int, str]:
    environment = dict(os.environ) | variables
    with run_together(work, [(folder, 0), (folder, 1)], [environment, environment]) as processes:
        wait_for(lambda: processes.ended(1))
        return processes.failures()


def test_each_has_the_folder_environment_and_output_of_now(tmp_path, monkeypatch, capfd):
    """Though the server that they are forked off has been there for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    assert together(report, tmp_path, GREETING="hello", OMP_NUM_THREADS="2") == {}
    for number in (0, 1):
        assert (tmp_path / f"report-{number}").read_text() == f"{tmp_path} hello None 2 3"
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "process 0", "process 1"]
    assert sorted(err.split("\n")) == ["", "error 0", "error 1"]


def test_a_failure_ends_the_others_and_is_named_with_its_traceback(tmp_path, capfd):
    assert together(wait_then_fail, tmp_path) == {1: "ValueError: the second one's sentence"}
    assert "Traceback" in capfd.readouterr().err


def test_a_sentence_is_shown_without_a_traceback(tmp_path, capfd):
    failures = together(refuse, tmp_path)
    assert failures
    assert set(failures.values()) <= {"one sentence", "ended by SIGTERM"}
    said = capfd.readouterr().err
    assert "one sentence" in said
    assert "Traceback" not in said


def test_a_death_is_named_by_its_signal(tmp_path):
    assert "ended by SIGKILL" in together(die, tmp_path).values()


def test_leaving_the_block_ends_them(tmp_path):
    with run_together(stay, [(tmp_path, 0)], [dict(os.environ)]):
        wait_for(lambda: list(tmp_path.iterdir()))
    [pid] = (int(path.name) for path in tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PROGRAM = """
import os, sys
from pathlib import Path
from sae_lightning.distributed.processes import run_together
from tests.distributed.test_processes import stay
from tests.processes import HANG
folder = Path(sys.argv[1])
with run_together(stay, [(folder, 0), (folder, 1)], [dict(os.environ)] * 2) as processes:
    processes.ended(HANG)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_they_end_when_the_process_that_started_them_is_killed(tmp_path):
    with Command("-c", PROGRAM, str(tmp_path), cwd=tmp_path) as job:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2 or not job.running)
        job.kill()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    wait_for(lambda: all(map(gone, pids)))


def test_the_running_script_is_not_run_again(tmp_path, monkeypatch):
    """A user's script that calls train() need not guard its main part."""
    script = tmp_path / "script.py"
    script.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'again')!r}).touch()")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert together(report, tmp_path) == {}
    assert not (tmp_path / "again").exists()
    assert sys.modules["__main__"] is main
