"""The documentation: its Python examples run, its notebooks run, and the site builds without a warning."""

import ast
import json
import re
from pathlib import Path

import pytest

import sae_lightning.api
from sae_lightning.api import extract, fit

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "```python" in page.read_text(encoding="utf-8"))
RUN = [ROOT / "README.md", ROOT / "docs" / "python.md"]  # the others' examples need what a reader has trained
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def blocks(text: str) -> str:
    """The Python of a page, each line at its own number, so that errors lead to it."""
    inside, lines = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN], ids=lambda page: page.stem)
def test_the_examples_of_a_page_name_what_there_is(page):
    tree = ast.parse(blocks(page.read_text(encoding="utf-8")), str(page))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(page), "exec"), {})


@pytest.fixture
def brief(tmp_path, monkeypatch):
    """An empty folder, in which trainings take one epoch, on a few of the demo's pictures."""

    def few(images, *arguments, **options):
        return extract(images, *arguments, **{"settings": {"data.limit": 100}} | options)

    def short(*arguments, **options):
        return fit(*arguments, **options | {"epochs": 1})

    monkeypatch.setattr(sae_lightning.api, "extract", few)
    monkeypatch.setattr(sae_lightning.api, "fit", short)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, brief):
    exec(compile(blocks(page.read_text(encoding="utf-8")), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(notebook, brief):
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or not re.search(r"\bprint\(|\.round\(", "".join(cell["source"])) for cell in cells)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{notebook.stem}, cell {number}", "exec"), names)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    commands = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config("mkdocs.yml", strict=True, site_dir=str(tmp_path / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    commands.build(config)  # which ends with an error after a warning
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert 'id="sae_lightning.api.fit"' in page
