"""The one interface of every vision encoder: images or captions in, features of any number of taps out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from sae_lightning.backbones.taps import (
    KINDS,
    LAYER_KINDS,
    SITES,
    BackboneError,
    LayerTokens,
    Place,
    Tap,
    find,
    laid_out,
    recorded,
    tensor_of,
)
from sae_lightning.registry import Registry

backbone_library: Registry[Any] = Registry("backbone.published.library", BackboneError)
"""Classes with ``load(cfg) -> Backbone`` and ``depth(wanted: Published) -> int``, the latter without weights."""


def reason(error: Exception) -> str:
    """The first line of an error's message without its full stop (the second, too, where that ends in a colon), or the
    error's name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


LACKING = {
    "patch": "has no patch tokens",
    "cls": "has no class token",
    "registers": "has no registers",
    "tokens": "has no tokens beside its patches",
    "pooled": "has no pooled output",
    "embedding": "has no projection into an image–text space",
    "text": "has no text tower",
}


class Reading(NamedTuple):
    """What one forward pass gives: the tokens of each wanted layer, and the pooled output [B, d] if there is one."""

    layers: dict[int, LayerTokens]
    pooled: Tensor | None


# (images [B, 3, H, W], layers, whether the pooled output is wanted): one forward pass, as short as that allows
Read = Callable[[Tensor, Collection[int], bool], Reading]


class Shape(NamedTuple):
    """What a place gives: the patches' ``grid``, the tokens' ``width``, how many stand in front of the patches
    (``prefix``) and how many of these are class tokens, and the ``kinds`` of features.
    """

    grid: tuple[int, int]
    width: int
    prefix: int
    classes: int
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, tokens: LayerTokens) -> Shape:
        """That of tokens that were read."""
        return cls(tokens.grid, tokens.patch.shape[-1], tokens.prefix.shape[1], tokens.classes, tokens.kinds)


class Backbone(nn.Module):
    """A frozen encoder.

    ``name`` is what configs call it, ``title`` what tables show. ``depth`` is the number of layers, ``layer``
    the default one (from 0) with its width ``d_in`` and its patch grid ``grid`` (rows, columns). ``transform``
    turns a PIL image into the model's input [3, image_size, image_size] and can be pickled.

    ``read`` runs ``model``, and ``module_at`` names the module that gives a layer; ``project`` takes pooled outputs
    into the image–text space; ``load_text`` makes the text tower, a module from captions to embeddings [B, d], when
    captions first ask for it.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Read,
        *,
        name: str,
        title: str,
        depth: int,
        layer: int,
        image_size: int,
        transform: Callable[[Image.Image], Tensor],
        project: nn.Module | None = None,
        load_text: Callable[[], nn.Module] | None = None,
        module_at: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.project = project.eval().requires_grad_(False) if project is not None else None
        self.text_tower: nn.Module | None = None
        self.name, self.title, self.depth, self.image_size, self.transform = name, title, depth, image_size, transform
        self._read, self._load_text, self._module_at = read, load_text, module_at
        self.layer = self.check_layer(layer)
        self._sites: dict[tuple[int | None, str], Shape] = {}
        self._shapes, self.kinds = self._try_out()
        self.d_in, self.grid = self.width_at(self.layer), self.grid_at(self.layer)

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def grid_at(self, layer: int) -> tuple[int, int]:
        """Rows and columns of the patch tokens of ``layer``."""
        return self._shapes[self.check_layer(layer)].grid

    def width_at(self, layer: int) -> int:
        """Width of the tokens of ``layer``."""
        return self._shapes[self.check_layer(layer)].width

    def shape_at(self, tap: Tap) -> Shape:
        """What stands where ``tap`` of a token or a site is read; BackboneError where there is no such site."""
        layer = None if tap.layer is None else self.check_layer(tap.layer)
        if tap.site == "block":
            return self._shapes[self.layer if layer is None else layer]
        if (layer, tap.site) not in self._sites:
            self._sites[layer, tap.site] = self._try_site(tap)
        return self._sites[layer, tap.site]

    def place_of(self, tap: Tap) -> Place:
        """The module where ``tap`` is read; BackboneError, naming the sites that there are, where there is none."""
        block = None if tap.layer is None else self.module_at(tap.layer)
        found = find(self.model, block, tap.site)
        if found is None:
            block = self.module_at(self.layer if tap.layer is None else tap.layer)
            sites = ", ".join(site for site in SITES if find(self.model, block, site))
            parts = ", ".join(name for name, _ in self.model.named_children())
            raise BackboneError(
                f"{self.title} has no site {tap.site}; it has {sites}, and modules by their path, which starts with "
                f"one of {parts}. Set site."
            )
        return found

    def module_at(self, layer: int) -> nn.Module:
        """The module whose output is ``layer``; BackboneError where the library does not say it."""
        if self._module_at is None:
            raise BackboneError(f"{self.title} does not say which module gives a layer; name it by its path.")
        return self._module_at(self.check_layer(layer))

    def check_layer(self, layer: int) -> int:
        """``layer`` counted from 0; BackboneError unless it exists."""
        if not -self.depth <= layer < self.depth:
            raise BackboneError(
                f"Layer {layer} does not exist in {self.title}: its layers are 0 to {self.depth - 1}, or -1 for the "
                "last. Set backbone.layer."
            )
        return layer % self.depth

    def check(self, tap: Tap) -> Tap:
        """``tap`` with its layer counted from 0; BackboneError if this backbone does not have it."""
        tap = tap if tap.layer is None else replace(tap, layer=self.check_layer(tap.layer))
        there = self.kinds if tap.site == "block" else self.shape_at(tap).kinds
        if tap.kind not in there:
            at = "" if tap.site == "block" else f" at {tap.site}"
            raise BackboneError(f"{self.title} {LACKING[tap.kind]}{at}; it has {', '.join(there)}.")
        return tap

    @torch.no_grad()
    def forward_features(self, images: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """The features of all ``taps`` from one forward pass: taps of several tokens [B, P, d], all others [B, d].

        ``images`` [B, 3, H, W] as ``transform`` makes them. Class and register tokens are no patches. The pass ends
        after the last wanted block unless something behind it is wanted too.
        BackboneError for a tap that this backbone does not have or that needs captions, for no taps at
        all, for images of another size, and where the features are not one row an image.
        """
        found = {tap: self.check(tap) for tap in taps}
        if not found:
            raise BackboneError("No taps were given; name at least one, for example Tap('pooled').")
        if any(tap.kind == "text" for tap in found):
            raise BackboneError("Text features come from captions, not from images; use encode_text.")
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise BackboneError(
                f"{self.title} takes images of {self.image_size} x {self.image_size} pixels; "
                f"it got {images.shape[-2]} x {images.shape[-1]}. Use its transform."
            )
        layers = {tap.layer for tap in found.values() if tap.layer is not None}
        inside = {(t.layer, t.site): self.place_of(t) for t in found.values() if t.site != "block"}
        with recorded(inside) as seen:
            reading = self._read(images, layers, any(tap.layer is None for tap in found.values()))
        return {tap: self._pick(reading, seen, tap_from_0, len(images)) for tap, tap_from_0 in found.items()}

    @torch.no_grad()
    def output(self, images: Tensor) -> Tensor | None:
        """What the whole model says of images, [n, d]: its embedding, else its pooled output; None without either.

        n is the number of images unless hooks inside the model make more of them.
        """
        pooled = self._read(images, (), True).pooled
        if pooled is None or "pooled" not in self.kinds:
            return None
        return pooled if self.project is None else self.project(pooled)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, d] of ``captions`` in the image–text space, not scaled to unit norm.

        The text tower is loaded by the first call, to where the model is. Captions beyond its length are
        cut. BackboneError without a text tower, without captions, and when the tower cannot be loaded.
        """
        self.check(Tap("text"))
        if isinstance(captions, str) or not captions:
            raise BackboneError("encode_text takes a list with at least one caption.")
        if self.text_tower is None:
            assert self._load_text is not None  # or check would have raised
            tower = self._load_text().eval().requires_grad_(False)
            self.text_tower = tower.to(next(self.model.parameters()).device)
        return self._one_each(self.text_tower(list(captions)), Tap("text"), len(captions))

    def describe(self) -> str:
        """What, beside the weights, changes the features: for the fingerprint."""
        return f"{self.title}|{self.image_size}|{self.transform}"

    def fingerprint(self) -> str:
        """Hex digest of the image encoder's weights, architecture and transform."""
        digest = hashlib.sha256(self.describe().encode())
        for part in (self.model, self.project):
            for name, tensor in ({} if part is None else part.state_dict()).items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _pick(self, reading: Reading, seen: Mapping[Any, Tensor], tap: Tap, count: int) -> Tensor:
        features: Tensor | None
        if tap.site != "block":
            output = seen[tap.layer, tap.site]
            tokens = self._laid_out(output, tap)
            features = output if tokens is None else tokens.pick(tap.kind)
        elif tap.layer is not None:
            features = reading.layers[tap.layer].pick(tap.kind)
        elif tap.kind == "embedding" and self.project is not None:
            features = self.project(reading.pooled)
        else:
            features = reading.pooled
        assert features is not None  # or check would have raised
        return self._one_each(features, tap, count)

    def _laid_out(self, output: Tensor, tap: Tap) -> LayerTokens | None:
        """What stands in the ``output`` of a site, by how tokens lie in its layer; None of one row an image."""
        layer = self._shapes[self.layer if tap.layer is None else tap.layer]
        return laid_out(output, layer.grid, layer.prefix, layer.classes)

    def _one_each(self, features: Tensor, tap: Tap, count: int) -> Tensor:
        """``features`` themselves; BackboneError unless they are one row for each of ``count`` inputs."""
        if len(features) != count:
            given = "captions" if tap.kind == "text" else "images"
            raise BackboneError(
                f"{self.title} gives {tuple(features.shape)} for {count} {given} at {tap}, not one row for each; such "
                "an encoder is not supported. Choose another model."
            )
        return features

    @torch.no_grad()
    def _try_out(self) -> tuple[list[Shape], tuple[str, ...]]:
        """The shape of every layer, and the kinds of taps that exist, as one black image shows them."""
        black = torch.zeros(1, 3, self.image_size, self.image_size)
        try:
            reading = self._read(black, range(self.depth), True)
        except BackboneError:
            raise
        except Exception as error:
            raise BackboneError(
                f"{self.title} cannot encode images of {self.image_size} x {self.image_size} pixels: {reason(error)}. "
                "Set backbone.published.image_size, or choose another model: not every one is supported."
            ) from error
        shapes = [Shape.of(reading.layers[layer]) for layer in range(self.depth)]
        has_pooled = reading.pooled is not None and reading.pooled.ndim == 2
        has = {kind: all(kind in shape.kinds for shape in shapes) for kind in LAYER_KINDS} | {
            "pooled": has_pooled,
            "embedding": has_pooled and self.project is not None,
            "text": self._load_text is not None,
        }
        return shapes, tuple(kind for kind in KINDS if has[kind])

    @torch.no_grad()
    def _try_site(self, tap: Tap) -> Shape:
        """The shape of what one black image gives at a site; BackboneError where the model does not come by there."""
        weights = next(self.model.parameters())
        black = torch.zeros(1, 3, self.image_size, self.image_size, device=weights.device, dtype=weights.dtype)
        layers = set() if tap.layer is None else {self.check_layer(tap.layer)}
        with recorded({0: self.place_of(tap)}) as seen:
            self._read(black, layers, tap.layer is None)
        if not seen:
            raise BackboneError(f"{self.title} does not call {tap.site} when it encodes images; choose another site.")
        tokens = self._laid_out(seen[0], tap)
        return Shape((1, 1), seen[0].shape[-1], 0, 0, ("pooled",)) if tokens is None else Shape.of(tokens)


def list_of_blocks(model: nn.Module, depth: int | None) -> list[nn.Module] | None:
    """The first list of ``depth`` modules in ``model``, which are its blocks; None where there is none."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    return next((list(found) for found in lists), None)


class _Enough(Exception):  # noqa: N818 - no error: it leaves a forward pass from which nothing more is wanted
    """Raised inside the last wanted block's hook."""


def block_outputs(
    run: Callable[[], Any], blocks: Sequence[nn.Module], layers: Collection[int], finish: bool
) -> tuple[dict[int, Tensor], Any]:
    """What ``blocks[layer]`` gives for each of ``layers`` during ``run()``, and what ``run()`` returns.

    Without ``finish`` the pass ends after the last wanted block, and None stands for its result. No hook
    stays behind, whatever happens.
    """
    seen: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[layer] = tensor_of(output)
            if not finish and len(seen) == len(layers):
                raise _Enough

        return hook

    handles = []
    try:
        handles += [blocks[layer].register_forward_hook(hook_of(layer)) for layer in layers]
        result = run()
    except _Enough:
        result = None
    finally:
        for handle in handles:
            handle.remove()
    return seen, result
