"""What ``explore.py`` left beside the runs, gathered into the report: figures in it, pages beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lightning.apps.result import PAGE, RECORD, read_result


def applications(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """The applications of the runs ``folders``, and those over several runs of the same parent folder.

    Each has a ``title``, the ``runs`` it speaks of, its ``headlines`` and ``href``: its page, copied into a folder of
    ``<out>-pages`` beside the report ``out``. Results older than their run's SAE are left out.
    """
    found: list[tuple[str, Path | None, Path]] = []
    found += [(run.name, run / "sae.safetensors", run / "apps") for run in folders]
    found += [("several runs", None, parent / "apps") for parent in dict.fromkeys(run.parent for run in folders)]
    gathered = []
    for name, weights, folder in found:
        for record in sorted(folder.glob(f"*/{RECORD}")):
            old = weights is not None and record.stat().st_mtime < weights.stat().st_mtime
            if old or not (record.parent / PAGE).is_file():
                continue
            result = read_result(record.parent)
            pages = out.with_name(f"{out.stem}-pages") / f"{name.replace(' ', '-')}-{result.app}"
            pages.mkdir(parents=True, exist_ok=True)
            for page in record.parent.glob("*.html"):  # its page may link to others
                shutil.copyfile(page, pages / page.name)
            gathered.append({
                "title": result.title, "runs": name, "headlines": result.headlines,
                "href": f"{pages.parent.name}/{pages.name}/{PAGE}",
            })  # fmt: skip
    return gathered
