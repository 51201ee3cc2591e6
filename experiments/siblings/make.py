"""Derive the groups: ``python -m experiments.siblings.make --wordnet DIR --synsets FILE --out FILE``.

DIR holds WordNet's ``data.noun``, FILE lists wnids, one a line. A group is a noun synset that is the direct hypernym
(pointer ``@``; the one of instances, ``@i``, does not count) of at least three of the classes. A class with several
hypernyms is in the group of each. ``--levels 2`` counts the hypernyms' hypernyms too, and so on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.data.siblings import SHIPPED

SMALLEST = 3  # ViSAEBench §4.4


class Synset(NamedTuple):
    """``words`` that mean the same, and the offsets of the synsets it is a kind of."""

    words: list[str]
    hypernyms: list[str]


def read_nouns(text: str) -> tuple[list[str], dict[str, Synset]]:
    """The licence's lines, and the synsets by their offset of eight digits, of a ``data.noun`` (see wndb(5WN)).

    A line is ``offset file n words-in-hex (word id)… pointers (sign offset pos from-to)… | gloss``.
    """
    licence, nouns = [], {}
    for line in text.splitlines():
        if line.startswith("  "):
            licence.append(re.sub(r"^ *\d+ ?", "", line).rstrip())
            continue
        fields = line.partition(" | ")[0].split()
        n_words = int(fields[3], 16)
        words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * n_words : 2]]
        first = 5 + 2 * n_words
        pointers = zip(fields[first::4], fields[first + 1 :: 4], strict=False)
        nouns[fields[0]] = Synset(words, [to for sign, to in list(pointers)[: int(fields[first - 1])] if sign == "@"])
    return licence, nouns


def ancestors(offset: str, nouns: Mapping[str, Synset], levels: int) -> set[str]:
    """The offsets of all hypernyms that 1 to ``levels`` steps lead to."""
    found: set[str] = set()
    reached = {offset}
    for _ in range(levels):
        reached = {above for one in reached for above in nouns[one].hypernyms}
        found |= reached
    return found


def groups(wnids: Sequence[str], nouns: Mapping[str, Synset], levels: int = 1) -> dict[str, dict[str, Any]]:
    """``{wnid of the hypernym: {"name": its first word, "classes": wnids}}``, all in ascending order.

    The name of hypernyms that share their first word has the wnid added.
    """
    below: dict[str, list[str]] = {}
    for wnid in sorted(wnids):
        for above in ancestors(wnid[1:], nouns, levels):
            below.setdefault(above, []).append(wnid)
    kept = {above: classes for above, classes in sorted(below.items()) if len(classes) >= SMALLEST}
    words = [nouns[above].words[0] for above in kept]
    names = [w if words.count(w) == 1 else f"{w} (n{above})" for w, above in zip(words, kept, strict=True)]
    return {f"n{above}": {"name": name, "classes": kept[above]} for name, above in zip(names, kept, strict=True)}


def build(wordnet: Path, synsets: Path, levels: int = 1) -> dict[str, Any]:
    """All that the file says: where it comes from, the words of each class, and the groups."""
    data = wordnet / "data.noun"
    licence, nouns = read_nouns(data.read_text(encoding="utf-8"))
    wnids = sorted(synsets.read_text(encoding="utf-8").split())
    found = groups(wnids, nouns, levels)
    version = next((hit[1] for line in licence if (hit := re.search(r"WordNet (\S+) Copyright", line))), "unknown")
    hypernyms = [len(nouns[wnid[1:]].hypernyms) for wnid in wnids]
    members = [wnid for group in found.values() for wnid in group["classes"]]
    about = {
        "wordnet": version,
        "script": "python -m experiments.siblings.make",
        "rule": f"classes with a hypernym (@) in common, at most {levels} step{'s' * (levels > 1)} up; "
        f"groups of at least {SMALLEST}",
        "levels": levels,
        "classes": len(wnids),
        "classes_with_several_hypernyms": sum(n > 1 for n in hypernyms),
        "groups": len(found),
        "tasks": len(members),
        "classes_in_groups": len(set(members)),
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (data, synsets)},
        "licence": "\n".join(licence).strip(),
    }
    return {"meta": about, "names": {wnid: ", ".join(nouns[wnid[1:]].words) for wnid in wnids}, "groups": found}


def as_text(about: Mapping[str, Any]) -> str:
    """JSON with a class and a group a line."""
    rows = {
        key: ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in part.items()) for key, part in about.items()
    }
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {{\n{lines}\n }}" for key, lines in rows.items()) + "\n}\n"


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="the folder of data.noun")
    parser.add_argument("--synsets", type=Path, required=True, help="a text file of wnids")
    parser.add_argument("--levels", type=int, default=1)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    about = build(args.wordnet, args.synsets, args.levels)
    args.out.write_text(as_text(about), encoding="utf-8")
    print(", ".join(f"{about['meta'][key]} {key}" for key in ("groups", "tasks")))


if __name__ == "__main__":
    main()
