"""The LightningModule around an SAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from sae_lightning.distributed.ranks import any_over_ranks, mean_over_ranks, world_size
from sae_lightning.metrics import L0, Firing, Reconstruction
from sae_lightning.registry import one_of
from sae_lightning.saes import SAE, ForwardOutput
from sae_lightning.saes.losses import TERMS, check_terms, loss_terms, total_loss
from sae_lightning.training.optimizer import UnitRowAdam, build_optimizer, check_name

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """Shares of all steps, between 0 and 1.

    ``warmup``: the learning rate rises linearly from 0. ``decay``: it falls to 0 at the end, in ``shape``
    "linear" or "cosine" (decay 1 with cosine is the usual cosine schedule). ``sparsity_warmup``: the weight
    of the term ``sparsity`` rises linearly from 0. ``k_share``: k falls linearly from ``k_from`` to its value.

    ValueError for shares outside [0, 1] or an unknown shape.
    """

    warmup: float = 0.0
    decay: float = 0.0
    shape: str = "linear"
    sparsity_warmup: float = 0.0
    k_from: float | None = None
    k_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "sparsity_warmup", "k_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name}={getattr(self, name)} must be a share of all steps, from 0 to 1.")
        one_of(self.shape, SHAPES, "schedule.shape")
        if self.k_share > 0 and self.k_from is None:
            raise ValueError("schedule.k_share needs schedule.k_from, the k to start at.")

    @classmethod
    def of(cls, settings: dict[str, Any] | None) -> Schedule:
        """From a config section; ValueError names a key that is none of its fields."""
        settings = dict(settings or {})
        known = {f.name for f in fields(cls)}
        if set(settings) - known:
            raise ValueError(
                f"Unknown schedule setting {sorted(set(settings) - known)}; known: {', '.join(sorted(known))}."
            )
        return cls(**settings)

    def lr_factor(self, step: int, steps: int) -> float:
        """Of the learning rate at ``step`` of ``steps``."""
        warmup, decay = round(self.warmup * steps), round(self.decay * steps)
        rising = (step + 1) / warmup if step < warmup else 1.0
        left = max(0, steps - step) / decay if decay and step > steps - decay else 1.0
        falling = left if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return min(rising, falling)

    def sparsity_factor(self, step: int, steps: int) -> float:
        """Of the sparsity weight."""
        rise = self.sparsity_warmup * steps
        return min(1.0, (step + 1) / rise) if rise >= 1 else 1.0

    def k_at(self, k: float, step: int, steps: int) -> float:
        """The k of training at ``step``, annealed from ``k_from``."""
        fall = self.k_share * steps
        if self.k_from is None or step >= fall:
            return k
        return self.k_from + (k - self.k_from) * step / fall


CONTROL = 0.02  # how fast the sparsity weight follows its target: log-weight a step at L0 twice the target

FOLLOW = 0.1  # share of all steps in which what a variant takes from data (JumpReLU's thresholds) is set, not learnt

Term = Callable[[ForwardOutput, Tensor], Tensor]

Weight = Callable[[int, int], float]


Batch = Tensor | Sequence[Tensor]  # of features, or as a DataLoader of a TensorDataset gives them, with labels or not


def features_of(batch: Batch) -> Tensor:
    """The features in a batch: itself, or the first of several tensors; TypeError for a batch of something else."""
    found = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, list | tuple) and batch else None
    if not isinstance(found, Tensor):
        raise TypeError(
            f"An SAEModule takes batches of features, or of (features, labels); got {type(batch).__name__}."
        )
    return found


class SAEModule(L.LightningModule):
    """Trains ``sae`` on batches of raw features [B, d_in] or [n, P, d_in] with a weighted sum of named loss terms.

    Batches are tensors or sequences whose first entry are the features, from any DataLoader.

    ``loss`` maps a term's name to its weight, ``loss_options`` to its keyword arguments; ``optimizer``
    holds ``name``, ``lr`` and further arguments; ``schedule`` the fields of ``Schedule``. With ``target_l0``
    the weight of ``sparsity`` is steered (see ``_steer``) so that L0 settles there; a JumpReLU's thresholds
    simply follow it for the first tenth of all steps, while the encoder changes fastest. ``center`` [d_in], the mean
    of the validation's store, is what ``val/cosine`` is about; by default the normaliser's mean.

    Logs ``train/loss``, ``loss/<term>``, ``train/explained_variance``, ``train/l0``, ``train/dead_share``
    and the ``val/`` metrics. Raises ValueError for unknown terms, optimisers or schedules.
    """

    control: Tensor

    def __init__(
        self,
        sae: SAE,
        loss: dict[str, float],
        loss_options: dict[str, dict[str, Any]] | None = None,
        optimizer: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        dead_after: int = 100_000,
        target_l0: float | None = None,
        center: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_terms(sae, loss)
        self.sae = sae
        self.loss = dict(loss)
        self.loss_options = dict(loss_options or {})
        self.optimizer = dict(optimizer or {"name": "adam", "lr": 1e-3})
        self.schedule = Schedule.of(schedule)
        self.dead_after = dead_after
        self.target_l0 = target_l0
        self.added: dict[str, tuple[Term, Weight]] = {}
        if target_l0 is not None and not self.loss.get("sparsity"):
            raise ValueError(
                f"target_l0={target_l0} steers the weight of the term sparsity; set loss.sparsity above 0."
            )
        check_name(self.optimizer.get("name"))
        center = sae.normalizer.mean if center is None else center
        self.register_buffer("control", torch.ones((), dtype=torch.float64))
        self.scores: dict[str, Metric] = torch.nn.ModuleDict(  # type: ignore[assignment]
            {"reconstruction": Reconstruction(sae.d_in, center), "l0": L0(), "firing": Firing(sae.d_sae)}
        )

    def add_term(self, name: str, term: Term, weight: Weight) -> None:
        """Add ``weight(step, steps)`` times ``term(run, features)`` to the loss, logged as ``loss/<name>``.

        For callbacks. ``features`` are the batch's raw ones as they came, [B, d_in] or [n, P, d_in]; where the weight
        is 0 the term is not computed. ValueError for a name that is taken.
        """
        if name in TERMS or name in self.added:
            raise ValueError(f"There is a loss term '{name}' already; give the callback's term another name.")
        self.added[name] = (term, weight)

    # --- steps ------------------------------------------------------------------------------------
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = features_of(batch)
        features = batch.flatten(0, -2)  # batches of images [n, P, d_in] are batches of their tokens
        step, steps = self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
        if self.sae.k is not None:
            self.sae.k_now = self.schedule.k_at(float(self.sae.k), step, steps)
        x, _ = self.sae.inputs(features)
        if step < FOLLOW * steps:
            self.sae.start(x, self.target_l0)
        run = self.sae.forward_pass(x)
        terms = loss_terms(self.sae, run, self.loss, self.loss_options)
        weights = self._weights(step, steps, self._steer(run))
        for name, (term, weight) in self.added.items():
            weights[name] = weight(step, steps)
            if weights[name]:
                terms[name] = term(run, batch)
        loss = total_loss(terms, weights)
        self.sae.count_firing(any_over_ranks(run.codes.fired()), len(features) * world_size())
        if (step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_step(run, loss.detach(), terms)
        return loss

    def _weights(self, step: int, steps: int, steering: float) -> dict[str, float]:
        weights = dict(self.loss)
        if weights.get("sparsity"):
            weights["sparsity"] *= self.schedule.sparsity_factor(step, steps) * steering
        return weights

    def _steer(self, run: ForwardOutput) -> float:
        """What ``sparsity``'s weight is multiplied by after a pass with L0 active latents a sample.

        With off = L0 / target - 1 within ±1, it is control + off, at least 0. ``control`` grows each step by the
        factor exp(0.02 · off) and is saved with the checkpoint: it settles where L0 stays at the target, while the
        second part answers at once. A variant may answer in its own way (``SAE.steered``).
        """
        if self.target_l0 is None:
            return 1.0
        l0 = self.control.new_tensor(run.codes.nnz / len(run.x))
        off = float(mean_over_ranks(l0)) / self.target_l0 - 1
        off = max(-1.0, min(1.0, off))
        self.control *= math.exp(CONTROL * off)
        return self.sae.steered(float(self.control), off)

    def _log_step(self, run: ForwardOutput, loss: Tensor, terms: dict[str, Tensor]) -> None:
        x, rebuilt = run.x, run.reconstruction.detach()
        fvu = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-12)
        record: dict[str, Any] = {
            "train/loss": loss,
            "train/explained_variance": 1 - fvu,
            "train/l0": run.codes.nnz / len(x),  # a number of the host
            "train/dead_share": (self.sae.tokens_since_fired >= self.dead_after).float().mean(),
        }
        record |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        record |= {f"train/{name}": value for name, value in self.sae.logged().items()}
        if self.target_l0 is not None:
            record["train/sparsity_weight"] = self.loss["sparsity"] * self.control
        # on the device, for NCCL takes nothing else, and in one tensor: one operation of all ranks for all of them
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=x.device) for v in record.values()])
        means = dict(zip(record, mean_over_ranks(values).unbind(), strict=True))
        self.log_dict(means)
        bar = {"ev": means["train/explained_variance"], "l0": torch.tensor(record["train/l0"], dtype=torch.float32)}
        self.log_dict(bar, prog_bar=True, logger=False)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        features = features_of(batch).flatten(0, -2)
        codes = self.sae.encode(features)
        rebuilt = self.sae.decode(codes)
        self.scores["reconstruction"].update(features.float(), rebuilt)
        self.scores["l0"].update(codes)
        self.scores["firing"].update(codes)

    def on_validation_epoch_end(self) -> None:
        record: dict[str, Tensor] = {}
        for metric in self.scores.values():
            record |= {f"val/{name}": torch.as_tensor(v, dtype=torch.float32) for name, v in metric.compute().items()}
            metric.reset()
        del record["val/r2"]  # which is of evaluations alone
        self.log_dict(record)  # already reduced over ranks by the metrics

    # --- optimiser --------------------------------------------------------------------------------
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clipping by norm is the optimiser's own, in the pass that reads the gradients anyway."""
        inner = getattr(optimizer, "optimizer", optimizer)
        if isinstance(inner, UnitRowAdam) and gradient_clip_algorithm in (None, "norm"):
            inner.clip = gradient_clip_val
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.sae, **self.optimizer)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.lr_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
