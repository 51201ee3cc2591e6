"""One run, opened for the page: its codes by latent, what is known of each, and the pictures behind them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.apps.explorer.uploads import RefusedError, Uploads
from sae_lightning.apps.names import names_of
from sae_lightning.backbones.seen import seen_by
from sae_lightning.data.decode import decode
from sae_lightning.evaluation.by_latent import ImagesOfLatents, scored_latents, top_purity
from sae_lightning.evaluation.core import stored_scores
from sae_lightning.metrics import MonoScore, Purity
from sae_lightning.runs.run import LATENTS, Run
from sae_lightning.saes.artefact import read_tensors
from sae_lightning.saes.codes import SparseCodes

TOP = 9  # images whose purity is ``top_purity``, as in the report

TITLES = {
    "monoscore": ("MonoScore", "How alike the pictures are that it fires on, weighted by how strongly."),
    "purity": ("Purity", "Share of its most frequent class among the pictures it fires on."),
    "weighted_purity": ("Weighted purity", "Share of its most frequent class in the sum of its activations."),
    "top_purity": ("Top-9 purity", "Share of one class among its nine strongest pictures."),
    "moran": ("Moran's I", "How much neighbouring patches activate it together; 0 is chance."),
    "image_share": ("Pictures", "Share of all pictures on which it fires."),
    "token_share": ("Patches", "Share of all patches on which it fires."),
    "peak": ("Peak", "Its largest activation."),
    "monosemanticity": ("Monosemanticity", "How alike its strongest pictures are, beyond random ones."),
    "monosemanticity_within_mass": ("Pairs of one class", "Share of pairs of one class among its strongest pictures."),
}

NOT_SHOWN = ("scored", "counts", "images_fired", "moran_images", "dominant_class")  # used, or counts behind a figure


@dataclass(frozen=True)
class Column:
    """One figure of every latent: ``values`` [d_sae] float64, NaN where a latent has none."""

    name: str
    title: str
    about: str
    values: np.ndarray


@dataclass(frozen=True)
class LatentFigures:
    """All columns by name; ``label`` [d_sae] int64 is the most frequent class (-1: never fires), ``images_fired``
    [d_sae] int64 counts pictures; ``evaluated`` says whether figures of an evaluation are among the columns.
    """

    columns: dict[str, Column]
    label: np.ndarray
    images_fired: np.ndarray
    evaluated: bool


def latent_figures(
    codes: csr_matrix, top: np.ndarray, labels: Tensor, n_classes: int, embeddings: np.ndarray,
    evaluation: Mapping[str, Tensor] | None = None, n_tokens: int = 0,
) -> LatentFigures:  # fmt: skip
    """Columns of latents from the ``codes`` [n, d_sae] of images and what an ``evaluation`` found, which comes first.

    ``top`` [d_sae, m ≥ 9] are each latent's strongest images (-1: none), ``labels`` [n] indices of ``n_classes``,
    ``embeddings`` [n, d] judge how alike images are where no evaluation has, ``n_tokens`` are those of its counts.
    """
    sparse = SparseCodes.of_csr(codes)
    purity = Purity(sparse.d_sae, n_classes)
    purity.update(sparse, labels)
    found = purity.per_latent()
    fired, never = found.images.numpy(), (found.images == 0).numpy()
    figures = {
        "monoscore": None if evaluation else scored_latents(
            MonoScore(sparse.d_sae, embeddings.shape[1]), codes, lambda some: torch.from_numpy(embeddings[some])
        ),
        "purity": found.purity.numpy(), "weighted_purity": found.weighted_purity.numpy(),
        "top_purity": top_purity(torch.from_numpy(top[:, :TOP]), labels)[1].numpy(),
        "image_share": fired / codes.shape[0], "peak": codes.max(0).toarray()[0],
    }  # fmt: skip
    if n_classes < 2:
        figures = {name: values for name, values in figures.items() if "purity" not in name}
    for name in ("purity", "weighted_purity", "top_purity", "peak"):
        if name in figures:
            figures[name] = np.where(never, np.nan, figures[name])
    figures |= {} if evaluation is None else of_evaluation(evaluation, n_tokens, never, n_classes)
    ordered = [*(n for n in TITLES if n in figures), *sorted(n for n in figures if n not in TITLES)]
    columns = {name: _column(name, np.asarray(figures[name], dtype=np.float64)) for name in ordered}
    return LatentFigures(columns, found.dominant.numpy(), fired, evaluation is not None)


def of_evaluation(
    tensors: Mapping[str, Tensor], n_tokens: int, never: np.ndarray, n_classes: int
) -> dict[str, np.ndarray]:
    """The figures among ``tensors``: all of [d_sae]; NaN for latents without a MonoScore or that ``never`` fire."""
    figures = {
        name: tensor.double().numpy().copy() for name, tensor in tensors.items()
        if tensor.shape == never.shape and name not in NOT_SHOWN and (n_classes > 1 or "purity" not in name)
    }  # fmt: skip
    for values in figures.values():
        values[never] = np.nan
    if "scored" in tensors and "monoscore" in figures:
        figures["monoscore"][~tensors["scored"].bool().numpy()] = np.nan
    if "counts" in tensors and n_tokens:
        figures["token_share"] = tensors["counts"].double().numpy() / n_tokens
    return figures


def evaluation_of(run: Path, split: str) -> tuple[dict[str, Tensor], int] | None:
    """What evaluate.py found of single latents of ``run`` on ``split``, and the tokens behind its counts; None without.

    One that is older than the SAE or of another split is none.
    """
    scores = stored_scores(run, split, ())
    return None if scores is None else (read_tensors(run / LATENTS)[0], int(scores["n_tokens"]))


def percentiles(columns: Iterable[Column]) -> dict[str, np.ndarray]:
    """By column the share [d_sae] of latents with a figure that lie below each latent's, from 0 to 1; NaN without."""
    shares = {}
    for column in columns:
        has = ~np.isnan(column.values)
        values = column.values[has]
        share = np.full(len(column.values), np.nan)
        share[has] = np.searchsorted(np.sort(values), values) / max(1, len(values) - 1)
        shares[column.name] = share
    return shares


def _column(name: str, values: np.ndarray) -> Column:
    title, about = TITLES.get(name, (name.replace("_", " ").capitalize(), "From the evaluation."))
    return Column(name, title, about, values)


KINDS = ("images", "uploads")

ENCODED = 256  # pictures whose codes of patches are kept


class PictureRef(NamedTuple):
    """A picture by number: of the ``images`` of the split, or of the ``uploads``."""

    kind: str
    number: int


class RunView:
    """The run ``opened`` over the pictures of ``split``; ``uploads`` are those of the user, encoded on ``device``.

    Picture i is row i of the store. Its methods may be called from several threads; one encodes at a time.
    Raises DataError, StoreError or BackboneError with a sentence for a run without pictures or features.
    """

    def __init__(self, opened: Run, split: str, uploads: Uploads, device: str = "cpu") -> None:
        self.opened, self.split, self.device = opened, split, device
        self.store, self.pictures, self.uploads = opened.store(split), opened.images(split), uploads
        self._place = self.pictures.index_of(self.store.image_ids)
        self.labels, self.class_names = self.store.labels, self.store.class_names
        self.codes = opened.codes(split)
        self.by_latent = ImagesOfLatents(self.codes)
        self.top = self.by_latent.top(TOP)
        self.names = names_of(opened)
        tensors, n_tokens = evaluation_of(opened.folder, split) or (None, 0)
        self.figures = latent_figures(
            self.codes, self.top, self.labels, len(self.class_names), opened.features(split), tensors, n_tokens
        )
        self.percentiles = percentiles(self.figures.columns.values())
        self.directions = torch.nn.functional.normalize(opened.sae.W_dec.detach().float(), dim=1)
        self.version = hashlib.sha256(f"{self.store.fingerprint}|{opened.folder}".encode()).hexdigest()[:12]
        self.seen = seen_by(opened.source.backbone) if self.has_patches else lambda picture: picture
        self._encoded: OrderedDict[PictureRef, csr_matrix] = OrderedDict()
        self._work = Lock()

    @property
    def d_sae(self) -> int:
        return self.codes.shape[1]

    @property
    def least(self) -> int:
        """On how many pictures, one in a hundred, a latent fires that is listed unless others are asked for."""
        return max(1, -(-len(self.store) // 100))

    @property
    def has_patches(self) -> bool:
        """Whether a latent's activation can be laid over a picture."""
        return self.store.spatial

    def check_latent(self, latent: int) -> int:
        """``latent``, or RefusedError when there is none of that number."""
        if not 0 <= latent < self.d_sae:
            raise RefusedError(404, f"There is no latent {latent}; this run has 0 to {self.d_sae - 1}.")
        return latent

    def check(self, picked: PictureRef) -> PictureRef:
        """``picked``, or RefusedError when there is no such picture."""
        if picked.kind == "images" and not 0 <= picked.number < len(self.store):
            raise RefusedError(404, f"There is no picture {picked.number}; this split has 0 to {len(self.store) - 1}.")
        if picked.kind == "uploads":
            self.uploads[picked.number]  # RefusedError where it is not held
        return picked

    def picture(self, picked: PictureRef) -> Image.Image:
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
    def features(self, picked: PictureRef) -> Tensor:
        """Raw features [1, P, d_in] of a picture, float32: from the store, or of an upload from the encoder."""
        if self.check(picked).kind == "images":
            return self.store.features([picked.number]).float()
        features = self.opened.picture_features(self.picture(picked), self.device)
        return features.to(self.store.dtype).float()

    def token_codes(self, picked: PictureRef) -> csr_matrix:
        """Codes [P, d_sae] of a picture's tokens; those of the last pictures are kept."""
        with self._work:
            if picked not in self._encoded:
                with torch.no_grad():
                    self._encoded[picked] = self.opened.sae.encode(self.features(picked)).csr()
                while len(self._encoded) > ENCODED:
                    self._encoded.popitem(last=False)
            self._encoded.move_to_end(picked)
            return self._encoded[picked]

    def pooled(self, picked: PictureRef) -> tuple[np.ndarray, np.ndarray]:
        """The latents [m] that fire on a picture and their largest activations [m], strongest first."""
        if self.check(picked).kind == "images":
            row = self.codes[picked.number]
        else:
            row = csr_matrix(self.token_codes(picked).max(axis=0))
        order = np.lexsort((row.indices, -row.data))
        return row.indices[order].astype(np.int64), row.data[order]

    def activation(self, picked: PictureRef, latent: int) -> np.ndarray:
        """How strongly ``latent`` fires on each patch of a picture, [rows, columns] float32.

        RefusedError where the run was not trained on patch tokens.
        """
        if not self.has_patches:
            raise RefusedError(409, "This run was trained on whole pictures; only patch tokens can be laid over one.")
        column = self.token_codes(picked)[self.store.prefix :, [self.check_latent(latent)]]
        return column.toarray().astype(np.float32).reshape(self.store.grid)

    def peak(self, latent: int) -> float:
        """The largest activation of ``latent`` on the split; 0 where it never fires."""
        value = float(self.figures.columns["peak"].values[latent])
        return 0.0 if np.isnan(value) else value


class OpenRuns:
    """``runs`` by number, over the pictures of ``split``, and the user's ``uploads``."""

    def __init__(self, runs: Sequence[Run], split: str, device: str = "cpu") -> None:
        self.runs, self.split, self.device = runs, split, device
        self.uploads = Uploads()
        self._views: dict[int, RunView] = {}
        self._locks = [Lock() for _ in runs]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, run: int) -> RunView:
        """Run ``run``, opened now if need be, which encodes the split; RefusedError if there is none."""
        if not 0 <= run < len(self.runs):
            raise RefusedError(404, f"There is no run {run}; this page was started with 0 to {len(self.runs) - 1}.")
        with self._locks[run]:
            if run not in self._views:
                try:
                    self._views[run] = RunView(self.runs[run], self.split, self.uploads, self.device)
                except (ValueError, OSError) as error:
                    raise RefusedError(409, f"{self.runs[run].name} cannot be shown: {error}") from error
            return self._views[run]
