"""Whether W&B can be reached with this machine's login, asked once and with little patience."""

from __future__ import annotations

import base64
import json
import netrc
import os
import threading
import time
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

QUERY = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
REMEMBERED = 600  # seconds for which a service that failed is not asked again

_failed: dict[tuple[str, str], tuple[float, str]] = {}  # by address and key: when, and what was wrong


def trouble(patience: float) -> str:
    """Why no run can be logged online, as the first half of a sentence; empty where the service knows this login.

    The service has ``patience`` seconds to answer; that it failed is remembered, so that the trainings of a sweep, or
    those that share a process, do not wait for it each.
    """
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "WANDB_MODE is offline"
    key = api_key()
    if not key:
        return "No W&B login found"
    address = base_url()
    when, what = _failed.get((address, key), (-REMEMBERED, ""))
    if time.monotonic() - when < REMEMBERED:
        return what
    what = _ask(address, key, patience)
    if what:
        _failed[address, key] = time.monotonic(), what
    return what


def remember(what: str) -> None:
    """Take the service as failing for a while, because of ``what``."""
    _failed[base_url(), api_key()] = time.monotonic(), what


def forget() -> None:
    """Ask again next time."""
    _failed.clear()


def api_key() -> str:
    """The API key in the environment, or the one that ``wandb login`` stored for the service's host; else empty."""
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    host = urlparse(base_url()).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return (found[2] or "") if found else ""


def base_url() -> str:
    """The address of the service, as the environment or W&B's settings say."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    import wandb

    return wandb.Settings().base_url


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
