"""The five training objectives, each a module with ``loss(cifar, index) -> Tensor`` on a batch of image indices.

Token dropping (half of the patch tokens, as in FLIP and PatchDropout) halves the cost of the three
discriminative objectives; their last epochs see all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.demo_data.captions import vocabulary
from experiments.tiny_backbones.cifar import Cifar, colour_jitter, normalise, random_resized_crop
from sae_lightning.backbones.tiny import PATCH_SIZE, WIDTH, TinyTextTower, tiny_vit
from sae_lightning.data.bundled import CIFAR10_CLASSES


def embed(vit: nn.Module, images: Tensor, mask_token: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
    """Patch tokens [B, P, WIDTH] with positions, before the blocks; ``masked`` [B, P] takes the mask token."""
    tokens = vit.patch_embed(images)  # [B, h, w, WIDTH], the model being of dynamic size
    _, height, width, _ = tokens.shape
    tokens = tokens.flatten(1, 2)
    if masked is not None:
        tokens = torch.where(masked.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
    position = vit.pos_embed[:, vit.num_prefix_tokens :]
    side = round(position.shape[1] ** 0.5)
    if (height, width) != (side, side):
        square = position.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2).float()
        square = F.interpolate(square, (height, width), mode="bicubic", align_corners=False)
        position = square.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)
    return tokens + position


def keep_random(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` random tokens of each row and their indices [B, count]."""
    index = torch.rand(tokens.shape[:2]).argsort(1)[:, :count]
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2])), index


def run_blocks(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Class token in front (where there is one), all blocks, final norm."""
    if vit.cls_token is not None:
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], 1)
    return vit.norm(vit.blocks(tokens))


class Paradigm(nn.Module):
    """A tiny ViT with what its objective needs around it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vit = tiny_vit(name)
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # CPU: bf16 flash attention's backward costs more than all products
        self.keep = 32  # patch tokens kept in training; the last epochs keep all 64

    @property
    def dtype(self) -> torch.dtype:
        return self.vit.cls_token.dtype if self.vit.cls_token is not None else self.vit.pos_embed.dtype

    def pooled(self, images: Tensor) -> Tensor:
        tokens = embed(self.vit, images.to(self.dtype))
        if self.training and self.keep < tokens.shape[1]:
            tokens, _ = keep_random(tokens, self.keep)
        return self.vit.forward_head(run_blocks(self.vit, tokens))

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step with the share of training done."""

    def extra_weights(self) -> dict[str, Tensor]:
        """Weights to ship beside the ViT's."""
        return {}


class Supervised(Paradigm):
    """DeiT's recipe without its teacher: crops, colour jitter, mixup and label smoothing."""

    def __init__(self) -> None:
        super().__init__("deit")
        self.head = nn.Linear(WIDTH, len(CIFAR10_CLASSES))

    def loss(self, cifar: Cifar, index: Tensor) -> Tensor:
        x = random_resized_crop(normalise(cifar.images[index]), 32, (0.35, 1.0))
        x = colour_jitter(x, 0.3)
        target = F.one_hot(cifar.labels[index], len(CIFAR10_CLASSES)).float()
        share = float(torch.distributions.Beta(0.2, 0.2).sample())
        x, target = share * x + (1 - share) * x.flip(0), share * target + (1 - share) * target.flip(0)
        return F.cross_entropy(self.head(self.pooled(x)).float(), target, label_smoothing=0.1)


class ImageText(Paradigm):
    """CLIP's softmax or SigLIP's sigmoid loss; pairs with the same caption count as matching."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sigmoid = name == "siglip"
        self.text = TinyTextTower(vocabulary(CIFAR10_CLASSES))
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3 if self.sigmoid else 2.66))
        self.bias = nn.Parameter(torch.tensor(-5.0))
        self._tokens: Tensor | None = None

    def loss(self, cifar: Cifar, index: Tensor) -> Tensor:
        if self._tokens is None:
            self._tokens = self.text.tokenize(cifar.captions)
        x = random_resized_crop(normalise(cifar.images[index]), 32, (0.45, 1.0))
        words = self._tokens[index]
        image = F.normalize(self.project(self.pooled(x)).float(), dim=-1)
        text = F.normalize(self.text.encode_tokens(words).float(), dim=-1)
        logits = image @ text.T * self.log_scale.float().clamp(max=4.6).exp()
        match = (words.unsqueeze(0) == words.unsqueeze(1)).all(-1).float()
        if self.sigmoid:
            return F.binary_cross_entropy_with_logits(logits + self.bias.float(), match, reduction="sum") / len(x)
        target = match / match.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    def extra_weights(self) -> dict[str, Tensor]:
        towers = {f"text.{k}": v for k, v in self.text.state_dict().items()}
        return towers | {"project.weight": self.project.weight, "logit_scale": self.log_scale, "logit_bias": self.bias}


class MaskedAutoencoder(Paradigm):
    """MAE: a quarter of the tokens encoded, a narrow decoder, squared error on normalised masked patches."""

    def __init__(self) -> None:
        super().__init__("mae")
        self.keep = 16
        width, patches = 64, 64
        self.enter = nn.Linear(WIDTH, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, 3 * PATCH_SIZE**2)

    def loss(self, cifar: Cifar, index: Tensor) -> Tensor:
        x = random_resized_crop(normalise(cifar.images[index]), 32, (0.4, 1.0))
        seen, kept = keep_random(embed(self.vit, x.to(self.dtype)), self.keep)
        seen = self.enter(run_blocks(self.vit, seen)[:, 1:])
        place = kept.unsqueeze(-1).expand_as(seen)
        tokens = self.mask_token.expand(len(x), self.position.shape[1], -1).scatter(1, place, seen)
        out = self.leave(self.decoder(tokens + self.position)).float()
        target = F.unfold(x, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-4).sqrt()
        hidden = torch.ones(target.shape[:2]).scatter(1, kept, 0.0)
        return ((out - target).square().mean(-1) * hidden).sum() / hidden.sum()


class SelfDistillation(Paradigm):
    """DINOv2 in small: EMA teacher, two global and four local crops, class-token and masked-patch losses."""

    def __init__(self, prototypes: int = 1024) -> None:
        super().__init__("dinov2")
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.head, self.teacher_head = self._head(prototypes), self._head(prototypes)
        self.teacher = tiny_vit("dinov2")
        for block in self.teacher.blocks:
            block.attn.fused_attn = False
        self.teacher.load_state_dict(self.vit.state_dict())
        self.teacher_head.load_state_dict(self.head.state_dict())
        for weight in self._teacher_weights():
            weight.requires_grad_(False)
        # bf16 would round the teacher's small steps away: its average lives in fp32 beside it
        for i, weight in enumerate(self._teacher_weights()):
            self.register_buffer(f"average_{i}", weight.detach().clone())

    def _teacher_weights(self) -> list[nn.Parameter]:
        return [*self.teacher.parameters(), *self.teacher_head.parameters()]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Cast and move as usual, but keep the averages in fp32."""
        averages = {n: b for n, b in self.named_buffers() if n.startswith("average_")}
        super()._apply(fn, recurse)
        for name, average in averages.items():
            setattr(self, name, average.to(getattr(self, name).device))
        return self

    @staticmethod
    def _head(prototypes: int) -> nn.Module:
        class Head(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mlp = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
                self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

            def forward(self, x: Tensor) -> Tensor:
                return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T

        return Head()

    @staticmethod
    @torch.no_grad()
    def _assign(scores: Tensor, temperature: float) -> Tensor:
        """Sinkhorn-Knopp assignments [N, prototypes] of the teacher's scores: three rounds, rows sum to one."""
        q = (scores.float() / temperature).exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True).clamp_min(1e-9)
            q = q / q.sum(1, keepdim=True)
        return q

    def loss(self, cifar: Cifar, index: Tensor) -> Tensor:
        pixels = normalise(cifar.images[index])

        def crop(size: int, scale: tuple[float, float]) -> Tensor:
            return colour_jitter(random_resized_crop(pixels, size, scale), 0.4, grey=0.15).to(self.dtype)

        first, second = crop(32, (0.4, 1.0)), crop(32, (0.4, 1.0))
        count, patches = len(index), 64
        with torch.no_grad():
            seen = run_blocks(self.teacher, embed(self.teacher, torch.cat([first, second])))
            classes = self._assign(self.teacher_head(seen[:, 0]), 0.06)
            masked = torch.zeros(count, patches).scatter(1, torch.rand(count, patches).argsort(1)[:, :26], 1).bool()
            targets = self._assign(self.teacher_head(seen[:count, 1:][masked]), 0.06)

        student = run_blocks(self.vit, embed(self.vit, first, self.mask_token, masked))
        local = torch.cat([crop(16, (0.1, 0.4)) for _ in range(4)])
        small = run_blocks(self.vit, embed(self.vit, local))

        def cross(target: Tensor, tokens: Tensor) -> Tensor:
            return -(target * (self.head(tokens).float() / 0.1).log_softmax(-1)).sum(-1).mean()

        one, two = classes[:count], classes[count:]
        both = ((one + two) / 2).repeat(4, 1)
        spread = F.normalize(student[:, 0].float(), dim=-1)  # KoLeo: push apart nearest neighbours
        nearest = (spread @ spread.T - 2 * torch.eye(count)).max(1).values
        koleo = -(2 - 2 * nearest).clamp_min(1e-6).sqrt().log().mean()
        return (
            0.3 * cross(two, student[:, 0]) + 0.7 * cross(both, small[:, 0])
            + cross(targets, student[:, 1:][masked]) + 0.1 * koleo
        )  # fmt: skip

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = 0.992 + 0.007 * progress
        students = [*self.vit.parameters(), *self.head.parameters()]
        for i, (teacher, student) in enumerate(zip(self._teacher_weights(), students, strict=True)):
            average = getattr(self, f"average_{i}")
            average.lerp_(student.float(), 1 - momentum)
            teacher.copy_(average)


def paradigm(name: str) -> Paradigm:
    """The objective that trains the tiny backbone ``name``."""
    if name in ("clip", "siglip"):
        return ImageText(name)
    return {"dinov2": SelfDistillation, "mae": MaskedAutoencoder, "deit": Supervised}[name]()
