"""``sae-lightning runs``: how far the runs of a folder are; removing, comparing and tidying them."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sae_lightning.rendering.table import Head, Table

STYLES = {"finished": "green", "running": "cyan", "broken": "yellow", "failed": "red", "planned": "dim"}


def main(arguments: Sequence[str]) -> int:
    """Run an action, by default ``list``; the exit status. OSError or ArtefactError with a sentence."""
    about = "Runs that are finished, running, broken, failed, or planned by a sweep."
    top = argparse.ArgumentParser("sae-lightning runs", description=about)
    actions = top.add_subparsers(required=True, metavar="action")
    shown = actions.add_parser("list", help="how far each run is; what `sae-lightning runs` does by itself")
    shown.add_argument("folder", nargs="?", default="runs", type=Path)
    shown.add_argument("--only", choices=STYLES, help="runs in this state alone")
    shown.set_defaults(run=_list)
    gone = actions.add_parser("rm", help="remove runs, planned ones too")
    gone.add_argument("runs", nargs="+", help="names, or patterns in quotes")
    gone.set_defaults(run=_remove)
    diff = actions.add_parser("diff", help="in which settings two runs differ")
    diff.add_argument("first")
    diff.add_argument("second")
    diff.set_defaults(run=_diff)
    clean = actions.add_parser("clean", help="remove what is of no more use: failed runs, such as would start anew, "
                                             "and what finished ones have left over")  # fmt: skip
    clean.add_argument("folder", nargs="?", default="runs", type=Path)
    clean.set_defaults(run=_clean)
    for action in (gone, diff):
        action.add_argument("--folder", default="runs", type=Path, help="where the runs are (runs)")
    for action in (gone, clean):
        action.add_argument("--yes", action="store_true", help="without asking")
    listed = not arguments or arguments[0] not in (*actions.choices, "-h", "--help")
    args = top.parse_args(["list", *arguments] if listed else arguments)
    return args.run(args)


def _list(args: argparse.Namespace) -> int:
    from sae_lightning.runs.state import states  # with Lightning, which other commands do not need

    _require(args.folder)
    found = states(args.folder)
    shown = [run for run in found if args.only in (None, run.state)]
    heads = [Head("run"), Head("state"), Head("", wraps=True), Head("parts scored", ".0f", drop=1)]
    rows = [[run.name, run.state, run.about, run.scores or ""] for run in shown]
    Table("runs", "", heads, rows, styles=[STYLES[run.state] for run in shown]).show()
    count = Counter(run.state for run in found)
    print(f"{len(found)} runs: " + ", ".join(f"{count[state]} {state}" for state in STYLES if count[state]))
    return 0


def _remove(args: argparse.Namespace) -> int:
    from sae_lightning.runs.state import is_running, matching, remove

    names = matching(args.folder, args.runs)
    busy = next((name for name in names if is_running(args.folder / name)), None)
    if busy is not None:
        raise FileExistsError(f"{busy} is running; stop it first. Nothing was removed.")
    print(*names, sep="\n")
    if not _agreed(f"Remove {_count(len(names), 'run')} from {args.folder}?", args.yes):
        return 1
    remove(args.folder, names)
    print(f"Removed {_count(len(names), 'run')}.")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from sae_lightning.runs.state import differences, shown

    runs = [Path(name) if Path(name).is_dir() else args.folder / name for name in (args.first, args.second)]
    found = list(differences(*runs))
    heads = [Head(title, wraps=True) for title in ("setting", runs[0].name, runs[1].name, "")]
    rows = [[each.setting, shown(each.first), shown(each.second), each.reason or "another run"] for each in found]
    if found:
        Table("diff", "", heads, rows, styles=["" if each.reason is None else "dim" for each in found]).show()
    count = sum(each.reason is None for each in found)
    print(f"They differ in {_count(len(found), 'setting')}, of which {count} can change the result.")
    return 0


def _clean(args: argparse.Namespace) -> int:
    from sae_lightning.runs.state import left_over, remove, without_use

    _require(args.folder)
    names, paths = without_use(args.folder), left_over(args.folder)
    if not names and not paths:
        print(f"There is nothing to tidy in {args.folder}.")
        return 0
    print(*names, *paths, sep="\n")
    if not _agreed(
        f"Remove {_count(len(names), 'run')} and {_count(len(paths), 'left-over file or folder')}?", args.yes
    ):
        return 1
    remove(args.folder, names)
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"Removed {_count(len(names) + len(paths), 'entry')}.")
    return 0


def _require(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; train with train.py, or name another folder.")


def _agreed(question: str, yes: bool) -> bool:
    """Whether the user says y; nobody there to answer is a no."""
    if yes:
        return True
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("Nothing was removed; answer y, or give --yes.")
        return False
    return True


def _count(n: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    plural = {"entry": "entries", "left-over file or folder": "left-over files or folders"}.get(noun, f"{noun}s")
    return f"{n} {noun if n == 1 else plural}"
