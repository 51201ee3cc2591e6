"""What all metrics share: states that add, in a precision that no module-wide cast can lower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

M = TypeVar("M", bound=Metric)


class SumMetric(Metric):
    """A metric whose states are sums, so that batches and ranks merge by addition in any order.

    Moving the parent module moves the states to its device, but ``.half()``, ``.to(torch.bfloat16)`` and
    the like leave their dtypes alone: a sum over millions of tokens does not fit 16 bits.
    """

    inputs: ClassVar[tuple[str, ...]] = ("codes",)  # what ``update`` takes, of those that a pass has; see ``part.py``
    full_state_update = False
    is_differentiable = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Add a state of zeros [*shape] that sums over ranks."""
        self.add_state(name, torch.zeros((), dtype=dtype).expand(shape), dist_reduce_fx="sum")
        setattr(self, name, torch.zeros(shape, dtype=dtype))  # the default that reset takes holds a single number

    def add_center(self, d_in: int, center: Tensor | None) -> None:
        """Keep the fixed point ``center`` [d_in] (zero if None) that samples are taken about, as a float64 buffer.

        ValueError for another shape.
        """
        center = torch.zeros(d_in) if center is None else torch.as_tensor(center).detach().clone()
        if center.shape != (d_in,):
            raise ValueError(f"Expected a center of shape [{d_in}]; got {list(center.shape)}.")
        self.register_buffer("center", center.double(), persistent=False)

    def sure(self) -> dict[str, Score]:
        """The figures of ``compute`` that have an interval, with it."""
        return {}

    def of_latents(self) -> dict[str, Tensor]:
        """What it says of each latent, [d_sae] by name, to be kept in latents.safetensors."""
        return {}

    def shown(self, n: int) -> dict[str, Tensor]:
        """Groups of about ``n`` latents each that are worth showing."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.zeros(1, device=tensor.device)).device)

        return super()._apply(move, exclude_state)


def of_one_rank(metric: M) -> M:
    """``metric``, whose ``compute`` does not ask other ranks for theirs; for one that some ranks alone compute."""
    metric.distributed_available_fn = _no
    return metric


def _no() -> bool:
    return False


def deviation(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """The standard deviation over ``count`` samples from their sum and the sum of their squares, float64."""
    mean = total.double() / count
    return (squares.double() / count - mean.square()).clamp_min(0).sqrt()


def require_pair(x: Tensor, reconstruction: Tensor, d_in: int | None = None) -> None:
    """ValueError unless both are [N, d_in], the same N and d_in."""
    if x.ndim != 2 or x.shape != reconstruction.shape or (d_in is not None and x.shape[1] != d_in):
        wanted = "[N, d_in]" if d_in is None else f"[N, {d_in}]"
        raise ValueError(
            f"Expected features and reconstruction of one shape {wanted}; got {list(x.shape)} and "
            f"{list(reconstruction.shape)}. Flatten the leading dimensions of both first."
        )


def require_samples(count: Tensor, metric: Metric) -> None:
    """ValueError when the metric has seen no sample."""
    if int(count) == 0:
        raise ValueError(f"{type(metric).__name__} has seen no sample; call update before compute.")


class Score(NamedTuple):
    """One figure: the ``metric``'s ``value`` in a ``setting``, such as ``k=128``; several are joined by commas.

    A value that could not be computed is NaN, and ``why`` says the reason. ``low`` to ``high`` is the 95 % interval of
    one that is of ``n`` of a ``unit``, such as pictures; see ``intervals.py``.
    """

    metric: str
    value: float
    setting: str = ""
    why: str = ""
    n: int | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
