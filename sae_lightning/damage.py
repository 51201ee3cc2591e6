"""Files that a power cut or a full disk has left in pieces: named, set aside, and gone round."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open


def whole(path: Path) -> bool:
    """Whether there is a file ``path``, of json or safetensors as its name says, that can be read."""
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        with safe_open(path, "pt"):  # which compares the file's length with what its header says
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def set_damaged_aside(paths: Sequence[Path], then: str) -> None:
    """``set_aside`` those of ``paths`` that are there and not ``whole``."""
    for path in paths:
        if path.is_file() and not whole(path):
            set_aside(path, f"its {path.stat().st_size:,} bytes are not a whole file", then)


def set_aside(path: Path, fault: str, then: str) -> None:
    """Give ``path`` the ending ``.damaged`` if that may be, and say what is wrong with it and what comes ``then``."""
    aside = path.with_name(path.name + ".damaged")
    try:
        os.replace(path, aside)
        now = f"is now called {aside.name}"
    except OSError as error:
        now = f"cannot be renamed ({error.strerror})"
    print(f"{path} is damaged ({fault}) and {now}; {then}.", file=sys.stderr, flush=True)
