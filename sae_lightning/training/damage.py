"""Files that a power cut or a full disk has left in pieces: named, set aside, and gone round."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def set_aside(path: Path, fault: str, then: str) -> None:
    """Give ``path`` the ending ``.damaged`` if that may be, and say what is wrong with it and what comes ``then``."""
    aside = path.with_name(path.name + ".damaged")
    try:
        os.replace(path, aside)
        now = f"is now called {aside.name}"
    except OSError as error:
        now = f"cannot be renamed ({error.strerror})"
    print(f"{path} is damaged ({fault}) and {now}; {then}.", file=sys.stderr, flush=True)
