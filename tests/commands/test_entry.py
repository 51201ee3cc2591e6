"""What is typed, from the shell to the command: help, quotes, and one sentence for a mistake."""

from __future__ import annotations

import ast
import re
import runpy
import stat
import sys
import tomllib
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from sae_lightning.commands import entry
from sae_lightning.commands.entry import as_typed, told
from sae_lightning.commands.help import CONF, EXAMPLES, groups, help_of
from sae_lightning.commands.sentences import EXTRAS, sentence_of
from sae_lightning.settings.places import check_devices, check_file, check_folder
from tests.settings.typed import composed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def typing(monkeypatch, tmp_path, capsys):
    """``typing(command, *words)``: the exit status of the command in this process, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(command: str, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"{command}.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return run


def test_ctrl_c_is_a_sentence(typing, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "run", interrupted)
    assert typing("extract") == (130, "extract: stopped by Ctrl-C; what is finished is kept.\n")


# --- mistakes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("train", ["k=foo"], "k=foo must be a number above 0."),
        ("train", ["sea=topk"], "There is no setting sea; did you mean sae=topk?"),
        ("train", ["expnasion=8"], "There is no setting expnasion; did you mean expansion?"),
        ("train", ["trainer.limit_trian_batches=8"], "did you mean trainer.limit_train_batches?"),
        ("train", ["sae=topkk"], "There is no sae=topkk; did you mean topk? Choices: batchtopk, frozen_decoder, "),
        ("train", ["experiment=visabench_grid"], "did you mean visaebench_grid?"),
        ("train", ["+backbon=clip"], "There is no setting backbon; did you mean backbone?"),
        ("train", ["backbone@foo=clip"], "backbone@foo is not chosen here, so it cannot be changed"),
        ("train", ["data.path=x"], "data.path is not among the settings of what is chosen; add it with a plus"),
        ("train", ["+k=8"], "k is there already; leave out the plus."),
        ("train", ["~loss.foo"], "There is no setting loss.foo."),
        ("train", ["k=8,16"], "k=8,16 names several values; write k=[8,16] for a list, or add -m"),
        ("train", ["k=[8"], "k=[8 cannot be read"),
        (
            "train",
            ["+callbacks.mine=3"],
            "callbacks.mine=3 must be a section with the _target_ of a callback",
        ),
        ("train", ["--config-name=confg"], "There is no configuration=confg; did you mean config?"),
        ("finetune", ["finetune_model=resnet5"], "did you mean resnet50?"),
        ("evaluate", ["run=x"], "There is no setting run; did you mean runs?"),
        ("explore", ["app=namin"], "There is no app=namin; did you mean naming?"),
    ],
)
def test_a_mistake_is_one_sentence(typing, command, words, said):
    status, err = typing(command, *words)
    assert status == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1, err


def test_all_mistakes_of_a_sweep_are_listed_before_any_job(typing, tmp_path):
    status, err = typing("train", "-m", "k=8,foo,-1", f"paths.runs={tmp_path / 'runs'}")
    assert (status, err.splitlines()[0]) == (1, "2 settings cannot be:")
    assert err.count("must be a number above 0") == 2
    assert not (tmp_path / "runs").exists()
    status, err = typing("finetune", "-m", "mono_weight=0,foo")
    assert (status, err) == (1, "mono_weight=foo must be a number of at least 0.\n")


def test_the_traceback_is_there_for_who_asks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "k=foo"])
    with pytest.raises(ValueError, match="k=foo must be"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_an_error_that_no_sentence_explains_is_let_through():
    with pytest.raises(ZeroDivisionError), told("train", end=True):
        _ = 1 / 0
    import numpy as np

    with pytest.raises(ValueError, match="shape"), told("train", end=True):
        np.zeros(3).reshape(2, 2)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError) as caught:
        Path("/no/such/file").read_text()
    assert sentence_of(caught.value, "train") == "Cannot read or write /no/such/file: no such file or directory."


def test_a_package_of_an_extra_that_is_missing_is_named():
    with pytest.raises(ModuleNotFoundError) as caught:
        raise ModuleNotFoundError("No module named 'peft.x'", name="peft.x")
    said = "This needs peft, which is not installed; pip install 'sae-lightning[finetune]'."
    assert sentence_of(caught.value, "finetune") == said
    assert sentence_of(ModuleNotFoundError(name="mine"), "finetune") is None
    missing = MissingConfigException("", "hydra/launcher/submitit_slurm", [])
    assert "sae-lightning[slurm]" in str(sentence_of(missing, "train"))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(any(package in each for each in known[extra]) for package, extra in EXTRAS.items())


def test_an_interpolation_without_a_target_is_named():
    cfg = OmegaConf.create({"a": "${b}"})
    with pytest.raises(Exception, match="b") as caught:
        _ = cfg.a
    assert sentence_of(caught.value, "train") == "a: Interpolation key 'b' not found."


# --- quotes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "word", "value"),
    [
        ("evaluate", "runs=batchtopk-[cd]*", "batchtopk-[cd]*"),
        ("report", "grid=[a]*", "[a]*"),
        ("explore", "run=runs/my run (2)", "runs/my run (2)"),
        ("train", "paths.runs=it's here", "it's here"),
        ("evaluate", "runs=[a*,b]", ["a*", "b"]),
        ("evaluate", "runs=*", "*"),
        ("train", "expansion=16", 16),
    ],
)
def test_patterns_and_paths_work_as_typed(command, word, value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(as_typed(word, command))
    assert override.value() == value


def test_what_is_no_text_stays_as_it_is():
    assert as_typed("k=[8", "train") == "k=[8"
    assert as_typed("-m", "train") == "-m"
    assert as_typed("+trainer.accumulate_grad_batches=2", "train") == "++trainer.accumulate_grad_batches=2"
    assert as_typed("+k=8", "train") == "+k=8"


# --- help --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_the_commands_own_groups_settings_and_examples(command, monkeypatch):
    name = "config" if command == "train" else command
    for typed, shown in ((f"somewhere/{command}.py", f"python {command}.py"), ("x", f"sae-lightning {command}")):
        monkeypatch.setattr(sys, "argv", [typed])
        page = help_of(command, name, "About.")
        assert all(f"{shown} {example}" in page for example in EXAMPLES[command])
    own = composed(command)
    for key in own:
        assert f"{key}:" in page or f"{key}=" in page or own[key] in (None, {}), key
    for line in (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line[:1].isalpha() and "#" in line:
            assert line.split("#")[1] in page
    assert "hydra:" not in page
    assert "defaults:" not in page.split("Settings")[1].split("\n\n")[0]


def test_help_shows_the_choice_that_was_typed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help", "sae=jumprelu"])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    page = capsys.readouterr().out
    assert "kernel_name: rectangle  # rectangle, gaussian, silverman" in page
    assert "scale@data" in page
    assert "  data:\n    backbones: tiny\n    k: 16 " in page  # which a data set's file takes from its scale
    assert "BatchTopK [" not in page
    assert set(groups()) > {"sae", "data", "backbone"}


# --- places -------------------------------------------------------------------------------------------------
def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match=rf"paths\.runs={file}/runs cannot be written, since {file} is a file"):
        check_folder(file / "runs", "paths.runs")
    with pytest.raises(ValueError, match=r"paths\.runs=/proc/none/runs cannot be written \("):
        check_folder(Path("/proc/none/runs"), "paths.runs")
    with pytest.raises(ValueError, match=rf"out={tmp_path} is a folder; name a file in it"):
        check_file(tmp_path, "out")
    check_file(tmp_path / "new" / "page.html", "out")
    assert (tmp_path / "new").is_dir()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("name", ["device", "extract.device"])
def test_a_gpu_that_is_not_there_is_named(name):
    import torch

    cfg = composed("evaluate" if name == "device" else "extract").copy()
    OmegaConf.update(cfg, name, "cuda:77")
    with pytest.raises(ValueError, match=rf"{name}=cuda:77 but {torch.cuda.device_count()} GPUs are visible"):
        check_devices(cfg)


def test_report_finds_out_that_it_cannot_write_before_it_reads(typing, tmp_path):
    (tmp_path / "file").write_text("x")
    status, err = typing("report", f"out={tmp_path}/file/page.html")
    assert (status, err.count("\n")) == (1, 1)
    assert "cannot be written" in err


def test_text_is_utf8_whatever_the_locale():
    for file in (ROOT / "sae_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            opens = node.func.attr == "open" and modes and re.fullmatch("[rwax+t]+", modes[0])
            if opens or node.func.attr in ("read_text", "write_text"):
                given = {keyword.arg for keyword in node.keywords}
                assert "encoding" in given, f"{file}:{node.lineno} reads or writes text without its encoding"


def test_files_have_the_mode_of_the_umask(tmp_path):
    import os

    import torch

    from sae_lightning.files import write_tensors
    from sae_lightning.saes import TopK

    before = os.umask(0o022)
    try:
        TopK(4, 8, k=2).save(tmp_path)
        write_tensors(tmp_path / "scores.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o644}, modes
