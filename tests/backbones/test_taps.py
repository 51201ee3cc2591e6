"""Names of taps, and what cannot be one."""

import pytest

from sae_lightning.backbones.backbone import KINDS, Tap


def test_taps_have_readable_names():
    taps = [Tap("patch", 11), Tap("cls", 0), Tap("registers", 1), Tap("tokens", 2)]
    taps += [Tap("pooled"), Tap("embedding"), Tap("text")]
    names = ["patch-L11", "cls-L0", "registers-L1", "tokens-L2", "pooled", "embedding", "text"]
    assert [str(tap) for tap in taps] == names
    assert [tap.kind for tap in taps] == list(KINDS)
    sites = [Tap("patch", 4, "mlp_out"), Tap("cls", None, "norm"), Tap("pooled", None, "head.fc")]
    assert [str(tap) for tap in sites] == ["patch-L4-mlp_out", "cls-norm", "pooled-head.fc"]


def test_taps_are_keys_that_stay():
    taps = {Tap("patch", 3): 1, Tap("patch", 3, "mlp_in"): 2}
    assert (taps[Tap("patch", 3)], taps[Tap("patch", 3, "mlp_in")]) == (1, 2)
    with pytest.raises(AttributeError):
        next(iter(taps)).kind = "cls"


@pytest.mark.parametrize(
    ("kind", "layer", "sentence"),
    [
        ("token", 3, "Unknown kind of tap=token; choose one of patch, cls, registers, tokens, pooled, embedding, text"),
        ("pooled", 3, "pooled tap has no layer, but layer 3 was given"),
        ("patch", (3, "norm"), "patch tap at norm has no layer, but layer 3 was given"),
        ("tokens", (None, "mlp_in"), "tokens tap needs a layer"),
        ("pooled", (None, "norm"), "pooled tap has no site norm: choose features=patch"),
        ("text", (None, "head"), "text tap has no site head"),
        ("patch", None, "patch tap needs a layer"),
        ("cls", "last", "needs a layer, a whole number from 0; it got 'last'"),
        ("cls", True, "needs a layer"),
    ],
)
def test_what_is_no_tap_is_said_in_a_sentence(kind, layer, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tap(kind, *(layer if isinstance(layer, tuple) else (layer,)))
