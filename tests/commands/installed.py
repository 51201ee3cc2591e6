"""What an installed package does in a folder of its own; ``make wheel-check`` runs this file.

It builds the wheel, installs it into an empty environment outside of the checkout with all that it depends on, and runs
the commands there. ``test_wheel.py`` does the same in seconds, with the packages of the tests' own environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
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
        assert f"{scores['explained_variance']:.3f}" in page
    assert page.count("data:image/") > 4
    assert "2 runs: 2 finished" in said
    assert "dinov2 (tiny)" in said


def main() -> None:
    """Build, install and check."""
    with tempfile.TemporaryDirectory(prefix="sae-lightning-wheel-") as made:
        own, elsewhere = Path(made) / "venv", Path(made) / "elsewhere"
        elsewhere.mkdir()
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", made, str(ROOT)], check=True)
        shutil.rmtree(ROOT / "build", ignore_errors=True)
        [wheel] = Path(made).glob("*.whl")
        print(f"Installing {wheel.name} into an empty environment …", flush=True)
        venv.create(own, with_pip=True)
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        pip = [str(own / "bin" / "python"), "-m", "pip"] if uv is None else [uv, "pip"]
        into = [] if uv is None else ["--python", str(own)]
        subprocess.run([*pip, "install", "-q", *into, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
        free = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        said = ""
        for words in COMMANDS:
            command = [str(own / "bin" / "sae-lightning"), *words]
            done = subprocess.run(command, cwd=elsewhere, env=free, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout, end="", flush=True)
            said += done.stdout
        check(elsewhere, said)
        print(f"{wheel.name} trains, evaluates and reports outside of the checkout.")


if __name__ == "__main__":
    main()
