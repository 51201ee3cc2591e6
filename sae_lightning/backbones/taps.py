"""Names of what can be read from a backbone: patch tokens, class token, pooled output, embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from sae_lightning.backbones.errors import BackboneError

LAYER_KINDS = ("patch", "cls")
KINDS = (*LAYER_KINDS, "pooled", "embedding", "text")


@dataclass(frozen=True, order=True)
class Tap:
    """One place to read features from.

    ``patch`` and ``cls`` are the patch tokens [B, P, d] and the class token [B, d] after block (or stage)
    ``layer``, from 0; a negative layer counts from the end. ``pooled`` is the model's own pooled output,
    ``embedding`` the image's and ``text`` the caption's projection into a joint image–text space, neither of
    them scaled to unit norm; these three have no layer. BackboneError for an unknown kind, and for a layer
    that is missing or too many.
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BackboneError(f"Unknown kind of tap '{self.kind}'; choose one of {', '.join(KINDS)}.")
        if self.kind not in LAYER_KINDS and self.layer is not None:
            raise BackboneError(f"A {self.kind} tap has no layer, but layer {self.layer} was given; leave it out.")
        if self.kind in LAYER_KINDS and type(self.layer) is not int:
            raise BackboneError(f"A {self.kind} tap needs a layer, a whole number from 0; it got {self.layer!r}.")

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}-L{self.layer}"
