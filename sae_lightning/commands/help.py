"""``--help``: a command's groups and settings, from the files in ``conf/`` with their comments."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import dedent, indent, wrap

CONF = Path(__file__).resolve().parents[1] / "conf"  # in a checkout a link to the folder at its top
EXAMPLES = {
    "train": (
        "-m sae=batchtopk,topk backbone=dinov2,mae expansion=8,16",
        "data=folder data.path=PICTURES backbone=clip k=32 trainer.max_epochs=2",
    ),
    "extract": (
        "backbone=dinov2 data=folder data.path=PICTURES",
        "backbone=clip features=[patch,cls] layers=[3,11] extract.device=cuda",
    ),
    "evaluate": (
        "runs='batchtopk-*'",
        "metrics=visaebench metrics.segmentation=null device=cuda",
    ),
    "report": (
        "runs='batchtopk-*' out=reports/batchtopk.html",
        "grid='*' paths.runs=runs/grid",
    ),
    "explore": (
        "app=naming run=runs/NAME",
        "app=explorer run='batchtopk-*' app.browser=true",
    ),
    "finetune": (
        "-m mono_weight=0,0.03,0.1",
        "data=folder data.path=PICTURES finetune_model=resnet50 epochs=20",
    ),
}


def own_folder() -> Path | None:
    """The folder of ``--config-dir`` on the command line, whose files come before ours."""
    typed = sys.argv[1:]
    named = [word.partition("=")[2] for word in typed if word.startswith("--config-dir=")]
    named += [after for word, after in pairwise(typed) if word in ("--config-dir", "-cd")]
    return Path(named[-1]) if named else None


def folders() -> list[Path]:
    """Where configs are, the first that has a file wins."""
    own = own_folder()
    return [CONF] if own is None else [own, CONF]


def groups() -> list[str]:
    """The names of all groups."""
    inside = {path.name for folder in folders() if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return sorted(inside - {"hydra", "__pycache__"})


def choices_of(group: str) -> list[str]:
    """The choices of a ``group``, also those in its sub-folders."""
    roots = [folder / group for folder in folders()] if group else []
    return sorted({str(path.relative_to(root).with_suffix("")) for root in roots for path in root.rglob("*.yaml")})


def text_of(name: str) -> str:
    """The file ``name`` (``sae/topk``); empty where there is none."""
    found = next((path for folder in folders() if (path := folder / f"{name}.yaml").is_file()), None)
    return "" if found is None else found.read_text(encoding="utf-8")


def keys_of(group: str, choice: str) -> list[str]:
    """The settings at the top of one choice's file."""
    return re.findall(r"^(\w+):", text_of(f"{group}/{choice}"), re.MULTILINE)


def help_of(command: str, config_name: str, about: str, typed: Sequence[str] = ()) -> str:
    """The page for ``command``, whose groups have the choices that were ``typed``."""
    text = text_of(config_name)
    picked = _choose(dict(_defaults(text)), typed)
    for group, choice in list(picked.items()):  # what a choice merges into itself, such as the scale of a data set
        inner = _defaults(text_of(f"{group.split('@')[0]}/{choice}"))
        picked |= {name.replace("_here_", group): taken for name, taken in inner if name.endswith("@_here_")}
    picked = _choose(picked, typed)
    parts = [
        about.strip().splitlines()[0].replace("``", ""),
        f"Usage: {_typed(command)} [-m] [group=choice …] [setting=value …]",
        "Examples\n" + indent("\n".join(f"{_typed(command)} {words}" for words in EXAMPLES[command]), "  "),
        "Groups: choices, and the one taken if none is named\n" + "\n".join(_groups(picked)),
        "Settings\n" + indent(_body(text), "  "),
        *(_group(group, choice) for group, choice in picked.items() if choice is not None),
        "-m runs every combination of values such as k=8,16. --cfg job shows the composed configuration and stops; "
        "--hydra-help tells of Hydra's own options.\nSettings that only some choices have are added with a plus: "
        "+loss.cosine=0.1. --help with another choice, such as --help sae=topk, shows that one's settings.",
    ]
    return "\n\n".join(parts)


def _choose(picked: dict[str, str | None], typed: Sequence[str]) -> dict[str, str | None]:
    """Choices by group, as ``typed`` where it names one."""
    given = [argument.lstrip("+").partition("=") for argument in typed]
    for group in picked:
        name = group.split("@")[0]
        for key, _, value in given:
            if key in (group, name) and value in choices_of(name):
                picked[group] = value
    return picked


def _typed(command: str) -> str:
    """What was typed to get here: the file of a checkout, or the command of the installed package."""
    file = f"{command}.py"
    return f"python {file}" if Path(sys.argv[0]).name == file else f"sae-lightning {command}"


def _groups(picked: dict[str, str | None]) -> Iterator[str]:
    wide = max(map(len, picked), default=0)
    for group, choice in picked.items():
        lines = wrap(", ".join(choices_of(group.split("@")[0])), 100 - wide)
        lines[-1:] = [f"{lines[-1]}   [{choice or 'none'}]"] if lines else []
        yield "\n".join(f"  {group if i == 0 else '':{wide}}  {line}" for i, line in enumerate(lines))


def _group(group: str, choice: str) -> str:
    """The file of one choice, under where its settings go."""
    name, _, place = group.partition("@")
    text = text_of(f"{name}/{choice}")
    if not text:
        return ""
    package = re.search(r"# @package (\S+)", text)
    body = re.sub(r"# @package .*\n", "", text)
    place = place or (package[1] if package else name)
    own = _body(body, keep_comment=True)
    return f"{group}={choice}\n" + indent(own if place == "_global_" else _below(place, own), "  ")


def _below(place: str, body: str) -> str:
    comment = "".join(f"{line}\n" for line in body.splitlines() if line.startswith("#"))
    rest = "\n".join(line for line in body.splitlines() if not line.startswith("#"))
    return f"{comment}{place}:\n{indent(rest, '  ')}"


def _body(text: str, keep_comment: bool = False) -> str:
    """The settings of a file with their comments: without its defaults list and Hydra's section."""
    lines: list[str] = []
    skipping = False
    for line in text.splitlines():
        if line[:1] not in ("", " ", "#", "-"):
            skipping = line.startswith(("defaults:", "hydra:"))
        if not skipping and (keep_comment or lines or not line.startswith("#")):
            lines.append(line)
    return dedent("\n".join(lines)).strip("\n")


def _defaults(text: str) -> Iterable[tuple[str, str | None]]:
    """The groups in a file's defaults list with their choices; without what only Hydra has."""
    import yaml

    for entry in (yaml.safe_load(text) or {}).get("defaults", ()):
        if isinstance(entry, dict):
            ((group, choice),) = entry.items()
            if not group.startswith("override "):
                yield group.lstrip("/"), choice if choice is None else str(choice)
