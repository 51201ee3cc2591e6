"""Saving and loading: the artefact is complete, and what is broken is refused with a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lightning.saes import SAE, VARIANTS, ArtefactError, BatchTopK, JumpReLU, Normalizer

D_IN, D_SAE = 8, 24

OPTIONS = [
    ("relu", {}),
    ("relu", {"tied": True, "input_norm": "layer"}),
    ("topk", {"k": 4}),
    ("topk", {"k": 3, "inference": "relu", "input_norm": "unit", "tied": True}),
    ("batchtopk", {"k": 4}),
    ("batchtopk", {"k": 2.5, "input_norm": "layer"}),
    ("batchtopk", {"k": 60, "k_per": "batch", "tied": True}),
    ("jumprelu", {}),
    ("jumprelu", {"bandwidth": "silverman", "kernel_name": "gaussian", "threshold": 0.4, "tied": True}),
    ("gated", {}),
    ("gated", {"input_norm": "unit"}),
    ("matryoshka", {"k": 4}),
    ("matryoshka", {"k": 0.5, "fractions": [0.25, 0.5, 1], "sampled": 3, "input_norm": "layer"}),
    ("matryoshka_topk", {"k": 4, "fractions": [0.5, 1], "inference": "relu"}),
    ("msae", {"k": 4}),
    ("msae", {"k": 4, "ks": [2, 9], "weighting": "reverse", "soft_cap": 2.0, "tied": True}),
]  # fmt: skip


def features(n: int = 30, seed: int = 2) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 2.5 + torch.arange(float(D_IN))


def build(variant: str, **options) -> SAE:
    """An SAE whose parameters and buffers all differ from those of a new one."""
    normalizer = Normalizer(D_IN, torch.arange(float(D_IN)), 2.5)
    sae = VARIANTS[variant](D_IN, D_SAE, normalizer=normalizer, seed=0, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
        sae.count_firing(torch.arange(D_SAE) % 2 == 0, 17)
    sae.train().forward_pass(sae.inputs(features(seed=5))[0])
    return sae


@pytest.mark.parametrize(("variant", "options"), OPTIONS)
def test_a_loaded_sae_is_the_saved_one(variant, options, tmp_path):
    sae, x = build(variant, **options), features()
    sae.save(tmp_path, backbone="dinov2 (tiny)", layer=4)
    loaded = SAE.load(tmp_path)
    assert not loaded.training
    assert type(loaded) is type(sae)
    assert loaded.settings() == sae.settings()
    state = loaded.state_dict()
    assert state.keys() == sae.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in sae.state_dict().items())
    assert torch.equal(loaded.encode(x).to_dense(), sae.eval().encode(x).to_dense())
    assert torch.equal(loaded(x), sae(x))
    trained = loaded.train().forward_pass(sae.inputs(x)[0])
    again = sae.train().forward_pass(sae.inputs(x)[0])
    assert torch.equal(trained.codes.to_dense(), again.codes.to_dense())
    assert trained.levels is None or torch.equal(trained.levels, again.levels)
    assert json.loads((tmp_path / "cfg.json").read_text())["backbone"] == "dinov2 (tiny)"


@pytest.mark.parametrize(("variant", "options"), OPTIONS)
def test_settings_are_plain_and_hold_every_option(variant, options):
    sae = build(variant, **options)
    made = json.loads(json.dumps(sae.settings()))
    assert {name: made[name] for name in options} == options
    assert VARIANTS[variant](D_IN, D_SAE, **made).settings() == sae.settings()


def test_a_tied_sae_is_stored_once_and_stays_tied(tmp_path):
    build("relu", tied=True).save(tmp_path)
    assert "W_enc" not in load_file(tmp_path / "sae.safetensors")
    loaded = SAE.load(tmp_path)
    assert loaded.W_enc is loaded.W_dec
    loaded.save(tmp_path / "again")
    assert torch.equal(SAE.load(tmp_path / "again").W_enc, loaded.W_dec)


@pytest.mark.parametrize("variant", ["relu", "topk", "batchtopk"])
def test_artefacts_of_schema_1_load_with_their_encoder_turned(variant, tmp_path):
    sae = build(variant, **({} if variant == "relu" else {"k": 4})).eval()
    sae.save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    tensors.pop("lowest", None)
    save_file(tensors, tmp_path / "sae.safetensors")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"schema": 1}))
    loaded, x = SAE.load(tmp_path), features()
    assert torch.equal(loaded.W_enc, sae.W_enc)
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    if isinstance(loaded, BatchTopK):
        assert loaded.threshold == sae.threshold
        assert loaded.use_lowest() == float(sae.threshold)


def test_saving_again_replaces_the_old_artefact_and_leaves_nothing_else(tmp_path):
    build("topk", k=4).save(tmp_path)
    sae = build("jumprelu")
    sae.save(tmp_path)
    assert isinstance(SAE.load(tmp_path), JumpReLU)
    assert {path.name for path in tmp_path.iterdir()} == {"sae.safetensors", "cfg.json"}


def test_broken_artefacts_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"no cfg\.json"):
        SAE.load(tmp_path)
    build("topk", k=4).save(tmp_path)
    weights = tmp_path / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ArtefactError, match="truncated"):
        SAE.load(tmp_path)
    weights.unlink()
    with pytest.raises(ArtefactError, match="did not finish"):
        SAE.load(tmp_path)
    weights.write_bytes(whole)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for change, sentence in (
        ({"d_sae": 25}, "does not fit"), ({"variant": "unheard"}, "known variants"), ({"schema": 99}, "schema 99"),
    ):  # fmt: skip
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
        with pytest.raises(ArtefactError, match=sentence):
            SAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ArtefactError, match="not valid JSON"):
        SAE.load(tmp_path)


def test_the_unit_norm_of_schema_2_is_rms(tmp_path):
    sae = build("topk", k=4, input_norm="rms").eval()
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["sae"]["input_norm"] = "unit"
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"schema": 2}))
    assert torch.equal(SAE.load(tmp_path)(features()), sae(features()))


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_an_artefact_without_its_encoder_is_refused(schema, tmp_path):
    build("topk", k=4).save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    del tensors["W_enc"]
    save_file(tensors, tmp_path / "sae.safetensors")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"schema": schema}))
    with pytest.raises(ArtefactError, match="does not fit"):
        SAE.load(tmp_path)
