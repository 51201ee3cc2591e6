"""Where a SLURM job finds itself, and how its nodes meet."""

import pytest

from sae_lightning.distributed.launch import as_first_node, await_rendezvous, check_tasks, publish_rendezvous


def slurm(monkeypatch, node: int, nodes: int, tasks: int) -> None:
    values = {"NODEID": node, "STEP_NUM_NODES": nodes, "STEP_NUM_TASKS": tasks, "JOB_ID": 5, "STEP_ID": 0}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_a_job_with_other_tasks_or_nodes_than_the_config_is_refused(config, monkeypatch):
    check_tasks(config())
    with pytest.raises(ValueError, match=r"trainer.num_nodes=2, but this job runs on 1"):
        check_tasks(config("trainer.num_nodes=2"))
    slurm(monkeypatch, 0, 1, 4)
    with pytest.raises(ValueError, match=r"4 tasks on 1 node.*tasks_per_node=1"):
        check_tasks(config("trainer.devices=4"))
    slurm(monkeypatch, 0, 2, 2)
    check_tasks(config("trainer.num_nodes=2"))
    with pytest.raises(ValueError, match="hydra/launcher=slurm_ddp"):
        check_tasks(config())


def test_nodes_meet_where_the_first_one_says(tmp_path, monkeypatch):
    slurm(monkeypatch, 0, 2, 2)
    with as_first_node(tmp_path):
        store, address = publish_rendezvous(tmp_path)
        assert await_rendezvous(tmp_path) == (address, store.port)
    assert await_rendezvous(tmp_path) is None  # over: finished, skipped or failed
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # what an earlier start said is no news
    with as_first_node(tmp_path):
        store, address = publish_rendezvous(tmp_path)
        assert await_rendezvous(tmp_path) == (address, store.port)
