"""Train one tiny backbone on CIFAR-10: ``python -m experiments.tiny_backbones.train dinov2 --data train.parquet``.

bf16 weights with fp32 masters, AdamW, warm-up, a constant rate and a linear decay at the end, an
exponential average of the weights. A checkpoint a minute; the same line again resumes from it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.tiny_backbones import cifar as cifar10
from experiments.tiny_backbones.paradigms import Paradigm, paradigm

# epochs, batch, peak learning rate; the first three see half of the tokens, MAE a quarter, DINOv2 six crops
RECIPES = {
    "deit": (8, 256, 1.5e-3),
    "clip": (8, 256, 1.5e-3),
    "siglip": (8, 256, 1.5e-3),
    "mae": (20, 256, 1.5e-3),
    "dinov2": (6, 128, 1.0e-3),
}
WARMUP, DECAY = 0.05, 0.35  # shares of all steps
ALL_TOKENS_FROM = 0.9  # the discriminative objectives drop no tokens after this share


class MasterWeights:
    """AdamW on fp32 copies of bf16 parameters, with an exponential average of the copies."""

    def __init__(self, module: Paradigm, rate: float, weight_decay: float = 0.05) -> None:
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.live = [p for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.live]
        self.average = [m.detach().clone() for m in self.masters]
        matrices = [m for m in self.masters if m.ndim == 2]
        vectors = [m for m in self.masters if m.ndim != 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    def step(self, rate: float, average_momentum: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate
        for live, master in zip(self.live, self.masters, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.masters, 1 - average_momentum)
            for live, master in zip(self.live, self.masters, strict=True):
                live.copy_(master)

    def averaged(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))


def rate_at(progress: float, peak: float) -> float:
    """Warm-up, constant, linear decay."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * min(1.0, (1 - progress) / DECAY)


def train(name: str, data: Path, work: Path, epochs: float | None = None) -> Path:
    """Train (or go on training) the backbone ``name``; returns the folder with its checkpoint."""
    default_epochs, batch, peak = RECIPES[name]
    epochs = epochs or default_epochs
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(42)
    cifar = cifar10.load(data)
    module = paradigm(name).to(torch.bfloat16).train()
    for p in module.parameters():
        p.data = p.data.contiguous()
    weights = MasterWeights(module, peak)
    steps, step = int(epochs * len(cifar) / batch), 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        step = saved["step"]
        module.load_state_dict(saved["module"])
        weights.adam.load_state_dict(saved["adam"])
        with torch.no_grad():
            for kind in ("masters", "average"):
                for ours, theirs in zip(getattr(weights, kind), saved[kind], strict=True):
                    ours.copy_(theirs)
        print(f"{name}: resuming at step {step} of {steps}", flush=True)

    def save() -> None:
        state = {
            "step": step, "module": module.state_dict(), "adam": weights.adam.state_dict(),
            "masters": [m.detach() for m in weights.masters], "average": weights.average,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)
        if step / steps < 1 - DECAY:
            shutil.copyfile(checkpoint, folder / "stable.pt")  # to go on from here with more epochs
        export(name, module, weights.averaged(), folder / "model.safetensors")

    start = last_saved = time.monotonic()
    first, losses = step, []
    while step < steps:
        progress = step / steps
        if name in ("deit", "clip", "siglip") and progress >= ALL_TOKENS_FROM:
            module.keep = 64
        epoch, place = divmod(step, len(cifar) // batch)
        generator = torch.Generator().manual_seed(1000 + epoch)
        order = torch.randperm(len(cifar), generator=generator)
        index = order[place * batch : (place + 1) * batch]
        torch.manual_seed(step)
        with sdpa_kernel(SDPBackend.MATH):
            loss = module.loss(cifar, index)
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: the loss is {loss.item()} at step {step}; the last checkpoint is sound.")
        loss.backward()
        weights.step(rate_at(progress, peak), min(0.999, (1 + step) / (10 + step)))
        module.after_step(progress)
        losses.append(loss.item())
        step += 1
        if time.monotonic() - last_saved > 60 or step == steps:
            speed = (step - first) * batch / (time.monotonic() - start)
            left = (steps - step) * batch / speed / 60
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"{name}: step {step}/{steps}  loss {mean:.4f}  {speed:.0f} images/s  {left:.0f} min left", flush=True
            )
            save()
            last_saved = time.monotonic()
    return folder


def export(name: str, module: Paradigm, averaged: dict[str, Tensor], path: Path) -> None:
    """Write the averaged ViT (the teacher for DINOv2) and the text tower as fp16 safetensors."""
    current = {k: averaged.get(k, v) for k, v in module.state_dict().items()}
    prefix = "teacher." if name == "dinov2" else "vit."
    tensors = {k.removeprefix(prefix): v for k, v in current.items() if k.startswith(prefix)}
    tensors |= {k: current.get(k, v) for k, v in module.extra_weights().items()}
    if name in ("clip", "siglip"):
        tensors |= {"logit_scale": averaged["log_scale"], "logit_bias": averaged["bias"]}
    half = {k: v.detach().to(torch.float16).contiguous().clone() for k, v in tensors.items()}
    save_file(half, path.with_suffix(".tmp"), metadata={"backbone": f"{name} (tiny)", "data": "CIFAR-10 train"})
    path.with_suffix(".tmp").rename(path)
    load_file(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's train split (parquet, image + label)")
    parser.add_argument("--work", type=Path, default=Path(".work/tiny_backbones"))
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.name, args.data, args.work, args.epochs)


if __name__ == "__main__":
    main()
