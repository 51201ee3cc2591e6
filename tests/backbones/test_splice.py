"""An SAE inside an encoder, against the same computed by hand, block after block."""

import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import r2_score

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.natural import Natural
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.splice import effects, spliced
from sae_lightning.backbones.taps import Layout
from sae_lightning.saes import TopK
from tests.backbones.models import timm, transformers
from tests.backbones.test_transformers import SMALL


@pytest.fixture(scope="module")
def vit():
    return load_backbone(timm("test_vit", layer=2))


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(vit, images):
    return vit.forward_features(images, [Tap("patch", 2)])[Tap("patch", 2)]


@pytest.fixture(scope="module")
def sae(features):
    made = TopK(64, 256, k=8, seed=0)
    made.normalizer.mean, made.normalizer.std = features.mean((0, 1)), features.std()
    return made.eval()


def by_hand(model, images, change, layer=2):
    """The output of timm's ViT where ``change`` makes of the patch tokens after block ``layer`` what it wants."""
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for i, block in enumerate(model.blocks):
            tokens = block(tokens)
            if i == layer:
                tokens = torch.cat([tokens[:, :1], change(tokens[:, 1:])], 1)
        return model.forward_head(model.norm(tokens))


def dense(sae, x):
    return sae.encode(x).to_dense().reshape(*x.shape[:2], -1)


def decoded(sae, z):
    return (z @ sae.W_dec + sae.b_pre) * sae.normalizer.std + sae.normalizer.mean


@torch.no_grad()
def expected(sae, x, mode, natural):
    z = dense(sae, x)
    error, latents = x - decoded(sae, z), [3, 9, 200]
    if mode == "replace":
        return decoded(sae, z)
    if mode == "top_k of all":
        kept = z.topk(2)
        return decoded(sae, torch.zeros_like(z).scatter(2, kept.indices, kept.values))
    if mode == "top_k of some":
        mask = torch.zeros(sae.d_sae)
        mask[latents] = 1
        return decoded(sae, z * mask)
    new = {"zero": 0.0, "mean": dense(sae, natural).mean((0, 1))[latents], "steer": z[..., latents] + 2.5}[mode]
    z[..., latents] = torch.as_tensor(new)
    return decoded(sae, z) + error


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("replace", {"mode": "replace"}),
        ("zero", {"mode": "ablate", "by": "zero", "latents": [3, 9, 200]}),
        ("mean", {"mode": "ablate", "latents": [3, 9, 200]}),
        ("steer", {"mode": "steer", "amount": 2.5, "latents": [3, 9, 200]}),
        ("top_k of all", {"mode": "top_k", "latents": 2}),
        ("top_k of some", {"mode": "top_k", "latents": [3, 9, 200]}),
    ],
)
def test_each_mode_does_what_a_pass_by_hand_does(vit, sae, images, features, mode, arguments):
    natural = Natural(sae, features)
    with spliced(vit, sae, **arguments, natural=natural):
        found = vit.model(images)
    reference = by_hand(vit.model, images, lambda x: expected(sae, x, mode, features))
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, vit.model(images), atol=1e-3)


ENCODERS = [
    timm("test_vit", layer=0), timm("test_efficientnet", layer=0), timm("test_convnext", layer=0),
    timm("vit_wee_patch16_reg1_gap_256", image_size=64, layer=0),
    *(transformers(SMALL[name][0], layer=0) for name in ("registers", "clip", "siglip", "deit")),
]  # fmt: skip


@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config["published"]["model"])
def test_with_its_error_added_an_sae_leaves_the_model_as_it_is(config):
    encoder = load_backbone(config)
    sae = TopK(encoder.d_in, 2 * encoder.d_in, k=2, seed=0).eval()
    x = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    tap = Tap("pooled") if "pooled" in encoder.kinds else Tap("patch", -1)
    before = encoder.forward_features(x, [tap])[tap]
    with spliced(encoder, sae, "add_error") as splice:
        torch.testing.assert_close(encoder.forward_features(x, [tap])[tap], before, atol=1e-5, rtol=1e-5)
    assert splice.report().n == 2 * encoder.n_patches
    with spliced(encoder, sae):
        changed = encoder.forward_features(x, [tap])[tap]
    assert not torch.allclose(changed, before, atol=1e-4)
    torch.testing.assert_close(encoder.forward_features(x, [tap])[tap], before)


def test_class_tokens_and_all_tokens_can_be_chosen(vit, sae, images, features):
    seen = {}
    for tokens in ("cls", "all"):
        with spliced(vit.model, sae, at="blocks.2", tokens=tokens) as splice:
            vit.model(images)
        seen[tokens] = splice.report().n
    assert seen == {"cls": 3, "all": 3 * 101}


def test_the_error_stays_the_clean_runs_where_something_before_is_changed_too(vit, sae, images, features):
    early = TopK(64, 128, k=1, seed=1).eval()
    with spliced(vit, sae, "add_error") as clean:
        vit.model(images)
    torch.testing.assert_close(clean.error, features - sae(features), atol=1e-5, rtol=1e-5)
    with spliced(vit, early, at=0), spliced(vit, sae, "add_error", error=clean.error):
        found = vit.model(images)

    def hand(tokens, layer):
        patches = tokens[:, 1:]
        changed = early(patches) if layer == 0 else sae(patches) + clean.error
        return torch.cat([tokens[:, :1], changed], 1)

    with torch.no_grad():
        tokens = vit.model._pos_embed(vit.model.patch_embed(images))
        for i, block in enumerate(vit.model.blocks):
            tokens = hand(block(tokens), i) if i in (0, 2) else block(tokens)
        reference = vit.model.forward_head(vit.model.norm(tokens))
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


def test_resampled_latents_take_their_values_on_other_pictures(vit, sae, images, features):
    natural = Natural(sae, features)
    with spliced(vit, sae, "ablate", [3, 9], "resample", natural=natural, seed=4):
        first = vit.model(images)
    with spliced(vit, sae, "ablate", [3, 9], "resample", natural=natural, seed=4):
        assert torch.equal(vit.model(images), first)
    values = natural.elsewhere([3, 9], 5, 100, torch.Generator().manual_seed(0))
    of_pictures = dense(sae, features)[..., [3, 9]]
    assert all(any(torch.allclose(row, picture) for picture in of_pictures) for row in values)


def test_effects_are_those_of_one_splice_a_latent(vit, sae, images, features):
    natural, pairs = Natural(sae, features), [(0, 3), (2, 3), (1, 9), (0, 200)]
    clean, changed, report = effects(vit.model, vit, sae, images, pairs, natural=natural)
    torch.testing.assert_close(clean, vit.model(images))
    for row, (image, latent) in zip(changed, pairs, strict=True):
        with spliced(vit, sae, "ablate", [latent], natural=natural):
            torch.testing.assert_close(row, vit.model(images)[image], atol=1e-4, rtol=1e-4)
    assert report.n == 300


def test_the_report_is_r2_and_mahalanobis_distance(vit, sae, images, features):
    natural, rows = Natural(sae, features), features.reshape(-1, 64)
    with spliced(vit, sae, natural=natural) as splice:
        vit.model(images)
    report = splice.report()
    assert report.fvu == pytest.approx(
        1 - r2_score(rows, sae(rows).detach(), multioutput="variance_weighted"), rel=1e-4
    )
    reference = EmpiricalCovariance().fit(rows.numpy()).mahalanobis(sae(rows).detach().numpy()) / 64
    assert report.distance == pytest.approx(reference.mean(), rel=0.02)
    assert float(natural.distance(features).mean()) == pytest.approx(1, rel=0.01)
    assert float((natural.distance(features) > natural.far).double().mean()) == pytest.approx(0.01, abs=0.005)


def test_rounding_beside_features_of_low_rank_is_not_far(sae):
    draw = torch.Generator().manual_seed(0)
    features = (torch.randn(400, 4, generator=draw) @ torch.randn(4, 64, generator=draw)).view(100, 4, 64)
    natural = Natural(sae, features)
    rounded = features + 1e-3 * torch.randn(features.shape, generator=draw)
    assert float((natural.distance(rounded) > natural.far).double().mean()) < 0.03
    assert bool((natural.distance(features + 3 * torch.randn(features.shape, generator=draw)) > natural.far).all())


def test_a_splice_far_from_natural_features_is_refused(vit, sae, images, features):
    natural = Natural(sae, features)
    with spliced(vit, sae, "steer", [3], amount=1000.0, natural=natural) as splice:
        vit.model(images)
    with pytest.raises(BackboneError, match="unlike any natural ones"):
        splice.report().check(fvu=2)
    with pytest.raises(BackboneError, match="variance unexplained"):
        splice.report().check(unnatural=1, fvu=0.01)
    with spliced(vit, sae, "add_error", natural=natural) as splice:
        vit.model(images)
    assert splice.report().check(fvu=2).unnatural < 0.05


def test_the_model_is_whole_again_after_an_exception(vit, sae, images):
    before = vit.model(images)
    with pytest.raises(ZeroDivisionError), spliced(vit, sae):
        raise ZeroDivisionError
    with pytest.raises(BackboneError, match="neither tokens"), spliced(vit.model, sae, at="blocks.0.mlp.fc1"):
        vit.model(images)
    assert torch.equal(vit.model(images), before)
    assert not any(module._forward_hooks for module in vit.model.modules())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "replaced"}, "mode"),
        ({"mode": "ablate"}, "needs latents"),
        ({"mode": "ablate", "latents": [3]}, "natural=Natural"),
        ({"mode": "ablate", "latents": [300], "by": "zero"}, "latents 0 to 255"),
        ({"mode": "ablate", "latents": 3, "by": "zero"}, "list them"),
        ({"mode": "steer", "latents": [3]}, "needs an amount"),
        ({"at": 17}, "Layer 17 does not exist"),
        ({"at": "blocks.2.nothing"}, "has no site blocks.2.nothing; it has block, attn_out"),
        ({"tokens": "registers"}, "tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(vit, sae, images, arguments, sentence):
    with pytest.raises(BackboneError, match=sentence), spliced(vit, sae, **arguments):
        vit.model(images)


def test_another_width_and_a_second_splice_at_one_place_are_refused(vit, sae, images):
    with pytest.raises(BackboneError, match="takes 32 dimensions"), spliced(vit, TopK(32, 64, k=2)):
        pass
    with spliced(vit, sae), pytest.raises(BackboneError, match="a splice at this"), spliced(vit, sae):
        pass
    with pytest.raises(BackboneError, match="neither tokens"), spliced(vit.model, TopK(32, 64, k=2), at="blocks.1"):
        vit.model(images)
    with pytest.raises(BackboneError, match="Name the place"), spliced(vit.model, sae):
        pass


def test_maps_with_channels_last_and_single_rows_are_tokens_too():
    layout, x = Layout(5), torch.randn(2, 3, 4, 5)
    first, tokens = layout.split(x)
    assert (first, tokens.shape) == (0, (2, 12, 5))
    assert torch.equal(layout.join(x, first, 2 * tokens), 2 * x)
    assert torch.equal(layout.join(x[:, 0, 0], *layout.split(x[:, 0, 0])), x[:, 0, 0])
    with pytest.raises(BackboneError, match="in two places"):
        layout.split(torch.randn(2, 5, 4, 5))
    with pytest.raises(BackboneError, match="no class token"):
        layout.split(x, "cls")
