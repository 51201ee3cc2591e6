"""Is an SAE used as it was trained? Figures against what is stated, and what fits better."""

import numpy as np
import pytest
import torch

import sae_lightning
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.taps import Tap
from sae_lightning.commands.main import main
from sae_lightning.data import load_images
from sae_lightning.runs import preflight
from sae_lightning.runs.model import preflight as of_run
from sae_lightning.runs.preflight import Preflight, Reader, figures_of, some_pictures, standard, transforms
from sae_lightning.runs.run import Run
from sae_lightning.saes import BatchTopK, Normalizer
from tests.configs import composed

TRAINED = Tap("patch", 4)


@pytest.fixture(scope="module")
def reader():
    cfg = composed("config", "backbone=dinov2", "backbone.size=tiny")
    images, _ = some_pictures(None, "test", 48)
    return Reader(load_backbone(cfg.backbone), images)


@pytest.fixture(scope="module")
def sae(reader):
    """One of layer 4: the 32 first principal axes of its features, of either sign, read at a threshold."""
    features = reader.features(TRAINED)
    normalizer = standard(features)
    x = normalizer.normalize(features)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:32]
    made = BatchTopK(128, 64, k=10, normalizer=normalizer, seed=0)
    with torch.no_grad():
        for weight in (made.W_enc, made.W_dec):
            weight.copy_(torch.cat([axes, -axes]))
    made.calibrate([features], len(features))
    return made.eval()


@pytest.fixture
def stated(sae, reader):
    return figures_of(sae, reader.features(TRAINED))


def looked(sae, reader, tap=TRAINED, stated=None):
    return Preflight(sae, reader, tap, stated or {}, "48 pictures").verdict()


def test_figures_are_those_of_dense_arithmetic(sae, reader):
    x = reader.features(TRAINED)[:300]
    found, codes = figures_of(sae, x), sae.encode(x).to_dense()
    left = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(1 - float(left), abs=1e-5)
    assert found["l0"] == pytest.approx(float((codes > 0).sum(1).float().mean()))
    assert found["dead_share"] == pytest.approx(float((codes.amax(0) == 0).float().mean()))


def test_an_sae_in_its_place_fits(sae, reader, stated):
    verdict = looked(sae, reader, stated=stated)
    assert verdict.fits
    assert "of the variance, 10 latents a token" in verdict.sentence
    assert verdict.better is None


@pytest.mark.parametrize(("layer", "better"), [(1, "layer 3"), (2, "layer 4")])  # at most two layers away
def test_another_layer_is_named(sae, reader, stated, layer, better):
    verdict = looked(sae, reader, Tap("patch", layer), stated)
    assert not verdict.fits
    assert verdict.better == better
    assert f"It fits best with {better}: " in verdict.sentence


def test_another_site_is_named(sae, reader, stated):
    verdict = looked(sae, reader, Tap("patch", 4, "mlp_out"), stated)
    assert verdict.better is not None
    assert verdict.better.startswith("site=block")


def test_statistics_that_are_missing_are_named(sae, reader, stated):
    without = BatchTopK(128, 64, k=10)
    without.load_state_dict(sae.state_dict())
    without.normalizer = Normalizer(128)
    verdict = looked(without.eval(), reader, stated=stated)
    assert verdict.better is not None
    assert "inputs centred and scaled" in verdict.better


def test_a_threshold_that_is_off_is_named(sae, reader, stated):
    off = BatchTopK(128, 64, k=10)
    off.load_state_dict(sae.state_dict())
    off.set_cuts(8 * sae.cuts())
    verdict = looked(off.eval(), reader, stated=stated)
    assert verdict.better == "a threshold for its k"


def test_other_pixels_are_named(sae, reader, stated, monkeypatch):
    grey = transforms(reader.backbone.image_size)["squeezed, by 0.5 as mean and deviation"]
    monkeypatch.setattr(reader.backbone, "transform", grey)
    verdict = looked(sae, Reader(reader.backbone, reader.images), stated=stated)
    assert verdict.better is not None
    assert verdict.better.startswith(("pixels cropped", "pixels squeezed"))


def test_where_nothing_is_stated_little_variance_is_suspicious(sae, reader):
    assert looked(sae, reader).fits
    verdict = looked(sae, reader, Tap("patch", 1))
    assert "stated: nothing" in verdict.sentence


def test_noise_fits_nowhere(reader):
    noise = BatchTopK(128, 256, k=4, seed=0)
    noise.set_cuts(torch.full((256,), 0.5))
    with torch.no_grad():
        noise.b_pre.copy_(torch.full((128,), 90.0))
    verdict = looked(noise.eval(), reader, stated={"explained_variance": 0.9, "l0": 4.0})
    assert not verdict.fits
    assert verdict.sentence.endswith(("unlike its own.", "% dead."))


def test_pictures_are_evenly_spaced_and_bundled_ones_stand_in():
    images, said = some_pictures(None, "test", 5)
    assert said == "5 pictures of demo"
    whole = load_images({"source": "demo", "name": "demo"}, "test")
    assert [images.image_ids[0], images.image_ids[-1]] == [whole.image_ids[0], whole.image_ids[-1]]
    assert some_pictures({"source": "folder", "path": "/nowhere", "name": "gone"}, "val", 5)[1] == "5 pictures of demo"


def test_runs_are_checked_against_their_training(alone, monkeypatch, capsys):
    folder = alone("sae=batchtopk")
    figures = Run(folder).cfg["figures"]
    assert set(figures) == {"explained_variance", "l0", "dead_share"}
    assert Run(folder).cfg["command"]
    verdict = of_run(Run(folder))
    assert verdict.stated == pytest.approx(figures)
    assert verdict.figures["explained_variance"] == pytest.approx(
        figures["explained_variance"], abs=0.02
    )  # fp16 stores
    assert main(["check", str(folder)]) == int(not verdict.fits)
    assert "8 pictures of folder" in capsys.readouterr().out


def test_a_wrong_use_is_a_warning_when_a_run_is_opened(alone, monkeypatch):
    folder = alone("sae=batchtopk")
    with np.errstate(all="ignore"):
        sae_lightning.open(folder)
    monkeypatch.setattr(preflight, "OFF", -1.0)
    with pytest.warns(UserWarning, match="8 pictures of folder it explains"):
        sae_lightning.open(folder)
