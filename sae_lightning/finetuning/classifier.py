"""The classifier: an encoder, the added linear layer and the head, with one layer's output as activations."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lightning.backbones.hooks import block_outputs
from sae_lightning.finetuning.errors import FinetuneError

SHOWN = 40  # names of layers in an error


class Output(NamedTuple):
    """``logits`` [B, n_classes] and the chosen layer's ``activations`` [B, M], of any sign."""

    logits: Tensor
    activations: Tensor


class Classifier(nn.Module):
    """images [B, 3, H, W] → encoder → ``embedding`` [B, d] → ``added`` [B, d] → ``head`` [B, n_classes].

    ``pool`` runs ``encoder`` on images and gives its pooled output [B, d]. ``added`` is the linear layer of §4.2, as
    wide as the embedding, or nothing with ``added_layer=False``. ``layer`` names the module whose output is read as
    activations: ``added``, ``embedding``, ``head``, or one of the encoder's (``encoder.…``); positions of feature
    maps and tokens are averaged. FinetuneError for a name that is no module, or whose output is no features.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pool: Callable[[Tensor], Tensor],
        n_classes: int,
        image_size: int,
        layer: str = "added",
        added_layer: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.layer, self.image_size = encoder, layer, image_size
        self._pool = pool
        width = self._width()
        self.embedding = nn.Identity()
        self.added: nn.Module = nn.Linear(width, width) if added_layer else nn.Identity()
        self.head = nn.Linear(width, n_classes)
        self.check_layer()
        self.n_units = self._try_out()

    def forward(self, images: Tensor) -> Output:
        tapped = self.get_submodule(self.layer)
        seen, logits = block_outputs(lambda: self._classify(images), [tapped], [0], finish=True)
        if 0 not in seen:
            raise FinetuneError(f"layer={self.layer} takes no part in the forward pass; name another layer.")
        return Output(logits, self._pooled(seen[0]))

    def _classify(self, images: Tensor) -> Tensor:
        return self.head(self.added(self.embedding(self._pool(images))))

    def _pooled(self, output: Tensor) -> Tensor:
        """[B, M] from [B, M], tokens [B, T, M], or maps [B, M, H, W] ([B, H, W, M] where the encoder says so)."""
        if isinstance(output, Tensor) and output.ndim == 2:
            return output
        if isinstance(output, Tensor) and output.ndim == 3:
            return output.mean(1)
        if isinstance(output, Tensor) and output.ndim == 4:
            return output.mean((1, 2) if getattr(self.encoder, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise FinetuneError(
            f"layer={self.layer} gives {shape}, not one vector, tokens or feature maps an image; name another layer."
        )

    def check_layer(self) -> None:
        """FinetuneError that lists layers unless ``layer`` is one."""
        modules = [name for name, _ in self.named_modules() if name]
        if self.layer in modules:
            return
        near = difflib.get_close_matches(self.layer, modules, n=8)
        top = [name for name in modules if name.count(".") <= 1 and name not in near]
        names = list(dict.fromkeys([*near, "added", "embedding", "head", *top]))[:SHOWN]
        raise FinetuneError(f"There is no layer={self.layer}; choose one of {', '.join(names)}, or a module in them.")

    @torch.no_grad()
    def _width(self) -> int:
        return int(self._pool(self._black()).shape[1])

    @torch.no_grad()
    def _try_out(self) -> int:
        """Units of the layer, as one black image shows them."""
        training = self.training
        self.eval()
        units = self(self._black()).activations.shape[1]
        self.train(training)
        return int(units)

    def _black(self) -> Tensor:
        return torch.zeros(1, 3, self.image_size, self.image_size)
