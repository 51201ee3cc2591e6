"""What features are like on natural pictures, and how far from that something else is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lightning.backbones.backbone import BackboneError
from sae_lightning.saes.edits import values_of
from sae_lightning.saes.sae import SAE

DIRECTIONS = 64  # principal directions whose variance is measured each; the rest share one

FLOOR = 1e-3  # of the mean variance, which no direction's is below: what has rank to spare is not all unnatural

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
        least = float(FLOOR * variances.mean().clamp_min(1e-12))
        self.directions, self.variances = directions[:, -top:], variances[-top:].clamp_min(least)
        self.rest = max(least, float(variances[:-top].mean())) if top < sae.d_in else 1.0
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
