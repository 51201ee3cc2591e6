"""``sae-lightning check``: whether an SAE is used as it was trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Look at runs on a few pictures; exit status 1 where one does not fit. ValueError or OSError with a sentence."""
    about = (
        "Compare explained variance, L0 and dead share on 64 pictures with what is stated, and say what fits better."
    )
    top = argparse.ArgumentParser("sae-lightning check", description=about)
    top.add_argument("run", nargs="+", help="runs: folders, names in --runs, or patterns in quotes")
    top.add_argument("--runs", default="runs", help="where the runs are (runs)")
    top.add_argument("--pictures", help="a folder of pictures; by default those that the run was trained on")
    args = top.parse_args(arguments)

    from pathlib import Path

    from sae_lightning.runs.model import preflight
    from sae_lightning.runs.run import Run, chosen_runs
    from sae_lightning.settings.compose import compose_config

    data = None
    if args.pictures is not None:
        data = compose_config(["data=folder", f"data.path={Path(args.pictures).resolve()}"]).data
    fit = True
    for folder in chosen_runs(args.run, Path(args.runs)):
        verdict = preflight(Run(folder), data)
        fit &= verdict.fits
        print(f"{folder}: {verdict.sentence}", flush=True)
    return 0 if fit else 1
