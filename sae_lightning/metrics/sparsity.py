"""How sparse codes are: L0, which latents are alive, and histograms of activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.files import write_tensors
from sae_lightning.metrics.base import Score, SumMetric, deviation, require_samples
from sae_lightning.metrics.part import Options, Part, ScoredRun, register
from sae_lightning.saes.codes import SparseCodes


class L0(SumMetric):
    """Number of active latents a sample; ``compute`` gives the mean ``l0``, a float64 scalar."""

    count: Tensor
    active: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("count", dtype=torch.long)
        self.add_sum("active", dtype=torch.long)
        self.add_sum("squares", dtype=torch.long)

    def update(self, codes: SparseCodes) -> None:
        """Add the codes of N samples."""
        self.count += codes.n_samples
        self.active += len(codes.latents)
        self.squares += codes.counts().square().sum()

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        return {"l0": self.active.double() / self.count}

    def deviations(self) -> dict[str, Tensor]:
        """``l0_std``, over samples."""
        return {"l0_std": deviation(self.active, self.squares, self.count)}


class Firing(SumMetric):
    """Counts each latent's active samples in ``counts`` [d_sae] int64.

    A latent is alive when it fired at least once on the evaluated set. ``compute`` gives ``dead_share``
    (float64) and ``alive`` (int64), scalars. ValueError for codes of another d_sae.
    """

    count: Tensor
    counts: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae = d_sae
        self.add_sum("count", dtype=torch.long)
        self.add_sum("counts", d_sae, dtype=torch.long)

    def update(self, codes: SparseCodes) -> None:
        """Add the codes of N samples."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"Expected codes of {self.d_sae} latents; got {codes.d_sae}.")
        self.count += codes.n_samples
        self.counts += torch.bincount(codes.latents, minlength=self.d_sae)

    def of_latents(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        alive = (self.counts > 0).sum()
        return {"dead_share": 1 - alive.double() / self.d_sae, "alive": alive}


HISTOGRAMS = "histograms.safetensors"
QUANTILES = (0.25, 0.5, 0.75)
RAREST = -9  # the firing frequencies' first edge, as a power of ten


class Histogram(NamedTuple):
    """``counts`` [b + 2] int64 of what lies below the first of ``edges`` [b + 1] float64, in each bin, and above.

    Bin i, from ``edges[i]`` to just below ``edges[i + 1]``, has ``counts[i + 1]``; the last edge counts as above.
    """

    edges: Tensor
    counts: Tensor

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` lies, by even spacing of log10 within its bin; NaN if all are empty.

        The first or last edge where it lies outside.
        """
        below = self.counts.cumsum(0).double()
        if not int(below[-1]):
            return float("nan")
        wanted = q * float(below[-1])
        i = int(torch.searchsorted(below, wanted))
        if i == 0 or i == len(self.edges):
            return float(self.edges[min(i, len(self.edges) - 1)])
        share = (wanted - float(below[i - 1])) / float(self.counts[i])
        low, high = (float(edge) for edge in self.edges[i - 1 : i + 1].log10())
        return float(10 ** (low + share * (high - low)))


def log_edges(low: int, high: int, per_decade: int) -> Tensor:
    """Edges [(high - low) · per_decade + 1] float64 from 10^low to 10^high, evenly spaced in log10.

    ValueError for an empty range or fewer than one bin a decade.
    """
    if high <= low or per_decade < 1:
        raise ValueError(
            f"A histogram needs whole powers of ten low < high and bins per decade >= 1; got {low}, {high} and "
            f"{per_decade}."
        )
    steps = torch.arange((high - low) * per_decade + 1, dtype=torch.float64) / per_decade + low
    return 10**steps


class ActivationHistogram(SumMetric):
    """Histograms over samples with bins fixed in advance, ``per_decade`` of them a power of ten [MSAE §4.6, App. F.3].

    ``values`` are all activations above zero and ``maxima`` each sample's largest, from 10^``low`` to 10^``high`` with
    one bin more on each side; ``frequencies``, of latents, are the shares of samples on which each is active, from
    1e-9 to 1, those of latents that never are below it. A sample without any activation has a largest one of 0.
    ``compute`` gives the counts of all three, int64; ``histograms`` has their edges, too. States are counts. ValueError
    for codes of another d_sae, or when no sample was seen.
    """

    count: Tensor
    counts: Tensor
    values: Tensor
    maxima: Tensor
    edges: Tensor

    def __init__(self, d_sae: int, low: int = -4, high: int = 4, per_decade: int = 20) -> None:
        super().__init__()
        self.d_sae, self.per_decade = d_sae, per_decade
        self.register_buffer("edges", log_edges(low, high, per_decade), persistent=False)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("counts", d_sae, dtype=torch.long)
        for name in ("values", "maxima"):
            self.add_sum(name, len(self.edges) + 1, dtype=torch.long)

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Add the codes of N samples."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"Expected codes of {self.d_sae} latents; got {codes.d_sae}.")
        values = codes.values.detach()
        largest = values.new_zeros(codes.n_samples).scatter_reduce(0, codes.rows(), values, "amax")
        self.count += codes.n_samples
        self.counts += torch.bincount(codes.latents, minlength=self.d_sae)
        self.values += counted(values, self.edges)
        self.maxima += counted(largest, self.edges)

    def histograms(self) -> dict[str, Histogram]:
        """``values``, ``maxima`` and ``frequencies``."""
        require_samples(self.count, self)
        shares = log_edges(RAREST, 0, self.per_decade).to(self.counts.device)
        return {
            "values": Histogram(self.edges, self.values), "maxima": Histogram(self.edges, self.maxima),
            "frequencies": Histogram(shares, counted(self.counts.double() / self.count, shares)),
        }  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        return {name: found.counts for name, found in self.histograms().items()}


def counted(values: Tensor, edges: Tensor) -> Tensor:
    """How many of ``values`` [n] lie below, in each bin of and above ``edges`` [b + 1], [b + 2] int64."""
    return torch.bincount(torch.bucketize(values.double(), edges, right=True), minlength=len(edges) + 1)


def histograms(run: ScoredRun, options: Options) -> list[Score]:
    """Histograms of activations, whole in the run's folder, and their quartiles."""
    found = run.metric("histograms", ActivationHistogram).histograms()
    tensors = {f"{name}.{field}": t for name, h in found.items() for field, t in h._asdict().items()}
    write_tensors(run.folder / HISTOGRAMS, {name: tensor.cpu().clone() for name, tensor in tensors.items()})
    return [
        Score(f"activation_{name}", h.quantile(q), f"quantile={q:g}") for name, h in found.items() for q in QUANTILES
    ]


PART = register(Part(
    "histograms", histograms, lambda about, options: {"histograms": ActivationHistogram(about.sae.d_sae, **options)},
    undefined="no latent is active",
))  # fmt: skip
