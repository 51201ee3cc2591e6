"""Which implementation of the sparse products serves given tensors."""

from __future__ import annotations

from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from sae_lightning.kernels import native, portable, reference
from sae_lightning.kernels import triton as on_triton

MODULES: dict[str, ModuleType] = {
    "reference": reference, "portable": portable, "native": native, "triton": on_triton,
}  # fmt: skip
DENSE_FROM = {"native": 0.35, "triton": 0.10, "portable": 0.01, "reference": 0.0}  # docs/decisions.md
_forced: list[str] = []


def choose(*tensors: Tensor, density: float = 0.0) -> ModuleType:
    """``native`` for float32 on the CPU, ``triton`` for float32 on CUDA, else ``portable``; ``reference``, which is
    dense, where the share of active entries (``density``) makes dense products faster."""
    if _forced:
        return MODULES[_forced[-1]]
    name = "portable"
    if native.available(*tensors):
        name = "native"
    elif on_triton.available(*tensors):
        name = "triton"
    return reference if density > DENSE_FROM[name] else MODULES[name]


@contextmanager
def forced(name: str):
    """Use one implementation whatever the tensors are; for tests and benchmarks."""
    if name not in MODULES:
        raise ValueError(f"Unknown kernels '{name}'; choose one of {', '.join(MODULES)}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
