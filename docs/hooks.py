"""What mkdocs needs beside its plugins: files of the repository that pages show or lead to, as parts of the site.

Links in the sources are those that a reader of the repository follows: ``../experiments/variants/plane.png``. Pictures
and Markdown outside of ``docs/`` become files of the site, README its first page; a link to any other file keeps its
text alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/**/*.md", "examples/**/*.md")
PICTURES = ("experiments/**/*.png", "experiments/**/*.svg", "experiments/**/*.webp", "experiments/**/*.jpg")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside of ``docs/``, under its path in the repository."""
    from mkdocs.structure.files import File

    for pattern in (*PAGES, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them: pages of ``docs/`` lie at its top, beside ``experiments/`` and the rest."""
    at = page.file.src_uri
    inside = (ROOT / "docs" / at).is_file()
    folder = posixpath.dirname(f"docs/{at}" if inside else at)

    def link(found: re.Match[str]) -> str:
        shown, text, target = found[1], found[2], found[3]
        path, mark, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, path))
        name = place.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            return found[0] if (ROOT / place).exists() is False else text
        here = posixpath.relpath(name, posixpath.dirname(at) or ".")
        return f"{shown}[{text}]({here}{mark}{anchor})"

    return LINK.sub(link, markdown)
