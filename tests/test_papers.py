"""The pages on the papers name files and configs that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "papers").glob("*.md"))
GROUPS = "|".join(sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"`([\w./-]+\.(?:py|yaml|md|json|csv))`", text)
    files += [f"docs/papers/{link}" for link in re.findall(r"\]\(([\w./-]+\.md)", text)]
    choices = re.findall(rf"(?<![\w.@])({GROUPS})=([\w/]+)", text)
    files += [f"conf/{group}/{name}.yaml" for group, name in choices]
    assert not [name for name in files if not (ROOT / name).is_file()]
    assert page.stem == "index" or len(files) > 10
