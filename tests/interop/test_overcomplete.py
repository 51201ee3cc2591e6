"""The folder for overcomplete's SAEs, against the package itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lightning.interop import overcomplete
from sae_lightning.saes import SAE
from tests.interop.test_saelens import D_IN, D_SAE, SETTINGS, assert_same, random_sae, randomise, raw_features

pytestmark = pytest.mark.slow

VARIANTS = [variant for variant in SETTINGS if variant != "gated"]


@pytest.fixture(scope="module")
def package() -> Any:
    """``overcomplete.sae``; version 0.3.0 wants a function that newer matplotlibs no longer have."""
    import matplotlib
    import matplotlib.cm

    if not hasattr(matplotlib.cm, "get_cmap"):
        matplotlib.cm.get_cmap = matplotlib.colormaps.__getitem__
    return pytest.importorskip("overcomplete.sae")


def read(package: Any, folder: Path) -> tuple[Any, Tensor]:
    """Their SAE, as the module's docstring says to load it, and the offset of its reconstruction."""
    config = json.loads((folder / "config.json").read_text())
    sae = getattr(package, config["class"])(**config["arguments"])
    sae.load_state_dict(torch.load(folder / "state_dict.pt", weights_only=True))
    sae.running_threshold = config.get("running_threshold")
    return sae.eval(), torch.tensor(config["offset"])


def write(sae: Any, folder: Path, arguments: dict[str, Any], **config: Any) -> None:
    """Save their SAE as a user of the package does, with the config beside it."""
    torch.save(sae.state_dict(), folder / "state_dict.pt")
    arguments = {"input_shape": D_IN, "nb_concepts": D_SAE} | arguments
    (folder / "config.json").write_text(json.dumps({"class": type(sae).__name__, "arguments": arguments} | config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package_reads_what_is_saved(package: Any, variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant)
    overcomplete.save(sae, tmp_path)
    theirs, offset = read(package, tmp_path)
    _, codes, reconstruction = theirs(raw_features())
    assert_same(sae, codes, reconstruction + offset)


def test_decoder_rows_of_different_norms_keep_them(package: Any, tmp_path: Path) -> None:
    sae = random_sae("relu")
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    overcomplete.save(sae, tmp_path)
    theirs, offset = read(package, tmp_path)
    _, codes, reconstruction = theirs(raw_features())
    assert_same(sae, codes, reconstruction + offset)
    assert_same(overcomplete.load(tmp_path), codes, reconstruction + offset)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant)
    overcomplete.save(sae, tmp_path)
    back = overcomplete.load(tmp_path)
    assert back.variant == {"matryoshka": "batchtopk"}.get(variant, variant)
    assert_same(back, sae.encode(raw_features()).to_dense(), sae(raw_features()))


@pytest.mark.parametrize("normalization", ["l2", "max_l2", "l1", "max_l1", "identity"])
@pytest.mark.parametrize(
    ("name", "variant", "own"), [("SAE", "relu", {}), ("TopKSAE", "topk", {"top_k": 5}), ("JumpSAE", "jumprelu", {})]
)
def test_reads_what_the_package_saves(
    package: Any, name: str, variant: str, own: dict[str, Any], normalization: str, tmp_path: Path
) -> None:
    arguments = own | {"dictionary_params": {"normalization": normalization, "use_multiplier": True}}
    theirs = randomise(getattr(package, name)(D_IN, D_SAE, **arguments)).eval()
    write(theirs, tmp_path, arguments)
    ours = overcomplete.load(tmp_path)
    assert ours.variant == variant
    assert_same(ours, *theirs(raw_features())[1:])


@pytest.mark.parametrize(("own", "settings"), [({}, {"k": 300, "k_per": "batch"}), ({"k": 4.5}, {"k": 4.5})])
def test_reads_a_batch_topk_with_its_threshold(
    package: Any, own: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = randomise(package.BatchTopKSAE(D_IN, D_SAE, top_k=300)).train()
    theirs(raw_features())
    write(theirs.eval(), tmp_path, {"top_k": 300})
    with pytest.raises(ValueError, match="has no running_threshold; a BatchTopKSAE keeps it outside its state dict"):
        overcomplete.load(tmp_path)
    write(theirs, tmp_path, {"top_k": 300}, running_threshold=float(theirs.running_threshold), **own)
    ours = overcomplete.load(tmp_path)
    assert (ours.variant, ours.settings()) == ("batchtopk", settings)
    assert_same(ours, *theirs(raw_features())[1:])


def test_k_a_batch_is_the_same_there(tmp_path: Path) -> None:
    sae = random_sae("batchtopk", k=200, k_per="batch")
    overcomplete.save(sae, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["top_k"] == 200
    assert overcomplete.load(tmp_path).settings() == sae.settings()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_reads_tied_and_untied_encoders(package: Any, tied: bool, bias: bool, tmp_path: Path) -> None:
    theirs = package.TopKSAE(D_IN, D_SAE, top_k=5)
    theirs = randomise(theirs.tied(bias=bias) if tied else theirs.untied(bias=bias)).eval()
    write(theirs, tmp_path, {"top_k": 5})
    assert_same(overcomplete.load(tmp_path), *theirs(raw_features())[1:])


@pytest.mark.parametrize("encoder", ["mlp_ln_1", "mlp_bn_1", "mlp_bn_3"])
def test_refuses_encoders_that_are_not_linear(package: Any, encoder: str, tmp_path: Path) -> None:
    write(package.TopKSAE(D_IN, D_SAE, top_k=5, encoder_module=encoder).eval(), tmp_path, {"top_k": 5})
    with pytest.raises(ValueError, match=r"has an encoder that is not linear \(encoder\.final_block\.1\.bias|mlp"):
        overcomplete.load(tmp_path)


def test_refuses_a_pickled_module(package: Any, tmp_path: Path) -> None:
    theirs = package.TopKSAE(D_IN, D_SAE, top_k=5).eval()
    write(theirs, tmp_path, {"top_k": 5})
    torch.save(theirs, tmp_path / "state_dict.pt")
    with pytest.raises(ValueError, match=r"holds a pickled module: save sae\.state_dict\(\)"):
        overcomplete.load(tmp_path)


def test_refuses_a_gated_sae(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layout for a 'gated' SAE; it can take these variants: relu, topk"):
        overcomplete.save(random_sae("gated"), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"class": "RATopKSAE"}, "names the class 'RATopKSAE'; known classes: SAE, TopKSAE"),
        ({"arguments": {"input_shape": [3, 4], "nb_concepts": D_SAE}}, r"input_shape \[3, 4\]"),
        ({"arguments": {"input_shape": D_IN, "nb_concepts": 41}}, r"shape \[40, 12\]; its config asks for \[41, 12\]"),
        ({"arguments": {"input_shape": D_IN}}, "has no entry 'nb_concepts'"),
        ({"offset": [0.0]}, r"gives b_dec the shape \[1\]"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    overcomplete.save(random_sae("relu"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        overcomplete.load(tmp_path)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        overcomplete.load(tmp_path)
    overcomplete.save(random_sae("relu"), tmp_path)
    (tmp_path / "state_dict.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no state_dict\.pt"):
        overcomplete.load(tmp_path)


def test_what_equals_the_threshold_stays_as_it_was(tmp_path: Path) -> None:
    """Theirs keeps what equals the threshold, ours only what exceeds it; neither way moves a latent over it."""
    sae: SAE = random_sae("batchtopk")
    sae.threshold.copy_(sae.encode(raw_features()).values.detach().max())
    overcomplete.save(sae, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["running_threshold"] > float(sae.threshold)
    assert float(overcomplete.load(tmp_path).threshold) == float(sae.threshold)
