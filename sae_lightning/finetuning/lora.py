"""Low-rank adapters in an encoder's linear layers, through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sae_lightning.finetuning.errors import FinetuneError


def add_lora(encoder: nn.Module, lora: Mapping[str, Any]) -> None:
    """Freeze ``encoder`` and put adapters into its linear layers named ``targets``, in place.

    ``lora`` holds ``r``, ``alpha``, ``targets`` (the last part of the layers' names) and ``dropout``. FinetuneError
    when the encoder has no such layers or a number is impossible.
    """
    import peft

    if not (type(lora["r"]) is int and lora["r"] >= 1 and lora["alpha"] > 0 and 0 <= lora["dropout"] < 1):
        raise FinetuneError(
            f"model.lora.r={lora['r']}, alpha={lora['alpha']} and dropout={lora['dropout']} do not fit: r is a whole "
            "number of at least 1 (or null for none), alpha is positive, dropout from 0 to below 1."
        )
    linear = {name.rsplit(".", 1)[-1] for name, part in encoder.named_modules() if isinstance(part, nn.Linear)}
    targets = list(lora["targets"])
    missing = [name for name in targets if name not in linear]
    if missing or not targets:
        raise FinetuneError(
            f"model.lora.targets={targets}: the encoder has no linear layer called "
            f"{missing[0] if missing else 'anything there'}; it has {', '.join(sorted(linear)) or 'none'}."
        )
    settings = peft.LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=targets, bias="none"
    )
    encoder.requires_grad_(False)
    peft.inject_adapter_in_model(settings, encoder)
