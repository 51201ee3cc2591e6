"""Scoring many runs: what is computed, what is left alone, and what interruptions and several processes change."""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.data import DataError
from sae_lightning.distributed.ranks import Ranks
from sae_lightning.evaluation import scoring_pass, suite
from sae_lightning.evaluation.core import stored_scores
from sae_lightning.evaluation.job import PARTIAL, Job, Settings
from sae_lightning.evaluation.suite import PartError, evaluate, evaluate_runs, scoring_lock
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.interop.layout import build, fold
from sae_lightning.metrics.part import PARTS
from sae_lightning.runs.run import LATENTS, SCORES, TOP_IMAGES
from sae_lightning.runs.scores import TABLE, read_rows, value_of
from sae_lightning.saes import SAE, VARIANTS, BatchTopK, Normalizer, TopK
from sae_lightning.saes.artefact import read_tensors
from tests.conftest import write_store
from tests.scoring import score

FIT = {"test_share": 0.2, "seed": 42, "C": 1.0, "max_iter": 200}

METRICS = {
    "core": {"above": [0.25, 0.5, 0.75], "bands": {"ranks": 6, "images": 4}},
    "moran": {"contiguity": "queen", "row_standardized": True, "min_active": 2, "min_variance": 1e-8, "min_images": 5},
    "raw_moran": {"contiguity": "queen", "row_standardized": True, "min_variance": 1e-8, "min_images": 5},
    "preservation": {"codes": True, **FIT},
    "sparse_probing": {"budgets": [1, 8, 32], "ranking": "joint", **FIT},
    "absorption": {"alphas": [0.8], "betas": [0.5], "min_group": 3, **FIT},
    "retrieval": {"at": [1]},
    "histograms": {"low": -4, "high": 4, "per_decade": 5},
    "cknna": {"k": 5, "samples": 60, "seed": 42},
    "recovery": {"budgets": [1, 2], "images": 20, "samples": 100, "seed": 42},
    "ms_score": {"judge": None, "features": None, "store": None},
    "monosemanticity": {
        "images": 8, "latents": 30, "groups": 20, "seed": 42, "features": None, "store": None, "pairing": {},
        "other": "itself", "judges": {"itself": None},
    },
}  # fmt: skip


@pytest.fixture
def folders(tmp_path, stores):
    """A given data set of the synthetic stores, and three SAEs on it."""
    config = {
        "data": {"source": "store", "held_out": 0.1, "seed": 0,
                 **{split: str(store.folder) for split, store in stores.items()}},
        "backbone": {"name": "none", "size": "tiny", "layer": 0, "tiny": {"layer": 0}}, "features": "patch",
    }  # fmt: skip
    store = stores["test"]
    normalizer = Normalizer(store.d_in, store.mean, store.std)
    saes = {
        "topk-a": TopK(store.d_in, 40, 3, normalizer=normalizer, seed=1),
        "topk-b": TopK(store.d_in, 24, 4, normalizer=normalizer, seed=2),
        "batchtopk": BatchTopK(store.d_in, 40, 3, normalizer=normalizer, seed=3),
    }
    for name, sae in saes.items():
        sae.save(tmp_path / name, name=name, backbone=store.backbone, features="patch", layer=0, k=3, config=config)
    return [tmp_path / name for name in saes]


def settings(**changes) -> Settings:
    given = {"batch_tokens": 200} | changes
    return Settings(OmegaConf.create(given.pop("metrics", METRICS)), **given)


def table(run) -> dict:
    """A run's rows, with text for values, in which one NaN equals another."""
    return {(r["part"], r["metric"], r["setting"]): repr(r["value"]) for r in read_rows(run)}


@pytest.fixture
def computed(monkeypatch):
    """Which parts are computed, and how many images every read of a store takes."""
    seen: dict[str, list] = {"parts": [], "read": []}
    scores, features = suite.Part.scores, FeatureStore.features

    def counted(self, run):
        seen["parts"].append((run.folder.name, self.name))
        return scores(self, run)

    def read(self, index):
        found = features(self, index)
        seen["read"].append(len(found))
        return found

    monkeypatch.setattr(suite.Part, "scores", counted)
    monkeypatch.setattr(FeatureStore, "features", read)
    return seen


def half_deleted(run):
    (run / "sae.safetensors").unlink()


def cut_off(run):
    whole = (run / "sae.safetensors").read_bytes()
    (run / "sae.safetensors").write_bytes(whole[: len(whole) // 2])


def foreign(run):
    (run / "cfg.json").write_text(json.dumps({"schema": 2, "architecture": "standard"}))


def without_its_config(run):
    made = json.loads((run / "cfg.json").read_text())
    (run / "cfg.json").write_text(json.dumps({key: value for key, value in made.items() if key != "config"}))


def no_json(run):
    (run / "cfg.json").write_text("{")


def without_its_store(run):
    made = json.loads((run / "cfg.json").read_text())
    made["config"]["data"]["test"] = "/no/such/store"
    (run / "cfg.json").write_text(json.dumps(made))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (half_deleted, "There is no sae.safetensors in"), (cut_off, "truncated"), (foreign, "lacks d_in, d_sae"),
        (without_its_config, "does not say how the SAE was trained"), (no_json, "is not valid JSON"),
        (without_its_store, "no feature store /no/such/store"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_scored(damage, said, folders, capsys):
    damage(folders[0])
    core = settings(metrics={"core": METRICS["core"]})
    with pytest.raises(PartError, match=r"1 runs or parts of them could not be computed, as said above: topk-a"):
        evaluate_runs(folders, core)
    err = capsys.readouterr().err
    assert "topk-a is left out. " in err
    assert said in err
    assert [bool(read_rows(run)) for run in folders] == [False, True, True]
    with pytest.raises(ValueError, match=said):  # alone, it is the error
        evaluate_runs(folders[:1], core)


def test_damaged_scores_are_made_anew(folders):
    core = settings(metrics={"core": METRICS["core"]})
    evaluate_runs(folders[:1], core)
    for name in (SCORES, TOP_IMAGES, TABLE):
        whole = (folders[0] / name).read_bytes()
        (folders[0] / name).write_bytes(whole[: len(whole) // 2])
        evaluate_runs(folders[:1], core)
        assert stored_scores(folders[0], "test", []) is not None
        assert read_rows(folders[0], strict=True)


def test_all_parts_land_in_one_table(folders, stores):
    evaluate_runs(folders, settings())
    for run in folders:
        rows = read_rows(run)
        assert {row["part"] for row in rows} == set(METRICS)
        assert {row["run"] for row in rows} == {run.name}
        assert {row["split"] for row in rows} == {"test"}
        assert not (run / PARTIAL).exists()
    a, b, _ = folders
    assert value_of(read_rows(a), "channel_moran") == value_of(read_rows(b), "channel_moran")
    assert value_of(read_rows(a), "accuracy_raw") == value_of(read_rows(b), "accuracy_raw")
    assert value_of(read_rows(a), "fvu") != value_of(read_rows(b), "fvu")
    alone = score(a, stores["test"])
    for name, value in alone["metrics"].items():
        assert value_of(read_rows(a), name) == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize(("variant", "options"), [("batchtopk", {"k": 3}), ("gated", {})])
def test_a_normaliser_folded_into_the_weights_changes_no_score(variant, options, folders, stores, tmp_path):
    """Nor does one that is not the store's: scores know the store, the codes and the raw reconstruction alone."""
    cfg, store = json.loads((folders[0] / "cfg.json").read_text()), stores["test"]
    other = Normalizer(store.d_in, store.mean * 0.8 + 0.3, store.std * 1.7)
    sae = VARIANTS[variant](store.d_in, 40, normalizer=other, seed=1, **options)
    if isinstance(sae, BatchTopK):
        sae.calibrate([store.features(slice(None))], store.n_tokens)
        sae.threshold -= 1e-4  # lest it be one of the entries, which rounding could move over it
    folded = build(variant, fold(sae), **options)
    runs = [tmp_path / "with", tmp_path / "folded"]
    for run, each in zip(runs, (sae, folded), strict=True):
        each.save(run, **{k: cfg[k] for k in ("name", "backbone", "features", "layer", "k", "config")})
    evaluate_runs(runs, settings())
    with_normaliser, without = ({row[:-1]: row[-1] for row in numbers(run)} for run in runs)
    assert with_normaliser.keys() == without.keys()
    for (part, *row), value in with_normaliser.items():
        probed = part in ("preservation", "sparse_probing", "absorption")  # up to where their solver stops
        tolerance = {"rel": 0.02, "abs": 0.02} if probed else {"rel": 1e-4, "abs": 1e-5}
        assert without[part, *row] == pytest.approx(value, **tolerance, nan_ok=True), row


def numbers(run) -> list[tuple]:
    return [(r["part"], r["metric"], r["setting"], r["value"]) for r in read_rows(run)]


def test_features_are_compared_in_the_frame_of_the_store(folders, stores, tmp_path):
    """An SAE of raw features has cosines about the store's mean, not about the origin, and probes of the same scale."""
    cfg, store = json.loads((folders[0] / "cfg.json").read_text()), stores["test"]
    sae = TopK(store.d_in, 40, 3, seed=1)
    sae.save(tmp_path / "raw", **{k: cfg[k] for k in ("name", "backbone", "features", "layer", "k", "config")})
    runs = [folders[0], tmp_path / "raw"]
    parts = ("core", "raw_moran", "preservation", "recovery")
    evaluate_runs(runs, settings(metrics={name: METRICS[name] for name in parts}))
    rows = [read_rows(run) for run in runs]
    for metric in ("accuracy_raw", "channel_moran"):
        assert value_of(rows[0], metric) == value_of(rows[1], metric)
    x = store.features(slice(None)).flatten(0, 1).float()
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(x - store.mean, sae(x) - store.mean).mean()
    assert value_of(rows[1], "cosine") == pytest.approx(float(cosine), abs=1e-5)
    assert value_of(rows[1], "recovery_cosine", "n=all") == pytest.approx(float(cosine), abs=0.1)  # of some images


def test_a_second_call_computes_only_what_is_missing(folders, computed):
    evaluate_runs(folders[:2], settings())
    assert len(computed["parts"]) == 2 * len(METRICS)
    computed["parts"].clear(), computed["read"].clear()
    before = {run: table(run) for run in folders}
    evaluate_runs(folders[:2], settings())
    assert computed == {"parts": [], "read": []}
    changed = METRICS | {"retrieval": {"at": [1, 3]}}
    evaluate_runs(folders[:2], settings(metrics=changed))
    assert computed["parts"] == [("topk-a", "retrieval"), ("topk-b", "retrieval")]
    after = table(folders[0])
    assert {key: after[key] for key in before[folders[0]]} == before[folders[0]]
    assert ("retrieval", "retrieval_codes", "k=3") in after


def test_another_sae_in_the_folder_is_scored_anew(folders, computed, stores):
    evaluate_runs(folders[:1], settings())
    computed["parts"].clear()
    store, cfg = stores["test"], json.loads((folders[0] / "cfg.json").read_text())
    sae = TopK(store.d_in, 40, 3, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=9)
    sae.save(folders[0], **{k: cfg[k] for k in ("name", "backbone", "features", "layer", "k", "config")})
    evaluate_runs(folders[:1], settings())
    assert len(computed["parts"]) == len(METRICS)


def test_saes_of_one_backbone_share_each_read(folders, computed):
    only = {"core": METRICS["core"]}
    evaluate_runs(folders[:1], settings(metrics=only))
    one = sum(computed["read"])
    assert one < 2 * 90  # the pass, and the top images of the report
    computed["read"].clear()
    streamed = []
    batches = scoring_pass.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_pass, "batches", lambda *a, **k: streamed.append(a[1:3]) or batches(*a, **k))
        evaluate_runs(folders, settings(metrics=only, again=True))
    assert streamed == [(0, 90)]


@pytest.mark.slow
def test_little_memory_only_means_more_reads(folders):
    evaluate_runs(folders, settings())
    together = [table(run) for run in folders]
    evaluate_runs(folders, settings(again=True, memory_gb=1e-9))
    assert [table(run) for run in folders] == together


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_killed_pass_goes_on_from_its_last_checkpoint(folders, computed, monkeypatch, after):
    evaluate_runs(folders[:2], settings())
    expected = [table(run) for run in folders[:2]]
    for run in folders[:2]:
        (run / "scores.parquet").unlink()
    batches = scoring_pass.batches

    def broken(*arguments, **options):
        for n, batch in enumerate(batches(*arguments, **options)):
            if n == after:
                raise Killed
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(scoring_pass, "batches", broken)
        with pytest.raises(Killed):
            evaluate_runs(folders[:2], settings(checkpoint_minutes=0))
    assert (folders[0] / PARTIAL).exists()
    assert read_rows(folders[0]) == []
    streamed = []
    with monkeypatch.context() as patch:
        patch.setattr(scoring_pass, "batches", lambda *a, **k: streamed.append(a[1]) or batches(*a, **k))
        evaluate_runs(folders[:2], settings())
    assert streamed[0] == 12 * after  # images of 16 patches in batches of 200 tokens
    assert [table(run) for run in folders[:2]] == expected


def test_what_was_written_after_the_last_checkpoint_does_not_count(folders, monkeypatch):
    evaluate_runs(folders[:1], settings())
    expected = table(folders[0])
    (folders[0] / "scores.parquet").unlink()
    saves = []

    def save(passes):
        if saves:
            raise Killed
        saves.append(True)
        for each in passes:
            each.save()

    with monkeypatch.context() as patch:
        patch.setattr(scoring_pass, "save", save)
        with pytest.raises(Killed):
            evaluate_runs(folders[:1], settings(checkpoint_minutes=0))
    evaluate_runs(folders[:1], settings())
    assert table(folders[0]) == expected


def test_a_call_killed_between_parts_keeps_the_finished_ones(folders, computed, monkeypatch):
    def killed(run, options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setitem(PARTS, "retrieval", replace(PARTS["retrieval"], compute=killed))
        with pytest.raises(Killed):
            evaluate_runs(folders[:1], settings())
    done = [name for _, name in computed["parts"]]
    computed["parts"].clear(), computed["read"].clear()
    evaluate_runs(folders[:1], settings())
    assert done[-1] == "retrieval"
    assert [name for _, name in computed["parts"]] == [name for name in METRICS if name not in done[:-1]]
    assert sum(computed["read"]) == 20 + 2 * 90  # recovery's and two judges' embeddings; the pass was not repeated


def test_a_part_that_cannot_be_computed_leaves_the_others(folders, capsys):
    broken = METRICS | {"sparse_probing": {"budgets": [64], "ranking": "joint", **FIT}}
    with pytest.raises(
        PartError, match=r"2 parts could not be computed.*sparse_probing of topk-a, sparse_probing of t"
    ):
        evaluate_runs(folders[:2], settings(metrics=broken))
    assert "The smallest budget is 64 latents, but the SAE has 40" in capsys.readouterr().out
    assert {row["part"] for row in read_rows(folders[0])} == set(METRICS) - {"sparse_probing"}
    evaluate_runs(folders[:2], settings())
    assert {row["part"] for row in read_rows(folders[0])} == set(METRICS)
    assert not (folders[0] / PARTIAL).exists()


def test_unknown_metrics_are_a_sentence():
    with pytest.raises(ValueError, match=r"Unknown metrics\.morans; the parts are core, absorption"):
        evaluate_runs([], settings(metrics={"morans": {}})) or settings(metrics={"morans": {}}).parts


def test_images_without_labels_have_no_probes(folders, tmp_path, stores):
    bare = write_store(tmp_path / "bare", 60, seed=9, class_names=["unlabelled"])
    run = folders[0]
    cfg = json.loads((run / "cfg.json").read_text())
    cfg["config"]["data"]["test"] = str(bare.folder)
    (run / "cfg.json").write_text(json.dumps(cfg))
    evaluate_runs([run], settings())
    rows = read_rows(run)
    assert value_of(rows, "preservation_left_out") == 1
    assert value_of(rows, "monosemanticity_within") != value_of(rows, "monosemanticity_within")  # NaN
    assert value_of(rows, "fvu") > 0


@pytest.fixture
def rare_classes(folders, tmp_path, stores):
    """The first run, on a test store that has two classes of a single image besides the other's classes and images."""
    features = torch.cat([stores["test"].features(slice(None)), stores["val"].features(slice(2))])
    names = [*stores["test"].class_names, "dodo", "moa"]
    labels = [*stores["test"].labels.tolist(), 3, 4]
    about = {"split": "test", "class_names": names, "data": "synthetic", "backbone": "none (synthetic)",
             "kind": "patch", "layer": 0, "grid": (4, 4)}  # fmt: skip
    writer = StoreWriter(tmp_path / "rare", "e" * 64, about, len(labels))
    shard, ids = writer.begin(0), [f"image-{i}" for i in range(len(labels))]
    shard.append(features, ids)
    writer.finish(0, shard, ids, labels)
    writer.seal(1)
    cfg = json.loads((folders[0] / "cfg.json").read_text())
    cfg["config"]["data"]["test"] = str(tmp_path / "rare")
    siblings = tmp_path / "siblings.json"
    siblings.write_text(json.dumps({"all": names, "extinct": ["dodo", "moa", names[0]]}))
    cfg["config"]["data"]["siblings"] = str(siblings)
    (folders[0] / "cfg.json").write_text(json.dumps(cfg))
    return folders[0]


def test_classes_with_a_single_image_cost_no_other_class_its_scores(rare_classes, folders, capsys):
    parts = ("core", "preservation", "sparse_probing", "absorption")
    evaluate_runs([rare_classes], settings(metrics={name: METRICS[name] for name in parts}))
    rows = read_rows(rare_classes)
    assert {row["part"] for row in rows} == set(parts)
    said = capsys.readouterr()
    sentence = "2 of 5 classes have too few images for probes and are left out: dodo, moa."
    assert (said.out + said.err).count(sentence) == 1
    for part in parts[1:]:
        (row,) = [row for row in rows if row["metric"] == f"{part}_classes_left_out"]
        assert (row["value"], row["why"]) == (2, "too few images of dodo, moa")
    assert value_of(rows, "absorption_tasks") == 3  # of the group of all; one class alone is no group
    evaluate_runs(folders[1:2], settings(metrics={name: METRICS[name] for name in parts}))
    for metric in ("accuracy_raw", "lp_accuracy"):
        assert value_of(rows, metric) == pytest.approx(value_of(read_rows(folders[1]), metric), abs=0.3), metric


def test_a_figure_that_cannot_be_computed_is_nan_with_its_reason(folders, stores, capsys):
    run, store = folders[0], stores["test"]
    cfg = json.loads((run / "cfg.json").read_text())
    sae = TopK(store.d_in, 40, 3, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=1)
    sae.b_enc.data -= 1e6  # no latent ever fires
    sae.save(run, **{k: cfg[k] for k in ("name", "backbone", "features", "layer", "k", "config")})
    evaluate_runs([run], settings())
    rows = {row["metric"]: row for row in read_rows(run)}
    for metric in (
        "purity", "weighted_purity", "top_purity", "monoscore_scored", "moran", "absorption", "cknna",
        "monosemanticity", "activation_values",
    ):  # fmt: skip
        assert math.isnan(rows[metric]["value"]), metric
    assert rows["dead"]["value"] == 40
    for row in rows.values():
        assert bool(row["why"]) == math.isnan(row["value"]), row["metric"]
    said = capsys.readouterr()
    assert "topk-a: moran: moran, " in said.out + said.err
    assert "cannot be computed: no latent has 5 images with 2 active patches" in said.out + said.err


def test_per_latent_scores_survive_later_parts(folders):
    evaluate_runs(folders[:1], settings(metrics={"core": METRICS["core"]}))
    evaluate_runs(folders[:1], settings())
    tensors, _ = read_tensors(folders[0] / LATENTS)
    assert {"monoscore", "purity", "moran", "monosemanticity"} <= set(tensors)
    evaluate_runs(folders[:1], settings(split="val"))
    evaluate_runs(folders[:1], settings())
    again, _ = read_tensors(folders[0] / LATENTS)
    for name, tensor in tensors.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert {row["split"] for row in read_rows(folders[0])} == {"test", "val"}


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_ranks_cover_all_images(world):
    spans = [Ranks(rank, world).span(10) for rank in range(world)]
    assert [i for span in spans for i in span] == list(range(10))


@pytest.mark.slow
def test_several_processes_give_the_same_scores(folders, tmp_path):
    evaluate_runs(folders, settings())
    expected = [table(run) for run in folders]
    cfg = OmegaConf.create({
        "metrics": METRICS | {"cross_domain": {"k": 8, "C": 1.0, "max_iter": 9, "sets": {"elsewhere": {
            "backbones": "published", "name": "${data.id}"}}}},  # a name that only a run's config could resolve
        "runs": [run.name for run in folders], "paths": {"runs": str(tmp_path), "stores": None}, "split": "test",
        "similarity": None, "similarity_features": None, "similarity_store": None, "batch_tokens": 200, "memory_gb": 4,
        "checkpoint_minutes": 5, "again": True, "device": "cpu", "devices": 2, "latents_shown": 12,
    })  # fmt: skip
    for run in folders:
        (run / "result.json").write_text("{}")
    evaluate(cfg)
    for run, values in zip(folders, expected, strict=True):
        assert table(run).keys() == values.keys()
        for key, value in table(run).items():
            assert float(value) == pytest.approx(float(values[key]), rel=1e-9, abs=1e-12, nan_ok=True), key
        assert not (run / PARTIAL).exists()


def test_runs_that_differ_by_seed_have_a_stability(config, tmp_path, stores):
    evaluated = settings(metrics={"core": METRICS["core"], "stability": True})
    runs, store = [], stores["test"]
    for name, seed, k in (("a", 1, 8), ("b", 2, 8), ("alone", 1, 4)):
        cfg = OmegaConf.to_container(config(f"seed={seed}", f"k={k}"), resolve=True)
        cfg |= {"data": {"source": "store", "held_out": 0.1, "seed": 0,
                         **{split: str(each.folder) for split, each in stores.items()}}}  # fmt: skip
        cfg["backbone"] = {"name": "none", "size": "tiny", "layer": 0, "tiny": {"layer": 0}}
        sae = TopK(store.d_in, 24, 3, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=seed)
        if name == "b":  # the same directions as a's, in another order
            with torch.no_grad():
                sae.W_dec.copy_(SAE.load(runs[0]).W_dec.flip(0))
                sae.W_enc.copy_(SAE.load(runs[0]).W_enc.flip(0))
        runs.append(tmp_path / name)
        sae.save(runs[-1], name=name, backbone=store.backbone, features="patch", layer=0, k=k, config=cfg)
    evaluate_runs(runs, evaluated)
    for run in runs[:2]:
        rows = read_rows(run)
        assert value_of(rows, "stability") == pytest.approx(1, abs=1e-6)
        assert value_of(rows, "stability_encoder") == pytest.approx(1, abs=1e-6)
        assert value_of(rows, "stability_siblings") == 1
    assert "stability" not in {row["part"] for row in read_rows(runs[2])}


def test_a_data_set_that_is_not_there_is_left_out_and_named_before_anything_is_computed(
    folders, computed, tmp_path, capsys
):
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    nowhere = {"source": "folder", "name": "nowhere", "path": str(tmp_path / "none"), "backbones": "tiny"}
    nowhere |= {"shares": shares, "limit": None, "shuffle": True, "seed": 42}
    wanted = {"k": 8, "C": 1.0, "max_iter": 100}
    birds = {"cross_domain": {**wanted, "sets": {"birds": nowhere}}}
    sentence = r"birds of metrics.cross_domain: .*or leave it out with '~metrics.cross_domain.se"
    with pytest.raises(DataError, match=sentence):
        evaluate_runs(folders[:1], settings(metrics=birds))
    assert computed["parts"] == []
    with pytest.raises(PartError, match="cross_domain/birds of topk-a"):
        evaluate_runs(folders[:1], settings(metrics={"core": METRICS["core"], **birds}))
    assert re.search(f"cross_domain/birds is left out. The data set {sentence}", capsys.readouterr().err)
    assert [name for _, name in computed["parts"]] == ["core"]
    absent = {name: {**nowhere, "name": name, "path": None} for name in ("birds", "plants")}
    both = {"core": METRICS["core"], "cross_domain": {**wanted, "sets": absent}}
    evaluate_runs(folders[:1], settings(metrics=both, again=True))
    said = "Left out, as nothing says where their data lie: cross_domain/birds, cross_domain/plants (metrics.cross_"
    assert capsys.readouterr().err.count(said) == 1


def test_nothing_is_extracted_to_see_that_nothing_is_missing(folders, monkeypatch):
    evaluate_runs(folders[:1], settings())
    monkeypatch.setattr(Job, "store", lambda *a: pytest.fail("a store was opened"))
    evaluate_runs(folders[:1], settings())


def test_two_calls_do_not_score_the_same_run_at_once(folders, capsys):
    started, results = threading.Event(), []
    with scoring_lock(folders[0]):
        thread = threading.Thread(
            target=lambda: (started.set(), evaluate_runs(folders[:1], settings()), results.append(True))
        )
        thread.start()
        started.wait()
        thread.join(1.0)
        assert thread.is_alive()
        assert results == []
    thread.join(60)
    assert results == [True]
    assert "Another job is scoring topk-a; waiting for it." in capsys.readouterr().out


def test_stores_that_lie_elsewhere_now_can_be_named(folders, tmp_path):
    assert Job(folders[0], settings()).source.stores.name == "stores"
    assert Job(folders[0], settings(stores=tmp_path / "moved")).source.stores == tmp_path / "moved"
