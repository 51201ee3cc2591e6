"""The one interface of every vision-language model: pictures in, captions out, and the blocks in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from sae_lightning.backbones.backbone import block_outputs, list_of_blocks


class VLMError(ValueError):
    """A vision-language model that cannot be had, or a layer, picture or prompt that does not fit it."""


class Anatomy(NamedTuple):
    """The vision tower, its blocks in order, and the block (from 0) whose tokens the language model takes."""

    tower: Any
    blocks: Sequence[nn.Module]
    feature_layer: int


def anatomy(model: Any, tower: str | None = None, blocks: str | None = None) -> Anatomy:
    """The anatomy of ``model``; ``tower`` and ``blocks`` are dotted paths where the usual places do not hold.

    The tower is what transformers calls the encoder of images, its blocks the list of as many modules as its
    config names layers. VLMError when there is none.
    """
    found = _at(model, tower, "vlm.tower") if tower else model.get_encoder(modality="image")
    if not tower and found in (model, model.base_model):
        raise VLMError(f"{type(model).__name__} has no vision tower of a usual name; give its path as vlm.tower.")
    stack = list(_at(found, blocks, "vlm.blocks")) if blocks else _blocks(found)
    return Anatomy(found, stack, _feature_layer(model.config, len(stack)))


def _blocks(tower: nn.Module) -> list[nn.Module]:
    config: Any = getattr(tower, "config", None)
    depth = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None)
    if (found := list_of_blocks(tower, depth)) is not None:
        return found
    raise VLMError(
        f"{type(tower).__name__} has no list of {depth or 'as many'} blocks; give the list's path in the vision tower "
        "as vlm.blocks, for example encoder.layers."
    )


def _feature_layer(config: Any, depth: int) -> int:
    """``vision_feature_layer`` indexes the depth + 1 hidden states, of which the first is no block's."""
    named = getattr(config, "vision_feature_layer", None)
    if named is None:
        return depth - 1
    states = [named] if isinstance(named, int) else list(named)
    return max(state % (depth + 1) for state in states) - 1


def _at(module: Any, path: str, option: str) -> Any:
    for name in path.split("."):
        if not hasattr(module, name):
            raise VLMError(f"{option}={path} does not exist: {type(module).__name__} has no '{name}'.")
        module = getattr(module, name)
    return module


Edit = Callable[[Tensor], Tensor]  # tokens [B, special + P, d] of a block to others of that shape


class VLM:
    """A frozen transformers ``model`` with its ``processor``.

    ``title`` is what tables show, ``prompt`` what the model is asked of every picture, ``max_new_tokens`` and
    ``batch_size`` what ``captions`` uses unless told otherwise. ``tower`` and ``blocks`` are dotted paths of the
    vision tower in the model and of the list of its blocks in the tower, where they are not found by themselves;
    ``special_tokens`` likewise.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        title: str,
        prompt: str,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        tower: str | None = None,
        blocks: str | None = None,
        special_tokens: int | None = None,
    ) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.title, self.prompt, self.max_new_tokens, self.batch_size = title, prompt, max_new_tokens, batch_size
        processor.tokenizer.padding_side = "left"  # so that all captions of a batch start at one place
        self._anatomy: Anatomy = anatomy(model, tower, blocks)
        self._special_tokens = special_tokens

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vision_tower(self) -> nn.Module:
        return self._anatomy.tower

    @property
    def depth(self) -> int:
        """How many blocks the vision tower has."""
        return len(self._anatomy.blocks)

    @property
    def feature_layer(self) -> int:
        """The block (from 0) behind which the language model takes the tower's tokens; no later one has an effect.

        The last where the model's config names no ``vision_feature_layer``, the latest where it names several.
        """
        return self._anatomy.feature_layer

    def layer(self, i: int) -> nn.Module:
        """Block ``i`` of the vision tower, from 0 (or from the end); VLMError when there is none.

        transformers reads the tokens of a block by forward hooks of its own: a hook that changes them must be
        registered with ``prepend=True``, as ``editing`` does, or the change passes the language model by.
        """
        return self._anatomy.blocks[self.check_layer(i)]

    def check_layer(self, i: int) -> int:
        """``i`` counted from 0; VLMError when the vision tower has no such block."""
        if not -self.depth <= i < self.depth:
            raise VLMError(
                f"Layer {i} does not exist in the vision tower of {self.title}: it has 0 to {self.depth - 1}."
            )
        return i % self.depth

    @contextmanager
    def editing(self, i: int, edit: Edit) -> Iterator[None]:
        """Inside, the tokens [B, special + P, d] that block ``i`` gives are replaced by ``edit`` of them.

        VLMError when ``edit`` gives another shape. Dtype and device are those of the tower whatever ``edit`` gives.
        """

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output
            edited = edit(tokens)
            if edited.shape != tokens.shape:
                raise VLMError(
                    f"An edit of layer {i} made tokens {tuple(edited.shape)} of {tuple(tokens.shape)}; keep the shape."
                )
            edited = edited.to(tokens)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = self.layer(i).register_forward_hook(hook, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tower's patches, for the pictures that the processor makes."""
        height, width = self._inputs([_black()], self.prompt)["pixel_values"].shape[-2:]
        patch = getattr(self.vision_tower.config, "patch_size", None)
        if not isinstance(patch, int):
            raise VLMError(f"The vision tower of {self.title} names no patch size; its patches cannot be laid out.")
        return height // patch, width // patch

    @cached_property
    def special_tokens(self) -> int:
        """How many class and register tokens stand before the patches in the tower's tokens."""
        if self._special_tokens is not None:
            return self._special_tokens
        tokens = self._tokens([_black()], 0)
        rest = tokens.shape[1] - self.grid[0] * self.grid[1]
        if rest < 0 or tokens.ndim != 3:
            raise VLMError(
                f"The vision tower of {self.title} gives {tuple(tokens.shape)} for one picture, not a token a patch; "
                "set vlm.special_tokens."
            )
        return rest

    @torch.no_grad()
    def patch_tokens(self, images: Sequence[Image.Image], i: int, batch_size: int | None = None) -> Tensor:
        """What block ``i`` gives for the patches of ``images``, [n, P, d] float32 on the CPU; no special tokens."""
        step, skip = batch_size or self.batch_size, self.special_tokens
        parts = [self._tokens(images[at : at + step], i)[:, skip:].float().cpu() for at in range(0, len(images), step)]
        if not parts:
            raise VLMError("There are no pictures to encode; give at least one.")
        return torch.cat(parts)

    @torch.no_grad()
    def captions(
        self,
        images: Sequence[Image.Image],
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
    ) -> list[str]:
        """What the model says of each of ``images``, the most likely next token each time (greedy).

        The answer alone, without ``prompt``. A prompt without the model's image token is put into its chat
        template, or behind the picture where it has none. No images give no captions.
        """
        if isinstance(images, Image.Image):
            raise VLMError("captions takes a list of pictures; put the picture into a list.")
        settings = self._greedy(max_new_tokens or self.max_new_tokens)
        step, found = batch_size or self.batch_size, []
        for at in range(0, len(images), step):
            inputs = self._inputs(images[at : at + step], prompt or self.prompt)
            tokens = self.model.generate(**inputs, generation_config=settings)
            found += self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in found]

    def _greedy(self, max_new_tokens: int) -> Any:
        """The model's own generation config without chance."""
        settings = deepcopy(self.model.generation_config)
        settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        settings.update(max_new_tokens=max_new_tokens, max_length=None)
        if settings.pad_token_id is None:
            settings.pad_token_id = self.processor.tokenizer.pad_token_id
        return settings

    def _inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:
        text = self._with_image(prompt)
        pictures = [image.convert("RGB") for image in images]
        inputs = self.processor(text=[text] * len(pictures), images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.model.dtype)  # whole numbers keep their type

    def _with_image(self, prompt: str) -> str:
        token = getattr(self.processor, "image_token", "<image>")
        if token in prompt:
            return prompt
        if getattr(self.processor, "chat_template", None) is None:
            return f"{token}\n{prompt}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    @torch.no_grad()
    def _tokens(self, images: Sequence[Image.Image], i: int) -> Tensor:
        """All tokens [B, special + P, d] that block ``i`` gives; the tower runs no further."""
        layer, pixels = self.check_layer(i), self._inputs(images, self.prompt)["pixel_values"]
        return block_outputs(lambda: self.vision_tower(pixels), self._anatomy.blocks, [layer], finish=False)[0][layer]


def _black() -> Image.Image:
    return Image.new("RGB", (64, 64))
