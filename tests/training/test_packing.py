"""Which runs of a sweep share a stream, how much memory they take, and what a folder says of their states."""

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sae_lightning.commands.main import main
from sae_lightning.features.source import Source
from sae_lightning.runs.identity import run_name
from sae_lightning.runs.packs import grouped
from sae_lightning.runs.state import note_plan, state_of, states
from sae_lightning.training.fit import train
from sae_lightning.training.packed import pack_bytes, rounds, weight_bytes
from tests.configs import CONF, composed
from tests.processes import run


@cache
def jobs_of(*overrides):
    """The configs of a sweep, as the sweeper of the config makes them; not to be changed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
        swept = [f"{name}={values}" for name, values in cfg.hydra.sweeper.params.items()]
        arguments = OverridesParser.create().parse_overrides([*swept, *overrides])
        (batch,) = BasicSweeper.split_arguments(arguments, None)
    return [composed("config", *job) for job in batch]


def of(cfg):
    """What a look at its data and encoder would find, without one."""
    return {"backbone": cfg.backbone.name, "layer": Source.of(cfg).tap.layer}


@pytest.mark.slow
def test_the_grid_is_sixty_runs_in_five_packs():
    cfgs = jobs_of("experiment=visaebench_grid")
    assert len({run_name(cfg, of(cfg)) for cfg in cfgs}) == 60
    groups = grouped(cfgs, in_turn=True)
    assert [len(group) for group in groups] == [12] * 5
    assert [{cfgs[i].backbone.name for i in group} for group in groups] == [
        {name} for name in ("dinov2", "clip", "siglip", "mae", "deit")
    ]
    assert {cfg.k for cfg in cfgs} == {8, 16, 24, 32}


def test_on_imagenet_it_is_the_paper_s_of_table_1():
    cfgs = jobs_of("experiment=visaebench_grid", "data=imagenet", "data.path=x", "backbone=deit")
    assert len(cfgs) == 12
    assert {(cfg.expansion, cfg.k) for cfg in cfgs} == {(e, k) for e in (8, 16, 32) for k in (64, 128, 192, 256)}
    for cfg in cfgs:
        assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.batch_size, cfg.trainer.max_epochs) == ("adam", 1e-3, 8192, 1)
        assert (cfg.seed, cfg.extract.dtype, cfg.normalize, cfg.sae.name) == (42, "float16", "standard", "batchtopk")
        assert (cfg.schedule.warmup, cfg.schedule.decay) == (0, 0)
        assert cfg.loss == {"reconstruction": 1, "sparsity": 0, "aux": 0}
        assert cfg.backbone.published.layer == 11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "count"),
    [("visaebench_layers", 6), ("visaebench_jumprelu", 20), ("msae", 6), ("monoloss/lambda", 25)],
)
@pytest.mark.parametrize("data", ["demo", "imagenet"])
def test_other_grids(experiment, count, data):
    cfgs = jobs_of(f"experiment={experiment}", f"data={data}", *(["data.path=x"] if data == "imagenet" else []))
    assert len({run_name(cfg, of(cfg)) for cfg in cfgs}) == count
    for cfg in cfgs:
        OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.slow
def test_the_late_half_of_the_layers_is_in_the_grid():
    grid = {run_name(cfg, of(cfg)) for cfg in jobs_of("experiment=visaebench_grid")}
    layers = {run_name(cfg, of(cfg)): cfg.backbone.layer for cfg in jobs_of("experiment=visaebench_layers")}
    assert Counter(layers.values()) == {1: 3, None: 3}
    assert {name for name, layer in layers.items() if layer is None} == grid & set(layers)


@pytest.mark.parametrize(
    ("when", "in_turn", "sizes"), [("auto", True, [4]), ("auto", False, [1] * 4), ("always", False, [4]),
                                   ("never", True, [1] * 4)],
)  # fmt: skip
def test_packing_is_chosen(config, when, in_turn, sizes):
    cfgs = [config(f"k={k}", f"pack.when={when}") for k in (2, 4, 6, 8)]
    assert [len(group) for group in grouped(cfgs, in_turn)] == sizes


@pytest.mark.slow
def test_runs_that_read_otherwise_are_apart(config):
    same = [config(), config("sae=topk"), config("callbacks=monoloss"), config("trainer.max_epochs=7"), config("k=3")]
    apart = [config(o) for o in ("seed=1", "batch_size=512", "features=cls", "stream.unit=images", "subset.images=9",
                                 "backbone=mae", "trainer.devices=2", "extract.dtype=int8")]  # fmt: skip
    groups = grouped([*same, *apart], in_turn=True)
    assert groups == [[0, 1, 2, 3, 4], *([i] for i in range(5, 13))]


@pytest.mark.parametrize("setting", ["trainer.num_nodes=2", "++trainer.profiler=pytorch"])
def test_several_nodes_and_profiled_runs_are_not_packed(setting, config):
    """PyTorch's profiler watches a process: in threads that run side by side it ends in a segmentation fault."""
    cfgs = [config(setting, f"k={k}", "pack.when=always") for k in (2, 4)]
    assert grouped(cfgs, in_turn=True) == [[0], [1]]


@pytest.mark.slow
def test_at_most_so_many_members_in_parts_of_equal_size(config):
    cfgs = [config(f"k={k}", "pack.members=4") for k in range(1, 11)]
    assert [len(group) for group in grouped(cfgs, True)] == [4, 3, 3]
    assert [i for group in grouped(cfgs, True) for i in group] == list(range(10))


def test_the_weights_are_what_training_holds(config):
    cfg = config("expansion=4")
    folder = train(cfg)
    from sae_lightning.saes import SAE

    sae = SAE.load(folder)
    held = 4 * 4 * sum(p.numel() for p in sae.parameters())  # with gradient and two moments
    assert weight_bytes(cfg, sae.d_in) == pytest.approx(held, rel=0.01)


@pytest.mark.slow
def test_rounds_fill_the_memory_in_order(config):
    todo = {Path(str(e)): config(f"expansion={e}", "pack.workers=1") for e in (2, 2.0, 4, 8, 16, 2)}
    todo |= {Path(f"more-{i}"): config("expansion=2", "pack.workers=1") for i in range(3)}
    limit = pack_bytes([config("expansion=8", "pack.workers=1"), config("expansion=4", "pack.workers=1")], 128)
    packs = list(rounds(todo, 128, limit))
    assert [folder for pack in packs for folder in pack] == list(todo)
    assert all(pack_bytes(list(pack.values()), 128) <= limit for pack in packs if len(pack) > 1)
    assert list(map(len, rounds(todo, 128, 1))) == [1] * len(todo)
    assert list(map(len, rounds(todo, 128, 1 << 40))) == [len(todo)]


@pytest.mark.slow
def test_states_of_planned_running_broken_and_finished_runs(config, capsys):
    cfgs = [config(f"k={k}") for k in (2, 4, 6, 8)]
    note_plan(cfgs, [[f"k={k}"] for k in (2, 4, 6, 8)], Path("sweep"))
    folder = Path(cfgs[0].paths.runs)
    assert [s.state for s in states(folder)] == ["planned"] * 4
    train(cfgs[0])
    with pytest.raises(RuntimeError, match="power"):
        train(config("k=4", "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 1}"))
    held = folder / run_name(cfgs[2])
    held.mkdir()
    with FileLock(held / ".lock"):
        found = {s.name: s for s in states(folder)}
        assert [found[run_name(cfg)].state for cfg in cfgs] == ["finished", "broken", "running", "planned"]
        assert "goes on from its checkpoint" in found[run_name(cfgs[1])].about
        assert main(["runs", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "4 runs: 1 finished, 1 running, 1 broken, 1 planned" in printed
    assert main(["runs", str(folder), "--only", "planned"]) == 0
    printed = capsys.readouterr().out
    assert run_name(cfgs[3]) in printed
    assert run_name(cfgs[0]) not in printed
    assert state_of(held).state == "broken"


def test_a_missing_folder_is_one_sentence(tmp_path, capsys):
    assert main(["runs", str(tmp_path / "nothing")]) == 1
    assert "There is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_is_one_job_a_stream_and_goes_on_after_one_that_fails(config, pictures, tmp_path):
    cfg = config()
    command = [
        "train.py", "-m", "data=folder", f"data.path={pictures}", "backbone=deit,mae",
        "backbone.size=tiny", "k=8", "optimizer.lr=0.001,1e30", "expansion=2,4", "batch_size=256",
        "trainer.accelerator=cpu", "trainer.max_epochs=1", f"paths.stores={cfg.paths.stores}",
        f"paths.runs={cfg.paths.runs}", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    done = run(*command, cwd=tmp_path, check=False, COLUMNS="160", OMP_NUM_THREADS="1")
    assert done.returncode != 0
    assert "Launching 2 jobs" in done.stdout + done.stderr
    assert "2 of 4 runs failed" in done.stderr
    assert "lower optimizer.lr" in done.stderr
    runs = Path(cfg.paths.runs)
    assert len(list(runs.glob("*/result.json"))) == len(list(runs.glob("*/failed.json"))) == 4
    planned = json.loads((runs / "planned.json").read_text())
    assert len(planned) == 8
    assert all("expansion=2" in p["overrides"] or "expansion=4" in p["overrides"] for p in planned.values())


@pytest.mark.slow
def test_packs_can_be_submitted(config, pictures, tmp_path):
    """The job is an interpreter of its own, which knows the pack by its pickle alone."""
    cfg = config()
    command = [
        "train.py", "-m", "data=folder", f"data.path={pictures}", "backbone=deit",
        "backbone.size=tiny", "k=4,8", "expansion=2", "batch_size=256", "trainer.accelerator=cpu",
        "trainer.max_epochs=1", f"paths.stores={cfg.paths.stores}", f"paths.runs={cfg.paths.runs}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra/launcher=submitit_local", "pack.when=always",
    ]  # fmt: skip
    done = run(*command, cwd=tmp_path, COLUMNS="160", OMP_NUM_THREADS="1")
    results = sorted(Path(cfg.paths.runs).glob("*/result.json"))
    assert sorted(json.loads(path.read_text())["side_by_side"] for path in results) == [2, 2]
    assert all(path.parent.name in done.stdout for path in results)


def test_the_names_of_the_experiments_runs_are_those_that_lie_on_disks():
    names = ["dinov2-x8-k16-s42-b20c6b71", "clip-x8-k16-s42-d7c6e72d", "siglip-x8-k16-s42-c11ddf66",
             "mae-x8-k16-s42-0f3e71c5", "deit-x8-k16-s42-de6e6a39"]  # fmt: skip
    assert [run_name(cfg) for cfg in jobs_of("experiment=demo")] == [f"batchtopk-{name}" for name in names]
    grid = " ".join(run_name(cfg) for cfg in jobs_of("experiment=visaebench_grid"))
    assert hashlib.sha256(grid.encode()).hexdigest().startswith("078ecbfdec312a51"), grid
