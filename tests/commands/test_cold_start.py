"""Each command, started by an interpreter of its own as users do, in another folder than the checkout.

What it imports on the way decides how long a user waits; the tests name it rather than measure seconds.
"""

import ast
import os
import subprocess
import sys

import pytest

from sae_lightning.commands.train import first_line
from tests.processes import HANG, ROOT

COMMANDS = {
    "train": ("sae=topk", "name: topk"), "extract": ("splits=[val]", "- val"), "evaluate": ("split=val", "split: val"),
    "report": ("detailed=3", "detailed: 3"), "explore": ("app=search", "name: search"),
    "finetune": ("epochs=3", "epochs: 3"),
}  # fmt: skip
SLOW = {"lightning", "pytorch_lightning", "torchvision", "timm", "transformers", "wandb", "pandas", "sklearn", "scipy",
        "matplotlib", "datasets", "peft", "statsmodels"}  # fmt: skip
UP_TO_TRAINING = """
import os, sys, types

class Ends(types.ModuleType):
    def __getattr__(self, name):
        if name != "train":
            raise AttributeError(name)
        print("loaded:", *{name.split(".")[0] for name in sys.modules}, flush=True)
        os._exit(0)

sys.modules["sae_lightning.training.fit"] = Ends("fit")  # in place of what trains
from sae_lightning.commands.train import main
main()
"""


def cold(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in an interpreter that has imported nothing."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=HANG)


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The packages that a process with ``-X importtime`` has imported."""
    return {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


def test_only_those_who_train_import_lightning():
    """So runs are named and opened, evaluated and reported on without it; publish.py is for loggers alone."""
    may = [ROOT / "sae_lightning" / name for name in ("training", "finetuning", "report/publish.py")]
    for path in (ROOT / "sae_lightning").rglob("*.py"):
        if not any(path.is_relative_to(place) for place in may):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top of the module
                names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.startswith(("lightning", "sae_lightning.training"))], path


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_it_composes_its_config_without_what_it_works_with(name, tmp_path):
    override, shown = COMMANDS[name]
    done = cold("-X", "importtime", str(ROOT / f"{name}.py"), override, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert not list(tmp_path.iterdir())
    assert "hydra" in imported(done)
    assert not imported(done) & (SLOW | {"torch", "numpy", "rich"})


@pytest.mark.slow
def test_help_needs_no_hydra(tmp_path):
    done = cold("-X", "importtime", str(ROOT / "train.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage: python train.py" in done.stdout
    assert not imported(done) & (SLOW | {"torch", "numpy", "hydra", "omegaconf"})


@pytest.mark.slow
def test_a_sweep_says_what_it_trains_before_it_imports_what_trains(tmp_path):
    done = cold("-c", UP_TO_TRAINING, "-m", "backbone=mae", "sae=topk,batchtopk", cwd=tmp_path)
    assert "Training 2 SAEs (topk, batchtopk) on mae (tiny) patch-L4, 320,000 tokens, into runs\n" in done.stdout
    loaded = done.stdout.splitlines()[-1].split()
    assert "torch" in loaded
    assert not set(loaded) & SLOW - {"scipy", "pandas"}  # which read scores and the bundled pictures


def test_what_a_run_is_trained_on_is_said_as_far_as_it_is_known(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, nothing = [tmp_path / "runs" / "topk-1"], f"paths.stores={tmp_path / 'stores'}"
    assert first_line([config("sae=topk")], folder).startswith("Training topk on deit (tiny) patch-L4, ")
    assert first_line([config("sae=topk")], folder).splitlines()[0].endswith(" tokens, into runs/topk-1")
    short, longer = (first_line([config("batch_size=64", f"trainer.max_epochs={n}")], folder) for n in (1, 500))
    assert "fewer than 300 leave an SAE undertrained; give it more pictures, trainer.max_epochs=" in short
    assert "undertrained" not in longer
    published = ("backbone=mae", "backbone.size=published", "backbone.published.pretrained=false")
    assert "mae (ViT-B/16, random weights) patch-L11, 32 images, into" in first_line([config(*published)], folder)
    assert "deit (tiny) patch-L4 of folder, into" in first_line([config("subset.per_class=2", nothing)], folder)
