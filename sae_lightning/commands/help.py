"""``--help``: a command's groups and settings, from the files in ``conf/`` with their comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import dedent, indent, wrap

CONF = Path(__file__).resolve().parents[2] / "conf"
EXAMPLES = {
    "train": (
        "python train.py -m sae=batchtopk,topk backbone=dinov2,mae expansion=8,16",
        "python train.py data=folder data.path=PICTURES backbone=clip k=32 trainer.max_epochs=2",
    ),
    "extract": (
        "python extract.py backbone=dinov2 data=folder data.path=PICTURES",
        "python extract.py backbone=clip features=[patch,cls] layers=[3,11] extract.device=cuda",
    ),
    "evaluate": (
        "python evaluate.py runs='batchtopk-*'",
        "python evaluate.py metrics=visaebench metrics.segmentation=null device=cuda",
    ),
    "report": (
        "python report.py runs='batchtopk-*' out=reports/batchtopk.html",
        "python report.py grid='*' paths.runs=runs/grid",
    ),
    "explore": (
        "python explore.py app=naming run=runs/NAME",
        "python explore.py app=explorer run='batchtopk-*' app.browser=true",
    ),
    "finetune": (
        "python finetune.py -m mono_weight=0,0.03,0.1",
        "python finetune.py data=folder data.path=PICTURES finetune_model=resnet50 epochs=20",
    ),
}


def groups() -> list[str]:
    """The names of all groups of ours."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")


def choices_of(group: str) -> list[str]:
    """The choices of a ``group``, also those in its sub-folders."""
    root = CONF / group
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml")) if group else []


def keys_of(group: str, choice: str) -> list[str]:
    """The settings at the top of one choice's file."""
    return re.findall(r"^(\w+):", (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8"), re.MULTILINE)


def help_of(command: str, config_name: str, about: str, typed: Sequence[str] = ()) -> str:
    """The page for ``command``, whose groups have the choices that were ``typed``."""
    text = (CONF / f"{config_name}.yaml").read_text(encoding="utf-8")
    picked = dict(_defaults(text))
    for argument in typed:
        key, _, value = argument.lstrip("+").partition("=")
        group = next((name for name in picked if key in (name, name.split("@")[0])), None)
        if group is not None and value in choices_of(group.split("@")[0]):
            picked[group] = value
    parts = [
        about.strip().splitlines()[0].replace("``", ""),
        f"Usage: python {command}.py [-m] [group=choice …] [setting=value …]",
        "Examples\n" + indent("\n".join(EXAMPLES[command]), "  "),
        "Groups: choices, and the one taken if none is named\n" + "\n".join(_groups(picked)),
        "Settings\n" + indent(_body(text), "  "),
        *(_group(group, choice) for group, choice in picked.items() if choice is not None),
        "-m runs every combination of values such as k=8,16. --cfg job shows the composed configuration and stops; "
        "--hydra-help tells of Hydra's own options.\nSettings that only some choices have are added with a plus: "
        "+loss.cosine=0.1. --help with another choice, such as --help sae=topk, shows that one's settings.",
    ]
    return "\n\n".join(parts)


def _groups(picked: dict[str, str | None]) -> Iterator[str]:
    wide = max(map(len, picked), default=0)
    for group, choice in picked.items():
        lines = wrap(", ".join(choices_of(group.split("@")[0])), 100 - wide)
        lines[-1:] = [f"{lines[-1]}   [{choice or 'none'}]"] if lines else []
        yield "\n".join(f"  {group if i == 0 else '':{wide}}  {line}" for i, line in enumerate(lines))


def _group(group: str, choice: str) -> str:
    """The file of one choice, under where its settings go."""
    name, _, place = group.partition("@")
    path = CONF / name / f"{choice}.yaml"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
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
