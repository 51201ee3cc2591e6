"""What a dictionary is like: how alike its rows are, and whether another seed finds the same [MSAE App. H]."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register

ABOVE = (0.7, 0.9)

SHIFT = 2.0  # makes all weights positive, since a sparse matrix has no zero entries

ALONE = 1e-3  # the weight of having no partner: less than that of any


class Matching(NamedTuple):
    """Latents ``first`` and ``second`` [m] int64 that are partners, each named once, and their ``cosine`` [m] float64.

    m is the size of the smaller dictionary; ``first`` ascends.
    """

    first: Tensor
    second: Tensor
    cosine: Tensor


@torch.no_grad()
def nearest_cosine(first: Tensor, second: Tensor, absolute: bool = False, rows: int = 1024) -> Tensor:
    """The largest cosine of each row of ``first`` [n, d] with any of ``second`` [m, d], [n] float64.

    Several rows may share their nearest one. With ``absolute``, the largest magnitude. In blocks of ``rows``.
    """
    _check(first, second)
    return _candidates(_unit(first), _unit(second), 1, absolute, rows)[1].squeeze(1).double()


@torch.no_grad()
def match_latents(
    first: Tensor, second: Tensor, absolute: bool = False, candidates: int = 64, rows: int = 1024
) -> Matching:  # fmt: skip
    """One-to-one partners of the rows of ``first`` [n, d] and ``second`` [m, d] with the largest sum of cosines.

    The assignment is solved exactly [Kuhn 1955; sparse Jonker–Volgenant] over the pairs in which one is among the
    other's ``candidates`` most alike: all pairs for up to so many latents. Memory is O((n + m) · candidates) and a
    block of cosines, not n · m; latents that this leaves without a partner get the best of what is left. ``absolute``
    takes a direction and its opposite for the same. On one thread 6,144 latents of 768 dimensions take 2 s, 24,576 half
    a minute, nearly all of it for the cosines.
    """
    _check(first, second)
    if len(first) > len(second):
        turned = match_latents(second, first, absolute, candidates, rows)
        order = turned.second.argsort()
        return Matching(turned.second[order], turned.first[order], turned.cosine[order])
    one, two = _unit(first), _unit(second)
    row, column, cosine = _pairs(one, two, candidates, absolute, rows)
    n, m = len(one), len(two)
    partner = torch.from_numpy(sparse_assignment(row, column, cosine, n, m))
    rest = (partner < 0).nonzero().squeeze(1)
    if len(rest):
        free = torch.ones(m, dtype=torch.bool)
        free[partner[partner >= 0]] = False
        left = free.nonzero().squeeze(1)
        found = match_latents(first[rest], second[left], absolute, min(len(left), 1024), rows)
        partner[rest] = left[found.second]
    cosines = (one.double() * two[partner.to(two.device)].double()).sum(1).cpu()
    return Matching(torch.arange(n), partner, cosines.abs() if absolute else cosines)


def sparse_assignment(row: np.ndarray, column: np.ndarray, value: np.ndarray, n: int, m: int) -> np.ndarray:
    """The partners [n] int64 with the largest sum of ``value`` (each from -1 to 1) over the pairs ``row``, ``column``.

    Of n ≤ m rows; -1 for a row whose pairs all have better uses. Solved exactly [sparse Jonker–Volgenant].
    """
    alone = np.arange(n)  # a column of its own for each row, so that there always is a full matching
    places = (np.concatenate([row, alone]), np.concatenate([column, m + alone]))
    graph = csr_matrix((np.concatenate([value + SHIFT, np.full(n, ALONE)]), places), shape=(n, m + n))
    _, partner = min_weight_full_bipartite_matching(graph, maximize=True)
    return np.where(partner < m, partner, -1).astype(np.int64)


def stability(
    first: Tensor, second: Tensor, alive_first: Tensor | None = None, alive_second: Tensor | None = None,
    absolute: bool = False, candidates: int = 64,
) -> dict[str, float]:  # fmt: skip
    """How alike two dictionaries are, rows [n, d] and [m, d] of two decoders (or encoders), of alive latents alone.

    ``alive_first`` [n] and ``alive_second`` [m] are bool masks; all by default. Of the cosines of one-to-one partners,
    found by ``match_latents``: ``stability``, their mean, ``stability_median``, and ``stability_above_0.7`` and
    ``_0.9``, the shares of them above. ``stability_nearest…`` are the same of each latent of ``first`` with its nearest
    in ``second``, whoever else's it is. NaN where a dictionary has no alive latent. ValueError for shapes that do not
    fit.
    """
    one = first if alive_first is None else first[_mask(alive_first, first)]
    two = second if alive_second is None else second[_mask(alive_second, second)]
    _check(one, two)
    if not len(one) or not len(two):
        partners = nearest = torch.empty(0, dtype=torch.float64)
    else:
        partners, nearest = match_latents(one, two, absolute, candidates).cosine, nearest_cosine(one, two, absolute)
    return _summary("stability", partners) | _summary("stability_nearest", nearest)


def _summary(name: str, cosines: Tensor) -> dict[str, float]:
    shares = {f"{name}_above_{t:g}": float((cosines > t).double().mean()) for t in ABOVE}
    median = float(cosines.quantile(0.5)) if len(cosines) else float("nan")
    return {name: float(cosines.mean()), f"{name}_median": median} | shares


def _check(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Expected two dictionaries [n, d] and [m, d] of the same d; got {list(first.shape)} and "
            f"{list(second.shape)}. Compare SAEs on the same features."
        )


def _mask(alive: Tensor, rows: Tensor) -> Tensor:
    if alive.dtype != torch.bool or alive.shape != rows.shape[:1]:
        raise ValueError(f"Expected a bool mask of {len(rows)} latents; got {alive.dtype} {list(alive.shape)}.")
    return alive


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().float(), dim=1)


def _candidates(one: Tensor, two: Tensor, k: int, absolute: bool, rows: int) -> tuple[Tensor, Tensor]:
    """The ``k`` most alike rows of ``two`` for each of ``one``, [n, k], and their cosines."""
    found = []
    for block in one.split(rows):
        cosines = block @ two.T
        found.append((cosines.abs_() if absolute else cosines).topk(min(k, len(two)), dim=1))
    return torch.cat([each.indices.cpu() for each in found]), torch.cat([each.values.cpu() for each in found])


def _pairs(one: Tensor, two: Tensor, k: int, absolute: bool, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and cosines of the pairs in which one is a candidate of the other, each once."""
    to_two, cosine_two = _candidates(one, two, k, absolute, rows)
    to_one, cosine_one = _candidates(two, one, k, absolute, rows)
    row = torch.cat([torch.arange(len(one)).repeat_interleave(to_two.shape[1]), to_one.flatten()])
    column = torch.cat([to_two.flatten(), torch.arange(len(two)).repeat_interleave(to_one.shape[1])])
    key, place = np.unique((row * len(two) + column).numpy(), return_index=True)
    cosine = torch.cat([cosine_two.flatten(), cosine_one.flatten()]).double().numpy()[place]
    return key // len(two), key % len(two), cosine


@torch.no_grad()
def decoder_cosine(W_dec: Tensor, rows: int = 2048) -> dict[str, float]:
    """Similarity of decoder rows [d_sae, d_in], in blocks of ``rows``; a zero row has cosine 0 with all.

    Over all pairs of different latents: ``decoder_cosine``, mean |cosine|; ``decoder_orthogonality``, mean signed
    cosine, the DO of MSAE §4.1; ``decoder_squared_cosine``, mean squared cosine, which the values printed there are
    (random directions have 1 / d_in, and 0 in the signed mean). ``decoder_nearest_cosine``: mean over latents of the
    largest cosine with another one. Low is diverse. ValueError for fewer than two rows.
    """
    if len(W_dec) < 2:
        raise ValueError(f"Decoder cosines need at least two latents; got {len(W_dec)}.")
    unit = F.normalize(W_dec.float(), dim=1)
    total, squares, nearest = 0.0, 0.0, 0.0
    for start in range(0, len(unit), rows):
        cosines = unit[start : start + rows] @ unit.T
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, own + start] = 0.0
        total += float(cosines.abs().sum(dtype=torch.float64))
        squares += float(torch.linalg.vector_norm(cosines, dim=1).double().square().sum())
        cosines[own, own + start] = -2.0
        nearest += float(cosines.max(1).values.sum(dtype=torch.float64))
    n = len(unit)
    pairs = n * (n - 1)
    return {
        "decoder_cosine": total / pairs, "decoder_orthogonality": mean_cosine(W_dec),
        "decoder_squared_cosine": squares / pairs, "decoder_nearest_cosine": nearest / n,
    }  # fmt: skip


def mean_cosine(W_dec: Tensor) -> float:
    """Mean cosine of all pairs of different rows u [n, d] at unit norm: (‖Σ u‖² - Σ ‖u‖²) / (n (n - 1)), in O(n d)."""
    unit = F.normalize(W_dec.double(), dim=1)
    alike = unit.sum(0).square().sum() - unit.square().sum()
    return float(alike) / (len(unit) * (len(unit) - 1))


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """The mean ``stability`` of a run with its siblings, of decoders and encoders; latents that are alive count."""
    own, found = run.dictionary, []
    for other in run.siblings():
        of_encoders = stability(own.encoder, other.encoder, own.alive, other.alive)
        of_decoders = stability(own.decoder, other.decoder, own.alive, other.alive)
        found.append(of_decoders | {name + "_encoder": value for name, value in of_encoders.items()})
    means = [Score(name, float(np.mean([each[name] for each in found]))) for name in found[0]]
    return [*means, Score("stability_siblings", len(found))]


KINDS = {"mean": "", "median": "_median", **{f"above {t}": f"_above_{t:g}" for t in ABOVE}, "nearest": "_nearest"}
PART = register(Part(
    "stability", scores, needs=("siblings",), title="Stability over seeds",
    about="Cosines of one-to-one partners among the latents of runs that differ by seed, mean over these runs.",
    columns=(
        *(Column(title, f"stability{kind}{end}", better=True, over=over)
          for end, over in (("", "decoder"), ("_encoder", "encoder")) for title, kind in KINDS.items()),
        Column("other runs", "stability_siblings", form=",.0f"),
    ),
))  # fmt: skip
