"""What the pass finds out about single latents, as files in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_lightning.benchmark.bands import bands, ranked, spread_ranks
from sae_lightning.benchmark.image_codes import ImageCodes
from sae_lightning.benchmark.top_images import TopImages
from sae_lightning.features.store import FeatureStore
from sae_lightning.saes import SAE, ArtefactError
from sae_lightning.saes.artefact import write_tensors

LATENTS, TOP_IMAGES, BAND_IMAGES = "latents.safetensors", "top_images.safetensors", "bands.safetensors"


def save_top_images(
    run: Path, sae: SAE, store: FeatureStore, images: Tensor, top: TopImages, counts: Tensor, purity: Tensor,
    label: Tensor, chosen: dict[str, Tensor],
) -> None:  # fmt: skip
    """The chosen latents with the first of their top ``images`` [d_sae, n] and the patch activations there (fp16)."""
    latents = torch.cat(list(chosen.values()))
    images = images[latents]
    tensors = {
        "latents": latents,
        "group": torch.cat([torch.full((len(v),), i) for i, v in enumerate(chosen.values())]),
        "images": images,
        "maps": activation_maps(sae, store, latents, images).half(),
        "firing_share": counts[latents] / store.n_tokens,
        "images_fired": top.images_fired[latents],
        "peak": top.peaks()[latents],
        "purity": purity[latents],
        "label": label[latents],
        "counts": counts,
    }
    metadata = {
        "groups": "|".join(chosen), "grid": "x".join(map(str, store.grid)), "image_ids": _ids(store, images)
    }  # fmt: skip
    write_tensors(run / TOP_IMAGES, tensors, metadata)


def save_bands(
    run: Path, store: FeatureStore, codes: ImageCodes, monoscores: Tensor, n_ranks: int, n_images: int
) -> None:
    """The top, middle and bottom images of the latents at ``n_ranks`` MonoScore ranks spread over all of them.

    ``ranks`` and ``latents`` [r], ``monoscore`` [r], ``images`` and ``values`` [r, 3, n_images]; images as rows of the
    store, -1 where there is none.
    """
    ranks = spread_ranks(len(monoscores), n_ranks)
    latents = ranked(monoscores)[ranks]
    images, values = bands(codes, latents, n_images)
    tensors = {
        "ranks": ranks, "latents": latents, "monoscore": monoscores[latents], "images": images, "values": values
    }  # fmt: skip
    write_tensors(run / BAND_IMAGES, tensors, {"image_ids": _ids(store, images)})


def activation_maps(sae: SAE, store: FeatureStore, latents: Tensor, images: Tensor) -> Tensor:
    """Activations [n, m, P] of each of ``latents`` [n] on the patches of its ``images`` [n, m] (-1: none, zeros)."""
    maps = torch.zeros(*images.shape, store.n_patches)
    columns, column_of = latents.unique(return_inverse=True)  # a latent may be named twice
    column = torch.full((sae.d_sae,), -1)
    column[columns] = torch.arange(len(columns))
    for some in images[images >= 0].unique().split(64):
        codes = sae.encode(store.features(some))
        here = column[codes.latents] >= 0
        part = torch.zeros(len(some) * store.n_patches, len(columns))
        part[codes.rows()[here], column[codes.latents[here]]] = codes.values[here].float()
        part = part.view(len(some), store.n_patches, len(columns))
        n, m = torch.isin(images, some).nonzero(as_tuple=True)
        maps[n, m] = part[torch.searchsorted(some, images[n, m]), :, column_of[n]]
    return maps


def put_tensors(path: Path, tensors: dict[str, Tensor], anew: bool = False) -> None:
    """Write tensors into a safetensors file beside those that it holds, or with ``anew`` in place of them."""
    held = {} if anew or not path.is_file() else read_tensors(path)[0]
    write_tensors(path, held | tensors)


def tensor_names(path: Path) -> set[str]:
    """The names of a safetensors file's tensors; none where there is no file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError):
        return set()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; ArtefactError where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); make it anew: python evaluate.py runs={path.parent.name}."
        ) from error


def _ids(store: FeatureStore, images: Tensor) -> str:
    """Ids of the images (rows of the store, -1 none) as JSON, by row."""
    return json.dumps({str(i): store.image_ids[i] for i in images[images >= 0].unique().tolist()})
