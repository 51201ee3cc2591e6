"""``sae-lightning COMMAND …``: the commands by their names; those of Hydra take settings, the others arguments."""

from __future__ import annotations

import sys
from importlib import import_module
from keyword import iskeyword

HYDRA = {
    "train": "train sparse autoencoders, one or a sweep (-m)",
    "extract": "extract feature stores, which training does by itself",
    "evaluate": "score finished runs on the held-out test split",
    "report": "write one HTML page over scored runs",
    "explore": "use trained dictionaries: name, search, steer, match, browse",
    "finetune": "fine-tune classifiers with MonoLoss",
}
OTHERS = {
    "store": "list, check, describe, merge and import feature stores",
    "runs": "how far runs are; remove, compare and tidy them",
    "import": "make a run of an SAE that another package has trained",
    "check": "the environment in ten lines; whether SAEs are used as they were trained",
    "pretrained": "list public SAEs that can be imported by name",
}
COMMANDS = HYDRA | OTHERS


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status. Errors are one sentence on stderr and exit status 1."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(page())
        return 0
    if name not in COMMANDS:
        print(f"There is no command {name}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    work = import_module(f"sae_lightning.commands.{name}{'_' * iskeyword(name)}").main
    if name in HYDRA:
        sys.argv = ["sae-lightning", *rest]
        work()
        return 0
    try:
        return work(rest)
    except Exception as error:
        from sae_lightning.commands.sentences import sentence_of

        said = sentence_of(error, "train") or (str(error) if isinstance(error, OSError) else None)
        if said is None:
            raise
        print(said, file=sys.stderr)
        return 1


def page() -> str:
    """What ``--help`` shows."""
    lines = [f"  {name:11}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: sae-lightning COMMAND …",
            "Train, score and compare sparse autoencoders on the features of vision encoders.\n",
            *lines,
            "\nsae-lightning COMMAND --help shows its settings. Stores, runs and reports go below the current folder.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
