"""SAEs as other projects release them: codes and reconstructions equal those of the format's own code."""

import json
import os
import pickle

import pytest
import torch

from sae_lightning.interop.releases import FORMATS, open_release
from sae_lightning.saes import SAE, ArtefactError
from sae_lightning.saes.artefact import upload
from tests.hub import stand_in
from tests.interop.released import CHECKPOINTS, PLACE, saved, weights

D_IN, D_SAE = 16, 64


def features(n: int = 40) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(3))


def assert_same(sae: SAE, forward, x: torch.Tensor) -> None:
    codes, reconstruction = forward(x)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes.clamp_min(0), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(sae(x), reconstruction, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_codes_and_reconstruction_are_those_of_the_format(name, tmp_path):
    path, forward = CHECKPOINTS[name](tmp_path / "release", D_IN, D_SAE)
    assert_same(SAE.load(path), forward, features())


def test_every_format_has_a_checkpoint():
    for name in FORMATS:
        assert any(made.startswith(name) for made in CHECKPOINTS), name


@pytest.mark.parametrize("name", ["visaebench-batchtopk", "visaebench-topk", "visaebench-jumprelu"])
def test_visaebench_s_own_code_gives_the_same(name, tmp_path):
    hub = pytest.importorskip("visaebench.hub")
    path, _ = CHECKPOINTS[name](tmp_path, D_IN, D_SAE)
    theirs = hub.load_sae(str(path), device="cpu")
    with torch.no_grad():
        assert_same(SAE.load(path), theirs, features())


def test_what_the_files_say_of_the_encoder_is_kept(tmp_path):
    places = {name: open_release(make(tmp_path / name, D_IN, D_SAE)[0]).place for name, make in CHECKPOINTS.items()}
    clip = "openai/clip-vit-base-patch16"
    assert places["sae-for-vlm"] == {"model": clip, "layer": 4, "features": "cls"}
    assert places["patchsae"] == {"model": clip, "layer": -2, "features": "tokens"}
    assert places["msae-topk"] == {"model": clip, "features": "embedding"}
    assert places["prisma"] == {
        "model": "laion/CLIP-ViT-B-32", "layer": 4, "features": "tokens", "site": "block"
    }  # fmt: skip


def test_projections_are_told_from_layers_by_the_folder_s_name(tmp_path):
    made, _ = CHECKPOINTS["sae-for-vlm"](tmp_path, D_IN, D_SAE)
    other = tmp_path / PLACE.replace("16_4_post_mlp_residual", "16_-1_post_projection")
    other.mkdir(parents=True)
    made = made.rename(other / made.name)
    assert open_release(made).place == {"model": "openai/clip-vit-base-patch16", "features": "embedding"}


class Harmful:
    """Whose file, unpickled, would leave a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_nothing_that_a_file_names_is_run(tmp_path):
    w = weights(D_IN, D_SAE)
    state = {"W_enc": w["E"].T, "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["o"]}
    cfg = {"block_layer": 3, "gated_sae": False, "harm": Harmful(tmp_path / "trace")}
    path = saved(tmp_path / "sae.pt", {"cfg": cfg, "state_dict": state})
    with pytest.raises(ValueError, match=r"os\.mkdir|cannot be read as plain tensors|posix"):
        SAE.load(path)
    assert not (tmp_path / "trace").exists()


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "sae.pt").write_bytes(pickle.dumps({"W_enc": Harmful(tmp_path / "trace")}))
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        SAE.load(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("saev-2", lambda p: (p / "sae.pt").rename(p / "sae.pkl"), "There are no weights|There is no cfg.json"),
        ("visaebench-topk", lambda p: (p / "config.json").unlink(), "does not say its sae_type"),
        ("msae-topk", lambda p: p.rename(p.with_name("msae.pth")), "not named as MSAE names its files"),
        ("prisma-gated", lambda p: (p / "config.json").unlink(), "is of no known format; it has the tensors W_dec"),
    ],
)
def test_what_is_missing_is_one_sentence(name, change, said, tmp_path):
    path, _ = CHECKPOINTS[name](tmp_path / "release", D_IN, D_SAE)
    changed = change(path)
    path = changed if name.startswith("msae") else path
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        SAE.load(path)


def test_several_files_of_weights_are_to_be_chosen_from(tmp_path):
    for name in ("one.pt", "two.pt"):
        saved(tmp_path / name, weights(D_IN, D_SAE))
    with pytest.raises(ValueError, match=r"several files of weights; name one: one\.pt, two\.pt"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("name", ["saev-1", "visaebench-batchtopk", "clip-scope", "sparsify", "SAELens"])
def test_the_hub_s_releases_are_opened_by_name(name, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch)
    path, forward = CHECKPOINTS[name](tmp_path / "release" / "one", D_IN, D_SAE)
    upload(tmp_path / "release", "someone/release", "SAEs")
    sae = SAE.from_pretrained(f"someone/release/{path.relative_to(tmp_path / 'release')}")
    assert_same(sae, forward, features())


def test_a_run_of_ours_whose_weights_are_gone_is_no_release(tmp_path):
    (tmp_path / "cfg.json").write_text(
        json.dumps({"schema": 3, "variant": "topk", "d_in": 4, "d_sae": 8, "sae": {"k": 1}})
    )
    with pytest.raises(ArtefactError, match=r"There is no sae\.safetensors"):
        SAE.load(tmp_path)
