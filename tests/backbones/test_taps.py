"""Names of taps, and what cannot be one."""

import pytest

from sae_lightning.backbones.backbone import KINDS, Tap


def test_taps_have_readable_names():
    taps = [Tap("patch", 11), Tap("cls", 0), Tap("pooled"), Tap("embedding"), Tap("text")]
    assert [str(tap) for tap in taps] == ["patch-L11", "cls-L0", "pooled", "embedding", "text"]
    assert {tap.kind for tap in taps} == set(KINDS)


def test_taps_are_keys_and_have_an_order():
    assert {Tap("patch", 3): 1}[Tap("patch", 3)] == 1
    taps = [Tap("pooled"), Tap("patch", 10), Tap("cls", 4), Tap("patch", 9)]
    assert sorted(taps) == [Tap("cls", 4), Tap("patch", 9), Tap("patch", 10), Tap("pooled")]
    with pytest.raises(AttributeError):
        taps[0].kind = "cls"


@pytest.mark.parametrize(
    ("kind", "layer", "sentence"),
    [
        ("token", 3, "Unknown kind of tap=token; choose one of patch, cls, pooled, embedding, text"),
        ("pooled", 3, "pooled tap has no layer, but layer 3 was given"),
        ("patch", None, "patch tap needs a layer"),
        ("cls", "last", "needs a layer, a whole number from 0; it got 'last'"),
        ("cls", True, "needs a layer"),
    ],
)
def test_what_is_no_tap_is_said_in_a_sentence(kind, layer, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tap(kind, layer)
