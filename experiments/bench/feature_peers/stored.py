"""Writing every contender's files once, and finding them again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from experiments.bench.feature_peers import PEERS
from experiments.bench.feature_peers.synthetic import Features
from experiments.bench.pagecache import evict, files_in


def stored(names: Sequence[str], features: Features, home: Path, progress: Progress) -> dict[str, Path]:
    """Folder of each contender below ``home``, written unless an earlier run has left the same features there.

    ``sequential`` gets the folder of ours where there is one. A contender that cannot be imported is left out with a
    line that says why. Raises OSError when the disk has not enough room.
    """
    folders: dict[str, Path] = {}
    for name in progress.track(sorted(names, key=lambda name: name == "sequential"), description="Writing features"):
        if name == "sequential" and "ours" in folders:
            folders[name] = folders["ours"]
            continue
        folder = home / name.replace(" ", "-").replace(".", "")
        note = folder.with_suffix(".json")
        if not (note.is_file() and json.loads(note.read_text(encoding="utf-8")) == list(features.shape)):
            note.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(home).free
            if free < 1.1 * features.n_bytes:
                raise OSError(f"{home} has {free / 1e9:.1f} GB left, too few for {name}; lower --gb or move --data.")
            folder.mkdir()
            try:
                PEERS[name].write(features, folder)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                shutil.rmtree(folder)
                continue
            evict(files_in(folder))
            note.write_text(json.dumps(features.shape), encoding="utf-8")
        folders[name] = folder
    return folders
