"""Results of applications in the report."""

import os

from sae_lightning.files import write_json
from sae_lightning.report.page import applications
from sae_lightning.runs.results import PAGE, RECORD


def leave(folder, app):
    folder.mkdir(parents=True)
    (folder / PAGE).write_text(f"<p>{app}</p>")
    line = {"what": "share named", "ours": 0.5, "baseline": 0.1, "against": "chance", "interval": [0.4, 0.6]}
    write_json(folder / RECORD, {"app": app, "title": app.title(), "headlines": [line]})


def run(folder):
    folder.mkdir(parents=True)
    (folder / "sae.safetensors").touch()
    return folder


def test_results_of_runs_and_of_their_folder_are_gathered_with_their_pages(tmp_path):
    runs = [run(tmp_path / "runs" / name) for name in ("a", "b")]
    leave(runs[0] / "apps" / "naming", "naming")
    leave(tmp_path / "runs" / "apps" / "stability", "stability")
    (tmp_path / "runs" / "apps" / "stability" / "more.html").write_text("more")
    found = applications(runs, tmp_path / "reports" / "report.html")
    first, figures, second, _ = found
    assert [(f.aside, f.text) for f in (first, second)] == [("a", "Naming"), ("several runs", "Stability")]
    assert figures.texts() == [["share named", "0.5", "0.4 to 0.6", "0.1", "chance"]]
    pages = [(tmp_path / "reports" / f.href) for f in (first, second)]
    assert [page.read_text() for page in pages] == ["<p>naming</p>", "<p>stability</p>"]
    assert pages[1].with_name("more.html").read_text() == "more"


def test_a_result_older_than_the_sae_or_without_its_page_is_left_out(tmp_path):
    old = run(tmp_path / "runs" / "a")
    leave(old / "apps" / "naming", "naming")
    leave(old / "apps" / "search", "search")
    (old / "apps" / "search" / PAGE).unlink()
    later = (old / "apps" / "naming" / RECORD).stat().st_mtime + 10
    os.utime(old / "sae.safetensors", (later, later))
    assert applications([old], tmp_path / "report.html") == []
    os.utime(old / "sae.safetensors", (later - 20, later - 20))
    assert [f.text for f in applications([old], tmp_path / "report.html")[::2]] == ["Naming"]
