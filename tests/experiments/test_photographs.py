"""Real photographs through encoders that were trained on photographs; skipped where these are not at hand."""

from pathlib import Path

import pytest
import timm
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sae_lightning.backbones.backbone import Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.splice import spliced
from sae_lightning.features.source import Source, extract_stores
from sae_lightning.metrics.moran import Moran
from sae_lightning.runs.run import Run
from sae_lightning.saes import BatchTopK
from sae_lightning.training.fit import train
from tests.configs import composed

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VIT, LITE0 = DATA / "encoders" / "dinov2_s_saliency", DATA / "encoders" / "efficientnet_lite0"
IMAGENET = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # Imagenette's classes among ImageNet's

pytestmark = pytest.mark.skipif(not VIT.is_dir(), reason="needs the photographs and encoders")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A hundred photographs a split, and everything below one folder."""
    root = tmp_path_factory.mktemp("photographs")
    data = (f"data.id={DATA / 'photographs'}", "data.config=null", "data.limit=100")
    paths = (f"paths.stores={root / 'stores'}", f"paths.runs={root / 'runs'}")

    def made(*overrides: str):
        return composed("config", "data=imagenette", *overrides, *data, *paths)

    return made


@pytest.fixture(scope="module")
def run(config):
    """BatchTopK on patch tokens after block 10 of the ViT-S."""
    settings = ("expansion=4", "k=64", "batch_size=1024", "trainer.max_epochs=12", "trainer.enable_progress_bar=false")
    cfg = config("backbone=dinov2_s", f"backbone.published.weights={VIT}", "backbone.layer=10", *settings)
    source = Source.of(cfg)
    for split in ("train", "test"):
        extract_stores(source, source.images(split), [source.tap, Tap("pooled")])
    return Run(train(cfg))


def plain(images):
    """Patch tokens after block 10 of pictures, and the class token at the end, as transformers alone gives them."""
    model = transformers.AutoModel.from_pretrained(VIT, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(VIT)
    pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    return output.hidden_states[11][:, 1:]


def test_stored_features_are_those_of_transformers(run):
    store, images = run.store("test"), run.images("test")
    reference = plain([images[i] for i in range(8)])
    found = store.features(slice(0, 8)).float()
    assert found.shape == (8, 256, 384)
    torch.testing.assert_close(found, reference, atol=0.02, rtol=2e-3)  # half precision, where values reach 20


def test_an_sae_explains_held_out_photographs_and_its_latents_are_connected(run):
    store = run.store("test")
    x = store.features(slice(0, len(store))).float()
    with torch.no_grad():
        left = (x - run.sae(x)).square().sum() / (x - x.mean((0, 1))).square().sum()
    assert 1 - float(left) > 0.8
    moran = Moran(run.sae.d_sae, grid=(16, 16))
    moran.update(run.sae.encode(x))
    assert float(moran.compute()["moran"]) > 0.1 > -1 / 255


def test_spliced_with_its_error_nothing_changes_and_random_directions_cost_more(run):
    encoder, pictures = run.backbone, run.images("test")
    pixels = torch.stack([encoder.transform(pictures[i]) for i in range(40)])
    pooled = {split: run.store(split, "pooled") for split in ("train", "test")}
    x, kept = (store.features(slice(0, len(store))).float()[:, 0] for store in pooled.values())
    scaler = StandardScaler()
    probe = LogisticRegression(C=0.01, max_iter=500).fit(scaler.fit_transform(x), pooled["train"].labels)

    def outputs():
        with torch.no_grad():
            return torch.cat([encoder.model(some).pooler_output for some in pixels.split(10)])

    def accuracy(x):
        return probe.score(scaler.transform(x), pooled["test"].labels[: len(x)])

    with torch.no_grad():
        before = encoder.model(pixels[:10]).pooler_output
    with spliced(encoder, run.sae, "add_error"):
        torch.testing.assert_close(encoder.model(pixels[:10]).pooler_output, before, atol=1e-4, rtol=1e-5)
    with spliced(encoder, run.sae):
        replaced = outputs()
    nothing = BatchTopK(384, 1536, k=64, normalizer=run.sae.normalizer, seed=1)
    nothing.finish([run.store("val").features(slice(0, 20)).float().flatten(0, 1)], 20 * 256, "mean")
    with spliced(encoder, nothing.eval()):
        by_chance = outputs()
    assert accuracy(kept) > 0.5
    assert accuracy(by_chance) < accuracy(replaced)


def test_efficientnet_knows_the_ten_classes(config):
    cfg = config(
        "backbone=efficientnet_lite0", f"backbone.published.weights={LITE0}", "features=pooled", "data.limit=200"
    )
    features = {split: Source.of(cfg).store(split) for split in ("train", "test")}
    (x, y), (x_test, y_test) = (
        (store.features(slice(0, len(store))).float().flatten(1), store.labels) for store in features.values()
    )
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(C=0.01, max_iter=500).fit(scaler.transform(x), y)
    assert probe.score(scaler.transform(x_test), y_test) > 0.95
    whole = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(LITE0 / "model.safetensors")).eval()
    encoder = load_backbone(Source.of(cfg).backbone)
    assert torch.equal(encoder.model.conv_stem.weight, whole.conv_stem.weight)
    with torch.no_grad():
        logits = whole.classifier(x_test)[:, IMAGENET]
    assert float((logits.argmax(1) == y_test).float().mean()) > 0.97
