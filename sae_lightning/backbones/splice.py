"""An SAE put back inside the encoder whose features it was trained on: what the rest of the network makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_lightning.backbones.backbone import Backbone, BackboneError
from sae_lightning.registry import one_of
from sae_lightning.saes.edits import values_of, written
from sae_lightning.saes.sae import SAE

MODES = ("replace", "add_error", "ablate", "steer", "top_k")

BY = ("mean", "resample", "zero")

TOKENS = ("patch", "cls", "all")

DIRECTIONS = 64  # principal directions whose variance is measured each; the rest share one

FAR = 0.99  # natural tokens' quantile of the distance beyond which a token counts as unnatural


class Natural:
    """What features and codes are like on natural pictures: what an ablated latent takes, and what is far off.

    ``features`` [n, P, d_in] are raw ones of whole pictures (P = 1 for class tokens and pooled features), some
    thousand tokens of a store. The distance of a token from their distribution is Mahalanobis's, in the ``DIRECTIONS``
    principal directions with each its variance and in the others with their mean variance, so that features that leave
    the data's subspace are far too; it is divided by d_in, so that natural tokens have a mean of about 1.
    """

    def __init__(self, sae: SAE, features: Tensor) -> None:
        if features.ndim != 3 or features.shape[-1] != sae.d_in or features.shape[0] < 2:
            raise BackboneError(
                f"Natural features are [pictures, tokens, {sae.d_in}] of at least two pictures; got "
                f"{tuple(features.shape)}."
            )
        rows = features.reshape(-1, sae.d_in).float()
        with torch.no_grad():
            self.codes = sae.encode(rows)
        self.tokens = features.shape[1]
        sums = torch.zeros(sae.d_sae, dtype=torch.float64, device=rows.device)
        sums.index_add_(0, self.codes.latents, self.codes.values.detach().double())
        self.mean_codes = (sums / len(rows)).float()
        x = rows.double()
        self.mean = x.mean(0)
        variances, directions = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        top = min(DIRECTIONS, sae.d_in, max(1, len(x) // 4))
        self.directions, self.variances = directions[:, -top:], variances[-top:].clamp_min(1e-12)
        self.rest = float(variances[:-top].mean().clamp_min(1e-12)) if top < sae.d_in else 1.0
        self.far = float(torch.quantile(self.distance(rows[: 1 << 20]), FAR))

    def distance(self, x: Tensor) -> Tensor:
        """Squared distances [N] float64 of tokens ``x`` [..., d_in], over d_in."""
        off = x.reshape(-1, x.shape[-1]).to(self.mean) - self.mean
        along = off @ self.directions
        beside = off.square().sum(1) - along.square().sum(1)
        return ((along.square() / self.variances).sum(1) + beside.clamp_min(0) / self.rest) / x.shape[-1]

    def elsewhere(self, latents: Sequence[int], pictures: int, tokens: int, generator: torch.Generator) -> Tensor:
        """Values [pictures, tokens, n] of ``latents`` on other pictures, drawn at random, at the same places."""
        values = values_of(self.codes, latents).unflatten(0, (-1, self.tokens))
        drawn = torch.randint(len(values), (pictures,), generator=generator)
        if tokens == self.tokens:
            return values[drawn]
        places = torch.randint(self.tokens, (pictures, tokens), generator=generator)
        return values[drawn[:, None], places]


@dataclass
class Report:
    """How honest a splice was: over ``n`` tokens, ``fvu`` of the SAE's reconstruction, the mean ``distance`` of what
    was put in place of the features from natural ones (about 1 for those), and the share ``unnatural`` of tokens
    beyond the natural 99 % quantile (0.01 for natural ones). The last two are NaN without a ``Natural``.
    """

    n: int
    fvu: float
    distance: float
    unnatural: float

    def check(self, unnatural: float = 0.5, fvu: float = 0.5) -> Report:
        """Itself; BackboneError where effects would be the splice's own: too much is lost, or too unlike features."""
        if self.fvu > fvu:
            raise BackboneError(
                f"The SAE leaves {self.fvu:.0%} of the features' variance unexplained (the limit is {fvu:.0%}); what "
                "changes behind it says nothing of its latents. Is it this encoder's, at this layer?"
            )
        if self.unnatural > unnatural:
            raise BackboneError(
                f"{self.unnatural:.0%} of the spliced tokens are unlike any natural ones (the limit is "
                f"{unnatural:.0%}); their effects are no latent's. Change fewer latents, or by less."
            )
        return self


class Tally:
    """Sums of what passes through a splice."""

    def __init__(self, natural: Natural | None) -> None:
        self.natural = natural
        self._n, self._off, self._squares, self._sum = 0, 0.0, 0.0, torch.zeros(())
        self._made, self._distance, self._far = 0, 0.0, 0

    def passed(self, x: Tensor, error: Tensor) -> None:
        """Features ``x`` [n, d_in] came, of which the SAE misses ``error`` [n, d_in]."""
        wide = x.double()
        self._n += len(x)
        self._off += float(error.double().square().sum())
        self._sum = self._sum.to(wide) + wide.sum(0)
        self._squares += float(wide.square().sum())

    def put(self, made: Tensor) -> None:
        """``made`` [..., d_in] was put in place of features."""
        if self.natural is not None:
            distance = self.natural.distance(made)
            self._made += len(distance)
            self._distance += float(distance.sum())
            self._far += int((distance > self.natural.far).sum())

    def report(self) -> Report:
        """Over all tokens so far; BackboneError before the first pass."""
        if not self._n:
            raise BackboneError("Nothing has passed through the splice yet; run the model inside of it first.")
        variance = self._squares - float(self._sum.square().sum()) / self._n
        fvu = self._off / max(variance, 1e-12)
        if not self._made:
            return Report(self._n, fvu, float("nan"), float("nan"))
        return Report(self._n, fvu, self._distance / self._made, self._far / self._made)


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
    by: str = "mean", *, at: int | str | None = None, amount: float | None = None, natural: Natural | None = None,
    tokens: str = "patch", keep_error: bool | None = None, error: Tensor | None = None, prefix: int | None = None,
    seed: int = 0,
) -> Iterator[Splice]:  # fmt: skip
    """Inside, what ``model`` computes at one place is what ``sae`` makes of it; the model is whole again afterwards.

    ``replace``: its reconstruction. ``add_error``: the reconstruction plus what it misses, that is the features
    themselves. ``ablate``: ``latents`` take their ``mean`` over natural tokens, their values on another natural picture
    (``resample``), or ``zero``, which overstates effects [arXiv 2604.14433]. ``steer``: ``amount`` is added to
    ``latents``. ``top_k``: of each token only the ``latents`` (a number) largest stay, or only those listed [PatchSAE].

    ``at`` is a layer of a ``Backbone`` (by default its own), or the dotted path of a module of any other model, whose
    output is [B, T, d_in] (``prefix`` class and register tokens first; by default what is left beside the largest
    square), a map [B, d_in, H, W] or [B, H, W, d_in], or [B, d_in]. ``tokens``: those that are changed.
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
    module, layout = place(model, at, sae.d_in, prefix)
    device = next(iter(module.parameters()), sae.W_dec).device
    sae = (sae if sae.W_dec.device == device else deepcopy(sae).to(device)).eval()
    keeps = mode in ("add_error", "ablate", "steer") if keep_error is None else keep_error
    splice = Splice(sae, mode, latents, by, amount, natural, keeps, error, seed)

    @torch.no_grad()
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = _tensor(output)
        prefixed, x = layout.split(whole, tokens)
        return _like(output, layout.join(whole, prefixed, splice.change(x).to(whole), tokens))

    with hooked(module, hook):
        yield splice


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
def hooked(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """``hook`` on the output of ``module``, gone afterwards in any case; BackboneError for a second one of ours."""
    if getattr(module, "_sae_lightning_spliced", False):
        raise BackboneError(f"There is a splice at this {type(module).__name__} already; end it first.")
    handle = module.register_forward_hook(hook, prepend=True)  # transformers reads tokens by hooks of its own
    module._sae_lightning_spliced = True  # type: ignore[assignment]
    try:
        yield
    finally:
        handle.remove()
        del module._sae_lightning_spliced


# --- where, and how tokens lie there ------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """How a module's output holds tokens of ``d_in`` dimensions: ``prefix`` of them, or all but the last ``patches``,
    before the patches; if neither is known, those that are left beside the largest square.
    """

    d_in: int
    prefix: int | None = None
    patches: int | None = None

    def split(self, output: Tensor, tokens: str = "patch") -> tuple[int, Tensor]:
        """How many tokens stand before the chosen ones, and these, [B, P, d_in]."""
        view = self._rows(output)
        count = view.shape[1]
        patches = int(count**0.5) ** 2 if self.patches is None else self.patches
        before = 0 if output.ndim != 3 else count - patches if self.prefix is None else self.prefix
        if tokens == "cls" and output.ndim != 2 and not before:
            raise BackboneError("There is no class token at this place; choose tokens='patch'.")
        first, last = {"patch": (before, None), "cls": (0, 1), "all": (0, None)}[tokens]
        return first, view[:, first:last]

    def join(self, output: Tensor, first: int, chosen: Tensor, tokens: str = "patch") -> Tensor:
        """``output`` with ``chosen`` [B, P, d_in] in the place of the tokens that ``split`` gave."""
        view = self._rows(output).clone()
        view[:, first : first + chosen.shape[1]] = chosen
        if output.ndim == 2:
            return view[:, 0]
        if output.ndim == 3:
            return view
        if self._channels_first(output):
            return view.transpose(1, 2).reshape(output.shape)
        return view.reshape(output.shape)

    def _channels_first(self, output: Tensor) -> bool:
        if output.shape[1] == self.d_in == output.shape[-1]:
            raise BackboneError(
                f"The output {tuple(output.shape)} has {self.d_in} channels in two places; which holds them is not "
                "known. Choose another place."
            )
        return output.shape[1] == self.d_in

    def _rows(self, output: Tensor) -> Tensor:
        """The output as [B, T, d_in]."""
        shape = tuple(output.shape)
        if output.ndim == 4 and self._channels_first(output):
            return output.flatten(2).transpose(1, 2)
        if output.ndim not in (2, 3, 4) or shape[-1] != self.d_in:
            raise BackboneError(
                f"The SAE takes {self.d_in} dimensions, but the model gives {list(shape)} at this place: neither "
                "tokens [B, T, d_in] nor a map of them. Is it the SAE of another encoder or layer?"
            )
        return output[:, None] if output.ndim == 2 else output.flatten(1, 2) if output.ndim == 4 else output


def place(model: Backbone | nn.Module, at: int | str | None, d_in: int, prefix: int | None) -> tuple[nn.Module, Layout]:
    """The module ``at`` which an SAE of width ``d_in`` is put, and the layout of its output."""
    if isinstance(model, Backbone):
        if isinstance(at, str):
            return _submodule(model.model, at), Layout(d_in, prefix)
        layer = model.check_layer(model.layer if at is None else at)
        if model.width_at(layer) != d_in:
            raise BackboneError(
                f"The SAE takes {d_in} dimensions, but layer {layer} of {model.title} gives {model.width_at(layer)}; "
                "name the SAE's own layer (at=…) and encoder."
            )
        rows, columns = model.grid_at(layer)
        return model.module_at(layer), Layout(d_in, prefix, rows * columns)
    if not isinstance(at, str):
        raise BackboneError(f"Name the place in {type(model).__name__} as at='path.of.module', for example blocks.10.")
    return _submodule(model, at), Layout(d_in, getattr(model, "num_prefix_tokens", None) if prefix is None else prefix)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in model.named_children())
        raise BackboneError(f"{type(model).__name__} has no module '{path}'; it starts with {names}.") from error


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
    if not isinstance(found, Tensor):
        raise BackboneError(f"A splice needs a module that gives a tensor; this one gives {type(found).__name__}.")
    return found


def _like(output: Any, made: Tensor) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)([made, *output[1:]])
    if isinstance(output, Tensor):
        return made
    output.last_hidden_state = made
    return output


# --- what single latents do -----------------------------------------------------------------------------
@torch.no_grad()
def effects(
    run: Callable[[Tensor], Tensor], model: Backbone | nn.Module, sae: SAE, images: Tensor,
    pairs: Sequence[tuple[int, int]], by: str = "mean", *, at: int | str | None = None,
    natural: Natural | None = None, tokens: str = "patch", prefix: int | None = None, seed: int = 0,
) -> tuple[Tensor, Tensor, Report]:  # fmt: skip
    """What ablating one latent at a time does: ``run(images)`` [B, …], the same [n, …] for ``pairs``, and the report.

    Each pair is (image of the batch, latent): one forward pass computes the model up to the SAE's place for the B
    images and from there on for all n pairs, with the error term of the clean run. ``run`` calls the model, which must
    hand on what this place gives (no skip connection around it); BackboneError where it does not.
    """
    one_of(by, BY, "by", BackboneError)
    latents = sorted({latent for _, latent in pairs})
    _check(sae, "ablate", latents, by, None, natural)
    module, layout = place(model, at, sae.d_in, prefix)
    clean = run(images)
    rows = torch.tensor([image for image, _ in pairs], device=images.device)
    columns = torch.tensor([latents.index(latent) for _, latent in pairs], device=images.device)
    tally, generator = Tally(natural), torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = _tensor(output)
        first, x = layout.split(whole, tokens)
        flat, (pictures, each) = x.reshape(-1, sae.d_in).float(), x.shape[:2]
        codes = sae.encode(flat)
        old = values_of(codes, latents)
        new = ablated(old, latents, by, natural, pictures, each, generator)
        change = (new - old).unflatten(0, (pictures, each))[rows, :, columns]  # [n, P]
        added = change[..., None] * sae.W_dec[torch.tensor(latents, device=rows.device)[columns]][:, None]
        if codes.frame is not None:
            added = added * codes.frame[1].unflatten(0, (pictures, each))[rows]
        made = x[rows].float() + added * sae.normalizer.std
        tally.passed(flat, flat - sae.decode(codes))
        tally.put(made)
        return _like(output, layout.join(whole[rows], first, made.to(whole), tokens))

    with hooked(module, hook):
        changed = run(images)
    if len(changed) != len(pairs):
        raise BackboneError(
            f"The model gives {len(changed)} rows for {len(pairs)} changed ones: something goes around the SAE's place."
        )
    return clean, changed, tally.report()
