"""Adam for dictionaries: clipping, the decoder's constraint and the step in one pass over each row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sae_lightning.kernels import native
from sae_lightning.registry import one_of
from sae_lightning.saes import SAE

OPTIMIZERS = ("adam", "adamw")


class UnitRowAdam(torch.optim.AdamW):
    """Adam (AdamW with ``decoupled``) that keeps the rows of some matrices at unit norm.

    Parameter groups with ``unit`` have their rows scaled to unit norm after the step, and those with ``project`` the
    gradient's part along each row removed before, which the constraint would undo. ``clip`` bounds the global norm of
    the remaining gradient. In float32 on the CPU each row is read and written once (``native.adam``); elsewhere
    PyTorch's fused or foreach AdamW does the step. State and ``state_dict`` are AdamW's own. Where a ``GradScaler``
    leaves the scale of the loss to the optimiser, as it does to fused ones, gradients are unscaled first: the norm is
    theirs.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float = 1e-3, decoupled: bool = False, **settings: Any
    ) -> None:
        self.clip: float | None = None
        self.grad_norm: float | None = None
        groups = [{"unit": False, "project": group.get("unit", False), **group} for group in params]
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        settings = {"weight_decay": 0.0, "fused": True if on_gpu else None} | settings
        super().__init__(groups, lr=lr, **settings)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = decoupled

    def __setstate__(self, state: dict[str, Any]) -> None:
        """AdamW's own sets the decay of every group to decoupled, whatever was saved."""
        decoupled = [group.get("decoupled_weight_decay") for group in state["param_groups"]]
        super().__setstate__(state)
        for group, was in zip(self.param_groups, decoupled, strict=True):
            group["decoupled_weight_decay"] = bool(was)
            group.setdefault("project", group.get("unit", False))  # of a checkpoint from before it could be chosen

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[tuple[Any, dict[str, Any]]] = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        bad = self._unscale([p.grad for p, _ in params])
        own = bool(params) and all(
            native.available(p, p.grad) and p.is_contiguous() and p.grad.is_contiguous() for p, _ in params
        )
        if own:
            if bad is not None and bool(bad):
                return loss
            squares = [native.squared_norm(p.grad, p if group["project"] else None) for p, group in params]
            scale = self._clip_scale(squares)
            for p, group in params:
                self._native_step(p, group, scale)
            return loss
        for p, group in params:
            if group["project"]:
                p.grad.sub_((p.grad * p).sum(1, keepdim=True) * p)
        norms = torch.stack([p.grad.double().square().sum() for p, _ in params]) if params else None
        scale = 1.0 if norms is None else self._clip_scale([float(norms.sum())])
        if scale < 1:
            torch._foreach_mul_([p.grad for p, _ in params], scale)
        super().step()
        for p, group in params:
            if group["unit"]:
                p.div_(_lengths(p) if bad is None else torch.where(bad > 0, 1.0, _lengths(p)))
        return loss

    def _unscale(self, gradients: list[Tensor]) -> Tensor | None:
        """Undo the scale that a ``GradScaler`` has left; its count of gradients that are not finite, with one.

        On the device: where it is not 0, AdamW's kernel leaves weights and state as they are.
        """
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, scale.double().reciprocal().to(gradients[0].dtype))
            self.grad_scale = None  # the kernel would divide once more
        return getattr(self, "found_inf", None)

    def _clip_scale(self, squares: list[float]) -> float:
        self.grad_norm = sum(squares) ** 0.5
        return 1.0 if not self.clip else min(1.0, self.clip / (self.grad_norm + 1e-6))

    def _native_step(self, p: Any, group: dict[str, Any], scale: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        native.adam(
            p, p.grad, state["exp_avg"], state["exp_avg_sq"], scale=scale, lr=float(group["lr"]),
            step=int(state["step"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"], unit=group["project"],
        )  # fmt: skip
        if group["unit"] and not group["project"]:
            p.div_(_lengths(p))


def _lengths(p: Tensor) -> Tensor:
    """Of the rows of ``p`` [n, d], as [n, 1]."""
    return p.norm(dim=1, keepdim=True).clamp_min(1e-8)


def check_name(name: str | None) -> None:
    """ValueError for a name that is no optimiser."""
    one_of(name, OPTIMIZERS, "optimizer.name")


def build_optimizer(
    sae: SAE, name: str = "adam", lr: float = 1e-3, project: bool = True, **settings: Any
) -> UnitRowAdam:
    """The optimiser ``name`` (adam or adamw) for ``sae``, with its decoder rows at unit norm.

    ``project``: the gradient of the decoder's rows is kept orthogonal to them. MonoLoss does so for untied decoders
    alone [App. B]: the gradient of a tied one also belongs to the encoder.
    """
    check_name(name)
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    rest: list[nn.Parameter] = [p for p in sae.parameters() if p is not sae.W_dec]
    groups: list[dict[str, Any]] = [{"params": [sae.W_dec], "unit": True, "project": project}, {"params": rest}]
    optimizer = UnitRowAdam(groups, lr=lr, decoupled=name == "adamw", **settings)
    optimizer.register_step_post_hook(lambda *_: sae.after_step())
    return optimizer
