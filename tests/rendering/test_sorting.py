"""Tables of the pages are sorted in a browser, by mouse and by keyboard."""

import re
import shutil
import subprocess

import pytest

from sae_lightning.rendering.page import Section, page
from sae_lightning.rendering.table import Head, Table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

PRESS = 'heads[{}].dispatchEvent(new KeyboardEvent("keydown", {{ key: "{}" }}));'


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("done", "names", "sorts"), [
    ("heads[1].click();", "cabd", {1: "descending"}),  # scores: the highest first
    (PRESS.format(1, "Enter") + PRESS.format(1, " "), "bacd", {1: "ascending"}),
    ("heads[1].click(); " + PRESS.format(0, "Enter"), "abcd", {0: "ascending"}),  # words
])  # fmt: skip
def test_a_heading_sorts_and_says_how(tmp_path, done, names, sorts):
    table = Table("", "", [Head("name"), Head("images", ",.0f")], [["b", 2.0], ["d", None], ["a", 30.0], ["c", 1200.0]])
    script = f"<script>const heads = document.querySelectorAll('th'); {done}</script></body>"
    (tmp_path / "page.html").write_text(page("Sorted", [], [Section("One", table)]).replace("</body>", script))
    dumped = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert "".join(re.findall(r'<td class="words">(.)</td>', dumped)) == names
    heads = re.findall(r"<th(?: [^>]*)?>", dumped)
    assert {i: m[1] for i, head in enumerate(heads) if (m := re.search('aria-sort="([a-z]+)"', head))} == sorts
    assert all('tabindex="0"' in head for head in heads)
