"""One run, opened for the page: its codes by latent, what is known of each, and the pictures behind them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.apps.codes import as_csr
from sae_lightning.apps.explorer.by_latent import ByLatent
from sae_lightning.apps.explorer.columns import TOP, evaluation_of, known, percentiles
from sae_lightning.apps.explorer.refused import RefusedError
from sae_lightning.apps.explorer.uploads import Uploads
from sae_lightning.apps.names import names_of
from sae_lightning.apps.opened import Opened
from sae_lightning.data.decode import decode

KINDS = ("images", "uploads")
ENCODED = 256  # pictures whose codes of patches are kept


class Picked(NamedTuple):
    """A picture by number: of the ``images`` of the split, or of the ``uploads``."""

    kind: str
    number: int


class Book:
    """The run ``opened`` over the pictures of ``split``; ``uploads`` are those of the user, encoded on ``device``.

    Picture i is row i of the store. Its methods may be called from several threads; one encodes at a time.
    Raises DataError, StoreError or BackboneError with a sentence for a run without pictures or features.
    """

    def __init__(self, opened: Opened, split: str, uploads: Uploads, device: str = "cpu") -> None:
        self.opened, self.split, self.device = opened, split, device
        self.store, self.pictures, self.uploads = opened.store(split), opened.images(split), uploads
        self._place = self.pictures.index_of(self.store.image_ids)
        self.labels, self.class_names = self.store.labels, self.store.class_names
        self.codes = opened.codes(split)
        self.by_latent = ByLatent(self.codes)
        self.top = self.by_latent.top(TOP)
        self.names = names_of(opened)
        tensors, n_tokens = evaluation_of(opened.folder, split) or (None, 0)
        self.known = known(
            self.codes, self.top, self.labels, len(self.class_names), opened.features(split), tensors, n_tokens
        )
        self.percentiles = percentiles(self.known.columns.values())
        self.directions = torch.nn.functional.normalize(opened.sae.W_dec.detach().float(), dim=1)
        self.version = hashlib.sha256(f"{self.store.fingerprint}|{opened.folder}".encode()).hexdigest()[:12]
        self._encoded: OrderedDict[Picked, csr_matrix] = OrderedDict()
        self._work = Lock()

    @property
    def d_sae(self) -> int:
        return self.codes.shape[1]

    @property
    def has_patches(self) -> bool:
        """Whether a latent's activation can be laid over a picture."""
        return self.store.n_patches > 1

    def check_latent(self, latent: int) -> int:
        """``latent``, or RefusedError when there is none of that number."""
        if not 0 <= latent < self.d_sae:
            raise RefusedError(404, f"There is no latent {latent}; this run has 0 to {self.d_sae - 1}.")
        return latent

    def check(self, picked: Picked) -> Picked:
        """``picked``, or RefusedError when there is no such picture."""
        if picked.kind == "images" and not 0 <= picked.number < len(self.store):
            raise RefusedError(404, f"There is no picture {picked.number}; this split has 0 to {len(self.store) - 1}.")
        if picked.kind == "uploads":
            self.uploads[picked.number]  # RefusedError where it is not held
        return picked

    def picture(self, picked: Picked) -> Image.Image:
        """The picture in RGB."""
        if self.check(picked).kind == "uploads":
            return self.uploads[picked.number]
        return decode(self.pictures.item(int(self._place[picked.number])))

    def label(self, number: int) -> str:
        """The class of image ``number``."""
        return self.class_names[int(self.labels[number])]

    def caption(self, number: int) -> str:
        """The sentence that belongs to image ``number``; "" without."""
        captions = self.pictures.captions
        return "" if captions is None else str(captions[int(self._place[number])])

    # --- encoding -----------------------------------------------------------------------------------
    def features(self, picked: Picked) -> Tensor:
        """Raw features [1, P, d_in] of a picture, float32: from the store, or of an upload from the encoder."""
        if self.check(picked).kind == "images":
            return self.store.features([picked.number]).float()
        features = self.opened.picture_features(self.picture(picked), self.device)
        return features.to(self.store.dtype).float()

    def token_codes(self, picked: Picked) -> csr_matrix:
        """Codes [P, d_sae] of a picture's tokens; those of the last pictures are kept."""
        with self._work:
            if picked not in self._encoded:
                with torch.no_grad():
                    self._encoded[picked] = as_csr(self.opened.sae.encode(self.features(picked)))
                while len(self._encoded) > ENCODED:
                    self._encoded.popitem(last=False)
            self._encoded.move_to_end(picked)
            return self._encoded[picked]

    def pooled(self, picked: Picked) -> tuple[np.ndarray, np.ndarray]:
        """The latents [m] that fire on a picture and their largest activations [m], strongest first."""
        if self.check(picked).kind == "images":
            row = self.codes[picked.number]
        else:
            row = csr_matrix(self.token_codes(picked).max(axis=0))
        order = np.lexsort((row.indices, -row.data))
        return row.indices[order].astype(np.int64), row.data[order]

    def activation(self, picked: Picked, latent: int) -> np.ndarray:
        """How strongly ``latent`` fires on each patch of a picture, [rows, columns] float32.

        RefusedError where the run was not trained on patch tokens.
        """
        if not self.has_patches:
            raise RefusedError(409, "This run was trained on whole pictures; only patch tokens can be laid over one.")
        column = self.token_codes(picked)[:, [self.check_latent(latent)]]
        return column.toarray().astype(np.float32).reshape(self.store.grid)

    def peak(self, latent: int) -> float:
        """The largest activation of ``latent`` on the split; 0 where it never fires."""
        value = float(self.known.columns["peak"].values[latent])
        return 0.0 if np.isnan(value) else value
