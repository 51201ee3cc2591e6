"""The codes of all evaluated images, kept in files while they stream by and read back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.kernels.portable import offsets_of
from sae_lightning.saes import SparseCodes


class RowFile:
    """Rows [width] of one ``dtype`` in ``path`` (plain numbers where ``width`` is None), appended and mapped.

    A file that is there is cut to its first ``rows`` rows: what an interrupted process wrote after its last checkpoint
    goes. ValueError when it has fewer.
    """

    def __init__(self, path: Path, dtype: type[np.number], width: int | None = None, rows: int = 0) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self._row_bytes = self.dtype.itemsize * (width or 1)
        self._rows = rows
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115
        if self._file.tell() < rows * self._row_bytes:
            raise ValueError(f"{path} holds {self._file.tell() // self._row_bytes} rows; expected {rows}.")
        self._file.truncate(rows * self._row_bytes)

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    def append(self, rows: np.ndarray) -> None:
        """Add rows [n, width], or [n] numbers, in this file's dtype."""
        shape = (len(rows),) if self.width is None else (len(rows), self.width)
        if rows.shape != shape:
            raise ValueError(f"{self.path.name} takes rows of shape {list(shape)}; got {list(rows.shape)}.")
        self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        self._rows += len(rows)

    def mapped(self) -> np.ndarray:
        """All rows [n, width], or [n] numbers, mapped read-only."""
        shape = (self._rows,) if self.width is None else (self._rows, self.width)
        if not self._rows:
            return np.zeros(shape, self.dtype)
        if not self._file.closed:
            self._file.flush()
        return np.memmap(self.path, self.dtype, "r", shape=shape)

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()


BLOCK = 1 << 22  # entries looked through at once


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

    8 bytes an entry (int32 latent, float32 value) and 4 an image lie in three files in ``folder``, which a new object
    on the same folder finds again: ``images`` of them, or none. 50,000 images with 500 active latents each take
    200 MB.
    """

    def __init__(self, d_sae: int, folder: Path, images: int = 0) -> None:
        self.d_sae = d_sae
        self._counts = RowFile(folder / "codes-counts.i32", np.int32, rows=images)
        nnz = int(self._counts.mapped().sum(dtype=np.int64))
        self._latents = RowFile(folder / "codes-latents.i32", np.int32, rows=nnz)
        self._values = RowFile(folder / "codes-values.f32", np.float32, rows=nnz)
        self._offsets: Tensor | None = None

    @property
    def files(self) -> tuple[RowFile, ...]:
        """Where the codes lie."""
        return self._counts, self._latents, self._values

    def close(self) -> None:
        """Close the files, which stay."""
        for file in self.files:
            file.close()

    def append(self, codes: SparseCodes) -> None:
        """Add the codes of the next images, one sample each; ValueError for codes of another d_sae."""
        if codes.d_sae != self.d_sae:
            raise ValueError(f"Expected codes of {self.d_sae} latents; got {codes.d_sae}.")
        self._latents.append(codes.latents.to("cpu", torch.int32).numpy())
        self._values.append(codes.values.detach().to("cpu", torch.float32).numpy())
        self._counts.append(codes.counts().to("cpu", torch.int32).numpy())
        self._offsets = None

    def extend(self, others: ImageCodes) -> None:
        """Add all images of ``others``."""
        for mine, theirs in zip(self.files, others.files, strict=True):
            mine.append(theirs.mapped())
        self._offsets = None

    def __len__(self) -> int:
        """Images."""
        return len(self._counts)

    @property
    def nnz(self) -> int:
        """Active latents of all images together."""
        return len(self._latents)

    @property
    def offsets(self) -> Tensor:
        """Where each image's entries begin and the last one's end, [n_images + 1] int64."""
        if self._offsets is None:
            self._offsets = offsets_of(torch.from_numpy(self._counts.mapped().astype(np.int64)))
        return self._offsets

    def matrix(self) -> csr_matrix:
        """All codes as a scipy matrix [n_images, d_sae] float32, in memory."""
        latents, values = self._mapped()
        return csr_matrix((np.array(values), np.array(latents), self.offsets.numpy()), (len(self), self.d_sae))

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

    def batches(self, images: int = 4096) -> Iterator[SparseCodes]:
        """The codes of all images, some at a time."""
        return (self.images(slice(start, start + images)) for start in range(0, len(self), images))

    def of_latents(self, latents: Tensor) -> LatentEntries:
        """All entries of these ``latents`` [m], each named once; reads the latents' file once, part by part."""
        if len(latents.unique()) != len(latents):
            raise ValueError("A latent is named twice; name each once.")
        place = np.full(self.d_sae, -1, dtype=np.int32)
        place[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
        stored, values = self._mapped()
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int32), np.zeros(0, np.int64))]
        for start in range(0, len(stored), BLOCK):
            mine = place[stored[start : start + BLOCK]]
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
        return self._latents.mapped(), self._values.mapped()
