"""torchrun's agent between a job and its ranks, which ends with the job and says which rank failed and why.

Run as a file, which spares it the package's imports; takes torchrun's arguments. It leaves SIGUSR1 and SIGUSR2, which
SLURM sends to every process of a job, to the job and its ranks, and SIGHUP and SIGINT, which a terminal sends to every
process in it, to the job.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

FAILURES = "SAE_LIGHTNING_FAILURES"  # environment: the file in which the agent says how ranks failed
PR_SET_PDEATHSIG = 1


def die_with_parent(signum: int) -> None:
    """Let the kernel send this process ``signum`` when its parent dies, however that happens. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)


def main() -> None:
    """Run torchrun; exits with 1 when a rank fails, and with 128 + n when stopped by signal n."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # and so in the ranks, until they take the first two
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGTERM"  # torchrun's default: also those of the terminal
    die_with_parent(signal.SIGTERM)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def reason(failure: ProcessFailure) -> str:
        message = failure.error_file_data["message"]
        if isinstance(message, dict):
            return str(message["message"])
        if failure.exitcode < 0:
            return f"ended by {failure.signal_name()}"
        return f"exit {failure.exitcode}"

    try:
        run.run(run.parse_args(sys.argv[1:]))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        said = "; ".join(f"rank {rank}: {reason(failure)}" for rank, failure in failures)
        if FAILURES in os.environ:
            Path(os.environ[FAILURES]).write_text(said)
        sys.exit(1)


if __name__ == "__main__":
    main()
