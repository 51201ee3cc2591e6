"""Changing latents between encoding and decoding: single edits, and what they write into the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_lightning.registry import one_of
from sae_lightning.saes.codes import DenseCodes, Frame, SparseCodes
from sae_lightning.saes.sae import SAE

MODES = ("set", "add", "scale", "ablate")


@dataclass(frozen=True)
class Edit:
    """What happens to a latent z on every token: ``set`` z = α, ``add`` z + α, ``scale`` α · z, ``ablate`` z = 0.

    α may be negative, and so may the edited code: it then writes against the latent's direction [MS score, steering].
    A tensor [B] gives each picture of a batch its own. ValueError for an unknown mode.
    """

    latent: int
    mode: str = "set"
    alpha: float | Tensor = 0.0

    def __post_init__(self) -> None:
        one_of(self.mode, MODES, "mode")

    def apply(self, z: Tensor) -> Tensor:
        """The edited values of codes ``z`` [N], N / B tokens of each picture one after another."""
        alpha = torch.as_tensor(self.alpha, dtype=z.dtype, device=z.device).reshape(-1, 1)
        if len(z) % len(alpha):
            raise ValueError(f"{len(z)} tokens are not those of {len(alpha)} pictures; give α one value a picture.")
        rows = z.view(len(alpha), -1)
        if self.mode == "scale":
            return (alpha * rows).flatten()
        if self.mode == "add":
            return (rows + alpha).flatten()
        return (alpha if self.mode == "set" else torch.zeros_like(alpha)).expand_as(rows).flatten()


def edited(
    sae: SAE, x: Tensor, edits: Sequence[Edit], keep_error: bool = False, directions: Tensor | None = None
) -> Tensor:
    """Raw features ``x`` [..., d_in] after ``edits`` of their codes, of the same shape and type.

    decode(edited codes), as in the paper; with ``keep_error`` x + decode(edited codes) - decode(codes), which is x
    where there is no edit. Encodes once; the edits' part is added as (new - old) · W_dec on their rows alone.
    ``directions`` [n, d_in] replace the decoder rows of the edited latents (in the order of ``columns_of``) at equal
    norm: what a baseline writes, as strongly as the SAE does.
    """
    columns = columns_of(edits)
    pure = keep_error and all(edit.mode == "add" for edit in edits) and sae.input_norm == "none"
    if pure:  # needs no codes
        old, codes = x.new_zeros(x.shape[:-1].numel(), len(columns), dtype=torch.float32), None
    else:
        codes = sae.encode(x.float())
        old = values_of(codes, columns)
    frame = None if codes is None else codes.frame
    change = written(sae, edited_values(old, columns, edits) - old, columns, frame, directions).reshape(x.shape)
    if keep_error:
        return x + change.to(x.dtype)
    assert codes is not None
    return (sae.decode(codes).reshape(x.shape) + change).to(x.dtype)


def written(
    sae: SAE, change: Tensor, columns: Sequence[int], frame: Frame | None = None, directions: Tensor | None = None
) -> Tensor:
    """What a ``change`` [N, n] of the codes of the latents ``columns`` adds to raw features, [N, d_in].

    ``frame`` is that of the codes (an ``input_norm``'s); ``directions`` as in ``edited``.
    """
    rows = sae.W_dec[list(columns)]
    if directions is not None:
        rows = nn.functional.normalize(directions.to(rows), dim=1) * rows.norm(dim=1, keepdim=True)
    added = change @ rows
    return (added if frame is None else added * frame[1]) * sae.normalizer.std


def columns_of(edits: Sequence[Edit]) -> list[int]:
    """The latents that ``edits`` name, each once, in their order."""
    return list(dict.fromkeys(edit.latent for edit in edits))


def edited_values(old: Tensor, columns: Sequence[int], edits: Sequence[Edit]) -> Tensor:
    """Codes ``old`` [N, n] of the latents ``columns`` after all ``edits``, one after another."""
    new = old.clone()
    for edit in edits:
        at = columns.index(edit.latent)
        new[:, at] = edit.apply(new[:, at])
    return new


def values_of(codes: SparseCodes, columns: Sequence[int]) -> Tensor:
    """The values [N, n] of the latents ``columns``, float32, without a matrix of all latents."""
    wanted = torch.as_tensor(list(columns), dtype=torch.long, device=codes.values.device)
    if isinstance(codes, DenseCodes):
        return codes.dense[:, wanted].float()
    place = torch.full((codes.d_sae,), -1, device=wanted.device)
    place[wanted] = torch.arange(len(wanted), device=wanted.device)
    column = place[codes.latents]
    here = column >= 0
    found = torch.zeros(codes.n_samples, len(wanted), device=wanted.device)
    found[codes.rows()[here], column[here]] = codes.values[here].float()
    return found
