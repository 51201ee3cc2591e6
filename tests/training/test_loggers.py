"""All loggers get the same metrics at the same steps; a training that resumes goes on in what they wrote."""

import csv
import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sae_lightning.saes.artefact import read_cfg
from sae_lightning.training import fit as module
from sae_lightning.training.fit import train
from sae_lightning.training.loggers import FINAL, checkpoint_step, columns, flat, open_loggers
from tests.training.wandb_files import offline_run


def csv_points(folder) -> set[tuple[str, int, float]]:
    """(metric, step, value) of every cell."""
    with (folder / "csv" / "metrics.csv").open() as file:
        return {
            (name, int(row["step"]), float(np.float32(cell)))
            for row in csv.DictReader(file) for name, cell in row.items() if cell and name not in ("step", "epoch")
        }  # fmt: skip


def tensorboard_points(folder) -> set[tuple[str, int, float]]:
    """(tag, step, value) of every scalar."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "epoch"]
    return {(tag, event.step, float(np.float32(event.value))) for tag in tags for event in events.Scalars(tag)}


def wandb_points(path) -> set[tuple[str, int, float]]:
    """(metric, step, value) of an offline run's history."""
    return {
        (name, row["trainer/global_step"], float(np.float32(value)))
        for row in offline_run(path)["history"] for name, value in row.items()
        if "/" in name and name != "trainer/global_step"
    }  # fmt: skip


@pytest.fixture
def _no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.mark.usefixtures("_no_login")
def test_all_loggers_hold_the_same_and_the_settings(config, capsys):
    folder = train(config("logger=[csv,tensorboard,wandb]"))
    assert "No W&B login found: logging offline" in capsys.readouterr().out
    points = csv_points(folder)
    assert {"loss/reconstruction", "train/l0", "val/fvu", "speed/wait_share"} <= {name for name, *_ in points}
    assert tensorboard_points(folder) == points
    [file] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert wandb_points(file) == points

    result, about = json.loads((folder / "result.json").read_text()), columns(read_cfg(folder))
    for name, value in result["val"].items():  # the last validation is that of the saved SAE, with its threshold
        assert (f"val/{name}", result["steps"], float(np.float32(value))) in points
    run = offline_run(file)
    assert run["id"] == folder.name
    assert run["tags"] == ["deit", "batchtopk", "folder"]
    assert about.items() <= run["config"].items()
    assert run["summary"]["val/fvu"] == pytest.approx(result["val"]["fvu"])
    assert run["summary"]["seconds"] == pytest.approx(result["seconds"])
    assert yaml.safe_load((folder / "csv" / "hparams.yaml").read_text()) == about
    assert hparams_of(folder) == {name: str(v) if isinstance(v, str) else float(v) for name, v in about.items()}


def hparams_of(folder) -> dict:
    """What TensorBoard's table of hyper-parameters has of a run; the final scores must be its metrics."""
    from tensorboard.plugins.hparams import metadata

    content = EventAccumulator(str(folder / "tensorboard")).Reload().PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    made = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert set(FINAL) <= {info.name.tag for info in made.metric_infos}
    kinds = {"number_value": float, "string_value": str, "bool_value": float}
    return {name: kinds[v.WhichOneof("kind")](getattr(v, v.WhichOneof("kind"))) for name, v in start.hparams.items()}


@pytest.mark.usefixtures("_no_login")
def test_a_resumed_training_goes_on_in_the_files_of_its_loggers(config, monkeypatch):
    overrides = ("logger=[csv,tensorboard]", "checkpoint.every_steps=5")
    reached = []

    class Stopping(module.History):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == 13 and not reached:
                reached.append(trainer.global_step)
                raise RuntimeError("stopped")

    monkeypatch.setattr(module, "History", Stopping)
    with pytest.raises(RuntimeError, match="stopped"):
        train(config(*overrides))
    folder = train(config(*overrides))
    monkeypatch.undo()
    for points in (csv_points(folder), tensorboard_points(folder)):
        steps = sorted(step for name, step, _ in points if name == "train/loss")
        assert steps == list(range(1, 24, 2))  # none twice, none missing
    assert csv_points(folder) == tensorboard_points(folder)


def test_a_training_without_checkpoint_starts_at_zero(tmp_path):
    assert checkpoint_step(tmp_path / "last.ckpt") == 0


def test_ranks_but_the_first_have_no_loggers(config, tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert open_loggers(config("logger=[csv,tensorboard]"), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@given(
    st.recursive(
        st.integers() | st.text() | st.none() | st.booleans(),
        lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, max_size=4), max_leaves=20,
    ).filter(lambda tree: isinstance(tree, dict))
)  # fmt: skip
def test_flat_names_lead_to_the_leaves(tree):
    def leaves(node, path):
        if not isinstance(node, dict):
            return [(path, node)]
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]

    assert list(flat(tree)) == [("/".join(path), value) for path, value in leaves(tree, ())]


def test_monoloss_is_a_column_of_runs_that_train_with_it():
    about = {"name": "run-1", "backbone": "clip (tiny)"}
    settings = {"weight": 0.3, "memory": 0.9}

    def of(callbacks) -> dict:
        config = {"backbone": {"name": "clip"}, "callbacks": callbacks}
        return {name: v for name, v in columns(about | {"config": config}).items() if "mono" in name}

    switched = {"_target_": "sae_lightning.training.monoloss.MonoLoss"}
    assert of({"monoloss": switched | settings})["monoloss"] == 0.3
    assert of({"monoloss": switched | settings})["callbacks/monoloss/memory"] == 0.9
    off = switched | settings | {"weight": 0}
    for callbacks in ({"monoloss": settings}, {"monoloss": off}, {"monoloss": None}, {}, None):
        assert of(callbacks) == {"monoloss": 0.0}


def test_columns_are_short_names_first_and_scalars():
    made = {
        "name": "run-1", "backbone": "clip (tiny)", "features": "patch", "layer": 4, "k": 16, "data": "demo",
        "variant": "batchtopk", "expansion": 8, "seed": 42, "d_in": 128, "d_sae": 1024,
        "config": {
            "backbone": {"name": "clip", "size": "tiny"}, "callbacks": {"monoloss": {"_target_": "…", "weight": 0.3}},
            "d_sae": None,
            "optimizer": {"lr": 0.001}, "classes": [1, 2], "k": 16,
            "paths": {"runs": "elsewhere"}, "logger": {"csv": {}},
        },
    }  # fmt: skip
    found = columns(made)
    assert (found["backbone"], found["title"], found["monoloss"], found["k"]) == ("clip", "clip (tiny)", 0.3, 16)
    assert (found["d_sae"], found["optimizer/lr"], found["classes"]) == (1024, 0.001, "[1, 2]")
    assert not any(name.startswith(("paths", "logger")) for name in found)
    assert all(isinstance(value, str | int | float) for value in found.values())
