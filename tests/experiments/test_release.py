"""A grid's runs as a release: what is written, checked, refused, kept, and uploaded."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from experiments.visaebench import release as releasing
from experiments.visaebench.release import ReleaseError, equal, find_runs, main, releasable, release, sha256
from sae_lightning.metrics.base import Score
from sae_lightning.runs.identity import run_hash, run_name
from sae_lightning.runs.scores import put_scores
from sae_lightning.saes import SAE, ArtefactError, BatchTopK, Normalizer
from tests.configs import composed
from tests.hub import stand_in

CONF = Path(__file__).resolve().parents[2] / "conf"
D_IN = 16
SCORES = [
    Score("moran", 0.39), Score("fvu", 0.1), Score("explained_variance", 0.9), Score("l0", 2.9),
    Score("preservation", float("nan")), Score("cross_domain_preservation", 0.8, "data=digits"),
    Score("cross_domain_preservation", 1.0, "data=dtd"), Score("cross_domain_accuracy_codes", 0.7, "data=digits"),
    Score("segmentation_miou", 0.15, "data=mosaic,input=raw"), Score("activation_values", 5.0, "quantile=0.5"),
]  # fmt: skip


def make_run(root, *overrides, scores=SCORES):
    """A run as training and scoring leave it, with an SAE of 16 dimensions."""
    cfg = composed("config", "k=3", "seed=1", "data=imagenet", "data.path=/secret/place/imagenet", *overrides)
    folder = root / run_name(cfg, {})
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(cfg.expansion)) + 3
    sae = BatchTopK(D_IN, D_IN * cfg.expansion, k=cfg.k, normalizer=Normalizer(D_IN, x.mean(0), x.std()), seed=cfg.seed)
    sae.calibrate([x], len(x))
    backbone = cfg.backbone
    sae.save(
        folder, name=folder.name, hash=run_hash(cfg, {}), k=cfg.k, expansion=cfg.expansion, seed=cfg.seed, layer=11,
        backbone=f"{backbone.name} {backbone.published.title}", data=cfg.data.name, features="patch",
        versions={"torch": "2"}, config=OmegaConf.to_container(cfg, resolve=True),
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))
    if scores:
        put_scores(folder, "core", "test", "key", scores)
        (folder / "latents.safetensors").write_bytes(b"of each latent")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    settings = (["backbone=mae"], ["backbone=clip", "expansion=16"], ["backbone=clip", "expansion=8"])
    return [make_run(root, *overrides) for overrides in settings]


@pytest.fixture
def runs(made, tmp_path):
    """Three runs, not in the order of their names."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in made]


def names_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def stamps(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in names_of(folder)}


def codes_of(sae):
    features = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(5)) * 2 + 3
    codes = sae.encode(features)
    return codes.latents.tolist(), codes.values.tolist()


def test_every_sae_loads_from_its_address_and_gives_the_codes_of_its_run(runs, tmp_path, monkeypatch):
    index = release(runs, tmp_path / "out" / "grid")
    monkeypatch.chdir(tmp_path / "out")
    assert set(index["folder"]) == {run.name for run in runs}
    for folder, address in zip(index["folder"], index["address"], strict=True):
        assert address == f"grid/{folder}"
        assert f'sae = SAE.from_pretrained("{address}")' in (Path(address) / "README.md").read_text()
        assert codes_of(SAE.from_pretrained(address)) == codes_of(SAE.load(tmp_path / "runs" / folder))


def test_a_card_says_what_the_scores_and_the_config_say(runs, tmp_path):
    release(runs, tmp_path / "out", license="mit")
    card = ModelCard.load(tmp_path / "out" / runs[1].name / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "sae-lightning"
    assert card.data.base_model == "openai/clip-vit-base-patch16"
    assert {"sparse-autoencoder", "batchtopk", "clip"} <= set(card.data.tags)
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("imagenet", "moran"): 0.39, ("imagenet", "fvu"): 0.1, ("imagenet", "explained_variance"): 0.9,
        ("imagenet", "l0"): 2.9, ("imagenet", "cross_domain_preservation"): 0.9,
        ("digits", "cross_domain_accuracy_codes"): 0.7, ("mosaic", "segmentation_miou"): 0.15,
    }  # fmt: skip
    assert {r.dataset_type for r in card.data.eval_results} == {"ILSVRC/imagenet-1k", "digits", "mosaic"}
    for row in (
        "| expansion | 16 |",
        "| k | 3 |",
        "| optimizer.lr | 0.001 |",
        "| M1 Moran's I | 0.390 |",
        "| L0 | 2.9 |",
    ):
        assert row in card.text
    assert "M3" not in card.text  # it is not finite


def test_without_a_licence_the_card_says_unknown(runs, tmp_path):
    release(runs, tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out" / runs[0].name):
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "unknown"
        assert "No licence has been stated yet" in card.text


def test_the_index_is_sorted_and_holds_scores_and_checksums(runs, tmp_path):
    out = tmp_path / "out"
    release(runs, out)
    table = pd.read_csv(out / "index.csv")
    assert table[["backbone", "expansion"]].to_numpy().tolist() == [["clip", 8], ["clip", 16], ["mae", 8]]
    assert table["M1"].tolist() == [0.39] * 3
    assert table["M3"].isna().all()
    assert table["M6"].tolist() == pytest.approx([0.9] * 3)
    assert table["accuracy:digits/codes"].tolist() == [0.7] * 3
    for row in json.loads((out / "index.json").read_text())["saes"]:
        weights = out / row["folder"] / "sae.safetensors"
        assert (row["bytes"], row["sha256"]) == (weights.stat().st_size, sha256(weights))
        assert row["M3"] is None
    card = (out / "README.md").read_text()
    assert [line.split(" | ")[0][2:] for line in card.splitlines() if line.startswith("| batchtopk")] == [
        *table["folder"]
    ]


def test_checksums_name_every_file(runs, tmp_path):
    out = tmp_path / "out"
    release(runs, out)
    lines = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sorted(lines) == [name for name in names_of(out) if not name.endswith("SHA256SUMS")]
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in lines.items())
    assert "latents.safetensors" in {Path(name).name for name in lines}


def test_places_on_the_makers_machine_are_left_out(runs, tmp_path):
    release(runs, tmp_path / "out")
    for name in names_of(tmp_path / "out"):
        assert b"secret" not in (tmp_path / "out" / name).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes()
    config = json.loads((tmp_path / "out" / runs[0].name / "cfg.json").read_text())["config"]
    assert config["data"]["path"] == "imagenet"
    assert "paths" not in config


def test_a_second_call_changes_nothing(runs, tmp_path, capsys):
    release(runs, tmp_path / "out")
    saes, content = (
        {name: stamp for name, stamp in stamps(tmp_path / "out").items() if "/" in name},
        {name: (tmp_path / "out" / name).read_bytes() for name in names_of(tmp_path / "out")},
    )
    release(runs, tmp_path / "out")
    assert "0 SAEs written, 3 were there already" in capsys.readouterr().out
    assert {name: stamp for name, stamp in stamps(tmp_path / "out").items() if "/" in name} == saes
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names_of(tmp_path / "out")} == content


def damage(out, run):
    weights = out / run.name / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def lose(out, run):
    (out / run.name / "scores.parquet").unlink()


def score_again(out, run):
    put_scores(run, "core", "test", "key", [Score("moran", 0.5)])


@pytest.mark.parametrize("change", [damage, lose, score_again])
def test_only_what_has_changed_is_written_again(runs, tmp_path, change):
    out = tmp_path / "out"
    release(runs, out)
    before = stamps(out)
    change(out, runs[1])
    release(runs, out)
    assert {name.partition("/")[0] for name, stamp in stamps(out).items() if "/" in name and stamp != before[name]} == {
        runs[1].name
    }
    assert codes_of(SAE.load(out / runs[1].name)) == codes_of(SAE.load(runs[1]))


def test_a_killed_release_goes_on(runs, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []

    def killed(one, other):
        calls.append(one)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return equal(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(releasing, "equal", killed)
        with pytest.raises(KeyboardInterrupt):
            release(runs, out)
    first = stamps(out / runs[0].name)
    assert not (out / runs[1].name).exists()
    release(runs, out)
    assert stamps(out / runs[0].name) == first
    release(runs, tmp_path / "at once" / "out")
    assert names_of(out) == names_of(tmp_path / "at once" / "out")
    assert (out / "SHA256SUMS").read_bytes() == (tmp_path / "at once" / "out" / "SHA256SUMS").read_bytes()


def weight(sae):
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nextafter(sae.W_enc[0, 0], torch.tensor(torch.inf))


def setting(sae):
    sae.input_norm = "unit"


@pytest.mark.parametrize("change", [weight, setting])
def test_one_digit_in_one_weight_or_another_setting_is_another_sae(runs, change):
    one, other = SAE.load(runs[0]), SAE.load(runs[0])
    assert equal(one, other)
    change(other)
    assert not equal(one, other)


def test_an_sae_that_was_written_wrongly_is_not_released(runs, tmp_path, monkeypatch):
    save = BatchTopK.save

    def wrong(sae, folder, **record):
        with torch.no_grad():
            sae.b_enc.sub_(0.5)
        save(sae, folder, **record)
        with torch.no_grad():
            sae.b_enc.add_(0.5)

    monkeypatch.setattr(BatchTopK, "save", wrong)
    with pytest.raises(ReleaseError, match=f"written for {runs[0].name} is not that of the run"):
        release(runs, tmp_path / "out")
    assert not (tmp_path / "out" / runs[0].name).exists()


def test_runs_are_named_by_folder_pattern_or_themselves(runs, tmp_path):
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs([str(tmp_path / "runs")]) == sorted(runs)
    assert find_runs([str(tmp_path / "runs" / "*clip*"), str(runs[1])]) == sorted(runs[1:])
    with pytest.raises(ReleaseError, match="No run is found at"):
        find_runs([str(tmp_path / "runs" / "notes")])
    shutil.copytree(runs[0], tmp_path / "others" / runs[0].name)
    with pytest.raises(ReleaseError, match="have the same name"):
        find_runs([str(tmp_path / "runs"), str(tmp_path / "others")])


def test_unfinished_and_unscored_runs_are_refused_unless_told_otherwise(tmp_path):
    done = make_run(tmp_path / "runs")
    bare = make_run(tmp_path / "runs", "expansion=4", scores=None)
    begun = tmp_path / "runs" / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    with pytest.raises(ReleaseError, match=r"1 run is \(begun\) not finished; go on with train.py"):
        releasable([done, begun])
    with pytest.raises(ReleaseError, match=rf"1 run is \({bare.name}\) not scored on the test split; call evaluate.py"):
        releasable([done, bare])
    with pytest.raises(ReleaseError, match=r"2 runs are .* not scored on the val split"):
        releasable([done, bare], "val")
    with pytest.raises(ReleaseError, match="No finished run is left"):
        releasable([begun], skip_unfinished=True)
    assert releasable([done, bare, begun], unscored=True, skip_unfinished=True) == [done, bare]
    release([bare], tmp_path / "out")
    assert "It has not been scored." in (tmp_path / "out" / bare.name / "README.md").read_text()


def test_one_repository_holds_all_saes_and_the_index(runs, tmp_path, monkeypatch, capsys):
    hub = stand_in(tmp_path, monkeypatch)
    out = tmp_path / "out"
    (out / "left over").mkdir(parents=True)
    (out / "left over" / "file").touch()
    main(["--runs", str(tmp_path / "runs"), "--out", str(out), "--repo", "lab/grid", "--private"])
    assert "hub/lab/grid" in capsys.readouterr().out
    assert set(names_of(hub / "lab/grid")) == set(names_of(out)) - {"left over/file"} | {".private"}
    for run in runs:
        assert codes_of(SAE.from_pretrained(f"lab/grid/{run.name}")) == codes_of(SAE.load(run))
    with pytest.raises(ArtefactError, match="name one: 'lab/grid/<folder>'"):
        SAE.from_pretrained("lab/grid")


def test_each_sae_has_a_repository_of_its_own_beside_that_of_the_index(runs, tmp_path, monkeypatch):
    hub = stand_in(tmp_path, monkeypatch)
    main([
        "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--repo", "lab/grid",
        "--layout", "repo-per-sae",
    ])  # fmt: skip
    assert names_of(hub / "lab/grid") == ["README.md", "index.csv", "index.json"]
    for address, folder in pd.read_csv(hub / "lab/grid/index.csv")[["address", "folder"]].to_numpy():
        assert address == f"lab/grid-{folder}"
        assert f'from_pretrained("{address}")' in (hub / address / "README.md").read_text()
        assert codes_of(SAE.from_pretrained(address)) == codes_of(SAE.load(tmp_path / "runs" / folder))


@pytest.mark.parametrize("token", [None, "hf_token"])
def test_without_login_or_network_the_release_stays_and_a_sentence_says_so(runs, tmp_path, monkeypatch, token):
    nobody_listens = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", nobody_listens)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    said = "could not be written to the model hub" if token else "No login at the model hub"
    with pytest.raises(
        SystemExit, match=rf"{said}[^\0]*The release lies complete in .*; the same call uploads it later"
    ):
        main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--repo", "lab/grid"])
    assert SAE.load(tmp_path / "out" / runs[0].name).d_in == D_IN


def test_what_cannot_be_released_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="No run is found"):
        main(["--runs", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
