"""dictionary_learning's layout, against the package itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lightning.interop import dictionary_learning
from tests.interop.test_saelens import D_IN, D_SAE, SETTINGS, assert_same, random_sae, randomise, raw_features

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def utils() -> Any:
    """The module with the package's loader and all its classes."""
    pytest.importorskip("dictionary_learning")
    return pytest.importorskip("dictionary_learning.utils")


@pytest.mark.parametrize("variant", SETTINGS)
def test_the_package_reads_what_is_saved(utils: Any, variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant)
    dictionary_learning.save(sae, tmp_path)
    theirs, _ = utils.load_dictionary(str(tmp_path), device="cpu")
    if variant == "relu":
        # load_dictionary rescales this class to unit decoder rows: other codes, the same reconstruction
        reconstruction, scaled = theirs(raw_features(), output_features=True)
        assert_same(sae, scaled / sae.normalizer.std, reconstruction)
        theirs = utils.AutoEncoder.from_pretrained(tmp_path / "ae.pt", normalize_decoder=False)
    assert_same(sae, theirs.encode(raw_features()), theirs(raw_features()))


@pytest.mark.parametrize("variant", SETTINGS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant)
    dictionary_learning.save(sae, tmp_path)
    back = dictionary_learning.load(tmp_path)
    assert (back.variant, back.settings()) == (variant, sae.settings())
    assert_same(back, sae.encode(raw_features()).to_dense(), sae(raw_features()))


@pytest.mark.parametrize(
    ("variant", "options", "dict_class"),
    [
        ("topk", {"inference": "relu"}, "AutoEncoder"),
        ("msae", {"k": 5}, "AutoEncoder"),
        ("matryoshka_topk", {"k": 5, "fractions": [0.5, 1.0]}, "AutoEncoderTopK"),
        ("batchtopk", {"k": 200, "k_per": "batch"}, "JumpReluAutoEncoder"),
    ],
)
def test_other_variants_go_by_their_inference(
    variant: str, options: dict[str, Any], dict_class: str, tmp_path: Path
) -> None:
    sae = random_sae(variant, **options)
    dictionary_learning.save(sae, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"] == dict_class
    assert_same(dictionary_learning.load(tmp_path), sae.encode(raw_features()).to_dense(), sae(raw_features()))


def test_refuses_what_the_layout_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layout for the codes of this 'msae' SAE .*'soft_cap': 2\.0"):
        dictionary_learning.save(random_sae("msae", k=5, soft_cap=2.0), tmp_path)
    with pytest.raises(ValueError, match=r"norms each sample before the encoder \(input_norm=layer\)"):
        dictionary_learning.save(random_sae("relu", input_norm="layer"), tmp_path)


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoEncoder": ("relu", {}),
    "AutoEncoderNew": ("relu", {}),
    "AutoEncoderTopK": ("topk", {"k": 5}),
    "BatchTopKSAE": ("batchtopk", {"k": 5}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {"k": 5, "group_sizes": [10, 10, 20]}),
    "JumpReluAutoEncoder": ("jumprelu", {}),
    "GatedAutoEncoder": ("gated", {}),
}


@pytest.mark.parametrize("dict_class", THEIRS)
def test_reads_what_the_package_saves(utils: Any, dict_class: str, tmp_path: Path) -> None:
    """As its trainers save: the state dict, and the config with the class and the sizes."""
    variant, arguments = THEIRS[dict_class]
    theirs = randomise(getattr(utils, dict_class)(D_IN, D_SAE, **arguments))
    if variant in ("batchtopk", "matryoshka"):
        theirs.threshold.fill_(0.7)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    ours = dictionary_learning.load(tmp_path)
    assert ours.variant == variant
    assert_same(ours, theirs.encode(raw_features()), theirs(raw_features()))


def test_an_untrained_threshold_keeps_every_positive_latent(utils: Any, tmp_path: Path) -> None:
    theirs = randomise(utils.BatchTopKSAE(D_IN, D_SAE, k=5))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": D_IN, "dict_size": D_SAE}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    assert_same(dictionary_learning.load(tmp_path), theirs.encode(raw_features()), theirs(raw_features()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dict_class": "IdentityDict"}, "names the class 'IdentityDict'; known classes: AutoEncoder"),
        ({"dict_class": "GatedAutoEncoder"}, "lacks gate_bias, mag_bias, r_mag"),
        ({"dict_size": 41}, r"shape \[40, 12\]; its config asks for \[41, 12\]"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    dictionary_learning.save(random_sae("relu"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"trainer": json.loads(path.read_text())["trainer"] | change}))
    with pytest.raises(ValueError, match=sentence):
        dictionary_learning.load(tmp_path)


def test_names_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        dictionary_learning.load(tmp_path)
    dictionary_learning.save(random_sae("relu"), tmp_path)
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no ae\.pt"):
        dictionary_learning.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no entry 'trainer'; it has none"):
        dictionary_learning.load(tmp_path)
