"""The model of the grid on ImageNet against figures worked out by hand, and its document."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from experiments.scale import measure, model, stages, work
from experiments.scale.rates import cpu_pass, cpu_step, rates
from experiments.scale.work import BACKBONES, CONFIGS, Config, Probe

CONF = Path(__file__).resolve().parents[2] / "conf"
DINOV2, CLIP = BACKBONES[:2]
ROUND = {
    "matmul": 1e15, "float32": 1e14, "memory": 2e12, "matmul_share": 0.5, "memory_share": 0.5, "host": 0.001,
    "gpus_a_node": 8, "cores": 10, "core_share": 0.5, "read_node": 1e9, "read_all": 4e9, "write_node": 1e9,
    "write_all": 2e9, "host_memory": 1e10, "loader": 1e10, "decode": 100, "probe_a": 1e-10, "probe_b": 1e-8,
}  # fmt: skip


def test_the_grid_is_the_papers():
    assert [backbone.patches for backbone in BACKBONES] == [256, 196, 196, 196, 196]
    assert len(CONFIGS) * len(BACKBONES) == 60
    assert sorted({config.d_sae for config in CONFIGS}) == [6144, 12288, 24576]


def test_tokens_bytes_and_steps_of_an_epoch():
    assert work.TRAIN * CLIP.patches == 251_108_732
    assert work.steps(CLIP) == 30_653  # 251,108,732 / 8192 = 30,652.9
    assert work.steps(DINOV2) == 40_037  # 327,978,752 / 8192 = 40,036.5
    assert work.steps(CLIP, epochs=3) == 91_959
    assert work.store_bytes(CLIP, work.TRAIN) == 385_703_012_352  # 1,281,167 · 196 · 768 · 2


def test_an_image_through_a_vit_b():
    # a block: 12 · 197 · 768² = 1,394,343,936 and 2 · 197² · 768 = 59,610,624; patches 196 · 768 · 768 = 115,605,504
    assert work.encoder_flop(CLIP) == 2 * (12 * (1_394_343_936 + 59_610_624) + 115_605_504)
    assert work.encoder_flop(CLIP) / 2 == pytest.approx(17.6e9, rel=0.01)  # multiplications, as timm lists the model


def test_the_work_of_a_training_step():
    config = Config(8, 64)
    assert work.product_flop(config) == 77_309_411_328  # 2 · 8192 · 768 · 6144
    assert work.selection_bytes(config) == 301_989_888  # 3 · 8192 · 6144 · 2
    assert work.sparse_bytes(config) == 4_831_838_208  # 3 · 8192 · 64 · 768 · 4
    assert work.optimizer_bytes(config) == 905_969_664  # 48 · 768 · 6144 · 4
    assert work.dense_flop(config) == 309_237_645_312


def test_the_bytes_of_an_sae_are_those_of_its_file(tmp_path):
    from sae_lightning.saes import BatchTopK

    BatchTopK(768, 6144, k=64, seed=0).save(tmp_path)
    counted = work.sae_bytes(Config(8, 64))
    assert counted == pytest.approx((tmp_path / "sae.safetensors").stat().st_size, rel=0.005)


def test_the_seconds_of_a_training_step():
    parts = stages.step(rates(**ROUND), Config(8, 64))
    assert parts == pytest.approx({
        "product": 77_309_411_328 / 5e14, "selection": 301_989_888 / 1e12, "sparse products": 4_831_838_208 / 1e12,
        "optimiser": 905_969_664 / 1e12, "host": 0.001,
    })  # fmt: skip
    # 154.6 µs + 302 µs + 4832 µs + 906 µs + 1000 µs, times 30,653
    assert stages.run_seconds(rates(**ROUND), CLIP, Config(8, 64)) == pytest.approx(220.5, abs=0.1)


def test_dense_products_win_where_both_take_the_same():
    known = rates(**ROUND)
    share = stages.dense_from(known)
    for factor, dense_is_faster in ((0.9, False), (1.1, True)):
        config = Config(32, factor * share * 24576)
        sparse = stages.step(known, config)["sparse products"]
        assert (stages.dense_alternative(known, config) < sparse) == dense_is_faster


def test_extraction_on_sixteen_gpus():
    stage = stages.extraction(rates(**ROUND), 16)
    images = 1_281_167 + 50_000 + 117_428
    assert work.OTHER_IMAGES == 117_428
    assert stage.needs["decoding (CPU)"] == pytest.approx(5 * images / (16 * 10 * 0.5 * 100))
    assert stage.needs["images (disk, network)"] == pytest.approx(5 * images * 110_000 / 2e9)
    assert stage.needs["store (disk, network)"] == pytest.approx((256 + 4 * 196) * images * 768 * 2 / 2e9)
    assert stage.needs["encoder (GPU)"] == pytest.approx(
        images * sum(work.encoder_flop(b) for b in BACKBONES) / (16 * 5e14)
    )
    assert stage.bound == "store (disk, network)"
    assert stage.seconds == max(stage.needs.values())


def test_training_on_one_gpu_is_all_runs_in_turn_with_one_read_a_backbone():
    known = rates(**ROUND)
    found = stages.training(known, 1)
    whole = sum(stages.run_seconds(known, b, c) for b in BACKBONES for c in CONFIGS)
    assert found.groups == 1
    assert found.stage.needs["GPU"] == pytest.approx(whole)
    read = sum(work.store_bytes(b, work.TRAIN) for b in BACKBONES)
    assert found.stage.needs["store (disk, network)"] == pytest.approx(read / 1e9)
    assert found.busy == pytest.approx(whole)


def test_sixty_gpus_or_more_end_with_the_longest_run():
    known = rates(**(ROUND | {"read_all": 1e15, "read_node": 1e15}))
    found = stages.training(known, 64)
    assert found.groups == 12
    assert found.stage.seconds == pytest.approx(stages.run_seconds(known, DINOV2, Config(32, 256)))


def test_a_slow_file_system_makes_packing_worth_it():
    fast, slow = (rates(**(ROUND | {"read_all": speed, "read_node": speed})) for speed in (1e15, 1e9))
    assert stages.training(fast, 64).groups > stages.training(slow, 64).groups
    assert stages.training(slow, 64).stage.bound == "store (disk, network)"


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 12))
def test_jobs_are_spread_without_loss_and_near_evenly(seconds, places):
    found = stages.spread(seconds, places)
    assert sorted(each for place in found for each in place) == sorted(seconds)
    even, last = sum(seconds) / places, max(map(sum, found))
    assert max(even, max(seconds)) * (1 - 1e-9) <= last <= (even + max(seconds)) * (1 + 1e-9)


def test_the_seconds_of_a_probe():
    probe, known = Probe(40_000, 128, 1000, 500), rates(**ROUND)
    assert stages.probe_on_cpu(known, probe) == pytest.approx(500 * 4e7 * (128e-10 + 1e-8))  # 456 core-seconds
    flop, passes, vectors = 4 * 4e7 * 128 / 5e13, 6 * 4e7 * 4 / 1e12, 20 * 129_000 * 8 / 1e10
    assert stages.probe_on_gpu(known, probe) == pytest.approx(500 * (flop + passes + vectors))


def test_the_probes_of_a_grid():
    saes, raw = work.sae_probes(), work.raw_probes()
    assert [probe.d for probe in saes[:11]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert {(probe.n, probe.classes) for probe in saes[:11]} == {(40_000, 1000)}
    assert [(probe.d, probe.classes) for probe in saes[11:]] == [
        (768, 10_000), (128, 10_000), (768, 200), (128, 200), (768, 47), (128, 47),
    ]  # fmt: skip
    assert len(stages.all_probes()) == 60 * len(saes) + 5 * len(raw)


def test_laws_meet_the_recorded_measurements():
    assert cpu_step().worst < 0.15
    assert 2048 * cpu_step()(24576, 256) == pytest.approx(0.332, rel=0.15)  # recorded: ×32, k 256, bf16
    for d_sae, seconds in ((6144, 9.29), (24576, 29.72)):
        assert 2000 * cpu_pass(d_sae, 64) == pytest.approx(seconds, abs=0.01)
    assert cpu_pass(6144, 128) > cpu_pass(6144, 64)


def test_the_scoring_pass_divides_by_cores():
    known = rates(**ROUND)
    images = 50_000 + 117_428
    per_image = sum(cpu_pass(c.d_sae, c.k) for c in CONFIGS)
    one = stages.scoring(known, 1).needs["encoding and sums (CPU)"]
    assert one == pytest.approx(2 * images * (4 + 256 / 196) * per_image / (10 * 0.5))
    assert stages.scoring(known, 8).needs["encoding and sums (CPU)"] == pytest.approx(one / 8)


@given(st.sampled_from([name for name in ROUND if name not in ("host", "probe_a", "probe_b", "gpus_a_node")]))
def test_a_faster_rate_never_makes_anything_slower(name):
    for gpus in (1, 8, 64):
        before, after = (stages.plan(rates(**changes), gpus) for changes in (ROUND, ROUND | {name: 2 * ROUND[name]}))
        assert all(b.seconds <= 1.03 * a.seconds for a, b in zip(before, after, strict=True))


def test_rates_say_where_they_come_from():
    known = rates("h200", decode=1.0)
    assert {rate.kind for rate in known.values()} == {"data sheet", "assumed", "measured", "given"}
    assert all(rate.source for rate in known.values())
    assert known["memory"].value == 4.8e12
    with pytest.raises(ValueError, match="Unknown GPU 'v100'; choose one of a100"):
        rates("v100")
    with pytest.raises(ValueError, match="No rate is called speed"):
        rates(speed=1.0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(90, "90 s"), (119, "119 s"), (120, "2.0 min"), (1200, "20 min"), (7200, "2.0 h"), (4e5, "4.6 d")],
)
def test_times_are_read_at_a_glance(seconds, said):
    assert model.clock(seconds) == said


def test_the_document_holds_what_the_model_prints():
    assert model.tables() in model.DOCS.read_text(), "Run python -m experiments.scale.model --docs."


def test_tables_are_put_between_the_marks():
    text = f"before\n{model.BEGIN}\nold\n{model.END}\nafter\n"
    new = model.put(text, "new")
    assert new == f"before\n{model.BEGIN}\n\nnew\n\n{model.END}\nafter\n"
    assert model.put(new, "new") == new


def command_lines():
    """(config's name, overrides) of every Hydra command in the document."""
    text = model.DOCS.read_text().replace("\\\n", " ")
    for line in re.findall(r'python (?:train|extract|evaluate|report)\.py[^"\n]*', text):
        _, script, *overrides = shlex.split(re.sub(r"\$\w+|…", "x", line.replace("$B", "clip")))
        name = script.removesuffix(".py")
        yield "config" if name == "train" else name, [o for o in overrides if o not in ("-m", "x")]


def test_the_documents_command_lines_compose():
    lines = list(command_lines())
    assert {name for name, _ in lines} == {"config", "extract", "evaluate", "report"}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, overrides in lines:
            quoted = [o if "*" not in o else "{}='{}'".format(*o.split("=", 1)) for o in overrides]
            assert compose(name, quoted, return_hydra_config=True)


def test_what_one_core_does_is_measured(monkeypatch):
    found = measure.probing(n=400, classes=20)
    assert found["b"] + 768 * found["a"] > 0
    monkeypatch.setattr(measure, "SHORT", 10_000)
    with pytest.raises(RuntimeError, match="stopped after"):
        measure.iteration(60, 4, 3)
