"""What keeps other sites and other machines away from the page, and requests small."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_lightning.apps.explorer.uploads import RefusedError

HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware: refuses other hosts and what another site's page sends; adds the headers of every answer.

    A request must be for 127.0.0.1, localhost or one of ``hosts``, names or patterns under which a proxy shows the
    page. Anything but GET and HEAD must come from the page itself: with its ``Origin``, or (not from a browser) with
    none. ``policy`` is the Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, policy: str, hosts: Sequence[str] = ()) -> None:
        self.app, self.headers, self.hosts = app, HEADERS | {"content-security-policy": policy}, tuple(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        headers, answer = Headers(scope=scope), None
        asked_for = _name(f"//{headers.get('host', '')}")
        if not _known(asked_for, (*HOSTS, *self.hosts)):
            sentence = (
                f"The explorer was asked for as '{asked_for[:100]}', which it does not know. If that is a proxy of "
                "yours, start it with that name in app.hosts."
            )
            answer = JSONResponse({"error": sentence}, 400)
        elif scope["method"] not in ("GET", "HEAD") and not same_origin(headers, self.hosts):
            sentence = (
                "This came from another site; only the explorer's own page may. Behind a proxy, name it in app.hosts."
            )
            answer = JSONResponse({"error": sentence}, 403)
        await (answer or self.app)(scope, receive, with_headers)


def same_origin(headers: Headers, hosts: Sequence[str] = ()) -> bool:
    """Whether a request's ``Origin`` and ``Sec-Fetch-Site``, where it has them, are those of the page itself.

    Behind a proxy that is one of ``hosts`` the page has its name and https, and ``Host`` may be this machine's.
    """
    origin, site, host = headers.get("origin"), headers.get("sec-fetch-site"), headers.get("host", "")
    if site not in (None, "same-origin", "none"):
        return False
    if origin in (None, f"http://{host}"):
        return True
    name, asked_for = _name(origin), _name(f"//{host}")
    if name == asked_for:
        return _known(name, hosts)
    return asked_for in HOSTS and _known(name, [one for one in hosts if one != "*"])


def _name(address: str | None) -> str:
    """The host in an address, without its port; empty where there is none."""
    try:
        return urlsplit(address or "").hostname or ""
    except ValueError:
        return ""


def _known(name: str, hosts: Sequence[str]) -> bool:
    return any(fnmatchcase(name, one.lower()) for one in hosts)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; RefusedError with 413 as soon as it is known to exceed ``limit`` bytes."""
    too_large = RefusedError(413, f"This is more than the {limit / 2**20:g} MB that the page takes.")
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)
