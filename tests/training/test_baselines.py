"""Baselines through the public functions: trained or fitted, alone, packed and on two ranks, then scored."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sae_lightning.analysis.lift import lift_table
from sae_lightning.evaluation.suite import evaluate
from sae_lightning.features.source import Source
from sae_lightning.runs.identity import run_name
from sae_lightning.saes import SAE
from sae_lightning.training.fit import train
from sae_lightning.training.packed import train_packed
from tests.configs import composed

FITTED = ("random", "neurons", "pca", "kmeans", "nmf")
FROZEN = ("frozen_decoder", "frozen_encoder", "soft_frozen_decoder")


@pytest.mark.parametrize("variant", FITTED)
def test_what_is_fitted_takes_no_step_and_has_its_l0(variant, alone):
    folder = alone(f"sae={variant}")
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], "in_part" in result) == (0, False)
    assert result["val"]["l0"] == pytest.approx(8, abs=0.1)
    assert not (folder / "checkpoints").exists()


def test_how_to_train_does_not_rename_what_is_not_trained(config):
    same = ("trainer.max_epochs=7", "optimizer.lr=0.1", "batch_size=512", "loss.aux=0.1", "schedule.decay=0.5")
    name = run_name(config("sae=random"))
    assert {run_name(config("sae=random", setting)) for setting in same} == {name}
    other = ("k=9", "seed=1", "expansion=3", "init.b_pre=zero", "subset.images=10", "backbone.tiny.pretrained=false")
    assert len({name, *(run_name(config("sae=random", setting)) for setting in other)}) == len(other) + 1


@pytest.mark.parametrize("variant", FROZEN)
def test_what_is_frozen_is_what_was_drawn(variant, alone):
    sae = SAE.load(alone(f"sae={variant}"))
    drawn = type(sae)(sae.d_in, sae.d_sae, k=8, seed=42)
    for name in sae.frozen:
        assert torch.equal(sae.get_parameter(name), drawn.get_parameter(name))
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec, drawn.W_dec, dim=1)
    assert variant == "frozen_encoder" or float(cosines.min()) > 0.8 - 1e-5
    assert not torch.equal(sae.b_pre, drawn.b_pre)


@pytest.mark.slow
def test_baselines_in_a_pack_are_those_alone(config, tmp_path):
    choices = [[f"sae={variant}"] for variant in ("batchtopk", "kmeans", "random", "soft_frozen_decoder")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        packed = train_packed([config(*choice, f"paths.runs={tmp_path / 'packed'}") for choice in choices])
        for choice, folder in zip(choices, packed, strict=True):
            one, other = (load_file(of / "sae.safetensors") for of in (train(config(*choice)), folder))
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), choice
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["kmeans", "frozen_decoder"])
def test_two_ranks_agree_with_one(variant, config, tmp_path):
    choice = [f"sae={variant}", "trainer.max_epochs=1", "trainer.precision=64-true",
              "+callbacks.same={_target_: tests.training.crash.SameWeights}"]  # fmt: skip
    saes = [SAE.load(train(config(*choice, f"trainer.devices={n}", f"paths.runs={tmp_path / str(n)}"))) for n in (1, 2)]
    for name, tensor in saes[0].state_dict().items():
        torch.testing.assert_close(saes[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_lifts_are_over_the_random_dictionary_of_the_same_weights(config):
    runs = {
        (variant, trained): train(config(f"sae={variant}", f"backbone.tiny.pretrained={trained}"))
        for variant in ("random", "pca") for trained in ("true", "false")
    }  # fmt: skip
    stores = {Source.of(config(f"backbone.tiny.pretrained={t}")).store("train").backbone for t in ("true", "false")}
    assert stores == {"deit (tiny)", "deit (tiny, random weights)"}
    cfg = config()
    evaluate(composed("evaluate", "metrics=core", f"paths.runs={cfg.paths.runs}", "split=val"))
    scores = {key: json.loads((run / "scores.json").read_text())["metrics"] for key, run in runs.items()}
    table = lift_table([runs["pca", "true"], runs["pca", "false"]], "val")
    place = [head.title for head in table.heads].index("MonoScore")
    for trained, title, line in zip(
        ("true", "false"), ("deit (tiny)", "deit (tiny, random weights)"), table.rows, strict=True
    ):
        assert line[1] == title
        difference = scores["pca", trained]["monoscore"] - scores["random", trained]["monoscore"]
        assert line[place] == pytest.approx(difference, abs=1e-6)


@pytest.mark.slow
def test_a_published_encoder_may_have_random_weights(config):
    published = ["backbone.size=published", "backbone.published.model=test_vit", "backbone.layer=-1"]
    folder = train(config("sae=random", *published, "backbone.published.pretrained=false"))
    evaluate(composed("evaluate", "metrics=core", f"paths.runs={folder.parent}", "split=val"))
    assert json.loads((folder / "cfg.json").read_text())["backbone"] == "deit (ViT-B/16, random weights)"
    assert json.loads((folder / "scores.json").read_text())["metrics"]["l0"] == pytest.approx(8, abs=0.1)
    assert run_name(config("sae=random", *published)) != folder.name


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sae=random", "resample.every=5"], "resample.every=5 gives dead latents new rows"),
        (["sae=frozen_decoder", "resample.every=5"], "sae.name=frozen_decoder does not allow"),
        (["sae=pca", "callbacks=monoloss"], "leave callbacks=monoloss out"),
        (["sae=nmf", "sae.threshold=running_average"], "set sae.threshold=calibrated"),
        (["sae=pca", "expansion=8"], "set expansion=2"),
        (["sae=neurons", "d_sae=100"], "set expansion=1 or 2"),
    ],
)
def test_what_a_baseline_cannot_do_is_refused_before_any_work(overrides, sentence, config):
    with pytest.raises(ValueError, match=sentence):
        train(config(*overrides))
