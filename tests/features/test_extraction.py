"""Extraction: what stores hold, what names them, several taps at once, pictures that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lightning.backbones.backbone import Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data import DataError
from sae_lightning.features import extraction
from sae_lightning.features.extraction import Extraction
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.report.latents import latent_groups
from sae_lightning.runs.run import TOP_IMAGES
from sae_lightning.saes import Normalizer, TopK
from tests.backbones.models import timm
from tests.features import jobs
from tests.features.jobs import (
    PATCH,
    content,
    extract_pixels,
    extract_split,
    litter,
    make_pictures,
    noise_images,
    picture_config,
    times,
)
from tests.scoring import score

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    """Ten pictures to train on."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), 10)


# --- one tap ----------------------------------------------------------------------------------------------
def test_the_store_holds_what_the_backbone_gives(ten, tmp_path):
    cfg = picture_config(ten, tmp_path)
    store = Source.of(cfg).store("train")
    images, backbone = Source.of(cfg).images("train"), load_backbone(Source.of(cfg).backbone)
    x = torch.stack([backbone.transform(images[i]) for i in range(len(images))])
    expected = backbone.forward_features(x, [PATCH])[PATCH]
    torch.testing.assert_close(store.features(slice(None)).float(), expected, rtol=2e-3, atol=2e-3)
    assert store.image_ids == images.image_ids
    assert store.labels.tolist() == images.labels.tolist()
    assert (store.backbone, store.kind, store.layer, store.grid) == ("mae (tiny)", "patch", 4, (8, 8))
    assert (store.data, store.split, store.class_names) == ("folder", "train", ["even", "odd"])
    assert [shard.images for shard in store.manifest.shards] == [4, 4, 2]
    assert litter(store.folder) == []
    store.verify()


@pytest.mark.slow
def test_whatever_changes_the_features_makes_another_store(ten, tmp_path):
    pictures = make_pictures(tmp_path / "p", 6)
    base = Source.of(picture_config(pictures, tmp_path)).store("train")
    assert Source.of(picture_config(pictures, tmp_path, "extract.batch_size=3")).store("train").folder == base.folder
    others = [
        Source.of(picture_config(pictures, tmp_path, change)).store("train")
        for change in (
            "backbone.layer=2",
            "features=cls",
            "extract.precision=bf16",
            "extract.dtype=int8",
            "data.seed=1",
        )
    ]
    others.append(Source.of(picture_config(pictures, tmp_path)).store("val"))
    others.append(Source.of(picture_config(pictures, tmp_path, backbone="deit")).store("train"))
    Image.new("RGB", (32, 32)).save(pictures / "train" / "even" / "0.png")
    others.append(Source.of(picture_config(pictures, tmp_path)).store("train"))
    assert len({store.folder for store in [base, *others]}) == 9
    assert len({store.fingerprint for store in [base, *others]}) == 9


def test_a_store_under_a_wrong_name_is_refused(ten, tmp_path):
    cfg = picture_config(ten, tmp_path)
    train, val = (Source.of(cfg).store(split).folder for split in ("train", "val"))
    for path in val.rglob("*.*"):
        (train / path.relative_to(val)).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="made from other images or another backbone"):
        Source.of(cfg).store("train")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("extract.precision=8", r"extract\.precision=8; choose one of 32, bf16, 16"),
        ("extract.dtype=float64", r"extract\.dtype=float64; choose one of float16, bfloat16, int8"),
        ("extract.part=4/4", r"extract\.part=4/4 must look like 0/4"),
        ("extract.part=half", r"extract\.part=half must look like"),
        ("extract.unreadable=ignore", r"extract\.unreadable=ignore; choose one of refuse, skip"),
        ("extract.images_per_shard=-1", r"images_per_shard=-1 must be at least 1"),
        ("extract.images_per_shard=0", r"images_per_shard=0 must be at least 1"),
        ("features=words", "Unknown kind of tap=words"),
        ("features=embedding", r"mae \(tiny\) has no projection"),
        ("features=text", r"mae \(tiny\) has no text tower"),
    ],
)
def test_impossible_settings_fail_with_a_sentence(override, sentence, ten, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        Source.of(picture_config(ten, tmp_path, override)).store("train")
    assert not list(tmp_path.rglob("manifest.json"))


# --- several taps -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Ten pictures with captions beside them."""
    folder = make_pictures(tmp_path_factory.mktemp("captioned"), 10)
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a photo of a {('cat', 'dog', 'ship')[int(path.stem) % 3]}")
    return folder


TAPS = [Tap("patch", 1), Tap("patch", 4), Tap("cls", 4), Tap("pooled"), Tap("embedding"), Tap("text")]


@pytest.mark.slow
def test_several_taps_in_one_pass_equal_separate_passes(captioned, tmp_path):
    cfg = picture_config(captioned, tmp_path / "once", backbone="clip")
    once = extract_split(cfg, TAPS)
    cfg = picture_config(captioned, tmp_path / "one by one", backbone="clip")
    for tap in TAPS:
        alone = extract_split(cfg, [tap])[tap]
        assert content(once[tap]) == content(alone), tap
    shapes = [(FeatureStore.open(once[tap]).n_patches, FeatureStore.open(once[tap]).grid) for tap in TAPS]
    assert shapes == [(64, (8, 8))] * 2 + [(1, (1, 1))] * 4
    assert len({FeatureStore.open(once[tap]).fingerprint for tap in TAPS}) == 6


def test_stores_of_all_tokens_and_of_sites_say_what_lies_where(ten, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_lightning.features.source.USUAL", 31)
    cfg = picture_config(ten, tmp_path, "features=tokens", "site=mlp_out")
    taps = [Tap("tokens", 4, "mlp_out"), Tap("patch", 4), Tap("patch", None, "norm"), Tap("cls", None, "blocks.2.attn")]
    folders = extract_split(cfg, taps)
    assert "mae (tiny) reads pictures of 32 x 32 pixels, 64 patches each" in capsys.readouterr().out
    backbone, images = load_backbone(Source.of(cfg).backbone), Source.of(cfg).images("train")
    expected = backbone.forward_features(torch.stack([backbone.transform(images[i]) for i in range(10)]), taps)
    names = ["tokens-L4-mlp_out", "patch-L4", "patch-norm", "cls-blocks.2.attn"]
    assert [folders[tap].parent.name for tap in taps] == names
    for tap in taps:
        store = FeatureStore.open(folders[tap])
        torch.testing.assert_close(store.features(slice(None)).float().squeeze(1), expected[tap], rtol=2e-3, atol=2e-3)
        assert (store.kind, store.layer, store.site) == (tap.kind, tap.layer, tap.site)
    whole = Source.of(cfg).store("train")
    assert (whole.folder, whole.prefix, whole.n_patches, whole.grid) == (folders[taps[0]], 1, 65, (8, 8))
    older = whole.folder / "manifest.json"
    about = json.loads(older.read_text())
    assert (about.pop("site"), about.pop("prefix")) == ("mlp_out", 1)
    older.write_text(json.dumps(about))
    assert FeatureStore.open(whole.folder).site == "block"
    assert Source.of(cfg).replace(features="cls").site == "block"


def test_text_stores_hold_the_captions_and_their_embeddings(captioned, tmp_path):
    cfg = picture_config(captioned, tmp_path, "features=text", backbone="clip")
    store = Source.of(cfg).store("train")
    images = Source.of(cfg).images("train")
    assert store._column("caption").tolist() == list(images.captions)
    expected = load_backbone(Source.of(cfg).backbone).encode_text(list(images.captions))
    torch.testing.assert_close(store.features(slice(None))[:, 0].float(), expected, rtol=2e-3, atol=2e-3)
    assert store.kind == "text"


def test_text_without_captions_is_refused(ten, tmp_path):
    with pytest.raises(DataError, match=r"'folder' has no captions.* set data\.caption_column"):
        Source.of(picture_config(ten, tmp_path, "features=text", backbone="clip")).store("train")


def test_a_pass_leaves_finished_stores_alone_and_goes_on_with_half_ones(ten, tmp_path):
    taps = [Tap("patch", 2), PATCH, Tap("cls", 4)]
    cfg = picture_config(ten, tmp_path)
    first = extract_split(cfg, taps[:1])[taps[0]]
    before = times(first)
    half = extract_split(cfg, [PATCH])[PATCH]
    expected = content(half)
    for name in ("manifest.json", "records/00001.json"):
        (half / name).unlink()
    kept = times(half)
    folders = extract_split(cfg, taps)
    assert times(first) == before
    assert content(half) == expected
    assert {name for name, t in times(half).items() if t != kept[name]} == {"shard-00001.safetensors"}
    assert content(folders[taps[2]])["ids"] == expected["ids"]


# --- pictures that cannot be read -------------------------------------------------------------------------
def break_picture(pictures: Path, i: int) -> str:
    """Cut picture i short; its id."""
    path = pictures / "train" / ("even", "odd")[i % 2] / f"{i}.png"
    path.write_bytes(path.read_bytes()[:300])
    return str(path.relative_to(pictures))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_picture_is_refused_by_name(workers, tmp_path):
    pictures = make_pictures(tmp_path / "p", 10)
    bad = break_picture(pictures, 7)
    cfg = picture_config(pictures, tmp_path, f"extract.num_workers={workers}")
    with pytest.raises(DataError, match=rf"Image '{bad}' cannot be read .* extract\.unreadable=skip"):
        Source.of(cfg).store("train")
    assert not list(tmp_path.rglob("manifest.json"))


def test_unreadable_pictures_are_left_out_and_counted_on_request(tmp_path, capsys):
    pictures = make_pictures(tmp_path / "p", 10)
    cfg = picture_config(pictures, tmp_path, "extract.unreadable=skip", "data.shuffle=false")
    ids = Source.of(cfg).images("train").image_ids
    whole = FeatureStore.open(extract_split(picture_config(pictures, tmp_path, "data.shuffle=false"))[PATCH])
    features = dict(zip(whole.image_ids, whole.features(slice(None)), strict=True))
    bad = {break_picture(pictures, 7), break_picture(pictures, 4)}
    store = FeatureStore.open(extract_split(cfg)[PATCH], verify=True)
    assert store.manifest.skipped_images == 2
    assert "2 unreadable pictures were left out." in capsys.readouterr().out
    assert store.image_ids == [i for i in ids if i not in bad]
    assert sum(shard.images for shard in store.manifest.shards) == len(store) == 8
    for i, image_id in enumerate(store.image_ids):
        torch.testing.assert_close(store.features([i])[0].float(), features[image_id].float(), rtol=1e-2, atol=1e-2)
        assert store.class_names[store.labels[i]] == ("even" if "even" in image_id else "odd")


@pytest.mark.parametrize("unreadable", [(0, 1, 2, 3), (4, 5, 6, 7), (10,), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_a_shard_without_a_readable_picture_is_an_empty_one(unreadable, tmp_path):
    """The last shard may well be a single picture."""
    images = noise_images(11, unreadable)
    extract_pixels(tmp_path / "s", images, per_shard=4 if 10 not in unreadable else 5, unreadable="skip")
    extract_pixels(tmp_path / "whole")
    store, whole = FeatureStore.open(tmp_path / "s", verify=True), FeatureStore.open(tmp_path / "whole")
    left = [i for i in range(11) if i not in unreadable]
    assert torch.equal(store.features(slice(None)), whole.features(left))
    assert torch.equal(store.features([0, len(left) - 1]), whole.features([left[0], left[-1]]))
    assert store.image_ids == [f"image-{i}" for i in left]
    assert store.manifest.skipped_images == len(unreadable)
    rest = store.select(np.arange(1, len(left)))
    assert torch.equal(rest.features(slice(None)), whole.features(left[1:]))
    assert litter(tmp_path / "s") == []


def test_no_readable_picture_at_all_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"No image of .* could be read"):
        extract_pixels(tmp_path / "s", noise_images(5, (0, 1, 2, 3, 4)), unreadable="skip")


@pytest.mark.slow
def test_top_images_are_the_right_pictures_where_some_were_left_out(tmp_path):
    """Their ids, not their places, lead back to the pictures."""
    pictures = make_pictures(tmp_path / "p", 30)
    for i in (3, 8, 20):
        break_picture(pictures, i)
    cfg = picture_config(pictures, tmp_path, "extract.unreadable=skip")
    store, images = Source.of(cfg).store("train"), Source.of(cfg).images("train")
    sae = TopK(store.d_in, 40, 3, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=1)
    run = tmp_path / "run"
    sae.save(run, name="run", backbone=store.backbone, layer=store.layer, features=store.kind, k=3, config={})
    score(run, store, latents_shown=5)
    from safetensors import safe_open

    with safe_open(run / TOP_IMAGES, "pt") as file:
        ids, shown = json.loads(file.metadata()["image_ids"]), file.get_tensor("images")
        latents = file.get_tensor("latents").tolist()
    assert ids == {str(i): store.image_ids[i] for i in shown[shown >= 0].unique().tolist()}
    about = {"folder": run, "cfg": {"config": {"backbone": Source.of(cfg).backbone}}}
    groups = latent_groups(about, images)
    assert [group["name"] for group in groups] == ["purest", "random", "most used"]
    labels = {
        latent: ", ".join(store.class_names[store.labels[i]] for i in row if i >= 0)
        for latent, row in zip(latents, shown.tolist(), strict=True)
    }
    cards = [card for group in groups for card in group["cards"]]
    assert cards
    for card in cards:
        assert card["alt"] == labels[card["latent"]]
        assert card["fired"] >= 10 or card in groups[2]["cards"]


# --- an encoder that does not give one row an image ---------------------------------------------------------
class Packing(jobs.PixelEncoder):
    """Puts a whole batch into one sequence."""

    def forward_features(self, images, taps):
        return {tap: x.flatten(0, 1)[None] for tap, x in super().forward_features(images, taps).items()}


def test_a_shard_whose_images_are_not_its_ids_is_never_sealed(tmp_path):
    with pytest.raises(StoreError, match=r"shape \(1, 48, 3\) for 3 images; the backbone must give one row for each"):
        extract_pixels(tmp_path / "s", encoder=Packing())
    assert not list(tmp_path.rglob("*shard-*.safetensors*"))
    writer = jobs.pixel_writer(tmp_path / "t")
    shard = writer.begin(0)
    shard.append(torch.ones(3, 16, 3), ["a", "b", "c"])
    with pytest.raises(StoreError, match=r"would hold 3 images for 4 ids"):
        writer.finish(0, shard, ["a", "b", "c", "d"], [0, 0, 0, 0])
    assert not list(tmp_path.rglob("*shard-*.safetensors*"))


def test_a_store_begun_with_other_images_in_a_record_is_not_sealed(tmp_path):
    extract_pixels(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()
    path = tmp_path / "s" / "records" / "00001.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"image_ids": [*record["image_ids"], "one more"]}))
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors holds 4 images, its record names others; delete"):
        extract_pixels(tmp_path / "s")


# --- how it is begun and shared out -----------------------------------------------------------------------
def test_an_extraction_that_was_begun_keeps_its_images_per_shard(ten, tmp_path):
    cfg = picture_config(ten, tmp_path, "extract.part=0/3")
    folder = extract_split(cfg)[PATCH]
    kept = times(folder)
    assert len(kept) == 1
    with pytest.raises(StoreError, match=r"begun with 4 images a shard, not extract\.images_per_shard=7; leave that"):
        extract_split(picture_config(ten, tmp_path, "extract.images_per_shard=7"))
    extract_split(picture_config(ten, tmp_path, "extract.images_per_shard=null"))
    assert [shard.images for shard in FeatureStore.open(folder).manifest.shards] == [4, 4, 2]
    assert kept.items() <= times(folder).items()


def test_parts_one_after_the_other_make_the_whole(ten, tmp_path):
    whole = content(extract_split(picture_config(ten, tmp_path / "whole"))[PATCH])
    first = extract_split(picture_config(ten, tmp_path, "extract.part=0/2"))[PATCH]
    assert list(times(first)) == ["shard-00000.safetensors"]
    with pytest.raises(StoreError, match="did not finish"):
        FeatureStore.open(first)
    assert extract_split(picture_config(ten, tmp_path, "extract.part=1/2"))[PATCH] == first
    assert content(first) == whole
    assert litter(first) == []


def test_ensuring_a_part_only_says_that_it_is_not_whole(ten, tmp_path):
    with pytest.raises(StoreError, match="did not finish"):
        Source.of(picture_config(ten, tmp_path, "extract.part=0/2")).store("train")


def test_processes_of_an_extraction_end_with_a_sentence(tmp_path, capfd):
    """Not with a traceback: their output is the user's."""
    pictures = make_pictures(tmp_path / "p", 10)
    bad = break_picture(pictures, 7)
    with pytest.raises(StoreError, match="its error is above"):
        extract_split(picture_config(pictures, tmp_path, "extract.devices=2", "extract.device=cpu"))
    said = capfd.readouterr().err
    assert f"Image '{bad}' cannot be read" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_devices_share_the_work(ten, tmp_path, capfd):
    whole = content(extract_split(picture_config(ten, tmp_path / "whole"))[PATCH])
    folder = extract_split(picture_config(ten, tmp_path, "extract.devices=2", "extract.device=cpu"))[PATCH]
    assert content(folder)["ids"] == whole["ids"]
    assert litter(folder) == []
    assert sum(int(line.split()[0]) for line in capfd.readouterr().out.splitlines() if " images in " in line) == 10 + 10


def test_the_bar_moves_with_the_pictures_that_a_cpu_encodes_at_a_time(monkeypatch):
    backbone = load_backbone(timm("test_vit", image_size=32, layer=0))
    monkeypatch.setattr(extraction, "PIXELS", 3 * 32 * 32)
    images, taps, told = torch.randn(8, 3, 32, 32), [Tap("patch", 0), Tap("pooled")], []
    found = extraction.encoder(backbone, taps, Extraction(device="cpu"), told.append)(images)
    assert told == [3, 3, 2]
    whole = backbone.forward_features(images, taps)
    for tap in taps:
        torch.testing.assert_close(found[tap], whole[tap])
