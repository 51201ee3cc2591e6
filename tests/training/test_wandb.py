"""W&B takes a training's metrics where it can be reached, and never stops or holds up a training where it cannot."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from sae_lightning.training import wandb_run
from sae_lightning.training.loggers import sweep_of, write_sweep_options
from sae_lightning.training.wandb_run import WandbRun, finish, log_artefact, open_run
from tests.configs import CONF
from tests.processes import HANG, Command, wait_for
from tests.training.wandb_files import KEY, Service, offline_run, records

ROOT = CONF.parent


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """No login, and nothing that W&B remembers of an earlier test."""
    import wandb

    wandb.teardown()
    wandb_run.forget()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.teardown()


@pytest.fixture
def login(monkeypatch):
    """``login(url)``: a key for the service there."""

    def to(url: str, key: str = KEY) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", key)

    return to


def options(**changes) -> dict:
    plain = yaml.safe_load((CONF / "logger" / "wandb.yaml").read_text())["wandb"]
    return plain | {"folder": "/nowhere", "patience": 5, "finish": 5} | changes


def written(run: Path) -> Path:
    """The file of an offline run, after W&B has written all of it, which it does not wait for by itself."""
    import wandb

    wandb.teardown()
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    return file


def make(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    return folder / name


def log(run: Path, steps: range, **changes) -> None:
    """One attempt at a training that logs its steps."""
    logger = WandbRun(open_run(options(**changes), run, {"k": 16, "optimizer/lr": 0.001}, ["clip"]), run)
    for step in steps:
        logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
        logger.log_metrics({"speed/wait_share": 0.5}, step)
    finish(logger.run)


@pytest.mark.slow
def test_trainings_side_by_side_each_have_their_run(tmp_path, login):
    service = Service()
    login(service.url)
    threads = [
        threading.Thread(target=log, args=(make(tmp_path, f"run-{i}"), range(i, 5)), kwargs={"group": "sweep"})
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        rows = service.rows(f"run-{i}")
        assert [row["trainer/global_step"] for row in rows] == list(range(i, 5))
        assert [row["train/loss"] for row in rows] == pytest.approx([1 / (s + 1) for s in range(i, 5)])
        assert all(row["speed/wait_share"] == 0.5 for row in rows)
        run = service.runs[f"run-{i}"]
        assert (run["groupName"], run["tags"], run["project"]) == ("sweep", ["clip"], "sae-lightning")
        assert '"optimizer/lr":{"value":0.001}' in run["config"]


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_its_run(tmp_path, login, capfd):
    service = Service()
    login(service.url)
    run = make(tmp_path, "run-1")
    log(run, range(6))
    log(run, range(3, 9))  # from a checkpoint at step 3
    assert [row["trainer/global_step"] for row in service.rows("run-1")] == list(range(9))
    assert "ignored" not in capfd.readouterr().err
    log(run, range(2), suffix="-b")
    assert [row["trainer/global_step"] for row in service.rows("run-1-b")] == [0, 1]


@pytest.mark.slow
def test_a_killed_training_goes_on_in_its_run(tmp_path, login):
    service = Service()
    login(service.url)
    run = make(tmp_path, "run-1")
    program = f"""
        import time
        from pathlib import Path
        from tests.training.test_wandb import WandbRun, open_run, options
        logger = WandbRun(open_run(options(), Path({str(run)!r}), {{}}), Path())
        for step in range(1000):
            logger.log_metrics({{"train/loss": 1.0}}, step)
            time.sleep(0.02)
            if step == 4:
                Path("reached").touch()
    """
    with Command("-c", textwrap.dedent(program), cwd=tmp_path) as child:
        wait_for(lambda: (tmp_path / "reached").exists() or not child.running)
        assert child.running
        child.kill()
    assert "run-1" in service.runs
    log(run, range(3, 9))
    steps = [row["trainer/global_step"] for row in service.rows("run-1")]
    assert steps == sorted(set(steps))
    assert set(steps) >= set(range(5, 9))


@pytest.mark.slow
def test_offline_attempts_are_synced_into_one_run(tmp_path):
    run = make(tmp_path, "run-1")
    log(run, range(3), offline=True)
    log(run, range(3, 6), offline=True)
    assert len(list(run.glob("wandb/offline-run-*/run-run-1.wandb"))) == 2
    service = Service()
    environment = os.environ | {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(run.glob("wandb/offline-run-*")))]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=HANG)
    assert sorted(row["trainer/global_step"] for row in service.rows("run-1")) == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_without_a_service_training_goes_on_offline(answers, tmp_path, login, capsys):
    with socket.socket() as server:  # refuses connections, or takes them and says nothing
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(50)
        login(f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("run-1", "run-2", "run-3"):
            log(make(tmp_path, name), range(3), patience=1)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert all("does not answer" in line and "logging offline" in line for line in lines)
        if answers:  # asked once, not by every training
            server.settimeout(5)
            server.accept()[0].close()
            server.settimeout(0.2)
            with pytest.raises(TimeoutError):
                server.accept()
    for name in ("run-1", "run-2", "run-3"):
        [file] = (tmp_path / name).glob("wandb/offline-run-*/*.wandb")
        assert [row["trainer/global_step"] for row in offline_run(file)["history"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("refuses", "sentence"), [("Viewer", "refuses the API key"), ("UpsertBucket", "failed to start a run")]
)
def test_a_service_that_refuses_is_left_alone(refuses, sentence, tmp_path, login, capsys):
    service = Service(refuses)
    login(service.url)
    log(make(tmp_path, "run-1"), range(3))
    out = capsys.readouterr().out
    assert sentence in out
    assert "logging offline" in out
    [file] = tmp_path.glob("run-1/wandb/offline-run-*/*.wandb")
    assert len(offline_run(file)["history"]) == 3


@pytest.mark.slow
def test_a_service_that_goes_away_does_not_stop_the_training(tmp_path, login):
    service = Service()
    login(service.url)
    run = make(tmp_path, "run-1")
    logger = WandbRun(open_run(options(finish=2), run, {}), run)
    logger.log_metrics({"train/loss": 1.0}, 0)
    service.shutdown()
    service.server_close()
    for step in range(1, 50):
        logger.log_metrics({"train/loss": 1.0}, step)
    finish(logger.run)
    [file] = run.glob("wandb/run-*/*.wandb")
    assert len(offline_run(file)["history"]) == 50  # for wandb sync


def test_insisting_on_the_service_is_an_error_without_it(tmp_path):
    with pytest.raises(ConnectionError, match=r"No W&B login found, but logger.wandb.offline=false"):
        open_run(options(offline=False), tmp_path, {})


@pytest.mark.parametrize("said_by", ["environment", "typed", "user"])
def test_disabled_means_nothing_is_written(said_by, tmp_path, login, monkeypatch, capsys):
    service = Service()
    login(service.url)
    run, folder = make(tmp_path, "run-1"), say(tmp_path, monkeypatch, said_by, mode="disabled")
    assert open_run(options(folder=folder), run, {}) is None
    assert list(run.iterdir()) == []
    assert service.runs == {}
    assert "W&B is disabled by its own settings" in capsys.readouterr().out


def say(tmp_path, monkeypatch, said_by: str, **settings: str) -> str:
    """Give W&B settings of its own; the folder where the command is typed, which is not where it runs."""
    if said_by == "environment":
        for name, value in settings.items():
            monkeypatch.setenv(f"WANDB_{name.upper()}", value)
    else:
        path = tmp_path / ("typed/wandb/settings" if said_by == "typed" else "no-settings/settings")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return str(tmp_path / "typed")


@pytest.mark.parametrize("said_by", ["environment", "typed", "user"])
def test_offline_means_nothing_is_sent(said_by, tmp_path, login, monkeypatch, capsys):
    service = Service()
    login(service.url)
    run, folder = make(tmp_path, "run-1"), say(tmp_path, monkeypatch, said_by, mode="offline", project="own")
    log(run, range(3), folder=folder)
    assert service.runs == {}
    assert "W&B's own settings say offline: logging offline" in capsys.readouterr().out
    file = written(run)
    made = next(r.run for r in records(file) if r.HasField("run"))
    assert (made.project, made.run_id) == ("own", "run-1")


@pytest.mark.parametrize(
    ("environment", "given", "name", "expected"),
    [
        ({}, {}, "project", "sae-lightning"),
        ({"WANDB_PROJECT": "own"}, {}, "project", "own"),
        ({"WANDB_PROJECT": "own"}, {"project": "given"}, "project", "given"),
        ({"WANDB_ENTITY": "own"}, {}, "entity", "own"),
        ({"WANDB_ENTITY": "own"}, {"entity": "given"}, "entity", "given"),
        ({}, {}, "run_name", "run-1"),
        ({"WANDB_NAME": "own"}, {}, "run_name", "own"),
        ({"WANDB_NAME": "own"}, {"suffix": "-b"}, "run_name", "run-1-b"),
        ({"WANDB_RUN_ID": "own"}, {}, "run_id", "own"),
        ({"WANDB_RUN_ID": "taken"}, {}, "run_id", "run-1"),
        ({}, {}, "run_tags", ("clip",)),
        ({"WANDB_TAGS": "a,b"}, {"tags": ["given"]}, "run_tags", ("clip", "a", "b", "given")),
        ({"WANDB_RUN_GROUP": "own"}, {}, "run_group", "own"),
        ({"WANDB_RUN_GROUP": "own"}, {"group": "given"}, "run_group", "given"),
        ({"WANDB_NOTES": "why"}, {}, "run_notes", "why"),
        ({"WANDB_DIR": "/own"}, {}, "root_dir", "/own"),
        ({"WANDB_INIT_TIMEOUT": "70"}, {"patience": None}, "init_timeout", 70),
        ({"WANDB_INIT_TIMEOUT": "70"}, {"patience": 3}, "init_timeout", 3),
        ({}, {"patience": None}, "init_timeout", 5),
        ({"WANDB_CONSOLE": "wrap"}, {}, "console", "wrap"),
    ],
)
def test_w_and_b_s_own_settings_win_over_ours_and_given_ones_over_both(
    environment, given, name, expected, monkeypatch
):  # fmt: skip
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setitem(wandb_run._named, "taken", Path("/another/run"))
    own = wandb_run.own_settings("/nowhere")
    assert wandb_run._settings(options(**given), own, Path("/runs/run-1"), ["clip"])[name] == expected


def test_given_ones_win_over_a_disabled_w_and_b(tmp_path, login, monkeypatch):
    service = Service()
    login(service.url)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log(make(tmp_path, "run-1"), range(2), offline=False)
    assert list(service.runs) == ["run-1"]


def test_settings_that_make_no_sense_send_nothing(tmp_path, login, monkeypatch, capsys):
    service = Service()
    login(service.url)
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert open_run(options(), make(tmp_path, "run-1"), {}) is None
    assert service.runs == {}
    assert "W&B's own settings make no sense" in capsys.readouterr().out


def kill_service() -> None:
    """Kill W&B's process."""
    [core] = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
    core.kill()
    core.wait()


@pytest.mark.parametrize("when", ["start", "middle", "end"])
def test_a_dead_service_ends_the_logging_only_and_the_next_training_has_a_new_one(when, tmp_path, monkeypatch, capsys):
    import wandb

    init, killed = wandb.init, []

    def dying(**settings):
        run = init(**settings)
        if when == "start" and not killed:
            killed.append(kill_service())
        return run

    monkeypatch.setattr(wandb, "init", dying)
    run = make(tmp_path, "run-1")
    logger = WandbRun(open_run(options(offline=True, finish=1), run, {}), run)
    logger.log_metrics({"train/loss": 1.0}, 0)
    if when != "start":
        kill_service()
    if when == "middle":
        for step in range(1, 50):
            logger.log_metrics({"train/loss": 1.0}, step)
    logger.close({"seconds": 1.0})
    assert capsys.readouterr().out.count("run-1: W&B ") >= 1
    log(make(tmp_path, "run-2"), range(3), offline=True)
    assert len(offline_run(written(tmp_path / "run-2"))["history"]) == 3


def test_the_sae_is_an_artefact_of_its_run(tmp_path, login):
    run = make(tmp_path, "run-1")
    (run / "sae.safetensors").write_bytes(b"weights")
    (run / "cfg.json").write_text("{}")
    opened = open_run(options(offline=True), run, {})
    assert opened is not None
    log_artefact(opened, run, {"k": 16})
    finish(opened)
    file = written(run)
    [artifact] = [r.artifact for r in records(file) if r.HasField("artifact")]
    assert (artifact.type, artifact.name) == ("sae", "sae-run-1")
    assert {entry.path for entry in artifact.manifest.contents} == {"sae.safetensors", "cfg.json"}


def test_the_group_is_the_sweep_and_the_experiment_a_tag(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["logger=wandb", "logger.wandb.tags=[mine]"], return_hydra_config=True)
    cfg.hydra.sweep.dir, cfg.hydra.mode = "multirun/2025-01-31/12-00-00", "MULTIRUN"
    cfg.hydra.runtime.output_dir = str(tmp_path)
    cfg.hydra.runtime.choices.experiment = "demo"
    plain = dict(cfg.logger.wandb)
    assert sweep_of(cfg, plain)["group"] is None  # not in Hydra
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        assert sweep_of(cfg, plain)["group"] == "demo 2025-01-31/12-00-00"
        assert sweep_of(cfg, plain | {"group": "grid 1"})["group"] == "grid 1"
        write_sweep_options(cfg)
    finally:
        HydraConfig.instance().cfg = before
    assert (cfg.logger.wandb.group, cfg.logger.wandb.tags) == ("demo 2025-01-31/12-00-00", ["demo", "mine"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"WANDB_API_KEY": KEY}, KEY), ({}, ""), ({"WANDB_BASE_URL": "https://w.example.org"}, "secret")],
)
def test_the_key_is_that_of_the_environment_or_the_login(environment, expected, monkeypatch, tmp_path):
    path = tmp_path / "netrc"
    path.write_text("machine w.example.org login user password secret\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_run.login(wandb_run.own_settings("/nowhere"))[1] == expected
