"""Train, score and compare sparse autoencoders on the features of vision encoders."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

API = ("compare", "evaluate", "extract", "fit", "list_runs")
PLACES = {name: f"sae_lightning.api.{name}" for name in API} | {
    "MonoLoss": "sae_lightning.training.monoloss.MonoLoss",
    "open": "sae_lightning.runs.model.open_model",
}
"""What can be used from here and where it is; loaded when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'sae_lightning' has no attribute '{name}'")
    module, _, attribute = PLACES[name].rpartition(".")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
