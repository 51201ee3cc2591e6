"""``sae-lightning pretrained ls``: public SAEs that can be opened by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase

from sae_lightning.interop.pretrained import all_pretrained
from sae_lightning.rendering.table import Head, Table


def main(arguments: Sequence[str]) -> int:
    """List entries; the exit status."""
    top = argparse.ArgumentParser(
        "sae-lightning pretrained", description="Public SAEs that open and import take by name."
    )
    verbs = top.add_subparsers(required=True, metavar="verb")
    ls = verbs.add_parser("ls", help="the SAEs, where each reads, and what is stated of it")
    ls.add_argument("pattern", nargs="?", default="*", help="of names, in quotes")
    ls.add_argument("--names", action="store_true", help="names alone, for other commands")
    args = top.parse_args(arguments)
    found = [entry for entry in all_pretrained() if fnmatchcase(entry.name, args.pattern)]
    if not found:
        raise ValueError(f"No public SAE is called {args.pattern}; `sae-lightning pretrained ls` lists them all.")
    if args.names:
        print(*[entry.name for entry in found], sep="\n")
        return 0
    heads = [Head("name", wraps=True), *map(Head, ("format", "backbone", "features")), Head("layer", ".0f"),
             Head("k", ".0f"), Head("expl. var.", ".3f"), Head("L0", ",.0f"), Head("paper", wraps=True)]  # fmt: skip
    rows = [
        [e.name, e.format or "not readable", e.model or e.backbone or "", e.features or "", e.layer, e.k,
         e.explained_variance, e.l0, e.paper]
        for e in found
    ]  # fmt: skip
    Table("pretrained", "", heads, rows).show()
    for note in dict.fromkeys(e.note for e in found if e.note):
        print(f"{next(e.name for e in found if e.note == note)}: {note}.")
    seen = sum(entry.opened for entry in found)
    print(f"{len(found)} entries, facts of the releases' own pages; {seen} were opened when this was written.")
    return 0
