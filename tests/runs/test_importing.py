"""SAEs of other hands as runs: imported, scored, reported and explored; what is missing is asked for."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import sae_lightning
from sae_lightning.apps.explorer.run_view import OpenRuns
from sae_lightning.commands.main import main
from sae_lightning.evaluation.job import Settings
from sae_lightning.evaluation.suite import evaluate_runs
from sae_lightning.interop.releases import FORMATS
from sae_lightning.report.page import build
from sae_lightning.runs import importing, preflight
from sae_lightning.runs.importing import choice_of, find, settled
from sae_lightning.runs.run import Run, chosen_runs
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import ArtefactError, upload
from tests.configs import composed
from tests.hub import stand_in
from tests.interop.released import CHECKPOINTS, K, saved

WIDTH = 128
METRICS = OmegaConf.create({"core": {"above": [0.5], "bands": {"ranks": 4, "images": 4}}})


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("imports")


@pytest.fixture(autouse=True)
def unjudged(monkeypatch):
    """Random weights fit nothing, and what fits better is not looked for here."""
    monkeypatch.setattr(preflight, "FLOOR", -math.inf)
    monkeypatch.setattr(preflight, "TIMES", math.inf)


@pytest.fixture
def imported(here, pictures, monkeypatch, capsys):
    """``imported(path, *words)``: the run that the command makes of it with a tiny encoder, and what it says."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(importing, "compose_config", lambda overrides: composed("config", *overrides))

    def run(path, *words: str) -> tuple[Path | None, str]:
        status = main(["import", str(path), "--backbone", "clip", "--data", "folder", f"data.path={pictures}",
                       "backbone.size=tiny", *words])  # fmt: skip
        said = capsys.readouterr()
        line = said.out.strip().splitlines()[-1] if status == 0 else said.err
        return (here / line.split(": ")[0], line) if status == 0 else (None, line)

    return run


PLACES = {"msae-nested": ["--features", "embedding"]}
ONE_OF_EACH = (
    "saev-5", "visaebench-batchtopk", "sae-for-vlm", "sae-for-vlm-matroyshka", "msae-nested", "monoloss-topk", "prisma",
    "patchsae", "clip-scope", "sparsify", "SAELens", "overcomplete", "dictionary_learning",
)  # fmt: skip


def test_a_release_of_every_format_is_imported_scored_reported_and_explored(imported, here):
    assert not [name for name in FORMATS if not any(one.startswith(name) for one in ONE_OF_EACH)]
    folders = []
    for name in ONE_OF_EACH:
        path, forward = CHECKPOINTS[name](here / "releases" / name, WIDTH, 2 * WIDTH)
        folder, said = imported(path, *PLACES.get(name, ["--layer", "4"]))
        assert folder is not None, said
        folders.append(folder)
        made = Run(folder)
        if not name.startswith("visaebench"):  # whose inputs are centred and scaled
            x = torch.randn(20, WIDTH)
            torch.testing.assert_close(made.sae(x), forward(x)[1], atol=1e-3, rtol=1e-3)
        assert made.cfg["figures"]["explained_variance"] <= 1
        assert made.cfg["command"]
        assert set(made.cfg["store"]) == {"train", "val"}
        assert made.cfg["imported"]["looked_at"]["pictures"] == "8 pictures of folder"
    evaluate_runs(folders, Settings(METRICS))
    page = build(folders, here / "page.html", detailed=1, grids=1).read_text()
    for folder in folders:
        made = Run(folder)
        assert made.scores["metrics"]["l0"] > 0
        assert made.cfg["variant"] in page
    opened = OpenRuns([Run(folder) for folder in folders[:2]], "test")
    assert [opened[i].check_latent(7) for i in range(2)] == [7, 7]


def test_a_second_import_does_nothing_and_a_third_with_another_layer_is_another_run(imported, here):
    path, _ = CHECKPOINTS["clip-scope"](here / "again", WIDTH, 2 * WIDTH)
    first, _ = imported(path, "--layer", "4")
    assert imported(path, "--layer", "4")[1].endswith("imported before.")
    second, _ = imported(path, "--layer", "3")
    assert first != second
    assert {first, second} <= set(chosen_runs(["*1200013184*"], here / "runs"))


def test_thresholds_that_a_release_lacks_are_found_on_pictures(imported, here):
    path, _ = CHECKPOINTS["monoloss-jumprelu"](here / "uncut", WIDTH, 2 * WIDTH)
    content = torch.load(path / "autoencoder_final.pt", weights_only=True)
    content["config"] |= {"model_type": "batch_topk", "topk_k": 7}
    saved(path / "autoencoder_final.pt", content)
    folder, _ = imported(path, "--layer", "4")
    made = Run(folder)
    assert made.cfg["imported"]["threshold"] == "32 pictures of folder"
    assert made.cfg["figures"]["l0"] == pytest.approx(7, rel=0.3)
    assert bool(made.sae.cuts().isfinite().all())


def test_visaebench_s_inputs_are_centred_and_scaled(imported, here):
    path, forward = CHECKPOINTS["visaebench-topk"](here / "standard", WIDTH, 2 * WIDTH)
    folder, _ = imported(path, "--layer", "4")
    sae = SAE.load(folder)
    x = torch.randn(20, WIDTH)
    codes = forward(sae.normalizer.normalize(x))[0]
    torch.testing.assert_close(sae.encode(x).to_dense(), codes, atol=1e-4, rtol=1e-4)
    assert float(sae.normalizer.std) != 1
    assert Run(folder).cfg["imported"]["normalizer"] == "32 pictures of folder"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"does not say whose features it takes \(128 dimensions\); give --backbone"),
        (["--backbone", "clip", "backbone.size=tiny"], r"does not say its layer; give --layer"),
        (["--backbone", "clip", "--layer", "40", "backbone.size=tiny"], "Layer 40 does not exist in clip"),
        (["--backbone", "clop", "--layer", "4"], "There is no backbone=clop"),
        (["--backbone", "clip", "--layer", "4", "backbone.size=tiny", "expansoin=3"], "did you mean expansion"),
    ],
)
def test_what_is_missing_is_asked_for_in_a_sentence_and_nothing_is_left(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, _ = CHECKPOINTS["saev-2"](tmp_path / "release", WIDTH, 2 * WIDTH)
    assert main(["import", str(path), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert not (tmp_path / "runs").exists()


def test_another_width_is_a_sentence(imported, here):
    path, _ = CHECKPOINTS["clip-scope"](here / "narrow", 64, 128)
    _, said = imported(path, "--layer", "4")
    assert "takes features of 64 dimensions, and patch-L4 of clip (tiny) has 128" in said


def test_a_failure_on_the_way_leaves_nothing(imported, here, monkeypatch):
    path, _ = CHECKPOINTS["clip-scope"](here / "failing", WIDTH, 2 * WIDTH)
    before = set((here / "runs").iterdir()) if (here / "runs").exists() else set()
    monkeypatch.setattr(importing, "write_json", lambda *a: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        importing.import_run(*_found(path))
    assert set((here / "runs").iterdir()) == before


def _found(path):
    found = find(str(path))
    return found, settled(found, ["backbone=clip", "backbone.layer=4", "backbone.size=tiny"])


def test_encoders_are_known_by_their_models():
    assert choice_of("openai/clip-vit-base-patch16") == "clip"
    assert choice_of("openai/clip-vit-large-patch14") == "clip_l14"
    assert choice_of("google/siglip-so400m-patch14-384") == "transformers"


def test_a_release_that_says_its_encoder_needs_no_more(tmp_path):
    found = find(str(CHECKPOINTS["patchsae"](tmp_path, WIDTH, 2 * WIDTH)[0]))
    cfg = settled(found, [])
    assert (cfg.backbone.name, cfg.backbone.size, cfg.backbone.layer, cfg.features) == (
        "clip",
        "published",
        -2,
        "tokens",
    )
    assert settled(found, ["features=patch", "backbone.layer=3"]).backbone.layer == 3
    found = find(str(CHECKPOINTS["prisma"](tmp_path / "prisma", WIDTH, 2 * WIDTH)[0]))
    assert settled(found, []).backbone.published.model == "laion/CLIP-ViT-B-32"


# --- the registry -----------------------------------------------------------------------------------------
def test_the_hub_s_sixty_are_known_by_name_and_imported(here, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path, monkeypatch)
    release = tmp_path / "release"
    for k in (64, 128):
        CHECKPOINTS["visaebench-batchtopk"](release / f"batchtopk_8x_k{k}", WIDTH, 2 * WIDTH)
    upload(release, "visaebench/mae-vitb16-saes", "SAEs")
    assert main(["pretrained", "ls", "visaebench/*", "--names"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 60
    wanted = [
        name
        for name in names
        if name.startswith("visaebench/mae-vitb16-saes/batchtopk_8x_k") and name[-2:] in ("64", "28")
    ]
    given = ["--data", "folder", f"data.path={pictures}", "--backbone", "mae", "backbone.size=tiny", "--layer", "4"]
    assert main(["import", *wanted, *given]) == 0
    runs = chosen_runs("visaebench--mae-*", tmp_path / "runs")
    assert len(runs) == 2
    assert Run(runs[0]).cfg["stated"] == {"l0": 128.0}
    evaluate_runs(runs, Settings(METRICS))


def test_a_known_sae_needs_no_words_about_its_encoder(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch)
    CHECKPOINTS["visaebench-batchtopk"](tmp_path / "release" / "batchtopk_16x_k128", 768, 1536)
    upload(tmp_path / "release", "visaebench/dinov2-vitb14-saes", "SAEs")
    cfg = settled(find("visaebench/dinov2-vitb14-saes/batchtopk_16x_k128"), [])
    assert (cfg.backbone.name, cfg.backbone.layer, cfg.backbone.size) == ("dinov2", 11, "published")
    assert (cfg.normalize, cfg.features) == ("standard", "patch")


def test_what_cannot_be_opened_says_why():
    with pytest.raises(ArtefactError, match="cannot be opened: its encoder measures distances"):
        find("shufanshen/VL-SAE")
    with pytest.raises(ArtefactError, match="is not on the model hub: the authors hand it out"):
        find("patchsae/clip-vit-base-patch16_-2_resid_49152.pt")


def test_the_list_shows_facts_and_says_what_was_not_opened(capsys):
    assert main(["pretrained", "ls", "lewington/*"]) == 0
    said = capsys.readouterr().out
    assert "0.684" in said
    assert "8 entries, facts of the releases' own pages; 0 were opened" in said
    assert main(["pretrained", "ls", "nobody/*"]) == 1


# --- open -------------------------------------------------------------------------------------------------
@pytest.fixture
def model(imported, here):
    """A run opened by its folder."""
    path, _ = CHECKPOINTS["clip-scope"](here / "opened", WIDTH, 2 * WIDTH)
    folder, _ = imported(path, "--layer", "4")
    return sae_lightning.open(folder, check=False)


def test_pictures_in_codes_out_on_the_grid(model, pictures):
    path = next(iter(sorted(pictures.rglob("*.png"))))
    image = Image.open(path)
    raw = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    codes = model.encode_images([image, path, raw, model.pixels([image])[0]])
    assert codes.is_sparse
    assert codes.shape == (4, model.grid[0] * model.grid[1], 2 * WIDTH)
    dense = codes.to_dense()
    for other in dense[1:]:
        torch.testing.assert_close(other, dense[0])
    features = model.features([image])
    torch.testing.assert_close(dense[0], model.sae.encode(features[0]).to_dense())
    latents, values = model.top([image], 3)
    assert values[0, 0] == dense[0].max()
    assert dense[0, :, latents[0, 0]].max() == values[0, 0]
    assert model.overlay(path, int(latents[0, 0])).size == (96, 96)  # 32 x 32, drawn larger
    with pytest.raises(ValueError, match=r"latents 0 to 255; latent 256 was asked for"):
        model.overlay(path, 256)


def test_ablating_and_steering_change_what_the_encoder_says_and_nothing_afterwards(model, pictures):
    image = next(iter(sorted(pictures.rglob("*.png"))))
    before, latents = model.output([image]), model.top([image], 3)[0][0].tolist()
    assert not torch.allclose(model.ablate([image], latents), before, atol=1e-4)
    assert not torch.allclose(model.steer([image], latents, 5.0), before, atol=1e-4)
    torch.testing.assert_close(model.steer([image], latents, 0.0), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.output([image]), before)


def test_from_a_name_to_a_heat_map(pictures, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch)
    CHECKPOINTS["sae-for-vlm"](tmp_path / "release", WIDTH, 2 * WIDTH)
    upload(tmp_path / "release", "someone/saes", "SAEs")
    name = next((tmp_path / "release").rglob("*.pt")).relative_to(tmp_path / "release")
    picture = next(iter(sorted(pictures.rglob("*.png"))))
    # what README shows, with a tiny encoder
    model = sae_lightning.open(
        f"someone/saes/{name}", backbone="clip", features="patch", check=False, **{"backbone.size": "tiny"}
    )
    latents, _ = model.top([picture])
    model.overlay(picture, int(latents[0, 0])).save(tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == (96, 96)


def test_what_a_run_says_of_itself(imported, here):
    path, _ = CHECKPOINTS["sparsify"](here / "said", WIDTH, 2 * WIDTH)
    folder, _ = imported(path, "--layer", "4")
    made = json.loads((folder / "cfg.json").read_text())
    assert made["stated"] == {"l0": float(K)}
    assert made["imported"]["format"] == "sparsify"
    assert len(made["imported"]["looked_at"]["fingerprint"]) == 64
