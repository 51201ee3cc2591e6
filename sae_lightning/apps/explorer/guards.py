"""What keeps other sites and other machines away from the page, and requests small."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_lightning.apps.explorer.refused import RefusedError

HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware: refuses what another site's page sends, and adds the headers of every answer.

    Anything but GET and HEAD must come from the page itself: with an ``Origin`` of this host and port, or (not from a
    browser) with none. ``policy`` is the Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self.app, self.headers = app, HEADERS | {"content-security-policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD") and not same_origin(headers):
            answer = JSONResponse({"error": "This came from another site; only the explorer's own page may."}, 403)
            await answer(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)


def same_origin(headers: Headers) -> bool:
    """Whether a request's ``Origin`` and ``Sec-Fetch-Site``, where it has them, are those of the page itself."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    return origin in (None, f"http://{headers.get('host', '')}") and site in (None, "same-origin", "none")


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
