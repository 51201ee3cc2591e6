"""Tokens and sites within layers, against hooks on timm's and transformers' own modules."""

import pytest
import torch

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.splice import spliced
from sae_lightning.saes import TopK
from tests.backbones.models import CLIP, SIGLIP, VISION, timm, transformers

DINO = VISION | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}


def plain(model, run, **modules):
    """What ``run`` brings by each of ``modules`` of ``model``, their paths given by name; ``mlp_in`` is an input."""
    seen, handles = {}, []
    for name, path in modules.items():
        module = model.get_submodule(path)
        if name == "mlp_in":
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]})))
        else:
            handles.append(module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
            ))  # fmt: skip
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


CASES = {  # config, class tokens, other tokens in front of patches, the block's path and its parts', the final norm's
    "vit": (timm("test_vit"), 1, 0, "blocks.{}", "attn", "mlp", "norm"),
    "timm registers": (timm("vit_wee_patch16_reg1_gap_256", image_size=64), 0, 1, "blocks.{}", "attn", "mlp", None),
    "dinov3": (timm("vit_small_patch16_dinov3", image_size=64), 1, 4, "blocks.{}", "attn", "mlp", "norm"),
    "distilled": (timm("deit_tiny_distilled_patch16_224"), 1, 1, "blocks.{}", "attn", "mlp", "norm"),
    "naflex": (timm("naflexvit_base_patch16_gap", image_size=64), 0, 4, "blocks.{}", "attn", "mlp", None),
    "dinov2": (transformers(DINO), 1, 4, "encoder.layer.{}", "attention", "mlp", "layernorm"),
    "clip": (transformers(CLIP), 1, 0, "encoder.layers.{}", "self_attn", "mlp", None),
    "siglip": (transformers(SIGLIP), 0, 0, "encoder.layers.{}", "self_attn", "mlp", "post_layernorm"),
    "ijepa": (transformers(VISION | {"model_type": "ijepa"}), 0, 0, "layers.{}", "attention", "mlp", "layernorm"),
    "vit of transformers": (transformers(VISION | {"model_type": "vit"}), 1, 0, "layers.{}", "attention", "mlp",
                            "layernorm"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_all_tokens_at_all_sites_in_one_pass_are_those_of_hooks(name):
    cfg, classes, others, block, attention, mlp, norm = CASES[name]
    ours = load_backbone(cfg)
    layer, prefix = ours.depth - 2, classes + others
    x = torch.randn(2, 3, ours.image_size, ours.image_size)
    where = block.format(layer)
    modules = {"block": where, "attn_out": f"{where}.{attention}", "mlp_in": f"{where}.{mlp}"}
    modules |= {"mlp_out": f"{where}.{mlp}", "path": f"{where}.{attention}"} | ({"norm": norm} if norm else {})
    kinds = ["patch"] + ["cls"] * bool(classes) + ["registers"] * bool(others) + ["tokens"] * bool(prefix)
    taps = {(site, kind): Tap(kind, layer, site) for site in modules if site not in ("path", "norm") for kind in kinds}
    taps |= {("norm", kind): Tap(kind, None, "norm") for kind in kinds if norm}
    taps |= {("path", kind): Tap(kind, None, modules["path"]) for kind in kinds}
    out = ours.forward_features(x, [*taps.values(), *([Tap("pooled")] if "pooled" in ours.kinds else [])])
    seen = plain(ours.model, lambda: ours._read(x, [layer], True), **modules)
    for (site, kind), tap in taps.items():
        tokens = seen[site]
        expected = {"patch": tokens[:, prefix:], "cls": tokens[:, 0], "registers": tokens[:, classes:prefix],
                    "tokens": tokens}[kind]  # fmt: skip
        assert torch.equal(out[tap], expected), tap
        shape = ours.shape_at(tap)
        assert (shape.grid, shape.width, shape.prefix) == (ours.grid, tokens.shape[-1], prefix)
    assert [kind for kind in ours.kinds if kind in ("patch", "cls", "registers", "tokens")] == kinds
    assert not any(module._forward_pre_hooks for module in ours.model.modules())


def test_a_site_ends_the_pass_after_its_block():
    ours, ran = load_backbone(timm("test_vit")), []
    for i, block in enumerate(ours.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    taps = [Tap("patch", 1, "mlp_out"), Tap("cls", 3, "attn_out")]
    ours.check(taps[0]), ours.check(taps[1])
    ran.clear()
    ours.forward_features(torch.randn(1, 3, 160, 160), taps)
    assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("model", "path", "grid", "width"),
    [
        ("test_resnet", "layer3.0.conv2", (10, 10), None),
        ("test_convnext", "stages.1.blocks.0.mlp.fc1", None, None),  # a map with channels last
        ("swin_tiny_patch4_window7_224", "layers.1.blocks.0", None, 192),
        ("swin_tiny_patch4_window7_224", "patch_embed", None, 96),
    ],
)
def test_maps_of_either_order_of_channels_have_their_grid(model, path, grid, width):
    ours = load_backbone(timm(model, image_size=56 if "swin" in model else None))
    x = torch.randn(2, 3, ours.image_size, ours.image_size)
    expected = plain(ours.model, lambda: ours.model(x), found=path)["found"]
    last = "swin" in model or "fc1" in path
    tap = Tap("patch", None, path)
    rows = expected if last else expected.permute(0, 2, 3, 1)
    assert torch.equal(ours.forward_features(x, [tap])[tap], rows.flatten(1, 2))
    shape = ours.shape_at(tap)
    assert (shape.grid, shape.width) == (tuple(rows.shape[1:3]), rows.shape[-1])
    assert grid in (None, shape.grid)
    assert width in (None, shape.width)


def test_a_module_that_gives_one_row_an_image_is_read_as_pooled():
    ours = load_backbone(timm("test_resnet"))
    x, tap = torch.randn(2, 3, 160, 160), Tap("pooled", None, "global_pool")
    assert torch.equal(ours.forward_features(x, [tap])[tap], ours.model(x))
    with pytest.raises(BackboneError, match=r"at global_pool; it has pooled"):
        ours.check(Tap("patch", None, "global_pool"))


@pytest.mark.parametrize(
    ("cfg", "tap", "sentence"),
    [
        (timm("test_resnet"), Tap("patch", 1, "mlp_out"), "no site mlp_out; it has block, and modules by their path"),
        (
            timm("test_vit"),
            Tap("patch", None, "block.5"),
            "no site block.5; it has block, attn_out, mlp_in, mlp_out, norm",
        ),
        (timm("test_vit"), Tap("registers", 3), "has no registers; it has patch, cls, tokens, pooled"),
        (timm("test_vit"), Tap("registers", 3, "mlp_in"), "has no registers at mlp_in; it has patch, cls, tokens"),
        (timm("test_vit"), Tap("patch", 9, "mlp_in"), "Layer 9 does not exist"),
        (timm("test_vit"), Tap("patch", None, "head_drop.x"), "no site head_drop.x"),
        (timm("test_vit", image_size=48), Tap("patch", None, "blocks.0.attn.qkv.weight"), "no site blocks"),
        (transformers(SIGLIP), Tap("cls", 0), "has no class token"),
        (transformers(CLIP), Tap("patch", None, "norm"), "at norm; it has pooled"),
    ],
)
def test_a_site_that_is_not_there_is_said_in_a_sentence(cfg, tap, sentence):
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(cfg).check(tap)


@pytest.mark.parametrize("site", ["attn_out", "mlp_in", "mlp_out", "norm", "blocks.3.attn.proj"])
@pytest.mark.parametrize("tokens", ["patch", "all"])
def test_an_sae_is_spliced_at_a_site(site, tokens):
    ours = load_backbone(timm("test_vit", layer=2))
    x = torch.randn(2, 3, 160, 160)
    sae = TopK(64, 128, k=4, seed=0).eval()
    path = {"attn_out": "blocks.2.attn", "mlp_out": "blocks.2.mlp", "mlp_in": "blocks.2.mlp"}.get(site, site)

    def replaced(_, given, out=None):
        whole = given[0] if out is None else out
        first = 1 if tokens == "patch" else 0
        made = sae.decode(sae.encode(whole[:, first:].flatten(0, 1))).unflatten(0, (2, -1))
        made = torch.cat([whole[:, :first], made], 1)
        return (made,) if out is None else made

    with torch.no_grad():
        module, clean = ours.model.get_submodule(path), ours.model(x)
        register = module.register_forward_pre_hook if site == "mlp_in" else module.register_forward_hook
        handle = register(replaced)
        expected = ours.model(x)
        handle.remove()
        with spliced(ours, sae, at=site, tokens=tokens):
            torch.testing.assert_close(ours.model(x), expected)
        with spliced(ours, sae, "add_error", at=Tap("patch", 2, site) if "_" in site else site, tokens=tokens):
            torch.testing.assert_close(ours.model(x), clean, atol=1e-5, rtol=1e-4)
    behind = (site, tokens) != ("norm", "patch")  # of which the class token, which is pooled, takes nothing
    assert torch.allclose(expected, clean) is not behind
