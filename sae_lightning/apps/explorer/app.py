"""The application explorer: a web page on this machine to browse latents, until Ctrl+C."""

from __future__ import annotations

import errno
import os
import socket
import webbrowser
from collections.abc import Sequence
from threading import Timer

import torch
import uvicorn
from omegaconf import DictConfig
from starlette.applications import Starlette

from sae_lightning.apps.app import app
from sae_lightning.apps.explorer.run_view import OpenRuns
from sae_lightning.apps.explorer.server import Explorer, make_app
from sae_lightning.apps.explorer.views import Captioner
from sae_lightning.runs.results import Result
from sae_lightning.runs.run import Run

HOST = "127.0.0.1"
LEAVING = 3  # seconds that requests under way get at the end


@app("explorer", together=True)
def run(runs: Sequence[Run], cfg: DictConfig) -> Result | None:
    """Serve the page over all runs until Ctrl+C; leaves nothing behind.

    The first run is opened before, the others when the page asks for them. ValueError for any host but 127.0.0.1, and
    for a port that is taken.
    """
    listening = listen(cfg.app.get("host", HOST), int(cfg.app.port))
    try:
        page = application(runs, cfg)
        address = f"http://{HOST}:{listening.getsockname()[1]}/"
        print(f"The explorer is at {address} and ends with Ctrl+C.", flush=True)
        prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
        if prefix:
            hub = f"{prefix}proxy/{listening.getsockname()[1]}/"
            print(f"Through this notebook hub it is at {hub}, with the hub's name in app.hosts.", flush=True)
        if cfg.app.browser:
            Timer(0.5, webbrowser.open, [address]).start()
        serve(page, listening)
    finally:
        listening.close()
    return None


def application(runs: Sequence[Run], cfg: DictConfig) -> Starlette:
    """The page's application, with the first run opened."""
    device = _device(cfg.get("device") or "cpu")
    open_runs, options = OpenRuns(runs, cfg.split, device), cfg.app
    open_runs[0]
    explorer = Explorer(
        open_runs, Captioner(options.get("vlm"), device), int(options.images_per_band), int(options.latents),
        int(options.neighbours), int(options.upload_mb * 2**20),
    )  # fmt: skip
    return make_app(explorer, [str(host) for host in options.get("hosts") or ()])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to 127.0.0.1; port 0 is a free one. ValueError for another host or a port that is taken."""
    if host not in (HOST, "localhost"):
        raise ValueError(
            f"The explorer listens on {HOST} only; app.host={host} is refused, because whoever reaches it can read all "
            f"pictures. From another machine use a tunnel: ssh -L 8000:{HOST}:<port> <this machine>."
        )
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listening.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is taken by another program" if taken else f"cannot be had ({error})"
        raise ValueError(f"Port {port} {why}; choose another app.port, or 0 for a free one.") from error
    return listening


def serve(app: Starlette, listening: socket.socket) -> None:
    """Answer requests on ``listening`` until Ctrl+C, which ends it without a traceback."""
    try:
        server_of(app).run(sockets=[listening])
    except KeyboardInterrupt:
        print("The explorer has ended.", flush=True)


def server_of(app: Starlette) -> uvicorn.Server:
    """The server of ``app``, without a log of requests."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
        lifespan="off", timeout_graceful_shutdown=LEAVING,
    )  # fmt: skip
    return uvicorn.Server(config)


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
