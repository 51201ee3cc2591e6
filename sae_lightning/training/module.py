"""The LightningModule around an SAE."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from sae_lightning.metrics import FVU, L0, Cosine, Firing
from sae_lightning.saes import SAE
from sae_lightning.saes.losses import check_terms, loss_terms, total_loss
from sae_lightning.saes.ranks import any_over_ranks, world_size

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class SAEModule(L.LightningModule):
    """Trains ``sae`` on batches of raw features [B, d_in] with a weighted sum of named loss terms.

    ``loss`` maps a term's name to its weight, ``loss_options`` to its keyword arguments; ``optimizer``
    holds ``name``, ``lr`` and further arguments; ``schedule`` holds ``warmup`` and ``decay``, the shares
    of all steps in which the learning rate rises from and falls to zero.

    Logs ``train/loss``, ``loss/<term>``, ``train/explained_variance``, ``train/l0``, ``train/dead_share``
    and the ``val/`` metrics. Raises ValueError for unknown terms or optimisers.
    """

    def __init__(
        self,
        sae: SAE,
        loss: dict[str, float],
        loss_options: dict[str, dict[str, Any]] | None = None,
        optimizer: dict[str, Any] | None = None,
        schedule: dict[str, float] | None = None,
        dead_after: int = 100_000,
    ) -> None:
        super().__init__()
        check_terms(loss)
        self.sae = sae
        self.loss = dict(loss)
        self.loss_options = dict(loss_options or {})
        self.optimizer = dict(optimizer or {"name": "adam", "lr": 1e-3})
        self.schedule = dict(schedule or {})
        self.dead_after = dead_after
        name = self.optimizer.get("name")
        if name not in OPTIMIZERS:
            raise ValueError(f"Unknown optimizer.name={name}; choose one of {', '.join(OPTIMIZERS)}.")
        self.scores: dict[str, Metric] = torch.nn.ModuleDict(  # type: ignore[assignment]
            {
                "fvu": FVU(sae.d_in, center=sae.normalizer.mean),
                "l0": L0(),
                "cosine": Cosine(center=sae.normalizer.mean),
                "firing": Firing(sae.d_sae),
            }
        )

    # --- steps ------------------------------------------------------------------------------------
    def training_step(self, features: Tensor, batch_idx: int) -> Tensor:
        x = self.sae.normalizer.normalize(features)
        run = self.sae.run(x)
        terms = loss_terms(self.sae, run, self.loss, self.loss_options)
        loss = total_loss(terms, self.loss)
        fired = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=x.device)
        fired[run.codes.latents] = True
        self.sae.count_firing(any_over_ranks(fired), len(x) * world_size())
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_step(x, run.reconstruction.detach(), run.codes.latents.numel(), loss.detach(), terms)
        return loss

    def _log_step(self, x: Tensor, rebuilt: Tensor, active: int, loss: Tensor, terms: dict[str, Tensor]) -> None:
        fvu = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-12)
        record: dict[str, Any] = {
            "train/loss": loss,
            "train/explained_variance": 1 - fvu,
            "train/l0": active / len(x),
            "train/dead_share": (self.sae.tokens_since_fired >= self.dead_after).float().mean(),
        }
        record |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        if hasattr(self.sae, "threshold"):
            record["train/threshold"] = self.sae.threshold
        self.log_dict({k: torch.as_tensor(v, dtype=torch.float32) for k, v in record.items()}, sync_dist=True)
        bar = {"ev": record["train/explained_variance"], "l0": torch.tensor(record["train/l0"], dtype=torch.float32)}
        self.log_dict(bar, prog_bar=True, logger=False)

    def validation_step(self, features: Tensor, batch_idx: int) -> None:
        codes = self.sae.encode(features)
        rebuilt = self.sae.decode(codes)
        self.scores["fvu"].update(features.float(), rebuilt)
        self.scores["cosine"].update(features.float(), rebuilt)
        self.scores["l0"].update(codes)
        self.scores["firing"].update(codes)

    def on_validation_epoch_end(self) -> None:
        record: dict[str, Tensor] = {}
        for metric in self.scores.values():
            record |= {f"val/{name}": torch.as_tensor(v, dtype=torch.float32) for name, v in metric.compute().items()}
            metric.reset()
        self.log_dict(record)  # already reduced over ranks by the metrics

    # --- the decoder's constraint -----------------------------------------------------------------
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.sae.project_decoder_gradient()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.sae.normalize_decoder()

    # --- optimiser --------------------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        settings = dict(self.optimizer)
        build = OPTIMIZERS[settings.pop("name")]
        if "betas" in settings:
            settings["betas"] = tuple(settings["betas"])
        optimizer = build(self.sae.parameters(), **settings)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = round(self.schedule.get("warmup", 0.0) * steps)
        decay = round(self.schedule.get("decay", 0.0) * steps)

        def factor(step: int) -> float:
            rising = (step + 1) / warmup if warmup and step < warmup else 1.0
            falling = max(0, steps - step) / decay if decay and step > steps - decay else 1.0
            return min(rising, falling)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
