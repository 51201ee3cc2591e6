"""SAELens' layout, against SAELens itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_lightning.interop import saelens
from sae_lightning.saes import SAE, VARIANTS, Normalizer

pytestmark = pytest.mark.slow

D_IN, D_SAE = 12, 40
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 5},
    "batchtopk": {"k": 5},
    "jumprelu": {},
    "gated": {},
    "matryoshka": {"k": 5, "fractions": [0.25, 0.5, 1.0]},
}


def random_sae(variant: str, **options: Any) -> SAE:
    """An SAE of random weights, biases, thresholds and normaliser, in evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    normalizer = Normalizer(D_IN, mean=torch.randn(D_IN, generator=generator), std=1.7)
    sae = VARIANTS[variant](D_IN, D_SAE, normalizer=normalizer, seed=1, **(SETTINGS.get(variant, {}) | options))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        if variant in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(0.7)
    return sae.eval()


def raw_features() -> Tensor:
    return 2 * torch.randn(60, D_IN, generator=torch.Generator().manual_seed(3))


def randomise(module: nn.Module) -> nn.Module:
    """Random parameters in a package's SAE."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def assert_same(sae: SAE, codes: Tensor, reconstruction: Tensor) -> None:
    """``sae`` gives these codes and this reconstruction of ``raw_features``, and some codes are active."""
    x = raw_features()
    ours = sae.encode(x).to_dense()
    assert 0.02 < (ours > 0).float().mean() < 0.9
    torch.testing.assert_close(ours, codes.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(x), reconstruction.detach(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    return pytest.importorskip("sae_lens")


def config(sae_lens: Any, architecture: str, training: bool = False, **options: Any) -> Any:
    """A SAELens config of that architecture."""
    from sae_lens import registry

    find = registry.get_sae_training_class if training else registry.get_sae_class
    return find(architecture)[1](d_in=D_IN, d_sae=D_SAE, **options)


def their_sae(sae_lens: Any, architecture: str, training: bool = False, **options: Any) -> Any:
    """SAELens' own SAE of random weights."""
    from sae_lens import registry

    find = registry.get_sae_training_class if training else registry.get_sae_class
    return randomise(find(architecture)[0](config(sae_lens, architecture, training, **options)))


@pytest.mark.parametrize("variant", SETTINGS)
def test_saelens_reads_what_is_saved(sae_lens: Any, variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant)
    saelens.save(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(sae, theirs.encode(raw_features()), theirs(raw_features()))


@pytest.mark.parametrize("variant", SETTINGS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant)
    saelens.save(sae, tmp_path)
    back = saelens.load(tmp_path)
    assert (back.variant, back.settings()) == (variant, sae.settings())
    assert_same(back, sae.encode(raw_features()).to_dense(), sae(raw_features()))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    ("architecture", "variant"), [("standard", "relu"), ("topk", "topk"), ("jumprelu", "jumprelu"), ("gated", "gated")]
)
def test_reads_what_saelens_saves(
    sae_lens: Any, architecture: str, variant: str, apply_b_dec_to_input: bool, tmp_path: Path
) -> None:
    options = {"k": 5, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    theirs = their_sae(sae_lens, architecture, apply_b_dec_to_input=apply_b_dec_to_input, **options)
    theirs.save_model(tmp_path)
    ours = saelens.load(tmp_path)
    assert ours.variant == variant
    assert_same(ours, theirs.encode(raw_features()), theirs(raw_features()))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_reads_a_training_checkpoint(sae_lens: Any, architecture: str, rescale: bool, tmp_path: Path) -> None:
    """The checkpoint of a training equals what SAELens saves at its end, for both ways of reading."""
    options: dict[str, Any] = {"k": 5, "rescale_acts_by_decoder_norm": rescale}
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [10, 20, D_SAE]
    training = their_sae(sae_lens, architecture, training=True, **options)
    if architecture != "topk":
        training.topk_threshold.fill_(0.7)
    training.save_model(tmp_path / "checkpoint")
    training.save_inference_model(tmp_path / "end")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "end")
    for folder in ("checkpoint", "end"):
        ours = saelens.load(tmp_path / folder)
        assert ours.variant == architecture.removesuffix("_batchtopk")
        assert ours.settings()["k"] == 5
        assert_same(ours, theirs.encode(raw_features()), theirs(raw_features()))


def test_reads_a_checkpoint_with_log_thresholds(sae_lens: Any, tmp_path: Path) -> None:
    """As JumpReLU trainings of earlier versions of SAELens saved them."""
    training = their_sae(sae_lens, "jumprelu", training=True)
    training.threshold.data.abs_()
    cfg_path = training.save_model(tmp_path)[1]
    tensors = dict(training.state_dict())
    save_file(
        tensors | {"log_threshold": tensors.pop("threshold").log()}, cfg_path.with_name("sae_weights.safetensors")
    )
    theirs = sae_lens.TrainingSAE.load_from_disk(tmp_path)
    assert_same(saelens.load(tmp_path), theirs.encode(raw_features()), theirs(raw_features()))


def test_reads_the_factor_of_a_scaled_input(sae_lens: Any, tmp_path: Path) -> None:
    theirs = their_sae(sae_lens, "standard", training=True, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"no activation_scaler\.json with the factor"):
        saelens.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.6}')
    x = raw_features() * 0.6
    assert_same(saelens.load(tmp_path), theirs.encode(x), theirs(x) / 0.6)


@pytest.mark.parametrize("variant", SETTINGS)
def test_the_norm_of_each_sample_goes_both_ways(sae_lens: Any, variant: str, tmp_path: Path) -> None:
    sae = random_sae(variant, input_norm="rms")
    with pytest.raises(ValueError, match="norms each sample before the encoder"):
        saelens.save(sae, tmp_path)
    sae.normalizer.mean.zero_()
    saelens.save(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(sae, theirs.encode(raw_features()), theirs(raw_features()))
    theirs.save_model(tmp_path)
    assert_same(saelens.load(tmp_path), theirs.encode(raw_features()), theirs(raw_features()))


def test_a_topk_that_infers_with_relu_is_a_standard_sae(sae_lens: Any, tmp_path: Path) -> None:
    sae = random_sae("topk", inference="relu")
    saelens.save(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "standard"
    assert_same(sae, theirs.encode(raw_features()), theirs(raw_features()))


def test_k_a_batch_leaves_a_jumprelu(tmp_path: Path) -> None:
    sae = random_sae("batchtopk", k=200, k_per="batch")
    saelens.save(sae, tmp_path)
    back = saelens.load(tmp_path)
    assert back.variant == "jumprelu"
    assert_same(back, sae.encode(raw_features()).to_dense(), sae(raw_features()))


def test_reads_a_file_from_before_version_6(sae_lens: Any, tmp_path: Path) -> None:
    sae = random_sae("topk")
    saelens.save(sae, tmp_path)
    cfg = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "activation_fn_str": "topk"}
    cfg |= {"activation_fn_kwargs": {"k": 5}, "normalize_activations": False, "hook_name": "blocks.0.hook_resid_pre"}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(saelens.load(tmp_path), theirs.encode(raw_features()), theirs(raw_features()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm', which SAEs here cannot do"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"architecture": "transcoder"}, "architecture 'transcoder'; known ones: standard"),
        ({"activation_fn": "tanh-relu"}, "activation 'tanh-relu'"),
        ({"d_sae": 41}, r"shape \[40, 12\]; its config asks for \[41, 12\]"),
        ({"architecture": "gated"}, "lacks b_gate, b_mag, r_mag"),
    ],
)
def test_refuses_what_it_cannot_represent(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    saelens.save(random_sae("relu"), tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        saelens.load(tmp_path)


def test_names_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json"):
        saelens.load(tmp_path)
    saelens.save(random_sae("relu"), tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        saelens.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no sae_weights\.safetensors"):
        saelens.load(tmp_path)


def test_refuses_an_unknown_variant(tmp_path: Path) -> None:
    sae = random_sae("relu")
    sae.variant = "other"
    with pytest.raises(ValueError, match="no layout for a 'other' SAE; it can take these variants: relu, topk"):
        saelens.save(sae, tmp_path)
