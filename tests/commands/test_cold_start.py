"""Each command, started by an interpreter of its own as users do, in another folder than the checkout."""

import os
import subprocess
import sys

import pytest

from tests.processes import HANG, ROOT

COMMANDS = {
    "train": ("sae=topk", "name: topk"), "extract": ("splits=[val]", "- val"), "evaluate": ("split=val", "split: val"),
    "report": ("detailed=3", "detailed: 3"), "explore": ("app=search", "name: search"),
    "finetune": ("epochs=3", "epochs: 3"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_it_composes_its_config(name, tmp_path):
    override, shown = COMMANDS[name]
    command = [sys.executable, str(ROOT / f"{name}.py"), override, "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert not list(tmp_path.iterdir())
