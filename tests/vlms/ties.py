"""Captions compared as far as a processor's rounding allows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from PIL import Image

from sae_lightning.vlms import VLM

MARGIN = 1e-2  # logits of two words that are about as likely; another order of sums moves one by 1e-5


def assert_same_captions(vlm: VLM, images: Sequence[Image.Image], said: Sequence[str], expected: Sequence[str]) -> None:
    """Each picture's captions are equal, or part at a word for which the model found the other's about as likely."""
    assert len(said) == len(expected) == len(images)
    for image, one, other in zip(images, said, expected, strict=True):
        if one != other:
            assert abs(_gap(vlm, image, one, other)) < MARGIN, (one, other)


def _gap(vlm: VLM, image: Image.Image, one: str, other: str) -> float:
    """How much likelier (in logits) ``one`` is where the two first part, after the words that they share."""
    tokenizer = vlm.processor.tokenizer
    end = [tokenizer.eos_token_id]
    first, second = ([*tokenizer(text, add_special_tokens=False).input_ids, *end] for text in (one, other))
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
    inputs = vlm._inputs([image], vlm.prompt)
    ids = torch.cat([inputs["input_ids"], torch.tensor([shared], dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
    return float(logits[first[len(shared)]] - logits[second[len(shared)]])
