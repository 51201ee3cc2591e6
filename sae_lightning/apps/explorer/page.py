"""The one page, with its style and scripts inside, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from sae_lightning import __version__

TEMPLATES = Path(__file__).resolve().parents[2] / "report" / "templates"
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
