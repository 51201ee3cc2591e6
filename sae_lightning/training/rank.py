"""One rank of a job: ``python -m sae_lightning.training.rank MODULE CONFIG FOLDER`` runs ``MODULE`` as a program.

It ends with its agent, stops at a checkpoint when asked to, and leaves its error where the agent finds it.
"""

from __future__ import annotations

import runpy
import signal
import sys

from sae_lightning.training.agent import die_with_parent


def main() -> None:
    """Run the module with the remaining arguments."""
    die_with_parent(signal.SIGKILL)
    from torch.distributed.elastic.multiprocessing.errors import record

    from sae_lightning.training.preempt import heeding

    module = sys.argv[1]
    sys.argv = sys.argv[1:]

    @record
    def run() -> None:
        with heeding(module, in_rank=True):
            runpy.run_module(module, run_name="__main__", alter_sys=True)

    run()


if __name__ == "__main__":
    main()
