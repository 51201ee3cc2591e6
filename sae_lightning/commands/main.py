"""``sae-lightning``: dispatches to the commands; errors are one sentence on stderr and exit 1."""

from __future__ import annotations

import argparse
import sys

from sae_lightning.commands.runs import add_runs_command, with_action
from sae_lightning.commands.store import add_store_commands
from sae_lightning.features.manifest import StoreError


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    top = argparse.ArgumentParser("sae-lightning", description="Look after feature stores and runs.")
    commands = top.add_subparsers(required=True, metavar="command")
    add_store_commands(commands)
    add_runs_command(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    args = parser().parse_args(with_action(sys.argv[1:] if arguments is None else arguments))
    try:
        return args.run(args)
    except (StoreError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
