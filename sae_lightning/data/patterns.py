"""Lists of files from one text: braces as in a shell, wildcards, a folder, or the file itself."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from sae_lightning.data.errors import DataError

RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
WILD = re.compile(r"[*?\[{]")


def expand_braces(pattern: str) -> list[str]:
    """``x-{000..010}.tar`` or ``{a,b}/x`` written out, as bash does: padded with zeros, nested, in order.

    Braces with neither a comma nor a range of whole numbers stay as they are.
    """
    for start, end in _pairs(pattern):
        choices = _choices(pattern[start + 1 : end])
        if choices is not None:
            tails = expand_braces(pattern[end + 1 :])
            return [pattern[:start] + choice + tail for choice in choices for tail in tails]
    return [pattern]


def _pairs(pattern: str) -> Iterator[tuple[int, int]]:
    """Each opening brace with its closing one, from the left."""
    for start in (i for i, c in enumerate(pattern) if c == "{"):
        depth = 0
        for end in range(start, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[end], 0)
            if depth == 0:
                yield start, end
                break


def _choices(inside: str) -> list[str] | None:
    numbers = RANGE.fullmatch(inside)
    if numbers:
        first, last, step = int(numbers[1]), int(numbers[2]), abs(int(numbers[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", text) for text in (numbers[1], numbers[2]))
        width = max(len(numbers[1]), len(numbers[2])) if padded else 0
        values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{value:0{width}d}" for value in values]
    parts, depth = [""], 0
    for c in inside:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [text for part in parts for text in expand_braces(part)] if len(parts) > 1 else None


def files_of(pattern: Path) -> list[Path]:
    """The tar files of a pattern: a folder's ``*.tar``, wildcards (sorted), braces (in their order), or the file.

    DataError when there is none, or when one that braces spell out is missing.
    """
    if pattern.is_dir():
        found = sorted(p for p in pattern.glob("*.tar") if not p.name.startswith("."))
        if not found:
            raise DataError(f"No *.tar files lie in {pattern}; set data.path (and data.splits) to where they are.")
        return found
    if pattern.is_file():
        return [pattern]
    files: list[Path] = []
    missing = []
    for text in expand_braces(str(pattern)):
        matches = sorted(glob.glob(text)) or [text]
        files += [Path(match) for match in matches]
        missing += [match for match in matches if not Path(match).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"There is no file {missing[0]}{more}; check the pattern {pattern}.")
    return list(dict.fromkeys(files))


def fixed_folder(pattern: Path) -> Path:
    """The folder that is named before the first wildcard or brace: what ids are relative to."""
    if pattern.is_dir():
        return pattern
    parts = pattern.parts
    wild = next((i for i, part in enumerate(parts) if WILD.search(part)), len(parts) - 1)
    return Path(*parts[: min(wild, len(parts) - 1)])
