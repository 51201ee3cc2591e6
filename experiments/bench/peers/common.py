"""What the adapters share: the types, the common settings, lazy imports and autocast."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

Step = Callable[[Tensor], None]
Builder = Callable[[int, int, int, int, str, str], Step]
"""d_in, d_sae, k, batch, device, precision → step."""

LEARNING_RATE = 1e-3
MATRYOSHKA_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Shares of d_sae that each level of a nested dictionary adds."""


def matryoshka_widths(d_sae: int) -> list[int]:
    """Cumulative widths of the nested dictionaries, the last one d_sae."""
    widths = accumulate(int(fraction * d_sae) for fraction in MATRYOSHKA_FRACTIONS[:-1])
    return [*widths, d_sae]


def load(module: str, package: str) -> ModuleType:
    """Import ``module`` of the peer ``package``; ImportError says which peer is missing or broken."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package may fail on import in many ways
        raise ImportError(
            f"The benchmark's peer {package} cannot be imported ({type(error).__name__}: {error}). "
            f"Install {package} beside sae-lightning or leave it out of the comparison."
        ) from error


def is_bf16(precision: str) -> bool:
    """Whether to run under bfloat16 autocast; ValueError unless ``precision`` is "32" or "bf16"."""
    if precision not in ("32", "bf16"):
        raise ValueError(f"precision is '32' or 'bf16'; got {precision!r}.")
    return precision == "bf16"


def autocast(device: str, precision: str) -> torch.autocast:
    """The context of the forward pass; entering it does nothing for "32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_bf16(precision))
