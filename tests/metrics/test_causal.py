"""Scores of an SAE inside its encoder, against a loop by hand over the encoder's blocks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.splice import fanned
from sae_lightning.evaluation.job import Job, Settings
from sae_lightning.evaluation.printed import print_scores
from sae_lightning.evaluation.suite import evaluate_runs
from sae_lightning.features.source import Source
from sae_lightning.metrics.causal import causal, pairs_of
from sae_lightning.metrics.readout import outputs
from sae_lightning.runs.scores import read_rows, value_of
from sae_lightning.saes import Normalizer, TopK
from tests.backbones.test_splice import ENCODERS
from tests.configs import composed

METRICS = composed("evaluate", "metrics=causal").metrics
OPTIONS = OmegaConf.to_container(METRICS.causal) | {
    "latents": 3, "top": 2, "budgets": [4], "draws": 200, "unnatural": 1.0, "fvu": 2.0
}  # fmt: skip
SIGLIP = ("backbone=siglip", "trainer.max_epochs=15")  # whose pooling reads patch tokens


def found(folder, split="train", **changes) -> dict[str, Any]:
    scores = causal(Job(folder, Settings(METRICS, split=split)), OPTIONS | changes)
    named = {f"{score.metric.removeprefix('causal_')} {score.setting}": score for score in scores}
    intervals = {f"{name} interval": (score.low, score.high) for name, score in named.items()}
    return {name: score.why or score.value for name, score in named.items()} | intervals


@pytest.fixture
def untrained(tmp_path, config):
    """Random directions, 8 of them a token, in a run's folder."""

    def make(*overrides: str):
        cfg = config(*overrides)
        store = Source.of(cfg).store("train")
        sae = TopK(store.d_in, 2 * store.d_in, 8, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=3)
        about = {"backbone": store.backbone, "features": store.kind, "layer": store.layer, "k": 8}
        sae.save(tmp_path / "random", name="random", config=OmegaConf.to_container(cfg, resolve=True), **about)
        return tmp_path / "random"

    return make


KNOWN: dict[str, dict[str, Any]] = {}


@pytest.fixture
def usual(untrained):
    """What is found of random directions in SigLIP, computed once."""
    if not KNOWN:
        KNOWN.update(random=found(untrained(*SIGLIP)))
    return KNOWN["random"]


@torch.no_grad()
def test_all_is_what_a_loop_by_hand_gives(untrained, usual):
    folder = untrained(*SIGLIP)
    job = Job(folder, Settings(METRICS, split="train"))
    encoder, data, sae = load_backbone(job.source.backbone), job.source.images("train"), job.sae
    pixels = torch.stack([encoder.transform(data[i]) for i in range(len(data))])
    labels = data.labels

    def output(change=lambda x: x):
        vit = encoder.model
        x = vit._pos_embed(vit.patch_embed(pixels))
        for i, block in enumerate(vit.blocks):
            x = block(x)
            if i == 4:
                output.features, x = x, change(x)
        return encoder.project(vit.forward_head(vit.norm(x))).double().numpy()

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(output(), labels)
    x = output.features
    z = sae.encode(x).to_dense().reshape(*x.shape[:2], -1)
    mean = z.mean((0, 1))

    def decoded(z):
        return (z @ sae.W_dec + sae.b_pre) * sae.normalizer.std + sae.normalizer.mean

    shown, entropy = usual, {}
    for name, change in {"kept": lambda x: x, "sae": sae, "mean": lambda x: x.mean((0, 1)).expand(x.shape),
                         "zero": torch.zeros_like}.items():  # fmt: skip
        p = probe.predict_log_proba(output(change))
        entropy[name] = -p[np.arange(len(labels)), labels].mean()
        assert shown[f"cross_entropy features={name}"] == pytest.approx(entropy[name], rel=2e-3)
        assert shown[f"accuracy features={name}"] == pytest.approx((p.argmax(1) == labels).mean())
    for by in ("mean", "zero"):
        expected = (entropy[by] - entropy["sae"]) / (entropy[by] - entropy["kept"])
        assert shown[f"recovered against={by}"] == pytest.approx(expected, abs=5e-3)

    typical = torch.zeros_like(z, dtype=torch.bool)
    for c in range(2):
        typical[labels == c] = torch.zeros(sae.d_sae, dtype=bool).index_fill(
            0, z[labels == c].mean((0, 1)).topk(4).indices, True
        )
    for what, made in {"kept": decoded(torch.where(typical, z, mean)),
                       "removed": x + decoded(torch.where(typical, mean, z)) - sae(x)}.items():  # fmt: skip
        p = probe.predict(output(lambda _, made=made: made))
        assert shown[f"accuracy {what}=4,latents=typical"] == pytest.approx((p == labels).mean(), abs=1.1 / len(labels))

    codes = csr_matrix(z.amax(1).numpy())
    for name, pairs in pairs_of(codes, labels, OPTIONS).items():
        clean, logits, kl, moved = output(), [], [], []
        for picture, latent in pairs:
            changed = z.clone()
            changed[..., latent] = mean[latent]
            made = x + decoded(changed) - decoded(z)
            after = output(lambda _, made=made: made)[[picture]]
            p, q = (probe.predict_log_proba(each)[0] for each in (clean[[picture]], after))
            (a,), (b,) = (probe.decision_function(each) for each in (clean[[picture]], after))
            logits.append((b - a) * labels[picture])  # of two classes the first one's logit is 0
            kl.append(float((np.exp(p) * (p - q)).sum()))
            moved.append(float((made[picture] - x[picture]).norm() / x[picture].norm()))
        setting = f"ablated=1,latents={name}"
        assert shown[f"logit {setting}"] == pytest.approx(np.mean(logits), rel=0.02, abs=1e-3)
        assert shown[f"kl {setting}"] == pytest.approx(np.mean(kl), rel=0.05, abs=1e-5)
        assert shown[f"change {setting},layer=4"] == pytest.approx(np.mean(moved), rel=0.01)
        assert shown[f"pairs {setting}"] == len(pairs) == 6


def test_an_sae_recovers_more_than_random_directions_do(alone, usual):
    trained, random = found(alone(*SIGLIP)), usual
    accuracy = "accuracy features="
    assert random[f"{accuracy}sae"] < trained[f"{accuracy}sae"] <= trained[f"{accuracy}kept"] + 0.1
    assert random["recovered against=mean"] < 0.6 < trained["recovered against=mean"] < 1.2
    low, high = trained["recovered against=mean interval"]
    assert low < trained["recovered against=mean"] < high


def test_effects_far_from_natural_features_are_not_told_but_how_much_an_sae_loses_is(untrained):
    shown = found(untrained(*SIGLIP), fvu=0.5, images=8)
    assert "variance unexplained" in shown["logit ablated=1,latents=purest"]
    assert "metrics.causal.unnatural" in shown["accuracy kept=4,latents=typical"]
    assert shown["recovered against=mean"] < 1
    assert shown["fvu "] > 0.5
    shown = found(untrained(*SIGLIP), unnatural=0.5, images=8)
    assert "unlike any natural ones" in shown["recovered against=mean"]
    assert shown["unnatural features=sae"] > 0.5


def test_ablated_latents_take_what_is_asked_for(untrained):
    folder = untrained(*SIGLIP)
    by = [found(folder, by=name, choose="used", images=4) for name in ("mean", "resample", "zero")]
    assert len({shown["change ablated=1,latents=used,layer=5"] for shown in by}) == 3
    assert len({shown["cross_entropy features=sae"] for shown in by}) == 1


def test_class_names_can_be_the_readout(untrained):
    shown = found(untrained(*SIGLIP), readout="zero_shot", template="a picture of {}")
    assert 0 <= shown["accuracy features=kept"] <= 1
    assert shown["cross_entropy features=kept"] <= math.log(2) + 1e-3  # at the best temperature


def test_where_nothing_reaches_the_output_it_says_so_and_patches_can_be_the_output(untrained):
    folder = untrained("backbone=deit", "backbone.layer=5")
    assert "the same whatever its patch tokens at layer 5" in found(folder)["recovered against=mean"]
    assert found(folder, output="patch")["accuracy features=kept"] > 0.5
    class_token = found(untrained("backbone=deit", "backbone.layer=5", "features=cls"))
    assert class_token["cross_entropy features=mean"] > class_token["cross_entropy features=kept"]


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config["published"]["model"])
def test_changed_pictures_go_on_behind_the_clean_ones_in_every_library(config, patches):
    encoder = load_backbone(config)
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    rows, seen = torch.tensor([1, 0, 1]), {}
    found = fanned(
        lambda x: outputs(encoder, x, patches, seen.__setitem__), encoder, images,
        lambda x: (rows, x[rows] * torch.tensor([1, 1, -1])[:, None, None]), encoder.d_in,
    )  # fmt: skip
    clean = outputs(encoder, images, patches)
    torch.testing.assert_close(found[:4], clean[[0, 1, 1, 0]], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[4], clean[1], atol=1e-4)
    assert {layer: len(given) for layer, given in seen.items()} == dict.fromkeys(range(encoder.depth), 5)


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        (["backbone=deit", "features=pooled"], {}, "nothing of the encoder lies behind pooled features"),
        (["backbone=clip", "features=embedding"], {}, "lies behind embedding features"),
        (["backbone=deit"], {"readout": "zero_shot"}, "no text tower; set metrics.causal.readout=probe"),
    ],
)
def test_what_it_is_not_for_has_a_reason(untrained, overrides, options, sentence):
    shown = found(untrained(*overrides), **options)
    assert list(shown)[:2] == ["recovered against=mean", "recovered against=zero"]
    assert all(sentence in shown[name] for name in list(shown)[:2])


def test_pictures_of_a_given_store_are_not_known(untrained, config):
    folder = untrained("backbone=deit")
    stores = {split: Source.of(config("backbone=deit")).store(split).folder for split in ("train", "val", "test")}
    job = Job(folder, Settings(METRICS))
    job.source = job.source.replace(data={"source": "store", "held_out": 0.1, "seed": 0,
                                          **{split: str(store) for split, store in stores.items()}})  # fmt: skip
    (why, *_) = (score.why for score in causal(job, OPTIONS))
    assert "are not known" in why


def test_chosen_latents_are_pure_and_the_others_fire_as_often():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    codes = rng.random((60, 30)) * (rng.random((60, 30)) < 0.3)
    codes[:, 7] = (labels == 1) * (1 + rng.random(60))
    codes[:, 9] = 0
    codes[0, 9] = 1  # fires on too few
    options = OPTIONS | {"latents": 1, "top": 5, "seed": 1}
    pairs = pairs_of(csr_matrix(codes), labels, options)
    assert pairs["purest"] == [(int(i), 7) for i in np.argsort(-codes[:, 7])[:5]]
    (other,) = {latent for _, latent in pairs["random"]}
    fired = (codes > 0).sum(0)
    assert abs(fired[other] - 20) <= sorted(abs(fired - 20))[11]
    (most,) = {latent for _, latent in pairs_of(csr_matrix(codes), labels, options | {"choose": "used"})["used"]}
    assert fired[most] == fired.max()


def test_evaluate_writes_and_prints_it(alone, tmp_path, capsys):
    folder, cfg = alone(*SIGLIP), composed("evaluate", "metrics=causal", "metrics.causal.unnatural=1", "split=train")
    evaluate_runs([folder], Settings(cfg.metrics, split="train"))
    value = value_of(read_rows(folder), "causal_recovered", "against=mean")
    print_scores([folder], cfg)
    printed = capsys.readouterr().out
    assert "causal on the train split" in printed
    assert f"{value:.3f}" in printed
