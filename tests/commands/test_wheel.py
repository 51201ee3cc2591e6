"""The wheel holds all that the commands need: unpacked elsewhere, it trains, evaluates and reports."""

import json
import zipfile

import pytest

from tests.commands.installed import COMMANDS, check
from tests.processes import ROOT, run

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
WORK = """
import json, sys
from pathlib import Path

target, checkout, commands = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ours = ("sae_lightning", "hydra_plugins", "tests")
for name in [name for name in sys.modules if name.split(".")[0] in ours]:  # of the checkout
    del sys.modules[name]
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path = [target, *(path for path in sys.path if path and Path(path).resolve() != Path(checkout))]

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
Singleton._instances.pop(Plugins, None)
from sae_lightning.commands.main import main

for words in commands:
    assert main(words) == 0, words
loaded = {name: module for name, module in sys.modules.items()
          if name.split(".")[0] == "sae_lightning" or name == "hydra_plugins.packed_sweeper"}
print("from elsewhere:", [name for name, m in loaded.items() if m.__file__ and not m.__file__.startswith(target)])
assert "hydra_plugins.packed_sweeper" in loaded
"""


@pytest.fixture
def unpacked(tmp_path):
    """The wheel's files in a folder of their own."""
    settings, dist = tmp_path / "setup.cfg", tmp_path / "dist"
    settings.write_text(f"[build]\nbuild_base = {tmp_path}/build\n[egg_info]\negg_base = {tmp_path}\n")
    dist.mkdir()
    run("-c", BUILD, str(dist), cwd=ROOT, DIST_EXTRA_CONFIG=str(settings))
    [wheel] = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


@pytest.mark.slow
def test_an_installed_package_trains_evaluates_and_reports(unpacked, tmp_path):
    shipped = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {str(p.relative_to(unpacked / "sae_lightning/conf")) for p in unpacked.rglob("conf/**/*.yaml")} == shipped
    assert not (unpacked / "hydra_plugins" / "__init__.py").exists()
    assert (unpacked / "sae_lightning" / "py.typed").is_file()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = run("-c", WORK, str(unpacked), str(ROOT), json.dumps(COMMANDS), cwd=folder)
    check(folder, done.stdout)
    assert "from elsewhere: []" in done.stdout
