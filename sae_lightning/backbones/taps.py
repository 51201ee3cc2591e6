"""Where features are read: a kind of token, a layer, a site within it; and how tokens lie in what is found there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_lightning.registry import one_of


class BackboneError(ValueError):
    """A backbone that cannot be had, or a tap, layer or image that does not fit it."""


LAYER_KINDS = ("patch", "cls", "registers", "tokens")

KINDS = (*LAYER_KINDS, "pooled", "embedding", "text")

IN_LAYERS = ("block", "attn_out", "mlp_in", "mlp_out")  # sites that every layer has or may have

SITES = (*IN_LAYERS, "norm")


@dataclass(frozen=True)
class Tap:
    """One place to read features from.

    ``patch`` and ``cls`` are the patch tokens [B, P, d] and the class token [B, d] after block (or stage)
    ``layer``, from 0; a negative layer counts from the end. ``registers`` [B, R, d] are the other tokens in front of
    the patches (DeiT's distillation token too), ``tokens`` [B, T, d] all of them, patches last. ``pooled`` is the
    model's own pooled output, ``embedding`` the image's and ``text`` the caption's projection into a joint image–text
    space, neither of them scaled to unit norm; these three have no layer.

    ``site`` is ``block``, or within the block the output of its attention (``attn_out``) or MLP (``mlp_out``), before
    they are scaled and added to the residual stream, or the MLP's input after its norm (``mlp_in``). Without a layer it
    is ``norm``, the tokens after the model's final norm, or the path of any module, whose output is read; where that is
    one row an image, as ``pooled``. BackboneError for an unknown kind, and for a layer that is missing or too many.
    """

    kind: str
    layer: int | None = None
    site: str = "block"

    def __post_init__(self) -> None:
        one_of(self.kind, KINDS, "kind of tap", BackboneError)
        layered = self.kind in LAYER_KINDS and self.site in IN_LAYERS
        if not layered and self.layer is not None:
            where = "" if self.site == "block" else f" at {self.site}"
            raise BackboneError(
                f"A {self.kind} tap{where} has no layer, but layer {self.layer} was given; leave it out."
            )
        if layered and type(self.layer) is not int:
            raise BackboneError(f"A {self.kind} tap needs a layer, a whole number from 0; it got {self.layer!r}.")
        named = self.site in SITES and self.site != "block"
        if self.kind not in LAYER_KINDS and (named or (self.kind != "pooled" and self.site != "block")):
            raise BackboneError(
                f"A {self.kind} tap has no site {self.site}: choose features={', '.join(LAYER_KINDS)}, or site=block."
            )

    def __str__(self) -> str:
        layer = [] if self.layer is None else [f"L{self.layer}"]
        return "-".join([self.kind, *layer, *([] if self.site == "block" else [self.site])])


class LayerTokens(NamedTuple):
    """What one place gives: ``patch`` [B, rows · columns, d] in reading order, and the tokens in front of the patches,
    ``prefix`` [B, n, d], of which the first ``classes`` (0 or 1) are class tokens.
    """

    patch: Tensor
    prefix: Tensor
    classes: int
    grid: tuple[int, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features that are there; without a prefix all tokens are patches."""
        n = self.prefix.shape[1]
        there = {"patch": True, "cls": self.classes > 0, "registers": n > self.classes, "tokens": n > 0}
        return tuple(kind for kind, is_there in there.items() if is_there)

    def pick(self, kind: str) -> Tensor:
        """The features of one of ``kinds``."""
        if kind in ("patch", "tokens"):
            return self.patch if kind == "patch" else torch.cat([self.prefix, self.patch], 1)
        return self.prefix[:, 0] if kind == "cls" else self.prefix[:, self.classes :]


# --- how tokens lie -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """How a module's output holds tokens of ``d_in`` dimensions: ``prefix`` of them, or all but the last ``patches``,
    before the patches; if neither is known, those that are left beside the largest square. Where ``d_in`` is None, the
    channels of a square map are the size that is unlike the other two.
    """

    d_in: int | None = None
    prefix: int | None = None
    patches: int | None = None

    def split(self, output: Tensor, tokens: str = "patch") -> tuple[int, Tensor]:
        """How many tokens stand before the chosen ones, and these, [B, P, d_in]."""
        view = self.rows(output)
        count = view.shape[1]
        patches = isqrt(count) ** 2 if self.patches is None else self.patches
        before = 0 if output.ndim != 3 else count - patches if self.prefix is None else self.prefix
        if tokens == "cls" and output.ndim != 2 and not before:
            raise BackboneError("There is no class token at this place; choose tokens='patch'.")
        first, last = {"patch": (before, None), "cls": (0, 1), "all": (0, None)}[tokens]
        return first, view[:, first:last]

    def join(self, output: Tensor, first: int, chosen: Tensor, tokens: str = "patch") -> Tensor:
        """``output`` with ``chosen`` [B, P, d_in] in the place of the tokens that ``split`` gave."""
        view = self.rows(output).clone()
        view[:, first : first + chosen.shape[1]] = chosen
        if output.ndim == 2:
            return view[:, 0]
        if output.ndim == 3:
            return view
        if self._channels_first(output):
            return view.transpose(1, 2).reshape(output.shape)
        return view.reshape(output.shape)

    def rows(self, output: Tensor) -> Tensor:
        """The output as [B, T, d_in]."""
        shape = tuple(output.shape)
        if output.ndim == 4 and self._channels_first(output):
            return output.flatten(2).transpose(1, 2)
        if output.ndim not in (2, 3, 4) or self.d_in not in (None, shape[-1]):
            wanted = "A tap reads tokens" if self.d_in is None else f"The SAE takes {self.d_in} dimensions"
            raise BackboneError(
                f"{wanted}, but the model gives {list(shape)} at this place: neither tokens [B, T, d] nor a map of "
                "them. Is it another encoder's or layer's place?"
            )
        return output[:, None] if output.ndim == 2 else output.flatten(1, 2) if output.ndim == 4 else output

    def grid(self, output: Tensor) -> tuple[int, int]:
        """Rows and columns of a map [B, d, H, W] or [B, H, W, d]."""
        rows, columns = output.shape[2:] if self._channels_first(output) else output.shape[1:3]
        return rows, columns

    def _channels_first(self, output: Tensor) -> bool:
        _, first, middle, last = output.shape
        at_start, at_end = (
            (middle == last, first == middle) if self.d_in is None else (first == self.d_in, last == self.d_in)
        )
        if at_start == at_end and (at_start or self.d_in is None):
            raise BackboneError(
                f"The output {list(output.shape)} may have its channels in two places; which holds them is not known. "
                "Choose another place."
            )
        return at_start


def laid_out(output: Tensor, grid: tuple[int, int], prefix: int, classes: int) -> LayerTokens | None:
    """What a place gives of images whose layer there has ``prefix`` tokens, then patches of ``grid``; None of [B, d].

    Tokens are all of these, the patches alone, or those of another square grid; BackboneError for others.
    """
    if output.ndim == 2:
        return None
    view, patches = Layout().rows(output), grid[0] * grid[1]
    count, before = view.shape[1], 0
    side = isqrt(count)
    if output.ndim == 4:
        grid = Layout().grid(output)
    elif count == patches + prefix:
        before = prefix
    elif count == side * side:
        grid = (side, side)
    elif count != patches:
        raise BackboneError(
            f"This place gives {list(output.shape)}: {count} tokens, neither {patches} patches with {prefix} before "
            "them nor a square of others. Choose another place."
        )
    return LayerTokens(view[:, before:], view[:, :before], min(classes, before), grid)


# --- where they are -----------------------------------------------------------------------------------------
class Place(NamedTuple):
    """A module of which the output is meant, or ``before`` it, its input."""

    module: nn.Module
    before: bool = False


CHILDREN = {"attn_out": ("attn", "attention", "self_attn"), "mlp_in": ("mlp",), "mlp_out": ("mlp",)}

NORMS = ("norm", "layernorm", "post_layernorm")


def find(model: nn.Module, block: nn.Module | None, site: str) -> Place | None:
    """The place of ``site`` in ``model``, of whose blocks ``block`` is meant; None where there is none."""
    if site in IN_LAYERS and block is None:
        return None
    if site == "block":
        return Place(block)  # type: ignore[arg-type]
    within, names = (block, CHILDREN[site]) if site in CHILDREN else (model, NORMS if site == "norm" else (site,))
    assert within is not None
    modules = dict(within.named_modules())
    found = next((modules[name] for name in names if name in modules), None)
    if found is None or (site == "norm" and isinstance(found, nn.Identity)):
        return None
    return Place(found, before=site == "mlp_in")


def hook(place: Place, take: Callable[[Any], Any], prepend: bool = False) -> RemovableHandle:
    """``take`` is called with what passes ``place``; what it returns goes on instead, unless that is None."""
    if place.before:
        return place.module.register_forward_pre_hook(lambda _, args: take(args), prepend=prepend)
    return place.module.register_forward_hook(lambda _, __, output: take(output), prepend=prepend)


@contextmanager
def recorded(places: Mapping[Any, Place]) -> Iterator[dict[Any, Tensor]]:
    """What passes the ``places`` inside, by key; no hook stays behind."""
    found: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for key, place in places.items():

            def keep(output: Any, key: Any = key) -> None:
                found[key] = tensor_of(output)

            stack.callback(hook(place, keep).remove)
        yield found


def tensor_of(output: Any) -> Tensor:
    """The tokens in what a module takes or gives; BackboneError where it holds no tensor."""
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    found = getattr(found, "last_hidden_state", found)
    if not isinstance(found, Tensor):
        raise BackboneError(f"A place needs a module that gives a tensor; this one gives {type(found).__name__}.")
    return found
