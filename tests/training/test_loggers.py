"""Every logger that the config offers writes what it should; W&B needs no login and no network."""

import csv

import pytest

from sae_lightning.training.loggers import has_login
from sae_lightning.training.run import train


def test_csv_holds_the_logged_metrics(config):
    folder = train(config("logger=csv"))
    with (folder / "csv" / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"loss/reconstruction", "train/l0", "val/explained_variance", "speed/wait_share"} <= set(columns)


def test_tensorboard_holds_the_logged_metrics(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(config("logger=tensorboard"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss/reconstruction", "val/fvu"} <= set(events.Tags()["scalars"])


def test_wandb_goes_offline_without_a_login(config, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    folder = train(config("logger=wandb"))
    assert "logging offline" in capsys.readouterr().out
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (folder / "result.json").is_file()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"WANDB_API_KEY": "x" * 40}, True), ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, False), ({}, False)],
)
def test_login_is_read_from_the_environment(environment, expected, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_login() is expected


def test_login_is_read_from_netrc(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    path = tmp_path / "netrc"
    path.write_text("machine wandb.example.org login user password secret\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    assert has_login() is True
