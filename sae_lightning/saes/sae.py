"""What every sparse autoencoder shares: weights, encode, decode, the decoder's unit norm, dead-latent counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sae_lightning.kernels import products as kernels
from sae_lightning.kernels import selection, sparse_pre_acts
from sae_lightning.registry import Registry, one_of
from sae_lightning.saes.artefact import VARIANTS, Artefact
from sae_lightning.saes.codes import DenseCodes, Frame, SparseCodes


class Normalizer(nn.Module):
    """Subtract a per-dimension mean [d_in] and divide by one scalar deviation (ViSAEBench Table 1).

    Raises ValueError when the mean is not finite or the deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, d_in: int, mean: Tensor | None = None, std: float | Tensor = 1.0) -> None:
        super().__init__()
        mean = torch.zeros(d_in) if mean is None else torch.as_tensor(mean, dtype=torch.float32).clone()
        std = torch.as_tensor(std, dtype=torch.float32).clone()
        if mean.shape != (d_in,) or not bool(mean.isfinite().all()):
            raise ValueError(f"The normaliser needs a finite mean of shape [{d_in}]; it got {tuple(mean.shape)}.")
        if not (float(std) > 0 and bool(std.isfinite())):
            raise ValueError(
                f"The normaliser needs a positive deviation; it got {float(std)}. Are all features the same?"
            )
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalize(self, features: Tensor) -> Tensor:
        """Raw features [..., d_in] of any float type to float32, centred and scaled."""
        return kernels.normalize(features, self.mean, self.std)

    def denormalize(self, features: Tensor) -> Tensor:
        """The inverse, [..., d_in]."""
        return features * self.std + self.mean


INPUT_NORMS = ("none", "layer", "rms", "unit")


def input_norm(kind: str, x: Tensor) -> tuple[Tensor, Frame | None]:
    """``x`` [N, d_in] normed by sample, and the (shift, scale) [N, 1] that undo it; None for "none".

    "layer": zero mean and unit variance over dimensions [Gao et al. 2024, §A.1]. "rms": L2 norm √d_in, which keeps
    deviations near 1. "unit": L2 norm 1 [MonoLoss App. B], where errors a dimension are d_in times smaller.
    """
    if kind == "none":
        return x, None
    shift = x.mean(1, keepdim=True) if kind == "layer" else x.new_zeros(len(x), 1)
    scale = (x - shift).square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    if kind == "unit":
        scale = scale * x.shape[1] ** 0.5
    return (x - shift) / scale, (shift, scale)


DENSE_FROM = 0.10  # share of positive pre-activations from which dense products are faster (docs/decisions.md)

PROBE = 64  # samples that decide it


@dataclass
class ForwardOutput:
    """One pass over a batch ``x`` [N, d_in] of the encoder's inputs.

    ``levels`` [N, h, d_in] are a nested variant's reconstructions, coarse to fine, with ``level_weights``
    [h] that sum to 1; ``extra`` is what a variant's own loss terms need besides.
    """

    x: Tensor
    codes: SparseCodes
    reconstruction: Tensor
    levels: Tensor | None = None
    level_weights: Tensor | None = None
    extra: dict[str, SparseCodes] = field(default_factory=dict)


LossTerm = Callable[..., Tensor]  # (sae, output, **options) -> scalar

TERMS: Registry[LossTerm] = Registry("loss term")  # all of them: those of ``losses.py`` and of single variants


class SAE(Artefact):
    """Base of all variants: x̂ = codes · W_dec + b_pre, pre_acts = (x - b_pre) · W_encᵀ + b_enc.

    Row i of ``W_enc`` [d_sae, d_in] reads latent i, row i of ``W_dec`` [d_sae, d_in] writes it. The decoder's
    rows have unit norm, the encoder starts as their copy times ``encoder_norm`` (and stays equal with ``tied``);
    ``b_enc`` [d_sae] and ``b_pre`` [d_in] start at zero, b_pre in normalised space, where zero is the data's mean.
    ``input_norm`` ("none", "layer", "rms", "unit") norms each sample once more before the encoder and gives the norm
    back after the decoder.

    ``encode``, ``decode`` and ``forward`` speak raw features; ``forward_pass`` and the losses speak the encoder's
    ``inputs``. A variant is a subclass with a name, ``variant``; defining it registers it. It implements ``code``,
    lists in ``settings`` what makes it beside d_in and d_sae, and overrides what else it does in its own way.
    """

    tokens_since_fired: Tensor
    k: float | None = None  # active latents a sample, for variants that choose them so
    k_now: float  # what training uses, where it anneals k
    frozen: ClassVar[tuple[str, ...]] = ()  # parameters that do not learn
    fitted: ClassVar[bool] = False  # by ``fit`` alone; nothing is trained
    restarts: ClassVar[bool] = True  # whether a dead latent may be given new rows
    losses: ClassVar[dict[str, LossTerm]] = {}  # terms that this variant alone has

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "variant" in vars(cls):
            for name, term in cls.losses.items():
                TERMS.add(name, term)
            VARIANTS.add(cls.variant, cls)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        normalizer: Normalizer | None = None,
        seed: int | None = None,
        tied: bool = False,
        input_norm: str = "none",
        encoder_norm: float = 1.0,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be at least 1; got d_in={d_in}, d_sae={d_sae}.")
        one_of(input_norm, INPUT_NORMS, "input_norm")
        if not encoder_norm > 0 or (tied and encoder_norm != 1):
            raise ValueError(
                f"encoder_norm={encoder_norm} must be positive, and 1 with tied weights, whose rows are the decoder's."
            )
        if tied and {"W_enc", "W_dec"} & set(self.frozen):
            raise ValueError(
                f"tied=true makes the encoder of sae.name={self.variant} its decoder, of which one is to learn and the "
                "other not; set sae.settings.tied=false."
            )
        self.d_in, self.d_sae, self.tied, self.input_norm = d_in, d_sae, tied, input_norm
        self.normalizer = normalizer or Normalizer(d_in)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        directions = torch.randn(d_sae, d_in, generator=generator)
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.W_enc = self.W_dec if tied else nn.Parameter(encoder_norm * self.W_dec.detach())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_pre = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))
        for name in self.frozen:
            self.get_parameter(name).requires_grad_(False)

    def extra_repr(self) -> str:
        """For example ``batchtopk, 384 → 3072, k=32``, which PyTorch shows among the modules."""
        return f"{self.variant}, {self.d_in} → {self.d_sae}" + (f", k={self.k:g}" if self.k else "")

    # --- what a variant defines -------------------------------------------------------------------
    def code(self, x: Tensor) -> SparseCodes:
        """Codes of the encoder's inputs [N, d_in], differentiable; may differ between training and evaluation."""
        raise NotImplementedError

    def forward_pass(self, x: Tensor) -> ForwardOutput:
        """Encode and decode the encoder's inputs [N, d_in] (see ``inputs``)."""
        codes = self.code(x)
        return ForwardOutput(x, codes, codes.decode(self.W_dec, self.b_pre))

    def sparsity(self, output: ForwardOutput, decoder_norms: bool = True) -> Tensor:
        """What the loss term ``sparsity`` penalises, summed over the batch: the L1 norm of the codes.

        With ``decoder_norms`` each latent counts by its decoder row's norm, so that a smaller code with a
        larger row gains nothing.
        """
        return output.codes.total(self.W_dec.norm(dim=1) if decoder_norms else None)

    def candidates(self, output: ForwardOutput) -> SparseCodes:
        """What selection chose from: the positive pre-activations of a pass, before any bound on their number."""
        return self.positive(output.x)

    def settings(self) -> dict[str, object]:
        options: dict[str, object] = {"tied": True} if self.tied else {}
        return options | ({"input_norm": self.input_norm} if self.input_norm != "none" else {})

    def start(self, x: Tensor, l0: float | None) -> None:
        """Take from inputs ``x`` [N, d_in] what the variant starts from, so that ``l0`` latents a sample are active.

        Called before the first step, with a sample of the store, and at each of the first tenth of all steps, with
        the rank's part of its batch. ``l0`` is None where nothing asks for a number.
        """

    def fit(self, x: Tensor, seed: int, bar: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> None:
        """Take the dictionary from inputs ``x`` [N, d_in], a sample of the store, where the variant is ``fitted``.

        What is gone through in turn is gone through as ``bar`` of it, which shows how far it is.
        """

    def after_step(self) -> None:
        """What is to hold of the weights after each step of the optimiser."""

    def steered(self, control: float, off: float) -> float:
        """The factor of the weight of ``sparsity`` where ``target_l0`` steers it (``training/module.py``)."""
        return max(0.0, control + off)

    def latent_parameters(self) -> dict[str, float | None]:
        """Parameters with a row for each latent, beside W_enc and W_dec, and what a fresh latent's row is.

        None: the mean of the living latents' rows.
        """
        return {"b_enc": 0.0}

    def finish(self, batches: Iterable[Tensor], n_samples: int, how: str) -> None:
        """After training: what evaluation needs, in the way ``how`` (``sae.threshold``).

        ``batches`` are this rank's held-out raw features [n, d_in], of ``n_samples`` tokens over all ranks.
        """

    def logged(self) -> dict[str, Tensor]:
        """Scalars to log beside the usual ones."""
        return {}

    def inference_forms(self) -> tuple[str, ...]:
        """The variants whose codes in evaluation these are, the nearest first; for other packages' layouts."""
        return (self.variant,)

    def without_selection(self) -> None:
        """Keep every positive pre-activation in evaluation, where training chooses among them [MSAE §3.3].

        ValueError for a variant that does not choose so.
        """
        if self.variant not in ("relu", "msae"):  # which do
            raise ValueError(
                f"inference=relu drops the selection of TopK and BatchTopK, but {self.variant} has another activation; "
                "leave inference out."
            )

    def cuts(self) -> Tensor | None:
        """What a pre-activation must exceed in evaluation, [d_sae]; None where there is no such value."""
        return None

    def set_cuts(self, cuts: Tensor) -> None:
        """Take such values from another package's file."""

    # --- the encoder's inputs -----------------------------------------------------------------------
    def inputs(self, features: Tensor) -> tuple[Tensor, Frame | None]:
        """Raw features [..., d_in] as the encoder takes them, [N, d_in], and what undoes ``input_norm``."""
        return input_norm(self.input_norm, self.normalizer.normalize(features.reshape(-1, self.d_in)))

    def pre_acts(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations [N, d_sae] of the encoder's inputs [N, d_in], or those of ``latents`` [n] alone."""
        W, b = (self.W_enc, self.b_enc) if latents is None else (self.W_enc[latents], self.b_enc[latents])
        return torch.nn.functional.linear(x - self.b_pre, W, b)

    def with_gradient(self, x: Tensor, entries: selection.Entries, bias: Tensor | None = None) -> SparseCodes:
        """Codes of the selected ``entries`` (latents, values, offsets) of the pre-activations of ``x``."""
        latents, values, offsets = entries
        bias = self.b_enc if bias is None else bias
        values = sparse_pre_acts(x, self.b_pre, self.W_enc, bias, latents, offsets, values)
        return SparseCodes(latents, values, offsets, self.d_sae)

    def positive(self, x: Tensor, bias: Tensor | None = None) -> SparseCodes:
        """Codes of all positive pre-activations; held as a matrix where a tenth or more of them is positive."""
        bias = self.b_enc if bias is None else bias
        with torch.no_grad():
            some = torch.nn.functional.linear(x[:: max(1, len(x) // PROBE)] - self.b_pre, self.W_enc, bias) > 0
        if float(some.float().mean()) > DENSE_FROM:
            return DenseCodes(torch.relu(torch.nn.functional.linear(x - self.b_pre, self.W_enc, bias)))
        entries = selection.above(x - self.b_pre, self.W_enc, bias, bias.new_zeros(()))
        return self.with_gradient(x, entries, bias)

    # --- raw features -----------------------------------------------------------------------------
    def encode(self, features: Tensor) -> SparseCodes:
        """Codes of raw features [..., d_in]; leading dimensions become samples, N = their product."""
        if features.shape[-1] != self.d_in:
            raise ValueError(
                f"This SAE takes features of {self.d_in} dimensions; it got {features.shape[-1]}. "
                "Is it from another backbone or layer?"
            )
        x, frame = self.inputs(features)
        nothing = x.new_zeros(0, self.d_sae)
        codes = self.code(x) if len(x) else SparseCodes.select(nothing, nothing > 0)
        codes.frame = frame
        return codes

    def decode(self, codes: SparseCodes) -> Tensor:
        """Raw-space reconstruction [N, d_in] of codes."""
        x = codes.decode(self.W_dec, self.b_pre)
        if codes.frame is not None:
            x = x * codes.frame[1] + codes.frame[0]
        return self.normalizer.denormalize(x)

    def dense(self, mean: Tensor | None = None, std: float | Tensor | None = None) -> Dense:
        """The same with codes as matrices, for packages that expect these, such as ``visaebench``.

        It speaks features that have been centred by ``mean`` [d_in] and divided by ``std``: the SAE's own by default.
        """
        own = self.normalizer
        return Dense(self, own.mean if mean is None else mean, own.std if std is None else std)

    def forward(self, features: Tensor) -> Tensor:
        """Reconstruction of raw features, same shape [..., d_in], float32."""
        return self.decode(self.encode(features)).reshape(features.shape)

    # --- the decoder's constraint and dead latents ------------------------------------------------
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def count_firing(self, fired: Tensor, tokens: int) -> None:
        """Advance the dead-latent counters by ``tokens`` samples; the latents of ``fired`` [d_sae] bool start anew."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired[fired] = 0


class Dense:
    """An SAE whose ``encode`` gives a matrix, which ``decode`` takes; of features less ``mean``, over ``std``."""

    def __init__(self, sae: SAE, mean: Tensor, std: float | Tensor) -> None:
        self.sae, self.frame = sae, Normalizer(sae.d_in, mean, std).to(sae.W_dec.device)
        self._norm: Frame | None = None  # of the samples that were encoded last

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., d_sae] of features [..., d_in]."""
        codes = self.sae.encode(self.frame.denormalize(x))
        self._norm = codes.frame
        return codes.to_dense().unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction [..., d_in] of codes [..., d_sae]; with an ``input_norm`` those that were encoded last.

        ValueError for another number of samples, since their norm is not known.
        """
        rows = z.reshape(-1, z.shape[-1])
        if self._norm is not None and len(self._norm[1]) != len(rows):
            raise ValueError(
                f"Decode got codes of {len(rows)} samples after {len(self._norm[1])} were encoded, whose norms it "
                f"gives back (sae.settings.input_norm={self.sae.input_norm}); decode what was encoded last."
            )
        return self.frame.normalize(self.sae.decode(DenseCodes(rows, self._norm))).unflatten(0, z.shape[:-1])
