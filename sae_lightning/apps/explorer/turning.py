"""One latent of a picture turned to a value: which pictures are then nearest, and what a captioner then says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import numpy as np

from sae_lightning.apps.explorer.book import Book, Picked
from sae_lightning.apps.explorer.refused import RefusedError
from sae_lightning.apps.explorer.views import number
from sae_lightning.apps.search.neighbours import neighbours
from sae_lightning.apps.search.turned import turned
from sae_lightning.apps.steering.captions import check_fit, steered_captions
from sae_lightning.vlms import VLM, VLMError, load_vlm

TRIED = 4  # pictures that decide whether a model sees as the run's encoder does


def turned_view(book: Book, picked: Picked, latent: int, value: float, n: int) -> dict[str, Any]:
    """The ``n`` nearest pictures by features before and after ``latent`` is at ``value`` on all tokens of a picture.

    What the SAE does not reconstruct of the picture is kept, so that only the latent differs.
    """
    features = book.features(picked)
    after = turned(book.opened.sae, features, book.check_latent(latent), [value], keep_error=True)[0]
    gallery, own = book.opened.features(book.split), picked.number if picked.kind == "images" else -1
    queries = np.concatenate([features.mean(1).numpy(), after.detach().numpy()])
    found = neighbours(queries, gallery, n, own=np.array([own, own]))

    def side(at: int) -> list[dict[str, Any]]:
        pairs = zip(found.images[at].tolist(), found.distances[at].tolist(), strict=True)
        return [{"image": i, "label": book.label(i), "cosine": number(1 - far)} for i, far in pairs if i >= 0]

    return {"latent": latent, "value": value, "before": side(0), "after": side(1)}


class Captioner:
    """The vision-language model of the config node ``node``, loaded to ``device`` when first asked; None: none."""

    def __init__(
        self, node: Mapping[str, Any] | None, device: str = "cpu", load: Callable[..., VLM] = load_vlm
    ) -> None:
        self._node, self._device, self._load, self._lock = node, device, load, Lock()
        self._vlm: VLM | None = None
        self._why: dict[str, str] = {}  # by run, why it does not fit; "" where it does

    def why_not(self, book: Book) -> str:
        """Why the SAE of ``book`` cannot steer the model; "" where it can."""
        with self._lock:
            if book.version not in self._why:
                try:
                    self._check(book)
                except (ValueError, ImportError) as error:
                    self._why[book.version] = str(error)
                else:
                    self._why[book.version] = ""
            return self._why[book.version]

    def view(self, book: Book, picked: Picked, latent: int, value: float) -> dict[str, Any]:
        """The caption of a picture before and after ``latent`` is at ``value`` on all of its tokens.

        What the SAE does not reconstruct is kept. RefusedError with 409 where ``why_not`` says so.
        """
        if why := self.why_not(book):
            raise RefusedError(409, why)
        picture, sae = book.picture(picked), book.opened.sae
        book.check_latent(latent)
        with self._lock:
            assert self._vlm is not None  # or why_not had said so
            before = self._vlm.captions([picture])[0]
            after = steered_captions(
                self._vlm, sae, [picture], latent, [value], layer=book.store.layer, keep_error=True
            )[0][0]
        return {"latent": latent, "value": value, "before": before, "after": after, "model": self._vlm.title}

    def _check(self, book: Book) -> None:
        if self._node is None:
            raise VLMError("No vision-language model was chosen.")
        if book.store.kind != "patch":
            raise VLMError("Captions need a run on patch tokens of the encoder that the captioner sees through.")
        if self._vlm is None:
            self._vlm = self._load(self._node, self._device)
        few = [book.picture(Picked("images", i)) for i in range(min(TRIED, len(book.store)))]
        check_fit(self._vlm, book.store, few)
