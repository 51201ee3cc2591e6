"""``sae-lightning runs``: how far the runs of a folder are."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

STYLES = {"finished": "green", "running": "cyan", "broken": "yellow", "planned": "dim"}


def add_runs_command(commands: argparse._SubParsersAction) -> None:
    """Put ``runs`` into a parser."""
    runs = commands.add_parser("runs", help="runs that are finished, running, broken, or planned by a sweep")
    runs.add_argument("folder", nargs="?", default="runs", type=Path)
    runs.add_argument("--only", choices=STYLES, help="runs in this state alone")
    runs.set_defaults(run=_runs)


def _runs(args: argparse.Namespace) -> int:
    from sae_lightning.training.plan import states  # with Lightning, which other commands do not need

    if not args.folder.is_dir():
        raise FileNotFoundError(f"There is no folder {args.folder}; train with train.py, or name another folder.")
    found = states(args.folder)
    table = Table()
    for column in ("run", "state", "", "parts scored"):
        table.add_column(column, justify="right" if column == "parts scored" else "left", no_wrap=column == "run")
    for run in found:
        if args.only in (None, run.state):
            table.add_row(run.name, run.state, run.about, str(run.scores or ""), style=STYLES[run.state])
    console = Console(width=max(120, Console().width))
    console.print(table)
    count = Counter(run.state for run in found)
    console.print(f"{len(found)} runs: " + ", ".join(f"{count[state]} {state}" for state in STYLES if count[state]))
    return 0
