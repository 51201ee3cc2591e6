"""Editing codes inside a vision tower, against dense encode, edit, decode; and the hook's manners."""

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lightning.saes import BatchTopK, Normalizer, ReLU, TopK
from sae_lightning.saes.edits import Edit, edited
from sae_lightning.vlms import VLMError, load_vlm
from sae_lightning.vlms.steering import steer, steered_captions

D, D_SAE, LAYER = 16, 48, 1


def make(variant, **options):
    torch.manual_seed(0)
    normalizer = Normalizer(D, torch.linspace(-1, 1, D), 1.7)
    sae = variant(D, D_SAE, normalizer=normalizer, seed=1, **options)
    with torch.no_grad():
        sae.b_pre.copy_(0.1 * torch.randn(D))
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE))
    if variant is BatchTopK:
        sae.threshold.fill_(0.8)
    return sae.eval()


SAES = {
    "topk": lambda: make(TopK, k=5),
    "batchtopk": lambda: make(BatchTopK, k=5),
    "relu": lambda: make(ReLU),  # codes held as a matrix
    "layer norm": lambda: make(TopK, k=5, input_norm="layer"),
}


def by_hand(sae, x, edits, keep_error):
    """Encode to a dense matrix, change its columns one by one, decode with the matrix of all rows."""
    flat = x.reshape(-1, D)
    codes = sae.encode(flat)
    dense = codes.to_dense().detach().clone()

    def decode(z):
        normed = z @ sae.W_dec + sae.b_pre
        if codes.frame is not None:
            normed = normed * codes.frame[1] + codes.frame[0]
        return normed * sae.normalizer.std + sae.normalizer.mean

    before = decode(dense)
    for latent, mode, alpha in edits:
        for i in range(len(dense)):
            z = float(dense[i, latent])
            dense[i, latent] = {"set": alpha, "add": z + alpha, "scale": z * alpha, "ablate": 0.0}[mode]
    after = decode(dense)
    return (flat + after - before if keep_error else after).reshape(x.shape)


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize(
    "edits",
    [
        [(3, "set", 4.0)], [(3, "set", -4.0)], [(3, "add", 1.5)], [(3, "scale", 3.0)], [(3, "ablate", 9.0)],
        [(7, "set", 2.0), (3, "add", 1.0), (7, "scale", -2.0), (11, "ablate", 0.0)],
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_edited_features_are_those_of_a_dense_encode_edit_decode(name, edits, keep_error):
    sae, x = SAES[name](), 2 * torch.randn(3, 5, D, generator=torch.Generator().manual_seed(2))
    found = edited(sae, x, [Edit(*each) for each in edits], keep_error)
    torch.testing.assert_close(found, by_hand(sae, x, edits, keep_error), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_latents_that_are_edited_do_fire_so_that_scaling_and_ablating_change_something():
    x = 2 * torch.randn(3, 5, D, generator=torch.Generator().manual_seed(2))
    for each in SAES.values():
        assert {3, 7, 11} <= set(each().encode(x).fired().nonzero().flatten().tolist())


@torch.no_grad()
def test_no_edit_leaves_features_as_they_are_with_the_error_and_reconstructs_without_it():
    sae, x = SAES["topk"](), torch.randn(2, 5, D)
    assert torch.equal(edited(sae, x, [], keep_error=True), x)
    torch.testing.assert_close(edited(sae, x, []), sae(x))


@torch.no_grad()
def test_other_directions_are_written_with_the_norm_of_the_sae_s_own_change():
    sae, x = SAES["layer norm"](), torch.randn(2, 5, D)
    direction = torch.randn(1, D)
    own = edited(sae, x, [Edit(3, "set", 5.0)], keep_error=True) - x
    other = edited(sae, x, [Edit(3, "set", 5.0)], keep_error=True, directions=direction) - x
    torch.testing.assert_close(other.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=1e-5)
    aligned = torch.nn.functional.cosine_similarity(other, direction, dim=-1)
    torch.testing.assert_close(aligned, torch.ones(2, 5), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision_stays_half_precision():
    assert edited(SAES["topk"](), torch.randn(2, 5, D).bfloat16(), [Edit(1)]).dtype == torch.bfloat16


ARCHITECTURE = {
    "model_type": "llava", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "hidden_size": D, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip


def small_llava():
    """A random LLaVA whose tower has 3 blocks, 4 patches and a class token; its language model reads block 1."""
    node = {"title": "small", "prompt": "<image> a photo of", "max_new_tokens": 3, "architecture": ARCHITECTURE}
    return load_vlm(node)


@torch.no_grad()
def logits(vlm, pictures):
    return vlm.model(**vlm._inputs(pictures, vlm.prompt)).logits


def tokens_after_each_block(vlm, pictures):
    """Tokens [B, T, d], seen by hooks that come last, in a pass of the whole model."""
    seen = {}

    def see(i):
        def hook(module, args, output):
            seen[i] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [vlm.layer(i).register_forward_hook(see(i)) for i in range(vlm.depth)]
    logits(vlm, pictures)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module")
def vlm():
    return small_llava()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]


def test_steering_reaches_the_language_model_before_and_after_a_first_pass(pictures):
    fresh, sae = small_llava(), SAES["topk"]()
    with steer(fresh, sae, [Edit(3, "set", 20.0)], LAYER):
        first = logits(fresh, pictures)  # transformers' own hooks come during this pass
    plain = logits(fresh, pictures)
    with steer(fresh, sae, [Edit(3, "set", 20.0)], LAYER):
        again = logits(fresh, pictures)  # and are there already in this one
    assert (first - plain).abs().max() > 1e-3
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("tokens", ["all", "patch"])
def test_only_the_chosen_layer_and_its_tokens_change_as_edited_says(vlm, pictures, tokens):
    sae = SAES["topk"]()
    before = tokens_after_each_block(vlm, pictures)
    with steer(vlm, sae, [Edit(3, "set", 20.0)], LAYER, tokens):
        after = tokens_after_each_block(vlm, pictures)
    assert torch.equal(after[0], before[0])
    expected = by_hand(sae, before[LAYER], [(3, "set", 20.0)], False).detach()
    if tokens == "patch":
        expected[:, 0] = before[LAYER][:, 0]
    torch.testing.assert_close(after[LAYER], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after[2], before[2])


def test_one_strength_a_picture_gives_each_what_it_would_have_alone(vlm, pictures):
    sae, alphas = SAES["topk"](), [20.0, -5.0, 0.5]
    with steer(vlm, sae, [Edit(3, "add", torch.tensor(alphas))], LAYER):
        together = logits(vlm, pictures)
    for i, alpha in enumerate(alphas):
        with steer(vlm, sae, [Edit(3, "add", alpha)], LAYER):
            torch.testing.assert_close(together[i : i + 1], logits(vlm, pictures[i : i + 1]), rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(ValueError, match="15 tokens are not those of 2 pictures"),
        steer(vlm, sae, [Edit(3, "set", torch.ones(2))], LAYER),
    ):
        logits(vlm, pictures)


def test_a_random_llava_is_steered_while_it_generates(vlm, pictures):
    sae = SAES["topk"]()
    found = steered_captions(vlm, sae, pictures, 3, [0.0, 300.0], keep_error=True)
    assert [len(said) for said in found] == [3, 3]
    for alpha, said in zip([0.0, 300.0], found, strict=True):
        with steer(vlm, sae, [Edit(3, "set", alpha)], LAYER, keep_error=True):  # the layer that it reads
            assert said == vlm.captions(pictures)
    assert found[0] != found[1]


def test_an_empty_edit_with_the_error_kept_changes_no_logit(vlm, pictures):
    plain = logits(vlm, pictures)
    with steer(vlm, SAES["topk"](), [], LAYER, keep_error=True):
        assert torch.equal(logits(vlm, pictures), plain)


def test_no_hook_stays_behind_after_an_exception(vlm, pictures):
    plain, hooks = logits(vlm, pictures), len(vlm.layer(LAYER)._forward_hooks)
    sae = SAES["topk"]().train()
    with pytest.raises(RuntimeError, match="inside"), steer(vlm, sae, [Edit(3, "set", 20.0)], LAYER):
        raise RuntimeError("inside")
    assert len(vlm.layer(LAYER)._forward_hooks) == hooks
    assert torch.equal(logits(vlm, pictures), plain)
    assert sae.training


def test_edits_that_cannot_be_are_refused_in_a_sentence(vlm):
    sae = SAES["topk"]()
    with pytest.raises(ValueError, match="Unknown mode=push; choose one of set, add, scale, ablate"):
        Edit(0, "push")
    with pytest.raises(ValueError, match="latents 0 to 47; an edit names 48"), steer(vlm, sae, [Edit(48)], LAYER):
        pass
    with pytest.raises(ValueError, match="Unknown tokens=cls"), steer(vlm, sae, [], LAYER, "cls"):
        pass
    with pytest.raises(VLMError, match="Layer 3 does not exist"), steer(vlm, sae, [], 3):
        pass
