"""Saving and loading: the artefact is complete, and what is broken is refused with a sentence."""

import json

import pytest
import torch

from sae_lightning.saes import SAE, VARIANTS, ArtefactError, Normalizer


def build(variant: str):
    settings = {} if variant == "relu" else {"k": 4}
    normalizer = Normalizer(8, torch.arange(8.0), 2.5)
    return VARIANTS[variant](8, 24, normalizer=normalizer, seed=0, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_sae_gives_the_same_codes_from_raw_features(variant, tmp_path):
    sae = build(variant)
    x = torch.randn(30, 8) * 2.5 + torch.arange(8.0)
    if variant == "batchtopk":
        sae.calibrate([x], 30)
    sae.save(tmp_path, backbone="dinov2 (tiny)", layer=4)
    loaded = SAE.load(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded.encode(x).to_dense(), sae.eval().encode(x).to_dense())
    assert torch.equal(loaded(x), sae(x))
    assert json.loads((tmp_path / "cfg.json").read_text())["backbone"] == "dinov2 (tiny)"


def test_broken_artefacts_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"no cfg\.json"):
        SAE.load(tmp_path)
    build("topk").save(tmp_path)
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
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"d_sae": 25}))
    with pytest.raises(ArtefactError, match="does not fit"):
        SAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"variant": "unheard"}))
    with pytest.raises(ArtefactError, match="known variants"):
        SAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"schema": 99}))
    with pytest.raises(ArtefactError, match="schema 99"):
        SAE.load(tmp_path)
