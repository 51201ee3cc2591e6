"""The codes of all evaluated images, kept in a temporary file while they stream by and read back afterwards."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lightning.kernels.portable import offsets_of
from sae_lightning.saes import SparseCodes

PART = 1 << 22  # entries looked through at once


class LatentEntries(NamedTuple):
    """What m latents do on all images, one latent after another, images ascending.

    Latent i owns the entries ``offsets[i]:offsets[i + 1]`` of ``images`` [nnz] int64 and ``values`` [nnz] float32;
    ``offsets`` [m + 1] int64.
    """

    images: Tensor
    values: Tensor
    offsets: Tensor


class ImageCodes:
    """Codes of images, appended batch by batch; read back by image or by latent.

    8 bytes an entry (int32 latent, float32 value) lie in unnamed files in ``folder``, which vanish with the object
    and also when the process is killed; 8 bytes an image (its offset) in memory. 50,000 images with 500 active
    latents each take 200 MB of disk. Use it in a ``with`` block, or call ``close``.
    """

    def __init__(self, d_sae: int, folder: Path) -> None:
        self.d_sae = d_sae
        self._latents: IO[bytes] = TemporaryFile(dir=folder)  # noqa: SIM115
        self._values: IO[bytes] = TemporaryFile(dir=folder)  # noqa: SIM115
        self._counts = [torch.zeros(0, dtype=torch.long)]
        self._offsets: Tensor | None = None

    def __enter__(self) -> ImageCodes:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        self._latents.close()
        self._values.close()

    def append(self, codes: SparseCodes) -> None:
        """Add the codes of the next images, one sample each; ValueError for codes of another d_sae."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"Expected codes of {self.d_sae} latents; got {codes.d_sae}.")
        self._latents.write(codes.latents.to("cpu", torch.int32).numpy().tobytes())
        self._values.write(codes.values.detach().to("cpu", torch.float32).numpy().tobytes())
        self._counts.append(codes.counts().cpu())
        self._offsets = None

    def __len__(self) -> int:
        """Images."""
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        """Active latents of all images together."""
        return int(self.offsets[-1])

    @property
    def offsets(self) -> Tensor:
        """Where each image's entries begin and the last one's end, [n_images + 1] int64."""
        if self._offsets is None:
            self._counts = [torch.cat(self._counts)]
            self._offsets = offsets_of(self._counts[0])
        return self._offsets

    def images(self, index: slice) -> SparseCodes:
        """The codes of consecutive images, as they were appended (values in float32)."""
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"Images are read back in order, without leaving any out; got a step of {step}.")
        offsets = self.offsets[start : max(start, stop) + 1]
        span = slice(int(offsets[0]), int(offsets[-1]))
        latents, values = self._mapped()
        return SparseCodes(
            torch.from_numpy(latents[span].astype(np.int64)),
            torch.from_numpy(np.array(values[span])),
            offsets - offsets[0],
            self.d_sae,
        )

    def of_latents(self, latents: Tensor) -> LatentEntries:
        """All entries of these ``latents`` [m], each named once; reads the latents' file once, part by part."""
        if len(latents.unique()) != len(latents):
            raise ValueError("A latent is named twice; name each once.")
        place = np.full(self.d_sae, -1, dtype=np.int32)
        place[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
        stored, values = self._mapped()
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int32), np.zeros(0, np.int64))]
        for start in range(0, len(stored), PART):
            mine = place[stored[start : start + PART]]
            here = np.flatnonzero(mine >= 0)
            found.append((mine[here], here + start))
        owner, entry = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(owner, kind="stable")
        entry = entry[order]
        return LatentEntries(
            torch.searchsorted(self.offsets, torch.from_numpy(entry), right=True) - 1,
            torch.from_numpy(np.array(values[entry], dtype=np.float32)),
            offsets_of(torch.from_numpy(np.bincount(owner, minlength=len(latents)))),
        )

    def _mapped(self) -> tuple[np.ndarray, np.ndarray]:
        """Stored latents [nnz] int32 and values [nnz] float32, mapped read-only."""
        if not self.nnz:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._latents.flush()
        self._values.flush()
        return (
            np.memmap(self._latents, np.int32, "r", shape=(self.nnz,)),  # type: ignore[call-overload]
            np.memmap(self._values, np.float32, "r", shape=(self.nnz,)),  # type: ignore[call-overload]
        )
