"""From PIL images to a transformers model's input, as its image processor makes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from sae_lightning.backbones.backbone import BackboneError, reason
from sae_lightning.backbones.settings import Published


class MiddleCrop(transforms.CenterCrop):
    """Cuts the middle out of a picture as transformers does: of two middles the upper left one, black around it."""

    upper_left = True  # masks follow it so (data/geometry.py)

    def forward(self, img: Image.Image) -> Image.Image:
        (height, width), (across, down) = self.size, img.size
        left, top = (across - width) // 2, (down - height) // 2
        return img.crop((left, top, left + width, top + height))


@contextmanager
def silent() -> Iterator[None]:
    """Without transformers' warnings, such as its table of tensors that belong to other parts of a checkpoint, and
    without its bars; those of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# PIL's codes of resampling filters, as image processors give them
FILTERS = {
    0: InterpolationMode.NEAREST, 1: InterpolationMode.LANCZOS, 2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC, 4: InterpolationMode.BOX, 5: InterpolationMode.HAMMING,
}  # fmt: skip

PLACING = ("resize", "center_crop")  # what a processor does to the places of pixels …

DOING = (*PLACING, "preprocess", "_preprocess", "process_image", "rescale", "normalize", "pad")  # … and all it does

Transform = Callable[[Image.Image], Tensor]


def image_size_and_transform(wanted: Published, config: Any) -> tuple[int, Transform]:
    """Size of the model's images and the way from PIL to them.

    The size is ``wanted.image_size``, else that of the image processor beside the weights, else the config's.
    Random weights have no processor; their images are squeezed to size and centred at 0. BackboneError if
    the processor cannot be had, or makes something else than square pictures of that size.
    """
    import transformers

    own = getattr(config, "image_size", None)
    if own is None:  # SigLIP 2 takes any size up to a number of patches
        own = int(config.num_patches**0.5) * config.patch_size
    if not wanted.pretrained:
        size = wanted.image_size or own
        squeeze = transforms.Resize((size, size), interpolation=InterpolationMode.BICUBIC)
        return size, transforms.Compose([squeeze, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    source = wanted.weights or wanted.model
    try:
        with silent():
            processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
    except Exception as error:
        raise BackboneError(
            f"The image processor of '{source}' cannot be loaded: {reason(error)}. It says how images are scaled and "
            "normalised; put preprocessor_config.json beside the weights."
        ) from error
    size = wanted.image_size or _edge(processor) or own
    transform = processor_transform(processor, size)
    _try_out(transform, size, str(source))
    return size, transform


def processor_transform(processor: Any, size: int) -> Transform:
    """What the image processor ``processor`` makes of a picture, its sizes in proportion so that ``size`` comes out.

    Where it does no more than resize, cut out the middle, rescale and normalise with Pillow, these are torchvision's
    steps, which give the same numbers faster; otherwise the processor itself runs.
    """
    processor = _resized(processor, size)
    steps = _steps(processor, size)
    if steps is not None and (_is_plain(processor, "PilBackend", DOING) or _cuts_patches(processor)):
        return transforms.Compose(steps)
    followed = any(_is_plain(processor, kind, PLACING) for kind in ("PilBackend", "TorchvisionBackend"))
    return Processed(processor, steps if followed else None)


class Processed:
    """An image processor as a transform.

    ``transforms`` are torchvision's steps that place pixels and scale values as it does, for masks and augmentation; it
    is missing where there are none.
    """

    def __init__(self, processor: Any, steps: list[Any] | None) -> None:
        self.processor = processor
        if steps is not None:
            self.transforms = steps

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = self.processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(np.asarray(pixels)).float()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.processor.to_json_string()})"


def _given(size: Any) -> dict[str, int]:
    """The entries of a processor's size that are set."""
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _edge(processor: Any) -> int | None:
    """Height of the images that a processor makes, if it makes all alike."""
    crop, size = _given(getattr(processor, "crop_size", None)), _given(getattr(processor, "size", None))
    if getattr(processor, "do_center_crop", None) and crop:
        return crop["height"]
    if not getattr(processor, "do_resize", None) and not _cuts_patches(processor):
        return None
    return size.get("height") or size.get("shortest_edge")


def _resized(processor: Any, size: int) -> Any:
    """``processor`` itself, or a copy with all its sizes in proportion so that it makes images of ``size``."""
    edge = _edge(processor)
    if edge in (None, size):
        return processor
    processor = copy.deepcopy(processor)
    for name in ("size", "crop_size"):
        given = getattr(processor, name, None)
        if given:
            setattr(processor, name, type(given)(**{key: round(v * size / edge) for key, v in _given(given).items()}))
    return processor


def _steps(processor: Any, size: int) -> list[Any] | None:
    """Torchvision's steps that do what the flags of ``processor`` say, or None where they can not.

    Its rescaling is part of mean and spread, as ToTensor already divides by 255.
    """
    asked, cut = _given(getattr(processor, "size", None)), _given(getattr(processor, "crop_size", None))
    steps: list[Any] = []
    if _cuts_patches(processor):
        asked = {"height": size, "width": size}
    if getattr(processor, "do_pad", None):
        return None
    if getattr(processor, "do_resize", None):
        if set(asked) not in ({"height", "width"}, {"shortest_edge"}):
            return None
        to = asked.get("shortest_edge") or (asked["height"], asked["width"])
        steps.append(transforms.Resize(to, interpolation=FILTERS[int(processor.resample)]))
    if getattr(processor, "do_center_crop", None):
        steps.append(MiddleCrop((cut["height"], cut["width"])))
    steps.append(transforms.ToTensor())
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (tuple(float(v) for v in np.broadcast_to(values, 3) / scale) for values in (mean, std))
    if (mean, std) != ((0.0,) * 3, (1.0,) * 3):
        steps.append(transforms.Normalize(mean=mean, std=std))
    return steps


def _cuts_patches(processor: Any) -> bool:
    """Whether it gives patches in place of pictures, as SigLIP 2's; then pictures are squeezed, and cut by us."""
    return hasattr(processor, "max_num_patches")


def _is_plain(processor: Any, backend: str, methods: tuple[str, ...]) -> bool:
    """Whether the ``methods`` of ``processor`` are those of transformers' ``backend``."""
    try:
        from transformers import image_processing_backends as backends
    except ImportError:  # of an older transformers: each processor runs itself
        return False
    base = getattr(backends, backend)
    return isinstance(processor, base) and all(
        getattr(type(processor), name) is getattr(base, name) for name in methods
    )


def _try_out(transform: Transform, size: int, source: str) -> None:
    """BackboneError unless a picture of ``size`` becomes [3, size, size]."""
    try:
        shape = tuple(transform(Image.new("RGB", (size, size))).shape)
    except Exception as error:
        raise BackboneError(f"The image processor of '{source}' does not work: {reason(error)}.") from error
    if shape != (3, size, size):
        raise BackboneError(
            f"The image processor of '{source}' makes {list(shape)} of a picture of {size} x {size} pixels; expected "
            f"{[3, size, size]}. Choose another encoder, or change the sizes in its preprocessor_config.json."
        )
