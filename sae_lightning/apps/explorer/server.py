"""The page's server: routes to JSON and WebP. No path of any request names a file; all things go by number."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sae_lightning import __version__
from sae_lightning.apps.explorer import views
from sae_lightning.apps.explorer.guards import Guard, read_body
from sae_lightning.apps.explorer.run_view import KINDS, OpenRuns, PictureRef, RunView
from sae_lightning.apps.explorer.uploads import RefusedError, read_picture
from sae_lightning.apps.explorer.views import Captioner, choose, turned_view
from sae_lightning.rendering.pictures import heat, overlay, thumbnail

TEMPLATES = Path(__file__).resolve().parents[2] / "rendering" / "templates"

PARTS = TEMPLATES / "apps" / "explorer"

SCRIPTS = ("dom.js", "state.js", "list.js", "latent.js", "picture.js", "main.js")  # one after another, in one scope


def page() -> tuple[str, str]:
    """The page's HTML, and its Content-Security-Policy, which names style and script by their hashes."""
    style = (TEMPLATES / "style.html").read_text(encoding="utf-8") + (PARTS / "page.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    template = jinja2.Environment(autoescape=True).from_string((PARTS / "page.html").read_text(encoding="utf-8"))
    html = template.render(style=Markup(style), script=Markup(script), version=__version__)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


SMALL, LARGE, WHOLE = 96, 288, 1024  # pixels at most: in lists, in galleries, and alone

SIZES = (SMALL, LARGE, WHOLE)


def webp(picture: Image.Image) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88, method=4)
    return buffer.getvalue()


PAGED = 200  # lines of the list at once, at most

CACHED = 4096  # pictures as WebP

SMALL_BODY = 4096  # bytes of a request in JSON

WORDS = {404: "There is no such page.", 405: "This cannot be done here."}


class Explorer:
    """Answers of the page over ``open_runs``: ``per_band`` images a band, ``n_latents`` a picture, ``n_near`` nearest.

    ``upload_bytes`` limits uploads. Methods take a request and run in threads, those that read its body excepted.
    """

    def __init__(
        self, open_runs: OpenRuns, captioner: Captioner, per_band: int = 8, n_latents: int = 16, n_near: int = 8,
        upload_bytes: int = 16 << 20,
    ) -> None:  # fmt: skip
        self.open_runs, self.captioner = open_runs, captioner
        self.per_band, self.n_latents, self.n_near, self.upload_bytes = per_band, n_latents, n_near, upload_bytes
        self._webp = lru_cache(CACHED)(self._draw)

    def runs(self, request: Request) -> Response:
        """All runs by number, without opening them."""
        return JSONResponse([{"title": run.label, "name": run.name} for run in self.open_runs.runs])

    def run(self, request: Request) -> Response:
        """One run, opened if need be."""
        return JSONResponse(views.run_view(self._run(request)))

    def latents(self, request: Request) -> Response:
        """A part of the list: ``sort``, ``order``, ``text``, ``label``, ``least``, ``start``, ``count``."""
        run, q = self._run(request), request.query_params
        columns = run.figures.columns
        sort, order = q.get("sort", next(iter(columns))), q.get("order", "desc")
        if sort == "latent":
            values = np.arange(run.d_sae, dtype=np.float64)
        elif sort in columns:
            values = columns[sort].values
        else:
            raise RefusedError(400, f"Latents have no '{sort[:40]}'; sort by one of latent, {', '.join(columns)}.")
        if order not in ("asc", "desc"):
            raise RefusedError(400, "The order is asc or desc.")
        label = _whole(q, "label", -1, len(run.class_names) - 1, low=-1)
        found = choose(
            values, run.names, run.figures.label, run.figures.images_fired, text=q.get("text", "")[:200],
            of_class=None if label < 0 else label, at_least=_whole(q, "least", 0), descending=order == "desc",
        )  # fmt: skip
        start, count = _whole(q, "start", 0), _whole(q, "count", 50, PAGED)
        rows = [views.latent_row(run, latent) for latent in found[start : start + count].tolist()]
        return JSONResponse({"total": len(found), "start": start, "rows": rows})

    def latent(self, request: Request) -> Response:
        """All of one latent."""
        run = self._run(request)
        return JSONResponse(views.latent_view(run, self._latent(request, run), self.per_band))

    def picture(self, request: Request) -> Response:
        """A picture and its strongest latents, and the one that ``latent`` names."""
        run, picked = self._run(request), self._picked(request)
        also = _whole(request.query_params, "latent", -1, run.d_sae - 1, low=-1)
        return JSONResponse(views.picture_view(run, picked, self.n_latents, None if also < 0 else also))

    def plain(self, request: Request) -> Response:
        """A picture as WebP."""
        return self._image(request, None)

    def over(self, request: Request) -> Response:
        """A picture as WebP with the patches outlined on which a latent fires; tinted with ``heat=1``."""
        tinted = _whole(request.query_params, "heat", 0, 1) == 1
        return self._image(request, self._latent(request, self._run(request)), tinted)

    def captions(self, request: Request) -> Response:
        """Whether captions can be had for a run, and why not."""
        return JSONResponse({"why_not": self.captioner.why_not(self._run(request))})

    async def upload(self, request: Request) -> Response:
        """Keep the picture that is the request's body; its number."""
        data = await read_body(request, self.upload_bytes)
        picture = await run_in_threadpool(read_picture, data)
        return JSONResponse({"upload": self.open_runs.uploads.add(picture)})

    async def turn(self, request: Request) -> Response:
        """The nearest pictures before and after a latent of a picture is turned: ``{"latent": 3, "value": 1.5}``."""
        return await self._turned(request, partial(turned_view, n=self.n_near))

    async def caption(self, request: Request) -> Response:
        """The captions of a picture before and after, likewise."""
        return await self._turned(request, self.captioner.view)

    async def _turned(self, request: Request, view: Any) -> Response:
        asked = await read_body(request, SMALL_BODY)
        latent, value = _turn(asked)
        run = await run_in_threadpool(self._run, request)
        return JSONResponse(await run_in_threadpool(view, run, self._picked(request), latent, value))

    # --- what requests name -------------------------------------------------------------------------
    def _run(self, request: Request) -> RunView:
        return self.open_runs[request.path_params["run"]]

    def _latent(self, request: Request, run: RunView) -> int:
        return run.check_latent(request.path_params["latent"])

    def _picked(self, request: Request) -> PictureRef:
        kind = request.path_params["kind"]
        if kind not in KINDS:
            raise RefusedError(404, WORDS[404])
        return PictureRef(kind, request.path_params["number"])

    def _image(self, request: Request, latent: int | None, tinted: bool = False) -> Response:
        size = _whole(request.query_params, "size", SIZES[0], max(SIZES))
        if size not in SIZES:
            raise RefusedError(400, f"Pictures come in sizes {', '.join(map(str, SIZES))}.")
        picked = self._picked(request)
        data = self._webp(request.path_params["run"], picked, size, latent, tinted)
        # numbers of uploads begin anew with each server
        kept = "no-store" if picked.kind == "uploads" else "private, max-age=86400"
        return Response(data, media_type="image/webp", headers={"cache-control": kept})

    def _draw(self, run: int, picked: PictureRef, size: int, latent: int | None, tinted: bool) -> bytes:
        view = self.open_runs[run]
        picture = thumbnail(view.seen(view.picture(picked)), size)
        if latent is not None:
            picture = (heat if tinted else overlay)(picture, view.activation(picked, latent))
        return webp(picture)


def make_app(explorer: Explorer, hosts: Sequence[str] = ()) -> Starlette:
    """The ASGI application: the page, its answers, and the guards around them, who also know ``hosts``."""
    html, policy = page()

    def front(request: Request) -> Response:
        return HTMLResponse(html, headers={"cache-control": "no-cache"})

    run, latent = "/api/runs/{run:int}", "/latents/{latent:int}"
    picture = run + "/{kind}/{number:int}"  # of images or uploads
    routes = [
        Route("/", front),
        Route("/api/runs", explorer.runs),
        Route(run, explorer.run),
        Route(f"{run}/latents", explorer.latents),
        Route(f"{run}{latent}", explorer.latent),
        Route(f"{run}/captions", explorer.captions),
        Route("/api/uploads", explorer.upload, methods=["POST"]),
        Route(picture, explorer.picture),
        Route(f"{picture}/picture", explorer.plain),
        Route(f"{picture}/over/{{latent:int}}", explorer.over),
        Route(f"{picture}/turn", explorer.turn, methods=["POST"]),
        Route(f"{picture}/caption", explorer.caption, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Guard, policy=policy, hosts=hosts),
        ],
        exception_handlers={RefusedError: _refused, HTTPException: _no_route, Exception: _failed},
    )


def _whole(query: Mapping[str, str], name: str, default: int, high: int = 10**9, low: int = 0) -> int:
    text = query.get(name)
    if text is None:
        return default
    value = int(text) if len(text) < 12 and text.removeprefix("-").isdigit() and text.isascii() else None
    if value is None or not low <= value <= high:
        raise RefusedError(400, f"{name} must be a whole number from {low} to {high}.")
    return value


def _turn(data: bytes) -> tuple[int, float]:
    try:
        asked = json.loads(data)
        latent, value = asked["latent"], float(asked["value"])
        if type(latent) is not int or not math.isfinite(value) or abs(value) > 1e6:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        sentence = 'Send {"latent": 3, "value": 1.5}: a latent\'s number and a value up to a million.'
        raise RefusedError(400, sentence) from error
    return latent, value


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": str(error)}, error.status)


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": WORDS.get(error.status_code, error.detail)}, error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"Something failed inside: {type(error).__name__}; the terminal says more."}, 500)
