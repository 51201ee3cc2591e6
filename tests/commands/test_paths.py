"""Paths are absolute from where the command was typed, wherever its jobs run."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import sae_lightning.settings.resolvers  # noqa: F401  registers a resolver that configs use
from sae_lightning.commands.paths import absolute, located
from tests.configs import composed


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder where commands are typed, with some files; the home folder is ``home``, and jobs run elsewhere."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for name in ("typed/mydata", "typed/runs/run-1", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "typed/words.txt").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "typed"


def typed(here, root, *overrides):
    return located(composed(root, *overrides), here)


def test_what_is_given_and_what_is_default(here, capsys):
    cfg = typed(here, "config", "data=folder", "data.path=pictures", "paths.runs='~/runs'", "logger=wandb")
    assert cfg.paths == {"stores": str(here / "stores"), "runs": "/home/me/runs", "reports": str(here / "reports")}
    assert (cfg.data.path, cfg.data.name, cfg.logger.wandb.folder) == (str(here / "pictures"), "folder", str(here))
    assert "runs in /home/me/runs" in capsys.readouterr().out
    located(cfg, here / "deeper")
    assert cfg.paths.stores == str(here / "stores")
    assert capsys.readouterr().out == ""  # said once


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("paths.runs", "$SCRATCH/x", "/scratch/x"),
        ("paths.runs", "${stores}/runs", "HERE/s/runs"),
        ("paths.runs", "./a//b/../c/", "HERE/a/c"),
        ("paths.runs", "./~", "HERE/~"),
        ("paths.runs", "it's here/ü", "HERE/it's here/ü"),
        ("data.path", "a/b-{0000..0099}.tar", "HERE/a/b-{0000..0099}.tar"),
        ("data.path", "https://host/a.tar", "https://host/a.tar"),
        ("data.classes", "words.txt", "HERE/words.txt"),
        ("data.classes", ["cat", "dog"], ["cat", "dog"]),
        ("data.val", "~/b", "/home/me/b"),
        ("data.id", "mydata", "HERE/mydata"),
        ("data.id", "someone/dataset", "someone/dataset"),
        ("backbone.published.model", "~/vit", "/home/me/vit"),
        ("backbone.published.model", "org/vit", "org/vit"),
        ("similarity.published.weights", "~/w", "/home/me/w"),
        ("callbacks.best.dirpath", "best", "HERE/best"),
        ("similarity_store.train", "a", "HERE/a"),
        ("similarity_store", "a", "HERE/a"),
        ("metrics.cross_domain.sets.dtd.path", "a", "HERE/a"),
        ("metrics.monosemanticity.store", None, None),
        ("out", "~/page.html", "/home/me/page.html"),
        ("run", "runs/run-1", "HERE/runs/run-1"),
        ("run", "runs/*", "HERE/runs/*"),
        ("run", "topk-*", "topk-*"),
        ("run", ["~/r", "topk-1"], ["/home/me/r", "topk-1"]),
        ("app.vlm.weights", "bundled", "bundled"),
        ("app.vocabulary", ["demo", "words.txt"], ["demo", "HERE/words.txt"]),
        ("app.queries", [3, "mydata"], [3, "HERE/mydata"]),
        ("app.judgements", ["a.csv", "~/b.csv"], ["HERE/a.csv", "/home/me/b.csv"]),
    ],
)
def test_every_path_counts_from_where_the_command_was_typed(key, given, expected, here):
    cfg = OmegaConf.create({"stores": "s"})
    OmegaConf.update(cfg, key, given)
    found = OmegaConf.select(located(cfg, here), key)

    def of_here(text):
        return text.replace("HERE", str(here)) if isinstance(text, str) else text

    assert found == ([of_here(one) for one in expected] if isinstance(expected, list) else of_here(expected))


def test_names_that_follow_from_a_path_stay_short(here):
    assert typed(here, "config", "data=hf", "data.id=mydata").data.name == "mydata"
    assert typed(here, "config", "backbone=timm", "backbone.published.model=./mydata").backbone.name == "mydata"


def test_a_home_folder_that_is_not_known_is_no_folder_name(here):
    with pytest.raises(ValueError, match=r"paths\.runs=~nobody-here/x begins with a home folder"):
        typed(here, "config", "paths.runs='~nobody-here/x'")
    assert list(Path.cwd().iterdir()) == []


def test_without_hydra_the_folder_is_the_current_one(here):
    assert located(OmegaConf.create({"paths": {"runs": "a"}})).paths.runs == str(Path.cwd() / "a")
    assert absolute("a", here) == os.path.join(here, "a")
