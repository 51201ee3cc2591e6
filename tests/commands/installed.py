"""What an installed package does in a folder of its own: ``python -m tests.commands.installed DIST PYTHON FOLDER``.

With these arguments it installs the wheel in ``DIST`` for ``PYTHON``, the interpreter of an empty environment, and
runs the commands in ``FOLDER``, as ``make wheel-check`` does; ``test_wheel.py`` does nearly the same in seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

COMMANDS = (
    ("train", "-m", "sae=topk,batchtopk", "+data.limit=96", "expansion=2", "k=8", "batch_size=512",
     "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
    ("evaluate", "split=val"),
    ("report",),
    ("runs",),
    ("store", "ls"),
)  # fmt: skip


def check(folder: Path, said: str) -> None:
    """AssertionError unless COMMANDS have left runs, scores and a report in ``folder``, and ``said`` what they do."""
    runs = [path.parent for path in (folder / "runs").glob("*/result.json")]
    assert sorted(run.name.split("-")[0] for run in runs) == ["batchtopk", "topk"]
    page = (folder / "reports" / "report.html").read_text(encoding="utf-8")
    for run in runs:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        assert 0.1 < result["val"]["explained_variance"] < 1
        scores = pd.read_parquet(run / "scores.parquet").set_index("metric")["value"]
        assert 0 < scores["explained_variance"] < 1
        assert 0 < scores["monoscore"] < 1
        assert said.count(run.name) >= 3  # the closing table, the scores, the list of runs
        assert run.name in page
    assert page.count("data:image/") > 4
    assert "2 runs: 2 finished" in said
    assert "dinov2 (tiny)" in said


def main(dist: str, python: str, folder: str) -> None:
    """Install and check."""
    [wheel] = Path(dist).glob("*.whl")
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    install = ["uv", "pip", "install", "-q", "--python", python, "-c", str(constraints), str(wheel)]
    subprocess.run(install, check=True)
    free = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    said = ""
    for words in COMMANDS:
        command = [str(Path(python).with_name("sae-lightning")), *words]
        done = subprocess.run(command, cwd=folder, env=free, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, end="", flush=True)
        said += done.stdout
    check(Path(folder), said)
    print(f"{wheel.name} trains, evaluates and reports outside of the checkout.")


if __name__ == "__main__":
    main(*sys.argv[1:])
