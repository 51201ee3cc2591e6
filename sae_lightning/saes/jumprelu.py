"""JumpReLU SAE: a learnt threshold for each latent, trained through straight-through estimators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sae_lightning.distributed.ranks import world_size
from sae_lightning.kernels import selection
from sae_lightning.kernels.selection import kth_largest_over_ranks
from sae_lightning.registry import one_of
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.sae import PROBE, SAE, ForwardOutput

REACH = {"rectangle": 0.5, "gaussian": 6.5, "silverman": 30.0}  # bandwidths beyond which a kernel is below 1e-9


def kernel(name: str, u: Tensor) -> Tensor:
    """The kernel's density at ``u``; each integrates to 1."""
    if name == "rectangle":
        return (u.abs() < 0.5).to(u.dtype)
    if name == "gaussian":
        return torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
    scaled = u.abs() / math.sqrt(2)
    return 0.5 * torch.exp(-scaled) * torch.sin(scaled + math.pi / 4)


class _Jump(torch.autograd.Function):
    """pre · 1[pre > θ]; the gradient of θ is -(θ / ε) K((pre - θ) / ε) [Rajamanoharan et al. 2024, eq. 11]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, name: str, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.options = (name, bandwidth)
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, theta = ctx.saved_tensors
        name, bandwidth = ctx.options
        through = -(theta / bandwidth) * kernel(name, (pre - theta) / bandwidth)
        return grad * (pre > theta), grad * through, None, None


class _Step(torch.autograd.Function):
    """1[pre > θ]; the gradient of θ is -(1 / ε) K((pre - θ) / ε) [eq. 12], that of pre is zero."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, name: str, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.options = (name, bandwidth)
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, theta = ctx.saved_tensors
        name, bandwidth = ctx.options
        return None, -grad * kernel(name, (pre - theta) / bandwidth) / bandwidth, None, None


class JumpReLU(SAE):
    """z = pre_acts where it exceeds the latent's threshold θ = exp(log_threshold), else 0.

    ``log_threshold`` [d_sae] learns from the entries near θ, weighted by ``kernel_name`` ("rectangle", "gaussian" or
    "silverman", the kernel of ViSAEBench's appendix) of width ``bandwidth``; "silverman" as a bandwidth takes his
    rule 1.06 σ N^(-1/5) with the deviation σ of the batch's pre-activations. ``threshold`` is θ at the start;
    ``start`` sets it from data. The term ``sparsity`` is L0.

    Raises ValueError for unknown kernels or a bandwidth or threshold that is not positive.
    """

    variant = "jumprelu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        bandwidth: float | str = 1e-3,
        kernel_name: str = "rectangle",
        threshold: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **options)
        one_of(kernel_name, REACH, "kernel_name")
        if bandwidth != "silverman" and not (isinstance(bandwidth, int | float) and bandwidth > 0):
            raise ValueError(f"bandwidth must be a positive number or silverman; got {bandwidth}.")
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, since its logarithm is learnt; got {threshold}.")
        self.bandwidth, self.kernel_name, self.threshold_start = bandwidth, kernel_name, threshold
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(threshold)))

    def settings(self) -> dict[str, object]:
        chosen = {"bandwidth": self.bandwidth, "kernel_name": self.kernel_name, "threshold": self.threshold_start}
        return chosen | super().settings()

    def latent_parameters(self) -> dict[str, float | None]:
        return {"b_enc": 0.0, "log_threshold": None}

    def steered(self, control: float, off: float) -> float:
        """Answers five times as hard, and may turn negative: the straight-through gradient then lowers thresholds,
        which little else does for a latent that has fallen silent.
        """
        return control + 5 * off

    def cuts(self) -> Tensor:
        return self.log_threshold.detach().exp()

    @torch.no_grad()
    def set_cuts(self, cuts: Tensor) -> None:
        # the smallest positive float for a threshold of zero: its logarithm stays finite
        self.log_threshold.copy_(cuts.clamp_min(torch.finfo(torch.float32).tiny).log())

    def code(self, x: Tensor) -> SparseCodes:
        if not self.training:
            return self.with_gradient(x, selection.above(x - self.b_pre, self.W_enc, self.b_enc, self.cuts()))
        return self._training_codes(x)[0]

    def forward_pass(self, x: Tensor) -> ForwardOutput:
        if not self.training:
            return super().forward_pass(x)
        codes, near, values = self._training_codes(x)
        # entries just below their threshold are 0, but their gradient is half of the threshold's
        whole = SparseCodes(near.latents, values, near.offsets, self.d_sae)
        return ForwardOutput(x, codes, whole.decode(self.W_dec, self.b_pre), extra={"near": near})

    def _training_codes(self, x: Tensor) -> tuple[SparseCodes, SparseCodes, Tensor]:
        """The codes, the positive entries that are active or in the kernel's reach, and their values after JumpReLU.

        The second's own ``values`` are pre-activations.
        """
        width = self._width(x)
        cuts = (self.cuts() - REACH[self.kernel_name] * width).clamp_min(0)
        near = self.with_gradient(x, selection.above(x - self.b_pre, self.W_enc, self.b_enc, cuts))
        theta = self.log_threshold.exp()[near.latents]
        values = _Jump.apply(near.values, theta, self.kernel_name, width)
        return near.where(near.values.detach() > theta.detach(), values), near, values

    def sparsity(self, output: ForwardOutput, decoder_norms: bool = True) -> Tensor:
        """L0 of the batch, summed over samples, with the straight-through gradient for the thresholds."""
        near = output.extra.get("near", output.codes)
        theta = self.log_threshold.exp()[near.latents]
        return _Step.apply(near.values, theta, self.kernel_name, self._width(output.x)).sum()

    @torch.no_grad()
    def _width(self, x: Tensor) -> float:
        if self.bandwidth != "silverman":
            return float(self.bandwidth)
        sigma = self.pre_acts(x[:: max(1, len(x) // PROBE)]).std()
        return float(1.06 * sigma * len(x) ** -0.2)

    @torch.no_grad()
    def start(self, x: Tensor, l0: float | None) -> None:
        """Set all thresholds to the value that leaves ``l0`` active latents a sample on ``x`` [N, d_in].

        Under DDP ``x`` is a rank's part, and the value is that for the parts of all ranks.
        """
        if not l0:
            return
        budget = min(max(1, round(l0 * len(x) * world_size())), len(x) * self.d_sae)
        values = selection.largest(x - self.b_pre, self.W_enc, self.b_enc, budget)[1]
        cut = kth_largest_over_ranks(values, budget)
        if bool(cut.isfinite()):
            self.log_threshold.fill_(float(cut.clamp_min(1e-3).log()))
