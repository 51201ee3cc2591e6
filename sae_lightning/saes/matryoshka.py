"""Matryoshka SAE: prefixes of the dictionary that each reconstruct by themselves."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_lightning.kernels import nested_decode
from sae_lightning.kernels.products import grouped
from sae_lightning.saes.batchtopk import BatchTopK
from sae_lightning.saes.losses import nested
from sae_lightning.saes.sae import SAE, ForwardOutput, LossTerm
from sae_lightning.saes.topk import TopK

FRACTIONS = (0.0625, 0.1875, 0.4375, 1.0)


def prefix_ends(d_sae: int, fractions: tuple[float, ...]) -> list[int]:
    """The first latent after each prefix; ValueError unless the fractions ascend to 1 and give different prefixes."""
    ends = [round(f * d_sae) for f in fractions]
    if not fractions or fractions[-1] != 1 or ends[0] < 1 or sorted(set(ends)) != ends:
        raise ValueError(
            f"fractions={list(fractions)} must ascend to 1 and give different prefixes of {d_sae} latents, each with "
            "at least one; for example [0.0625, 0.1875, 0.4375, 1]."
        )
    return ends


class _Prefixes(SAE):
    """Adds nested prefix groups to the variant it is mixed with."""

    losses: ClassVar[dict[str, LossTerm]] = {"nested": nested}
    sampled: int
    fractions: tuple[float, ...]
    draws: Tensor

    def __init__(
        self, d_in: int, d_sae: int, k: Any, fractions: Any = FRACTIONS, sampled: int = 0, **options: Any
    ) -> None:
        super().__init__(d_in, d_sae, k=k, **options)  # type: ignore[call-arg]
        if sampled < 0 or sampled > d_sae:
            raise ValueError(f"sampled={sampled} must be the number of prefixes to draw a step, or 0 for fixed ones.")
        self.fractions, self.sampled = tuple(float(f) for f in fractions), int(sampled)
        self.register_buffer("ends", torch.tensor(prefix_ends(d_sae, self.fractions)), persistent=False)
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def settings(self) -> dict[str, object]:
        return super().settings() | {"fractions": list(self.fractions), "sampled": self.sampled}

    def prefixes(self) -> Tensor:
        """The ends of this step's prefixes, [h] int64 ascending to d_sae.

        With ``sampled``, that many lengths are drawn a step, short ones more often (density ~ length^-1.5) and the
        whole dictionary always among them, by a generator seeded with the number of draws so far, which is saved: a
        resumed run draws what it would have.
        """
        if not self.sampled:
            return self.ends  # type: ignore[return-value]
        if self.sampled == 1:
            return self.ends[-1:]  # type: ignore[index, no-any-return]
        generator = torch.Generator().manual_seed(7919 * int(self.draws) + 17)
        lengths = torch.arange(1, self.d_sae, dtype=torch.double).pow_(-1.5)
        drawn = torch.multinomial(lengths, min(self.sampled, self.d_sae) - 1, generator=generator) + 1
        return torch.cat([drawn.unique(), torch.tensor([self.d_sae])]).to(self.W_dec.device)

    def forward_pass(self, x: Tensor) -> ForwardOutput:
        codes = self.code(x)
        ends = self.prefixes()
        if self.training:
            self.draws += 1
        group = torch.bucketize(codes.latents, ends, right=True)
        entries = grouped(codes.latents, codes.values, codes.offsets, group, len(ends))
        levels = nested_decode(*entries, self.W_dec, self.b_pre, len(ends))
        weights = torch.full((len(ends),), 1 / len(ends), device=x.device, dtype=x.dtype)
        return ForwardOutput(x, codes, levels[:, -1], levels, weights)


class Matryoshka(_Prefixes, BatchTopK):
    """BatchTopK over prefixes of the dictionary [Bussmann et al. 2025].

    ``fractions`` of d_sae, ascending to 1, are the prefixes; the loss term ``nested`` is the mean of their
    reconstruction errors. With ``sampled`` = n, n prefixes are drawn anew each step instead.
    """

    variant = "matryoshka"


class MatryoshkaTopK(_Prefixes, TopK):
    """The same over TopK."""

    variant = "matryoshka_topk"
