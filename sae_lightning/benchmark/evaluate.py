"""Scores of a finished run on a held-out store, and which runs have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf

from sae_lightning.benchmark.latents import BAND_IMAGES, LATENTS, TOP_IMAGES, tensor_names
from sae_lightning.benchmark.scoring_pass import Gather, ScoringPass
from sae_lightning.benchmark.similarity import Judge, Similarity
from sae_lightning.benchmark.streaming import stream
from sae_lightning.benchmark.summary import SCHEMA, SCORES, write_summary
from sae_lightning.features.ensure import ensure_store
from sae_lightning.features.store import FeatureStore
from sae_lightning.saes.artefact import ArtefactError, read_cfg, read_json

FILES = (SCORES, LATENTS, TOP_IMAGES, BAND_IMAGES)  # what scoring leaves in the run's folder


def evaluate_run(
    run: Path, split: str = "test", batch_tokens: int = 4096, latents_shown: int = 12,
    similarity: Similarity | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """``score`` the SAE in ``run`` on ``split`` of its own data; extracts the store if it is missing.

    ``similarity`` judges how alike images are (by default the SAE's own features).
    """
    config = read_cfg(run)["config"]
    similarity = similarity or Similarity()
    store = ensure_store(OmegaConf.create(config), split)
    judge = Judge(store, similarity.open(config, split), similarity.key(config))
    return score(run, store, batch_tokens, latents_shown, judge, **options)


def score(
    run: Path, store: FeatureStore, batch_tokens: int = 4096, latents_shown: int = 12, judge: Judge | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score the SAE in ``run`` on ``store`` in one pass, write what ``write_summary`` says, and return the scores.

    MonoScore and purity work on codes of images: of patch tokens the maximum over an image's patches. ``judge`` gives
    the images' embeddings (by default their own features); ``options`` are those of ``write_summary``. Raises
    StoreError when the store is of another backbone, layer or width than the SAE.
    """
    with TemporaryDirectory(dir=run, prefix="evaluation.") as folder:
        scored = ScoringPass(run, store, judge or Judge(store), Path(folder), Gather())
        try:
            stream([scored], batch_tokens, title=f"Scoring {run.name}")
            return write_summary(scored, latents_shown, **options)
        finally:
            scored.close()


def stored_scores(
    run: Path, split: str, names: Iterable[str], similarity: Similarity | None = None
) -> dict[str, Any] | None:
    """The scores of ``run`` on ``split``; None unless whole, newer than the SAE, with every metric in ``names`` and,
    where ``similarity`` is given, judged by it.
    """
    path = run / SCORES
    if not path.is_file() or not all(tensor_names(run / name) for name in FILES if name != SCORES):
        return None
    if not (run / "sae.safetensors").is_file() or path.stat().st_mtime < (run / "sae.safetensors").stat().st_mtime:
        return None
    try:
        scores = read_json(path, "score the run again")
    except ArtefactError:
        return None
    if scores.get("schema") != SCHEMA or scores["split"] != split or not set(names) <= set(scores["metrics"]):
        return None
    if similarity is not None and scores["similarity"]["key"] != similarity.key(read_cfg(run)["config"]):
        return None
    return scores


def finished_runs(patterns: str | Iterable[str], folder: Path) -> list[Path]:
    """Finished run folders below ``folder`` whose names match ``patterns`` (one or several), sorted.

    Raises FileNotFoundError with a sentence when there is none.
    """
    patterns = [str(patterns)] if isinstance(patterns, str | int | float) else [str(pattern) for pattern in patterns]
    try:
        found = {p for pattern in patterns for p in folder.glob(pattern) if (p / "result.json").is_file()}
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{', '.join(patterns)} is no pattern of names below {folder} ({error}); name runs as in batchtopk-*."
        ) from error
    if not found:
        raise FileNotFoundError(f"No finished run in {folder} matches {', '.join(patterns)}; train one with train.py.")
    return sorted(found)
