"""Train, score and compare sparse autoencoders on the features of vision encoders."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PLACES = dict.fromkeys(("compare", "extract", "fit", "list_runs"), "sae_lightning.api")
PLACES |= {"MonoLoss": "sae_lightning.training.monoloss"}
"""What can be used from here and where it is; loaded when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'sae_lightning' has no attribute '{name}'")
    return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
