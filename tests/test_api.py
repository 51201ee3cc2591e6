"""The commands from Python: on arrays, with ordinary runs behind them."""

import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_tensor

import sae_lightning
from sae_lightning import MonoLoss
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.taps import Tap
from sae_lightning.features.store import FeatureStore
from sae_lightning.runs.run import Run, find_runs
from sae_lightning.saes import VARIANTS
from sae_lightning.saes.topk import TopK
from sae_lightning.training.module import SAEModule
from tests.configs import composed

WORLD = np.random.default_rng(0)
DIRECTIONS = WORLD.normal(size=(24, 16)).astype(np.float32)
ACTIVE = (WORLD.random((2000, 24)) < 0.1) * WORLD.uniform(0.5, 1.5, (2000, 24)).astype(np.float32)
FEATURES = (ACTIVE @ DIRECTIONS + 0.01 * WORLD.normal(size=(2000, 16))).astype(np.float32)
LABELS = ACTIVE.argmax(1) % 5
TINY = {"backbone.size": "tiny"}
SMALL = {"k": 4, "expansion": 2, "epochs": 1, "batch_size": 200, "progress": False}


def explained(sae, x: np.ndarray) -> float:
    """Explained variance by hand."""
    x = torch.from_numpy(x)
    with torch.no_grad():
        rebuilt = sae.decode(sae.encode(x))
    return 1 - float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())


def test_ten_lines_give_an_sae_that_explains_the_features():
    sae = sae_lightning.fit(FEATURES, k=4, expansion=4, batch_size=128, epochs=12, lr=1e-2, progress=False)
    assert explained(sae, FEATURES) > 0.8
    assert sae.encode(torch.from_numpy(FEATURES)).nnz / 2000 == pytest.approx(4, rel=0.1)  # calibrated


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a run on labelled features, with MonoLoss and other settings."""
    out = tmp_path_factory.mktemp("out")
    sae_lightning.fit(
        FEATURES, "topk", labels=LABELS, loss={"aux": 0.1}, callbacks=[MonoLoss(0.1, every=2)], out=out,
        settings={"schedule.warmup": 0.1}, **SMALL,
    )  # fmt: skip
    return out


def test_the_run_is_an_ordinary_one(kept):
    (folder,) = find_runs("*", kept / "runs")
    run = Run(folder)
    assert run.cfg["variant"] == "topk"
    assert run.cfg["k"] == 4
    assert run.config["loss"]["aux"] == 0.1
    assert run.config["schedule"]["warmup"] == 0.1
    entry = run.config["callbacks"]["monoloss"]
    assert (entry["_target_"], entry["weight"], entry["every"]) == (
        "sae_lightning.training.monoloss.MonoLoss", 0.1, 2
    )  # fmt: skip
    store = run.store("train")
    assert (store.kind, store.class_names) == ("pooled", list("01234"))
    assert len(store) == round(2000 * 0.9)
    assert len(run.store("val")) + len(run.store("test")) == 200


def test_the_same_call_gives_what_is_finished(kept, capsys):
    sae_lightning.fit(
        FEATURES, "topk", labels=LABELS, loss={"aux": 0.1}, callbacks=[MonoLoss(0.1, every=2)], out=kept,
        settings={"schedule.warmup": 0.1}, **SMALL,
    )  # fmt: skip
    assert "finished before, skipped" in capsys.readouterr().out
    assert len(find_runs("*", kept / "runs")) == 1


def test_sources_of_every_kind_train_the_same_sae(tmp_path):
    np.save(tmp_path / "x.npy", FEATURES)
    loader = DataLoader(TensorDataset(torch.from_numpy(FEATURES)), batch_size=300)
    sources = [FEATURES, np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "x.npy", loader]
    weights = [sae_lightning.fit(source, **SMALL).W_dec.detach() for source in sources]
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_a_store_and_features_of_their_own_to_validate_on(kept, tmp_path):
    (folder,) = (kept / "stores").glob("train-*")
    sae_lightning.fit(FeatureStore.open(folder), val=FEATURES[:64], out=tmp_path, **SMALL)
    run = Run(find_runs("*", tmp_path / "runs")[0])
    assert len(run.store("train")) == 2000
    assert len(run.store("val")) == 64


def test_tokens_of_images(tmp_path):
    sae_lightning.fit(FEATURES.reshape(125, 16, 16), out=tmp_path, **SMALL)
    store = Run(find_runs("*", tmp_path / "runs")[0]).store("val")
    assert (store.kind, store.n_patches, store.manifest.grid) == ("patch", 16, (4, 4))


def test_a_variant_of_ones_own(tmp_path):
    class Largest(TopK):
        """TopK with half of k."""

        variant = "largest"

        def __init__(self, d_in: int, d_sae: int, k: int, **options) -> None:
            super().__init__(d_in, d_sae, max(1, int(k) // 2), **options)

        def settings(self) -> dict[str, object]:
            return super().settings() | {"k": 2 * self.k}

    try:
        sae = sae_lightning.fit(FEATURES, Largest, **SMALL)
        assert type(sae) is Largest
        assert sae.encode(torch.from_numpy(FEATURES)).counts().max() == 2
    finally:
        del VARIANTS["largest"]


def test_without_a_folder_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    sae_lightning.fit(FEATURES, **SMALL)
    assert list(tmp_path.iterdir()) == []


CONSTANT = FEATURES.copy()
CONSTANT[:, 3] = 7


@pytest.mark.parametrize(
    ("features", "options", "said"),
    [
        (FEATURES[:1], {}, "1 rows of features, of which 1 are to train on; give at least 16"),
        (np.ones((100, 4), np.float32), {}, "All rows of the features are equal"),
        (FEATURES * np.nan, {}, "row 0 holds nan in dimension 0"),
        (FEATURES, {"k": 33}, "k=33 is more than d_sae=32"),
        (FEATURES, {"sae": "topkk"}, "topkk"),
        (FEATURES, {"loss": {"no_term": 1}}, "no_term"),
        (FEATURES, {"settings": {"optimizer.lr": -1}}, "optimizer.lr=-1"),
        (FEATURES, {"callbacks": [object()]}, "_target_|object"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(features, options, said):
    with pytest.raises(ValueError, match=said):
        sae_lightning.fit(features, **SMALL | options)


def test_a_constant_column_is_said(capsys):
    sae_lightning.fit(CONSTANT, **SMALL)
    assert "1 of 16 dimensions are constant (the first is 3)" in capsys.readouterr().out


def test_an_sae_is_scored_on_a_store(kept):
    run = Run(find_runs("*", kept / "runs")[0])
    store = run.store("test")
    scores = sae_lightning.evaluate(run.sae, store).set_index("metric")["value"]
    x = store.features(slice(None))[:, 0].float()
    assert scores["explained_variance"] == pytest.approx(explained(run.sae, x.numpy()), abs=1e-3)
    of_run = sae_lightning.evaluate(run.folder, metrics=["cknna"])
    assert {"core", "cknna"} == set(of_run["part"])
    assert of_run.set_index("metric").loc["explained_variance", "value"] == pytest.approx(scores["explained_variance"])
    assert "explained_variance" in sae_lightning.list_runs(kept / "runs").columns


def test_what_cannot_be_scored_is_one_sentence(kept):
    store = Run(find_runs("*", kept / "runs")[0]).store("test")
    with pytest.raises(ValueError, match="takes features of 8 dimensions, and FeatureStore"):
        sae_lightning.evaluate(TopK(8, 16, 2), store)
    with pytest.raises(ValueError, match="needs a store"):
        sae_lightning.evaluate(TopK(16, 32, 2))
    with pytest.raises(ValueError, match="There is no metric morann; there are core"):
        sae_lightning.evaluate(TopK(16, 32, 2), store, ["morann"])
    with pytest.raises(FileNotFoundError, match="No finished run"):
        sae_lightning.evaluate(kept / "runs" / "nothing")


def test_runs_as_a_table(kept):
    table = sae_lightning.list_runs(kept / "runs")
    assert list(table["variant"]) == ["topk"]
    assert (
        table["val/explained_variance"].iloc[0]
        == Run(find_runs("*", kept / "runs")[0]).result["val"]["explained_variance"]
    )
    sae_lightning.fit(FEATURES, "batchtopk", labels=LABELS, out=kept / "more", **SMALL)
    other = find_runs("*", kept / "more" / "runs")[0]
    told = sae_lightning.compare(find_runs("*", kept / "runs")[0], other)
    assert tuple(told.loc["sae.name"]) == ("topk", "batchtopk")
    assert told.loc["val/explained_variance"].notna().all()


PICTURES = [Image.fromarray(WORLD.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(5)]


def small_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.AvgPool2d(4), torch.nn.Flatten())


def to_input(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.resize((16, 16)))).permute(2, 0, 1) / 255


def test_features_of_pictures_and_a_named_backbone(tmp_path):
    PICTURES[0].save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", PICTURES[1], np.array(PICTURES[2]), to_tensor(PICTURES[3])]
    store = sae_lightning.extract(mixed, "dinov2", labels=["x", "y", "x", "y"], out=tmp_path, settings=TINY)
    assert (len(store), store.kind, store.class_names) == (4, "patch", ["x", "y"])
    backbone = load_backbone(composed("extract", *(f"{k}={v}" for k, v in TINY.items())).backbone)
    tap = Tap("patch", store.layer)
    pixels = torch.stack([backbone.transform(picture) for picture in PICTURES[:4]])
    assert torch.allclose(store.features(slice(None)).float(), backbone.forward_features(pixels, [tap])[tap], atol=1e-2)


@pytest.mark.parametrize(("layer", "shape", "kind"), [("1", (16, 8), "patch"), (None, (1, 8), "pooled")])
def test_features_of_any_module(layer, shape, kind, tmp_path):
    module = small_module().train()
    store = sae_lightning.extract(
        list(zip(PICTURES, "abaab", strict=True)), module, layer=layer, transform=to_input, batch_size=2, out=tmp_path
    )
    pixels = torch.stack([to_input(picture) for picture in PICTURES])
    expected = module(pixels)[:, None] if layer is None else module[:2](pixels).flatten(2).transpose(1, 2)
    assert torch.allclose(store.features(slice(None)).float(), expected.detach(), atol=1e-3)
    assert (store.n_patches, store.d_in, store.kind) == (*shape, kind)
    assert [store.class_names[i] for i in store.labels] == list("abaab")
    assert module.training  # as before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], "dinov2"), "no pictures in the list"),
        (([np.ones((4, 4, 5), np.uint8)], "dinov2"), r"Picture 0 is ndarray of shape \[4, 4, 5\]"),
        (([np.full((4, 4, 3), 2.0)], "dinov2"), "values from 2 to 2; floats are to be from 0 to 1"),
        ((PICTURES, "dinov22"), "dinov22"),
        ((PICTURES, small_module()), "needs transform"),
    ],
)
def test_what_cannot_be_extracted_is_one_sentence(arguments, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        sae_lightning.extract(*arguments, out=tmp_path, settings=TINY if arguments[1] == "dinov2" else None)


def test_objects_say_what_they_are_in_a_line(kept):
    run = Run(find_runs("*", kept / "runs")[0])
    assert repr(run).startswith("Run(topk-features-pooled-x2-k4-monoloss-s42-")
    assert repr(run.store("train")) == "FeatureStore(1,800 x 1 x 16 float16, pooled of unknown, imported train)"
    assert repr(run.sae).splitlines()[0].startswith("TopK(")
    assert "topk, 16 → 32, k=4" in repr(run.sae)
    assert repr(run.sae.encode(torch.from_numpy(FEATURES[:3]))) == "SparseCodes(3 x 32, 4.0 active a sample, cpu)"


def test_importing_the_package_loads_nothing():
    heavy = "import sys, sae_lightning; print([m for m in ('torch', 'hydra', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", heavy], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("[]", "")
    assert "Error" not in done.stderr
    with pytest.raises(AttributeError, match="no attribute 'fits'"):
        _ = sae_lightning.fits
    assert "fit" in dir(sae_lightning)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_module_in_a_trainer_of_ones_own(labelled):
    x = torch.from_numpy(FEATURES)
    data = TensorDataset(x, torch.from_numpy(LABELS)) if labelled else TensorDataset(x)
    sae = TopK(16, 32, 4, seed=0)
    module = SAEModule(sae, {"reconstruction": 1.0}, optimizer={"name": "adam", "lr": 1e-2})
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="cpu")  # fmt: skip
    before = explained(sae, FEATURES)
    trainer.fit(module, DataLoader(data, batch_size=100), DataLoader(data, batch_size=500))
    assert explained(sae.eval(), FEATURES) > before + 0.2
    assert trainer.callback_metrics["val/l0"] == pytest.approx(4, abs=0.1)
    with pytest.raises(TypeError, match=r"takes batches of features, or of \(features, labels\); got dict"):
        module.training_step({"x": x}, 0)
