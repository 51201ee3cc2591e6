"""The page on which people judge pairs of latents, offline: one file, no server, progress kept in the browser."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sae_lightning.apps.statistics import turns
from sae_lightning.evaluation.by_latent import dominant, scored_latents, top_images
from sae_lightning.evaluation.similarity import ImageEmbeddings, SimilarityEncoder
from sae_lightning.metrics import MonoScore, MSScore
from sae_lightning.rendering.page import render
from sae_lightning.rendering.pictures import GAP, data_uri, thumbnail
from sae_lightning.runs.run import Run

COLUMNS = ("judge", "run_left", "latent_left", "run_right", "latent_right", "choice")

CHOICES = ("left", "right", "unsure")

SIMULATED = "simulated"  # how the names of judges begin that are no people


def read_judgements(paths: Sequence[str | Path], d_sae: Mapping[str, int]) -> pd.DataFrame:
    """All choices in these files, the last where a judge chose twice; ``d_sae`` of each run that can be analysed.

    Semicolons instead of commas and a byte-order mark, as spreadsheets write them, are understood. FileNotFoundError
    and ValueError with a sentence for a file that is missing or empty, a missing column, an unknown choice, a run that
    was not opened and a latent that it does not have.
    """
    tables = [_read(Path(path), d_sae) for path in paths]
    table = pd.concat(tables, ignore_index=True)
    return table.drop_duplicates([c for c in COLUMNS if c != "choice"], keep="last").reset_index(drop=True)


def _read(path: Path, d_sae: Mapping[str, int]) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give csv files that the collecting page exported.")
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    if not header.strip():
        raise ValueError(f"{path} is empty; expected a header with {', '.join(COLUMNS)}.")
    separator = ";" if ";" in header and "," not in header else ","
    table = pd.read_csv(path, sep=separator, encoding="utf-8-sig", dtype=str, keep_default_na=False)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(missing)}; it has {', '.join(table.columns)}. Expected "
            f"{', '.join(COLUMNS)}, as the collecting page exports them."
        )
    if not len(table):
        raise ValueError(f"{path} holds no judgement, only a header.")
    for number, row in enumerate(table.to_dict("records"), start=2):
        _check(f"Line {number} of {path}", row, d_sae)
    for side in ("latent_left", "latent_right"):
        table[side] = table[side].astype(int)
    table["choice"] = table["choice"].str.strip().str.lower()
    return table


def _check(where: str, row: Mapping[str, str], d_sae: Mapping[str, int]) -> None:
    if row["choice"].strip().lower() not in CHOICES:
        raise ValueError(f"{where} has the choice '{row['choice']}'; expected one of {', '.join(CHOICES)}.")
    for side in ("left", "right"):
        run, latent = row[f"run_{side}"], row[f"latent_{side}"].strip()
        if run not in d_sae:
            raise ValueError(
                f"{where} judges a latent of the run {run}, which was not given; opened were {', '.join(d_sae)}. Name "
                "it too with run=…"
            )
        if not latent.isdecimal() or int(latent) >= d_sae[run]:
            raise ValueError(
                f"{where} judges the latent '{latent}' of {run}, which has 0 to {d_sae[run] - 1}. Is it of another run "
                "with that name?"
            )


COLLECT = "collect.html"


def sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of ``columns``, on one sheet."""
    side = images[0].width
    rows = -(-len(images) // columns)
    found = Image.new("RGBA", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP))
    for i, image in enumerate(images):
        found.paste(image.resize((side, side)), (i % columns * (side + GAP), i // columns * (side + GAP)))
    return found


def study_of(pairs: pd.DataFrame, opened: Mapping[str, Run], split: str, n_images: int) -> dict[str, Any]:
    """What the page holds: ``id``, the ``columns`` of its csv, ``sheets`` of top images, ``pairs`` that name them.

    Neither scores nor names are in it, so that nobody can be led by them.
    """
    sheets: dict[str, str] = {}
    for run in opened:
        left, right = (pairs.loc[pairs[f"run_{side}"] == run, f"latent_{side}"] for side in ("left", "right"))
        images, top = opened[run].images(split), top_images(opened[run].codes(split), n_images)
        for latent in np.union1d(left, right).astype(int).tolist():
            pictures = [thumbnail(images[i]) for i in top[latent].tolist() if i >= 0]
            sheets[f"{run}/{latent}"] = data_uri(sheet(pictures, int(np.ceil(np.sqrt(n_images)))))
    shown = pairs.drop(columns="difference").to_dict("records")
    identity = hashlib.sha256(repr(shown).encode()).hexdigest()[:12]
    return {"id": identity, "columns": ["pair", *COLUMNS, "seconds"], "sheets": sheets, "pairs": shown}


def collecting_page(study: Mapping[str, Any]) -> str:
    """The page's HTML."""
    return render("apps/agreement_collect.html", {"study": study})


CANDIDATES = 50_000  # pairs that are drawn from


def draw_pairs(scores: pd.DataFrame, n: int, strata: int, n_images: int, seed: int, by: str = "ms") -> pd.DataFrame:
    """About ``n`` pairs of latents in random order and on random sides, as many from each range of differences.

    The ranges divide the differences in the score ``by`` that candidates have into ``strata`` equal parts; one that
    holds too few gives what it has, and the others make up for it. Columns ``pair``, ``run_left``, ``latent_left``,
    ``run_right``, ``latent_right``, ``difference``. Only latents with a score that fire on ``n_images`` images count;
    ValueError when there are not two.
    """
    live = scores[scores[by].notna() & (scores["images"] >= n_images)].reset_index(drop=True)
    if len(live) < 2:
        raise ValueError(
            f"{len(live)} latents fire on at least {n_images} images of the split and have a score; two are needed. "
            "Lower app.images, or choose runs with more active latents."
        )
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.integers(0, len(live), (CANDIDATES, 2)), axis=1)
    drawn = np.unique(drawn[drawn[:, 0] != drawn[:, 1]], axis=0)
    drawn = rng.permutation(drawn)
    values = live[by].to_numpy()
    gap = abs(values[drawn[:, 0]] - values[drawn[:, 1]])
    stratum = np.minimum((gap / max(gap.max(), 1e-12) * strata).astype(int), strata - 1)
    chosen = rng.permutation(np.argsort(turns(stratum), kind="stable")[:n])
    sides = rng.permuted(drawn[chosen], axis=1)
    left, right = (live.iloc[sides[:, i]].reset_index(drop=True) for i in (0, 1))
    return pd.DataFrame({
        "pair": np.arange(len(chosen)), "run_left": left["run"], "latent_left": left["latent"],
        "run_right": right["run"], "latent_right": right["latent"], "difference": gap[chosen],
    })  # fmt: skip


SCORES = {"ms": "MS score", "monoscore": "MonoScore", "purity": "class purity (labels)", "constant": "a constant"}


def latent_scores(opened: Run, split: str, judge: SimilarityEncoder, n_images: int) -> pd.DataFrame:
    """One row a latent of a run: ``run``, ``latent``, ``images`` that it fires on, and the scores.

    ``ms`` [ms-score-vlm] by the features of ``judge``, ``monoscore`` by the run's own, both of the pooled codes of
    ``split`` (NaN where a latent has no score); ``purity``, the share of its activation on one class; ``constant``;
    ``top_purity``, the share of the commonest class among its ``n_images`` strongest images. StoreError or
    BackboneError where the judge's features cannot be had.
    """
    codes, images = opened.codes(split), opened.images(split)
    other = judge.open(opened.source, split)
    _, purity, fires = dominant(codes, images.labels, len(images.class_names))
    top = top_images(codes, n_images)
    return pd.DataFrame({
        "run": opened.name, "latent": np.arange(codes.shape[1]), "images": fires,
        "ms": _scored(MSScore, opened, split, other), "monoscore": _scored(MonoScore, opened, split, None),
        "purity": purity, "constant": 1.0, "top_purity": [_commonest(images.labels[i[i >= 0]]) for i in top],
    })  # fmt: skip


def _scored(kind: type[MonoScore], opened: Run, split: str, other: object) -> np.ndarray:
    store, codes = opened.store(split), opened.codes(split)
    judge = ImageEmbeddings(store, other)  # type: ignore[arg-type]
    return scored_latents(
        kind(codes.shape[1], judge.d), codes, lambda some: judge.embeddings(some, store.features(some))
    )


def _commonest(labels: np.ndarray) -> float:
    return float(np.bincount(labels).max() / len(labels)) if len(labels) else np.nan


SHARPNESS = 8.0  # log odds of preferring images of one class to images of none in common

UNSURE = 0.05  # difference in purity below which a judge is unsure half of the time


def simulated_judgements(pairs: pd.DataFrame, scores: pd.DataFrame, judges: int, seed: int) -> pd.DataFrame:
    """Choices of ``judges`` simulated judges on all ``pairs``, in the columns of a collected csv.

    Each sees the images shown of both latents as their labels and prefers the side with the larger share of one class,
    at odds that grow with the difference.
    """
    rng = np.random.default_rng(seed)
    seen = scores.set_index(["run", "latent"])["top_purity"]
    left, right = (
        seen.loc[list(zip(pairs[f"run_{side}"], pairs[f"latent_{side}"], strict=True))].to_numpy()
        for side in ("left", "right")
    )
    tables = []
    for judge in range(judges):
        prefers_left = rng.random(len(pairs)) < 1 / (1 + np.exp(-SHARPNESS * (left - right)))
        unsure = (abs(left - right) < UNSURE) & (rng.random(len(pairs)) < 0.5)
        choice = np.where(unsure, "unsure", np.where(prefers_left, "left", "right"))
        tables.append(pairs.drop(columns="difference").assign(judge=f"{SIMULATED} {judge + 1}", choice=choice))
    return pd.concat(tables, ignore_index=True)
