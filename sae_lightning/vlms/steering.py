"""Turning latents of an SAE inside a vision-language model's vision tower while it looks at pictures.

[MS score, steering]: after the SAE's layer all tokens are encoded, a latent is forced to a value on each of them, and
the codes are decoded back; the language model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from PIL import Image
from torch import Tensor

from sae_lightning.features.store import FeatureStore
from sae_lightning.registry import one_of
from sae_lightning.saes import SAE
from sae_lightning.saes.edits import Edit, edited
from sae_lightning.vlms.vlm import VLM

TOKENS = ("all", "patch")  # which tokens are edited: all of them, or all but the leading special ones


@contextmanager
def steer(
    vlm: VLM, sae: SAE, edits: Sequence[Edit], layer: int, tokens: str = "all", keep_error: bool = False,
    directions: Tensor | None = None,
) -> Iterator[None]:  # fmt: skip
    """Within this context the tokens after block ``layer`` (from 0) are ``edited``; the hook goes in any case.

    ``tokens`` "patch" leaves class and register tokens as they are. An SAE on another device is copied to the tower's.
    ValueError for latents that the SAE lacks, unknown ``tokens``, and a layer that the tower lacks.
    """
    _check(sae, edits, tokens)
    device = next(vlm.layer(layer).parameters()).device
    if sae.W_dec.device != device:
        sae = deepcopy(sae).to(device)
    was_training = sae.training
    sae.eval()
    first = vlm.special_tokens if tokens == "patch" else 0

    @torch.no_grad()
    def alter(x: Tensor) -> Tensor:
        changed = edited(sae, x[:, first:], edits, keep_error, directions)
        return torch.cat([x[:, :first], changed], dim=1) if first else changed

    try:
        with vlm.editing(layer, alter):
            yield
    finally:
        sae.train(was_training)


def _check(sae: SAE, edits: Sequence[Edit], tokens: str) -> None:
    one_of(tokens, TOKENS, "tokens")
    missing = [edit.latent for edit in edits if not 0 <= edit.latent < sae.d_sae]
    if missing:
        raise ValueError(f"The SAE has latents 0 to {sae.d_sae - 1}; an edit names {missing[0]}.")


ALIKE = 0.99  # least mean cosine of the tower's tokens with the run's features for its SAE to fit


def steered_captions(
    vlm: VLM, sae: SAE, images: Sequence[Image.Image], latent: int, alphas: Sequence[float], mode: str = "set", *,
    layer: int | None = None, tokens: str = "all", keep_error: bool = False, direction: Tensor | None = None,
    said: Callable[[int], object] | None = None,
) -> list[list[str]]:  # fmt: skip
    """Captions of all ``images`` at each of ``alphas``: one list an α, in the images' order.

    Pictures and strengths share batches of ``vlm.batch_size``. ``layer`` is the SAE's, by default the one that the
    language model reads; ``direction`` [d_in] is written in place of the latent's own, at equal norm. ``said`` is told
    after each batch how many captions it made.
    """
    layer = vlm.feature_layer if layer is None else layer
    pairs = [(alpha, image) for alpha in alphas for image in images]
    directions = None if direction is None else direction.reshape(1, -1)
    found: list[str] = []
    for at in range(0, len(pairs), vlm.batch_size):
        values, pictures = zip(*pairs[at : at + vlm.batch_size], strict=True)
        edit = Edit(latent, mode, torch.tensor(values))
        with steer(vlm, sae, [edit], layer, tokens, keep_error, directions):
            found += vlm.captions(list(pictures), batch_size=len(pictures))
        if said is not None:
            said(len(pictures))
    return [found[i * len(images) : (i + 1) * len(images)] for i in range(len(alphas))]


def check_fit(vlm: VLM, store: FeatureStore, images: Sequence[Image.Image]) -> int:
    """The layer of ``store``, of whose first pictures ``images`` are some; ValueError unless it is the tower's.

    The tower must give the patch tokens that the SAE was trained on, at a layer that the language model reads or that
    comes before it.
    """
    if store.kind != "patch" or store.layer is None:
        raise ValueError(
            f"Steering needs an SAE of patch tokens, but this run was trained on features={store.kind}; train one with "
            "features=patch on the encoder that the vision-language model sees through."
        )
    if store.layer > vlm.feature_layer:
        raise ValueError(
            f"This run was trained on layer {store.layer}, but the language model of {vlm.title} reads layer "
            f"{vlm.feature_layer}, which nothing behind it changes; train with backbone.layer={vlm.feature_layer} or "
            "lower."
        )
    ours = store.features(list(range(len(images)))).float()
    theirs = vlm.patch_tokens(list(images), store.layer)
    if ours.shape == theirs.shape:
        alike = float(torch.cosine_similarity(ours, theirs, dim=-1).mean())
        if alike >= ALIKE:
            return store.layer
        found = f"tokens of cosine {alike:.2f} with those"
    else:
        found = (
            f"{theirs.shape[1]} tokens of {theirs.shape[2]} dimensions, not {ours.shape[1]} of {ours.shape[2]} as those"
        )
    raise ValueError(
        f"The vision tower of {vlm.title} gives {found} that this run was trained on ({store.backbone}, layer "
        f"{store.layer}); train on the tower's own encoder and picture size, or choose another model (vlm@app.vlm=…)."
    )
