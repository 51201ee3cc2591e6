"""Whether W&B can be reached with this machine's login, asked once and with little patience."""

from __future__ import annotations

import base64
import json
import netrc
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

QUERY = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
REMEMBERED = 600  # seconds for which a service that failed is not asked again

_failed: dict[tuple[str, str], tuple[float, str]] = {}  # by address and key: when, and what was wrong


def trouble(patience: float, own: Mapping[str, Any]) -> str:
    """Why no run can be logged online, as the first half of a sentence; empty where the service knows this login.

    The service has ``patience`` seconds to answer; that it failed is remembered, so that the trainings of a sweep, or
    those that share a process, do not wait for it each.
    """
    address, key = login(own)
    if not key:
        return "No W&B login found"
    when, what = _failed.get((address, key), (-REMEMBERED, ""))
    if time.monotonic() - when < REMEMBERED:
        return what
    what = _ask(address, key, patience)
    if what:
        _failed[address, key] = time.monotonic(), what
    return what


def remember(what: str, own: Mapping[str, Any]) -> None:
    """Take the service as failing for a while, because of ``what``."""
    _failed[login(own)] = time.monotonic(), what


def forget() -> None:
    """Ask again next time."""
    _failed.clear()


def own_settings(folder: str | Path) -> dict[str, Any]:
    """What W&B's environment variables and settings files say, by the names of ``wandb.Settings``.

    The files are ``wandb/settings`` in ``folder``, which ``wandb offline`` and ``wandb disabled`` write, and that of
    the user's.
    ValueError for what W&B does not understand.
    """
    import wandb

    made = wandb.Settings()
    made.quiet, made.root_dir = True, str(folder)
    made.settings_system = str(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    ours = {name: getattr(made, name) for name in ("quiet", "root_dir", "settings_system")}
    made.update_from_system_settings()
    made.update_from_env_vars(dict(os.environ))
    own = {name: getattr(made, name) for name in made.model_fields_set}
    return {name: value for name, value in own.items() if name not in ours or value != ours[name]}


def login(own: Mapping[str, Any]) -> tuple[str, str]:
    """Address of the service that ``own_settings`` name, and the key for it: theirs, or what ``wandb login`` stored."""
    import wandb

    address = str(own.get("base_url") or wandb.Settings().base_url)
    if own.get("api_key"):
        return address, str(own["api_key"])
    host = urlparse(address).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return address, ""
    return address, (found[2] or "") if found else ""


def _ask(address: str, key: str, patience: float) -> str:
    """What is wrong, in a thread of its own: looking up a host has no time limit."""
    found = [f"W&B at {address} does not answer within {patience:g} s"]

    def ask() -> None:
        found[0] = _answer(address, key, patience)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return found[0]


def _answer(address: str, key: str, patience: float) -> str:
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    try:
        with urlopen(Request(f"{address.rstrip('/')}/graphql", QUERY, headers), timeout=patience) as reply:
            viewer = (json.load(reply).get("data") or {}).get("viewer")
        return "" if viewer else f"W&B at {address} does not know the API key"
    except HTTPError as error:
        if error.code in (401, 403):
            return f"W&B at {address} refuses the API key"
        return f"W&B at {address} answers with error {error.code}"
    except (OSError, ValueError, AttributeError) as error:
        return f"W&B at {address} does not answer ({getattr(error, 'reason', error)})"
