"""The folders of the package stand on each other in one order; no module reaches itself through its imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sae_lightning"
# A folder, or a module of the package's root, imports itself and what stands before it: docs/architecture.md.
ORDER = (
    "registry", "files", "settings", "distributed", "kernels", "rendering", "saes", "interop", "data", "backbones",
    "features", "metrics", "vlms", "runs", "training", "finetuning", "evaluation", "analysis", "apps", "report",
    "commands", "api",
)  # fmt: skip
LIGHTNING = {"training", "finetuning"}  # the folders that may load it


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in sorted(names.items())}


def imported(file: Path) -> Iterator[str]:
    """What ``file`` imports, also inside functions and for types alone; ``a.b`` of ``from a import b``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def imports() -> networkx.DiGraph:
    """Arrows from each module to those of the package that it imports."""
    known, graph = modules(), networkx.DiGraph()
    for name, file in known.items():
        for target in imported(file):
            found = target if target in known else target.rpartition(".")[0]
            if found in known and found != name:
                graph.add_edge(name, found)
    return graph


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_module_reaches_itself(imports):
    tied = [sorted(group) for group in networkx.strongly_connected_components(imports) if len(group) > 1]
    assert tied == []


def test_every_folder_stands_in_the_order():
    assert {folder(name) for name in modules()} == {"", *ORDER}


def test_imports_go_one_way(imports):
    rank = {name: i for i, name in enumerate(("", *ORDER))}
    upward = [f"{a} -> {b}" for a, b in imports.edges if folder(a) and rank[folder(a)] < rank[folder(b)]]
    assert upward == []


def test_only_training_and_fine_tuning_load_lightning():
    for name, file in modules().items():
        if folder(name) not in LIGHTNING:
            assert not [x for x in imported(file) if x.split(".")[0] in ("lightning", "pytorch_lightning")], name
