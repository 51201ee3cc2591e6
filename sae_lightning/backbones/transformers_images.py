"""From PIL images to a transformers model's input, as its image processor describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from sae_lightning.backbones.errors import BackboneError, reason
from sae_lightning.backbones.settings import Published
from sae_lightning.backbones.transformers_build import silent

# PIL's codes of resampling filters, as image processors give them
FILTERS = {
    0: InterpolationMode.NEAREST, 1: InterpolationMode.LANCZOS, 2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC, 4: InterpolationMode.BOX, 5: InterpolationMode.HAMMING,
}  # fmt: skip


def image_size_and_transform(wanted: Published, config: Any) -> tuple[int, Callable[[Image.Image], Tensor]]:
    """Size of the model's images and the way from PIL to them.

    The size is ``wanted.image_size``, else that of the image processor beside the weights, else the config's.
    Random weights have no processor; their images are squeezed to size and centred at 0. BackboneError if
    the processor cannot be had.
    """
    import transformers

    own = getattr(config, "image_size", None)
    if own is None:  # SigLIP 2 takes any size up to a number of patches
        own = int(config.num_patches**0.5) * config.patch_size
    if not wanted.pretrained:
        size = wanted.image_size or own
        return size, _pipeline((size, size), size, InterpolationMode.BICUBIC, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    source = wanted.weights or wanted.model
    try:
        with silent():
            processor = transformers.AutoImageProcessor.from_pretrained(source)
    except Exception as error:
        raise BackboneError(
            f"The image processor of '{source}' cannot be loaded: {reason(error)}. It says how images are scaled and "
            "normalised; put preprocessor_config.json beside the weights."
        ) from error
    size = wanted.image_size or _edge(processor) or own
    return size, processor_transform(processor, size)


def processor_transform(processor: Any, size: int) -> Callable[[Image.Image], Tensor]:
    """The steps of an image processor at ``size`` pixels: squeeze, or scale the shorter edge and cut the centre out."""
    short = (processor.size or {}).get("shortest_edge")
    resize: int | tuple[int, int] = (size, size)
    if short is not None:
        resize = round(short * size / (_edge(processor) or short))
    return _pipeline(resize, size, FILTERS[int(processor.resample)], processor.image_mean, processor.image_std)


def _edge(processor: Any) -> int | None:
    """Height of the images that a processor makes, if it makes all alike."""
    if processor.do_center_crop and processor.crop_size:
        return processor.crop_size["height"]
    return (processor.size or {}).get("height") or (processor.size or {}).get("shortest_edge")


def _pipeline(
    resize: int | tuple[int, int], size: int, resample: InterpolationMode, mean: Any, std: Any
) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(resize, interpolation=resample),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean=tuple(mean), std=tuple(std)),
        ]
    )
