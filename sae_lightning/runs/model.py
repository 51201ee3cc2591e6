"""Pictures in, codes out: an SAE together with its encoder, from a run's folder or from a name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.natural import Natural
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.seen import seen_through
from sae_lightning.backbones.splice import Splice, spliced
from sae_lightning.backbones.taps import LAYER_KINDS, Tap
from sae_lightning.data.decode import to_rgb
from sae_lightning.features.extraction import Extraction
from sae_lightning.features.source import Source
from sae_lightning.rendering.pictures import heat, thumbnail
from sae_lightning.runs.importing import find, look, settled
from sae_lightning.runs.preflight import Preflight, Reader, Verdict, some_pictures
from sae_lightning.runs.record import FIGURES
from sae_lightning.runs.run import CFG, RESULT, Run
from sae_lightning.saes import SAE, SparseCodes

Picture = Image.Image | str | Path | Tensor
BATCH = 32  # pictures encoded at once
TOKENS = {"patch": "patch", "cls": "cls", "tokens": "all"}  # what a splice changes, by the kind of features


def open_model(name: str | Path, device: str | None = None, check: bool = True, **settings: object) -> Model:
    """The SAE of a run's folder, of a name in the registry, or of a release at a path or on the model hub, with its
    encoder.

    ``device`` is by default that of the record. With ``check`` it is looked at on a few pictures, and a warning says
    what fits better where its figures are not those that are stated. ``settings`` tell what a release does not:
    ``backbone="dinov2"``, ``layer=11``, ``features="patch"``, ``data="demo"``. ArtefactError, BackboneError or
    ValueError in a sentence.
    """
    if (Path(name) / CFG).is_file() and (Path(name) / RESULT).is_file():
        run = Run(Path(name))
        model, verdict = Model(run.sae, run.backbone, run.source.tap), preflight(run) if check else None
        where = run.source.extraction.device
    else:
        found = find(str(name))
        given = [f"{'backbone.layer' if key == 'layer' else key}={value}" for key, value in settings.items()]
        source = Source.of(settled(found, given))
        verdict, _ = look(found, source)
        model, where = Model(found.release.sae, load_backbone(source.backbone), source.tap), source.extraction.device
    if check and verdict is not None and not verdict.fits:
        warnings.warn(verdict.sentence, stacklevel=2)
    return model.to(device or str(Extraction(device=where).target()))


def preflight(run: Run, data: dict[str, object] | None = None, split: str = "val") -> Verdict:
    """How the SAE of a run stands on pictures of its own data, or of other ``data``, against what is stated of it.

    A run that was trained here states what its training measured.
    """
    images, shown = some_pictures(data or run.source.data, split)
    stated = run.cfg.get("stated", run.cfg.get("figures")) or run.result.get("val", {})
    stated = {name: value for name, value in stated.items() if name in FIGURES}
    return Preflight(run.sae, Reader(run.backbone, images), run.source.tap, stated, shown).verdict()


class Model:
    """An SAE and the encoder whose features it takes at ``tap``.

    Pictures are PIL images, paths, or tensors [3, H, W]: of uint8 any picture, of floats what the encoder's transform
    makes. P is the patches of ``grid`` (rows, columns), in reading order; 1 where a picture is one vector.
    """

    def __init__(self, sae: SAE, backbone: Backbone, tap: Tap) -> None:
        self.sae, self.backbone, self.tap = sae, backbone, backbone.check(tap)
        spatial = self.tap.kind in ("patch", "tokens")
        shape = backbone.shape_at(self.tap) if self.tap.kind in LAYER_KINDS else None
        self.grid = shape.grid if shape is not None and spatial else (1, 1)
        self.prefix = shape.prefix if shape is not None and self.tap.kind == "tokens" else 0

    def to(self, device: str) -> Model:
        """The same model, on ``device``."""
        self.sae, self.backbone = self.sae.to(device), self.backbone.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.sae.W_dec.device

    def pixels(self, images: Sequence[Picture] | Picture) -> Tensor:
        """What the encoder takes, [n, 3, H, W]."""
        many = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        return torch.stack([self._pixels(image) for image in many])

    def _pixels(self, image: Picture) -> Tensor:
        if isinstance(image, Tensor) and image.is_floating_point():
            return image.cpu()
        return self.backbone.transform(picture(image))

    @torch.no_grad()
    def features(self, images: Sequence[Picture] | Picture) -> Tensor:
        """Raw features [n, P, d_in] float32 of pictures, on the CPU."""
        many = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        parts = []
        for start in range(0, len(many), BATCH):
            batch = self.pixels(many[start : start + BATCH]).to(self.device)
            found = self.backbone.forward_features(batch, [self.tap])[self.tap].float().cpu()
            parts.append(found[:, self.prefix :] if found.ndim == 3 else found[:, None])
        return torch.cat(parts)

    @torch.no_grad()
    def codes(self, features: Tensor) -> SparseCodes:
        """The codes of features [n, P, d_in], a sample a patch, on the CPU."""
        codes = self.sae.encode(features.to(self.device))
        return SparseCodes(codes.latents.cpu(), codes.values.float().cpu(), codes.offsets.cpu(), codes.d_sae)

    def encode_images(self, images: Sequence[Picture] | Picture) -> Tensor:
        """Codes of pictures on the patch grid: a sparse tensor [n, P, d_sae]; ``to_dense`` makes it a usual one."""
        features = self.features(images)
        codes, (n, patches) = self.codes(features), features.shape[:2]
        rows = codes.rows()
        index = torch.stack([rows // patches, rows % patches, codes.latents])
        return torch.sparse_coo_tensor(
            index, codes.values, (n, patches, codes.d_sae), check_invariants=False
        ).coalesce()

    def top(self, images: Sequence[Picture] | Picture, n: int = 5) -> tuple[Tensor, Tensor]:
        """The ``n`` strongest latents of each picture, by their largest value on it: latents and values [N, n]."""
        features = self.features(images)
        dense = self.codes(features).pool(features.shape[1]).to_dense()
        values, latents = dense.topk(min(n, dense.shape[1]), dim=1)
        return latents, values

    def overlay(self, image: Picture, latent: int, side: int = 224) -> Image.Image:
        """What the encoder sees of a picture, tinted where ``latent`` fires; ValueError without patches."""
        if self.grid == (1, 1):
            raise ValueError(f"{self.tap} gives one vector a picture, so there is nothing to lay over it.")
        codes = self.encode_images([image])[0].to_dense()
        if not 0 <= latent < codes.shape[1]:
            raise ValueError(f"The SAE has latents 0 to {codes.shape[1] - 1}; latent {latent} was asked for.")
        shown = thumbnail(seen_through(self.backbone.transform)(picture(image)), side)
        return heat(shown, codes[:, latent].reshape(self.grid).numpy().astype(np.float32))

    @contextmanager
    def spliced(self, mode: str, latents: Sequence[int] | int | None = None, by: str = "zero",
                amount: float | None = None, natural: Natural | None = None) -> Iterator[Splice]:  # fmt: skip
        """Inside, the encoder computes with what the SAE makes of its features (``backbones.splice``)."""
        if self.tap.kind not in TOKENS:
            raise ValueError(f"{self.tap} is the encoder's end; what is changed inside must be a layer's tokens.")
        how = {"at": self.tap, "tokens": TOKENS[self.tap.kind], "amount": amount, "natural": natural}
        with spliced(self.backbone, self.sae, mode, latents, by, **how) as splice:  # type: ignore[arg-type]
            yield splice

    def ablate(self, images: Sequence[Picture] | Picture, latents: Sequence[int]) -> Tensor:
        """What the encoder says of pictures [n, d] while ``latents`` are zero; what the SAE misses stays."""
        with self.spliced("ablate", latents):
            return self.output(images)

    def steer(self, images: Sequence[Picture] | Picture, latents: Sequence[int], amount: float) -> Tensor:
        """What the encoder says of pictures [n, d] while ``amount`` is added to ``latents`` on every token."""
        with self.spliced("steer", latents, amount=amount):
            return self.output(images)

    def output(self, images: Sequence[Picture] | Picture) -> Tensor:
        """What the encoder says of pictures, [n, d]: its embedding, else its pooled output, else the mean patch."""
        batch = self.pixels(images).to(self.device)
        found = self.backbone.output(batch)
        if found is None:
            last = Tap("patch", self.backbone.depth - 1)
            found = self.backbone.forward_features(batch, [last])[last].mean(1)
        return found.float().cpu()


def picture(image: Picture) -> Image.Image:
    """``image`` as an RGB picture; ValueError for floats, whose colours are not known."""
    if isinstance(image, Tensor):
        if image.is_floating_point():
            raise ValueError("A tensor of floats holds no colours to show; give a picture, a path, or uint8 [3, H, W].")
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    return image.convert("RGB") if isinstance(image, Image.Image) else to_rgb(Path(image).read_bytes(), str(image))
