"""``sae-lightning import``: a run's folder of an SAE that another package has trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Import an SAE; the exit status. ValueError or OSError with a sentence."""
    about = "Make a run of a public SAE, which evaluate, report and explore then take like any other."
    top = argparse.ArgumentParser("sae-lightning import", description=about)
    top.add_argument(
        "name",
        nargs="+",
        metavar="NAME",
        help="files, folders, names of `sae-lightning pretrained ls` or of the model hub; settings (data.path=…)",
    )
    for option, what in {
        "backbone": "the encoder, a choice of conf/backbone", "layer": "its layer, from 0, or -1 for the last",
        "features": "patch, cls, tokens, pooled or embedding", "site": "where in the layer: block, mlp_out, attn_out",
        "data": "pictures that it is looked at and scored on (demo)", "runs": "where the run goes (runs)",
    }.items():  # fmt: skip
        top.add_argument(f"--{option}", help=what)
    args = top.parse_intermixed_args(arguments)

    from sae_lightning.commands.paths import located
    from sae_lightning.runs.importing import find, import_run, settled

    keys = {"backbone": "backbone", "layer": "backbone.layer", "features": "features", "site": "site", "data": "data",
            "runs": "paths.runs"}  # fmt: skip
    given = [f"{key}={getattr(args, option)}" for option, key in keys.items() if getattr(args, option) is not None]
    names = [word for word in args.name if "=" not in word]
    for name in names:
        found = find(name)
        folder, verdict = import_run(found, located(settled(found, given, [w for w in args.name if "=" in w])))
        print(f"{folder}: {'imported before.' if verdict is None else verdict.sentence}", flush=True)
    return 0
