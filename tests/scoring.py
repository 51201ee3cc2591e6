"""The core scores of one SAE in one call, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_lightning.evaluation.core import core_metrics, write_summary
from sae_lightning.evaluation.scoring_pass import ScoringPass, check_store, stream
from sae_lightning.evaluation.similarity import ImageEmbeddings, SimilarityEncoder
from sae_lightning.features.store import FeatureStore
from sae_lightning.runs.run import Run
from sae_lightning.saes import SAE


def evaluate_run(
    run: Path, split: str = "test", similarity: SimilarityEncoder | None = None, **options: Any
) -> dict[str, Any]:
    """``score`` the SAE in ``run`` on ``split`` of its own data; extracts the store if it is missing.

    ``similarity`` judges how alike images are (by default the SAE's own features).
    """
    source = Run(run).source
    similarity, store = similarity or SimilarityEncoder(), source.store(split)
    judge = ImageEmbeddings(store, similarity.open(source, split), similarity.key(source))
    return score(run, store, judge=judge, **options)


def score(
    run: Path, store: FeatureStore, batch_tokens: int = 4096, judge: ImageEmbeddings | None = None, **options: Any
) -> dict[str, Any]:
    """Score the SAE in ``run`` on ``store`` in one pass, write what ``write_summary`` says, and return the scores.

    MonoScore and purity work on codes of images: of patch tokens the maximum over an image's patches. ``judge`` gives
    the images' embeddings (by default their own features); ``options`` are those of ``write_summary``. Raises
    StoreError when the store is of another backbone, layer or width than the SAE.
    """
    judge = judge or ImageEmbeddings(store)
    check_store(run, store)
    with TemporaryDirectory(dir=run, prefix="evaluation.") as folder:
        scored = ScoringPass(run, store, judge, Path(folder), core_metrics(SAE.load(run), store, judge))
        try:
            stream([scored], batch_tokens, title=f"Scoring {run.name}")
            return write_summary(scored, **options)
        finally:
            scored.close()
