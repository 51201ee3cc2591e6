"""What every sparse autoencoder shares: weights, encode, decode, the decoder's unit norm, dead-latent counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sae_lightning.kernels import sparse_decode
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.normalizer import Normalizer


@dataclass
class Pass:
    """One training pass over a batch of normalised features ``x`` [N, d_in]."""

    x: Tensor
    pre_acts: Tensor
    codes: SparseCodes
    reconstruction: Tensor


class SAE(nn.Module):
    """Base of all variants: x̂ = codes · W_dec + b_pre, pre_acts = (x - b_pre) · W_enc + b_enc.

    ``W_enc`` [d_in, d_sae] starts as the decoder's transpose, ``W_dec`` [d_sae, d_in] has rows of unit
    norm, ``b_enc`` [d_sae] and ``b_pre`` [d_in] start at zero, b_pre in normalised space, where zero is
    the data's mean. ``encode``, ``decode`` and ``forward`` speak raw features; ``run`` and the losses
    speak normalised ones.

    A variant implements ``activate``; it lists what makes it, beside d_in and d_sae, in ``settings``.
    """

    variant: str
    tokens_since_fired: Tensor

    def __init__(self, d_in: int, d_sae: int, normalizer: Normalizer | None = None, seed: int | None = None) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be at least 1; got d_in={d_in}, d_sae={d_sae}.")
        self.d_in, self.d_sae = d_in, d_sae
        self.normalizer = normalizer or Normalizer(d_in)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        directions = torch.randn(d_sae, d_in, generator=generator)
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_pre = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))

    # --- what a variant defines -------------------------------------------------------------------
    def activate(self, pre_acts: Tensor) -> SparseCodes:
        """Codes from pre-activations [N, d_sae]; may differ between training and evaluation."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """Constructor arguments besides d_in, d_sae and the normaliser, as plain values."""
        return {}

    # --- normalised space -------------------------------------------------------------------------
    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations [N, d_sae] of normalised features [N, d_in]."""
        return torch.addmm(self.b_enc - self.b_pre @ self.W_enc, x, self.W_enc)

    def run(self, x: Tensor) -> Pass:
        """Encode and decode normalised features [N, d_in]."""
        pre_acts = self.pre_acts(x)
        codes = self.activate(pre_acts)
        return Pass(x, pre_acts, codes, self._decode(codes))

    def _decode(self, codes: SparseCodes) -> Tensor:
        return sparse_decode(codes.latents, codes.values, codes.offsets, self.W_dec) + self.b_pre

    # --- raw features -----------------------------------------------------------------------------
    def encode(self, features: Tensor) -> SparseCodes:
        """Codes of raw features [..., d_in]; leading dimensions become samples, N = their product."""
        if features.shape[-1] != self.d_in:
            raise ValueError(
                f"This SAE takes features of {self.d_in} dimensions; it got {features.shape[-1]}. "
                "Is it from another backbone or layer?"
            )
        x = self.normalizer.normalize(features.reshape(-1, self.d_in))
        return self.activate(self.pre_acts(x))

    def decode(self, codes: SparseCodes) -> Tensor:
        """Raw-space reconstruction [N, d_in] of codes."""
        return self.normalizer.denormalize(self._decode(codes))

    def forward(self, features: Tensor) -> Tensor:
        """Reconstruction of raw features, same shape [..., d_in], float32."""
        return self.decode(self.encode(features)).reshape(features.shape)

    # --- the decoder's constraint and dead latents ------------------------------------------------
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the decoder's gradient the part along each row, which the constraint would undo."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)

    @torch.no_grad()
    def count_firing(self, fired: Tensor, tokens: int) -> None:
        """Advance the dead-latent counters by ``tokens`` samples; the latents of ``fired`` [d_sae] bool start anew."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired[fired] = 0

    # --- the artefact -----------------------------------------------------------------------------
    def save(self, folder: str | Path, **record: object) -> None:
        """Write ``sae.safetensors`` and ``cfg.json`` into ``folder``; ``record`` is added to the latter."""
        from sae_lightning.saes.artefact import save

        save(self, Path(folder), record)

    @staticmethod
    def load(folder: str | Path) -> SAE:
        """The SAE in ``folder``, in evaluation mode; ArtefactError says what is missing or does not fit."""
        from sae_lightning.saes.artefact import load

        return load(Path(folder))
