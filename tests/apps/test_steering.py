"""The application on a run whose encoder is a vision tower with a planted language model: the nearest class is said."""

import re

import pandas as pd
import pytest
import torch

from sae_lightning.apps.app import results_of
from sae_lightning.apps.steering import app as steering
from sae_lightning.apps.steering.app import judge_node
from sae_lightning.apps.steering.latents import diffmean
from sae_lightning.backbones.backbone import Tap
from sae_lightning.runs.results import read_result
from sae_lightning.runs.run import Run
from sae_lightning.saes.edits import Edit, edited
from sae_lightning.training.fit import train
from sae_lightning.vlms import VLM
from sae_lightning.vlms.steering import check_fit, steered_captions
from tests.configs import composed


class Namer(VLM):
    """Says the class whose mean token after block ``feature_layer`` is nearest; its tower is the run's encoder."""

    title, batch_size, special_tokens, feature_layer, depth = "namer", 8, 1, 4, 6

    def __init__(self, opened):
        self.backbone = opened.backbone
        images = opened.images("train")
        self.classes = images.class_names
        features = torch.from_numpy(opened.features("train"))
        self.means = torch.stack([features[images.labels == c].mean(0) for c in range(len(self.classes))])
        self.batches = []

    def layer(self, i):
        return self.backbone.model.blocks[i]

    def patch_tokens(self, images, i, batch_size=None):
        tap = Tap("patch", i)
        return self.backbone.forward_features(torch.stack([self.backbone.transform(x) for x in images]), [tap])[tap]

    def say(self, tokens):
        nearest = torch.cdist(tokens.mean(1), self.means).argmin(1)
        return [f"a photo of {self.classes[c]}" for c in nearest.tolist()]

    def captions(self, images, prompt=None, max_new_tokens=None, batch_size=None):
        self.batches.append(len(images))
        return self.say(self.patch_tokens(images, 4)) if images else []


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("steering")
    cfg = composed(
        "config", "data=folder", f"data.path={pictures}", "backbone=deit", "backbone.size=tiny", "sae=topk", "k=4",
        "expansion=1", "batch_size=256", "trainer.accelerator=cpu", "trainer.max_epochs=8", "logger=none",
        "trainer.enable_progress_bar=false", f"paths.stores={root / 'stores'}", f"paths.runs={root / 'runs'}",
    )  # fmt: skip
    train(cfg)
    return Run(next((root / "runs").iterdir()))


def options(*overrides):
    return composed(
        "explore", "app=steering", "app.top=4", "app.top_k=[1,4]", "app.latents=2", "app.images=2", "app.tested=3",
        "app.insert=[1,30]", "app.suppress=[0,-30]", "app.shown=1", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "load_vlm", lambda node, device: Namer(trained))
        return results_of([trained], options())[0]


@pytest.mark.slow
def test_a_run_is_steered_scored_and_shown(trained, result):
    again = read_result(result.folder)
    assert [line.what for line in again.headlines] == [line.what for line in result.headlines]
    assert {"DiffMean", "random"} <= {line.against.split()[0] for line in result.headlines}
    table = pd.read_parquet(result.folder / "steering.parquet")
    assert set(table["split"]) == {"val", "test"}
    assert set(table["method"]) == {"sae", "random", "diffmean"}
    assert table["share"].between(0, 1).all()
    assert (table["passed"] <= table["share"]).all()
    strong = table[(table.split == "val") & (table.method == "diffmean") & (table.alpha.abs() == 30)]
    assert (strong["share"] == 1).all()  # far along a difference of class means lies that class
    assert set(strong["goal"]) == {"insert", "suppress"}
    page = result.page.read_text()
    assert "unsteered" in page
    assert "<mark>" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.mark.slow
def test_captions_in_the_table_are_those_of_edited_tokens(trained, result):
    model, captions = Namer(trained), pd.read_parquet(result.folder / "captions.parquet")
    images = {split: trained.images(split) for split in ("val", "test")}
    train_labels = trained.images("train").labels
    for line in captions[captions.method != "random"].sample(12, random_state=0).itertuples():
        pictures = images[line.split]
        x = model.patch_tokens([pictures[int(pictures.index_of([line.image])[0])]], 4)
        name = pictures.class_names.index(line.concept)
        direction = diffmean(trained.features("train"), train_labels == name)[None]
        edits = [Edit(line.latent, "set", line.value)]
        after = (
            edited(trained.sae, x, edits) if line.method == "sae" else edited(trained.sae, x, edits, True, direction)
        )
        assert model.say(x)[0] == line.before
        assert model.say(after)[0] == line.caption


@pytest.mark.slow
def test_steered_captions_share_batches_and_come_by_strength(trained):
    model, images = Namer(trained), trained.images("val")
    pictures, told = [images[i] for i in range(3)], []
    found = steered_captions(model, trained.sae, pictures, 5, [0.0, 4.0, 60.0, -60.0], "add", said=told.append)
    assert model.batches == told == [8, 4]
    for alpha, said in zip([0.0, 4.0, 60.0, -60.0], found, strict=True):
        assert said == steered_captions(model, trained.sae, pictures, 5, [alpha], "add")[0]
    assert found[2] != found[3]


@pytest.mark.slow
def test_runs_that_do_not_fit_the_tower_are_refused_in_a_sentence(trained):
    model, store = Namer(trained), trained.store("train")
    pictures = [trained.images("train")[i] for i in range(4)]
    assert check_fit(model, store, pictures) == 4
    model.feature_layer = 3
    with pytest.raises(ValueError, match=r"trained on layer 4, but .* reads layer 3"):
        check_fit(model, store, pictures)
    model.feature_layer = 4
    with pytest.raises(
        ValueError, match=r"gives tokens of cosine 0\.\d+ with those that this run was trained on \(deit"
    ):
        check_fit(model, store, pictures[::-1])
    model.patch_tokens = lambda images, i: torch.zeros(4, 9, 16)
    with pytest.raises(ValueError, match="gives 9 tokens of 16 dimensions, not 64 of 128"):
        check_fit(model, store, pictures)
    with pytest.raises(ValueError, match="features=pooled; train one with features=patch"):
        check_fit(model, trained.store("train", "pooled"), pictures)


def test_the_judge_is_of_the_size_of_the_run_s_encoder_unless_it_names_one():
    assert judge_node(options().app.judge, "tiny")["size"] == "tiny"
    node = judge_node(options("app.judge.size=published").app.judge, "tiny")
    assert (node["size"], node["name"]) == ("published", "siglip")
