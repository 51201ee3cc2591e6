"""An SAE put back inside the encoder whose features it was trained on: what the rest of the network makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.natural import Natural, Report, Tally
from sae_lightning.backbones.taps import CHILDREN, IN_LAYERS, BackboneError, Layout, Place, Tap, find, hook, tensor_of
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.edits import values_of, written
from sae_lightning.saes.sae import SAE

T = TypeVar("T")

MODES = ("replace", "add_error", "ablate", "steer", "top_k")

BY = ("mean", "resample", "zero")

TOKENS = ("patch", "cls", "all")


class Splice:
    """One SAE at one place of a model, while ``spliced`` holds; ``report`` says how far from natural it went.

    ``error`` is what the SAE does not explain in the last pass [B, P, d_in], for passes that shall keep it.
    """

    def __init__(
        self, sae: SAE, mode: str, latents: Sequence[int] | int | None, by: str, amount: float | None,
        natural: Natural | None, keep_error: bool, error: Tensor | None, seed: int,
    ) -> None:  # fmt: skip
        self.sae, self.mode, self.by, self.amount, self.natural = sae, mode, by, amount, natural
        self.k = latents if isinstance(latents, int) else None
        self.latents = [] if latents is None or isinstance(latents, int) else [int(latent) for latent in latents]
        self.keep_error, self.clean_error = keep_error, error
        self.error: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.tally = Tally(natural)

    def change(self, x: Tensor) -> Tensor:
        """What stands in place of raw features ``x`` [B, P, d_in], float32."""
        sae, rows = self.sae, x.reshape(-1, x.shape[-1]).float()
        codes = sae.encode(rows)
        reconstruction = sae.decode(codes)
        error = rows - reconstruction
        self.error = error.reshape(x.shape)
        kept = error if self.clean_error is None else self.clean_error.reshape(error.shape)
        if self.mode == "top_k":
            if self.k is not None:
                codes = codes.top(self.k)
            else:
                stays = torch.zeros(sae.d_sae, dtype=torch.bool, device=rows.device)
                stays[self.latents] = True
                codes = codes.where(stays[codes.latents])
            reconstruction = sae.decode(codes)
        elif self.latents:
            old = values_of(codes, self.latents)
            new = self._new(old, *x.shape[:2])
            reconstruction = reconstruction + written(sae, new - old, self.latents, codes.frame)
        made = reconstruction + kept if self.keep_error else reconstruction
        self.tally.passed(rows, error)
        self.tally.put(made)
        return made.reshape(x.shape)

    def _new(self, old: Tensor, pictures: int, tokens: int) -> Tensor:
        if self.mode == "steer":
            assert self.amount is not None  # or spliced would have refused
            return old + self.amount
        return ablated(old, self.latents, self.by, self.natural, pictures, tokens, self.generator)

    def report(self) -> Report:
        """Over all tokens so far; BackboneError before the first pass."""
        return self.tally.report()


def ablated(
    old: Tensor, latents: Sequence[int], by: str, natural: Natural | None, pictures: int, tokens: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """What the values ``old`` [pictures · tokens, n] of ``latents`` become when they are ablated ``by`` one of BY."""
    if by == "zero":
        return torch.zeros_like(old)
    assert natural is not None
    if by == "mean":
        return natural.mean_codes.to(old)[list(latents)].expand_as(old)
    return natural.elsewhere(latents, pictures, tokens, generator).to(old).reshape(old.shape)


@contextmanager
def spliced(
    model: Backbone | nn.Module, sae: SAE, mode: str = "replace", latents: Sequence[int] | int | None = None,
    by: str = "mean", *, at: Tap | int | str | None = None, amount: float | None = None, natural: Natural | None = None,
    tokens: str = "patch", keep_error: bool | None = None, error: Tensor | None = None, prefix: int | None = None,
    seed: int = 0,
) -> Iterator[Splice]:  # fmt: skip
    """Inside, what ``model`` computes at one place is what ``sae`` makes of it; the model is whole again afterwards.

    ``replace``: its reconstruction. ``add_error``: the reconstruction plus what it misses, that is the features
    themselves. ``ablate``: ``latents`` take their ``mean`` over natural tokens, their values on another natural picture
    (``resample``), or ``zero``, which overstates effects [arXiv 2604.14433]. ``steer``: ``amount`` is added to
    ``latents``. ``top_k``: of each token only the ``latents`` (a number) largest stay, or only those listed [PatchSAE].

    ``at`` is a tap, a layer (by default its own), a site or a path of a ``Backbone``, or the path of a module of any
    other model, whose output is [B, T, d_in] (``prefix`` class and register tokens first; by default what is left
    beside the largest square), a map [B, d_in, H, W] or [B, H, W, d_in], or [B, d_in]. ``tokens``: those that are
    changed.
    ``keep_error`` adds what the SAE misses to the result (by default where latents are changed): of the same pass, or
    ``error``, a clean run's ``Splice.error``, where something before this place is changed too. ``natural`` is needed
    to ablate by mean or resample, and for distances in the ``report``.

    BackboneError for what does not fit: an unknown mode or place, another width, latents that the SAE lacks, a second
    splice at one place.
    """
    one_of(mode, MODES, "mode", BackboneError)
    one_of(by, BY, "by", BackboneError)
    one_of(tokens, TOKENS, "tokens", BackboneError)
    _check(sae, mode, latents, by, amount, natural)
    there, layout = place(model, at, sae.d_in, prefix)
    device = next(model.parameters(), sae.W_dec).device
    sae = beside(sae, device)
    keeps = mode in ("add_error", "ablate", "steer") if keep_error is None else keep_error
    splice = Splice(sae, mode, latents, by, amount, natural, keeps, error, seed)

    @torch.no_grad()
    def change(output: Any) -> Any:
        whole = tensor_of(output)
        prefixed, x = layout.split(whole, tokens)
        return _like(output, layout.join(whole, prefixed, splice.change(x).to(whole), tokens))

    with hooked(there, change):
        yield splice


def beside(sae: SAE, device: torch.device | str) -> SAE:
    """``sae`` as it evaluates on ``device``; a copy where it is elsewhere."""
    return (sae if sae.W_dec.device == torch.device(device) else deepcopy(sae).to(device)).eval()


def _check(
    sae: SAE, mode: str, latents: Sequence[int] | int | None, by: str, amount: float | None, natural: Natural | None
) -> None:
    if mode in ("ablate", "steer", "top_k") and (
        latents is None or (not isinstance(latents, int) and not len(latents))
    ):
        raise BackboneError(f"mode={mode} needs latents; name at least one.")
    if isinstance(latents, int) and (mode != "top_k" or latents < 1):
        raise BackboneError(
            f"latents={latents} is a number of latents, which mode=top_k alone takes, from 1; list them."
        )
    if not isinstance(latents, int) and latents is not None:
        missing = [int(latent) for latent in latents if not 0 <= latent < sae.d_sae]
        if missing:
            raise BackboneError(f"The SAE has latents 0 to {sae.d_sae - 1}; latent {missing[0]} was named.")
    if mode == "steer" and amount is None:
        raise BackboneError("mode=steer needs an amount, which is added to the latents' values.")
    if mode == "ablate" and by != "zero" and natural is None:
        raise BackboneError(
            f"by={by} takes values of natural features; give natural=Natural(sae, features), or say by='zero'."
        )


@contextmanager
def hooked(place: Place, take: Callable[[Any], Any]) -> Iterator[None]:
    """``take`` at ``place``, gone afterwards in any case; BackboneError for a second one of ours."""
    module = place.module
    if getattr(module, "_sae_lightning_spliced", False):
        raise BackboneError(f"There is a splice at this {type(module).__name__} already; end it first.")
    handle = hook(place, take, prepend=True)  # transformers reads tokens by hooks of its own
    module._sae_lightning_spliced = True  # type: ignore[assignment]
    try:
        yield
    finally:
        handle.remove()
        del module._sae_lightning_spliced


# --- where ----------------------------------------------------------------------------------------------------
def place(
    model: Backbone | nn.Module, at: Tap | int | str | None, d_in: int, prefix: int | None
) -> tuple[Place, Layout]:
    """The place ``at`` which an SAE of width ``d_in`` is put, and the layout of what passes there."""
    if not isinstance(model, Backbone):
        if not isinstance(at, str):
            raise BackboneError(f"Name the place in {type(model).__name__} as at='path.of.module', such as blocks.10.")
        found = find(model, None, at)
        if found is None:
            names = ", ".join(name for name, _ in model.named_children())
            raise BackboneError(f"{type(model).__name__} has no module '{at}'; it starts with {names}.")
        return found, Layout(d_in, getattr(model, "num_prefix_tokens", None) if prefix is None else prefix)
    if not isinstance(at, Tap):
        site = at if isinstance(at, str) else "block"
        layer = at if isinstance(at, int) else model.layer if site in IN_LAYERS else None
        at = Tap("patch", layer, site)
    shape = model.shape_at(at)
    if shape.width != d_in:
        where = f"layer {at.layer}" if at.site == "block" else str(at).removeprefix("patch-")
        raise BackboneError(
            f"The SAE takes {d_in} dimensions, but {where} of {model.title} gives {shape.width}; name the SAE's own "
            "place (at=…) and encoder."
        )
    return model.place_of(at), Layout(d_in, prefix, shape.grid[0] * shape.grid[1])


def _like(output: Any, made: Tensor) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)([made, *output[1:]])
    if isinstance(output, Tensor):
        return made
    output.last_hidden_state = made
    return output


# --- what single latents do -----------------------------------------------------------------------------
@torch.no_grad()
def fanned(
    run: Callable[[Tensor], T], model: Backbone | nn.Module, images: Tensor,
    change: Callable[[Tensor], tuple[Tensor, Tensor]], d_in: int, *, at: Tap | int | str | None = None,
    tokens: str = "patch", prefix: int | None = None,
) -> T:  # fmt: skip
    """``run(images)`` in one pass, in which changed pictures go on behind the B images from one place of the model.

    ``change`` takes the features x [B, P, d_in] there and gives which of the images each of the n changed pictures is,
    [n] int64, and its features [n, P, d_in]. ``run`` calls the model, of which all rows, B + n, must be what this
    place hands on (no skip connection around it).
    """
    if getattr(at, "site", at) in CHILDREN:
        raise BackboneError(f"The residual stream goes around {at}; name a whole layer, or use spliced.")
    there, layout = place(model, at, d_in, prefix)

    def widened(output: Any) -> Any:
        whole = tensor_of(output)
        first, x = layout.split(whole, tokens)
        rows, made = change(x)
        return _like(output, torch.cat([whole, layout.join(whole[rows], first, made.to(whole), tokens)]))

    with hooked(there, widened):
        return run(images)


def masked(
    sae: SAE, x: Tensor, codes: SparseCodes, pairs: Sequence[tuple[int, Sequence[int]]], by: str,
    natural: Natural | None, generator: torch.Generator, keep: bool = False,
) -> Tensor:  # fmt: skip
    """Features [n, P, d_in] of ``pairs`` (picture of ``x`` [B, P, d_in], its latents) with these ablated ``by``.

    What the SAE misses stays the clean picture's. With ``keep`` all other latents are ablated instead (``resample``
    takes their means, too) and what the SAE misses is left out, as it would still hold what they say.
    """
    latents = sorted({latent for _, some in pairs for latent in some})
    old, by = values_of(codes, latents), "mean" if keep and by == "resample" else by
    change = (ablated(old, latents, by, natural, x.shape[0], x.shape[1], generator) - old).unflatten(0, x.shape[:2])
    scale = torch.ones_like(x[..., :1], dtype=torch.float32) * sae.normalizer.std
    base = x.float()
    if keep:
        change, base = -change, background(sae, codes, by, natural).reshape(x.shape)
    if codes.frame is not None:
        scale = scale * codes.frame[1].reshape(scale.shape)
    rows = {latent: row for row, latent in enumerate(latents)}
    made = []
    for picture, some in pairs:
        columns = torch.tensor([rows[latent] for latent in some], device=x.device)
        written = change[picture][:, columns] @ sae.W_dec[torch.tensor(some, device=x.device)]
        made.append(base[picture] + written * scale[picture])
    return torch.stack(made)


def background(sae: SAE, codes: SparseCodes, by: str, natural: Natural | None) -> Tensor:
    """What the SAE decodes [N, d_in], in the frames of ``codes``, where all latents are zero or take their means."""
    x = sae.b_pre.expand(codes.n_samples, -1)
    if by != "zero":
        assert natural is not None
        x = x + natural.mean_codes @ sae.W_dec
    return sae.normalizer.denormalize(x if codes.frame is None else x * codes.frame[1] + codes.frame[0])


@torch.no_grad()
def effects(
    run: Callable[[Tensor], Tensor], model: Backbone | nn.Module, sae: SAE, images: Tensor,
    pairs: Sequence[tuple[int, int]], by: str = "mean", *, at: Tap | int | str | None = None,
    natural: Natural | None = None, tokens: str = "patch", prefix: int | None = None, seed: int = 0,
) -> tuple[Tensor, Tensor, Report]:  # fmt: skip
    """What ablating one latent at a time does: ``run(images)`` [B, …], the same [n, …] for ``pairs``, and the report.

    Each pair is (image of the batch, latent): one forward pass computes the model up to the SAE's place for the B
    images and from there on for all n pairs, with the error term of the clean run. ``run`` calls the model, which must
    hand on what this place gives (no skip connection around it); BackboneError where it does not.
    """
    one_of(by, BY, "by", BackboneError)
    _check(sae, "ablate", [latent for _, latent in pairs], by, None, natural)
    sae = beside(sae, images.device)
    tally, generator = Tally(natural), torch.Generator().manual_seed(seed)

    def change(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, sae.d_in).float()
        codes = sae.encode(flat)
        made = masked(sae, x, codes, [(image, [latent]) for image, latent in pairs], by, natural, generator)
        tally.passed(flat, flat - sae.decode(codes))
        tally.put(made)
        return torch.tensor([image for image, _ in pairs], device=x.device), made

    both = fanned(run, model, images, change, sae.d_in, at=at, tokens=tokens, prefix=prefix)
    if len(both) != len(images) + len(pairs):
        raise BackboneError(
            f"The model gives {len(both)} rows for {len(images)} pictures and {len(pairs)} changed ones: something "
            "goes around the SAE's place."
        )
    return both[: len(images)], both[len(images) :], tally.report()
