"""What each choice that ViSAEBench or MSAE leaves open changes: every metric as we compute it, and otherwise.

    python -m experiments.visaebench.choices [--runs runs/benchmark] [--out FILE.md]

For runs on patch tokens that are scored under both protocols (``make benchmark``). One row a choice: the mean over runs
both ways, the largest difference, and Spearman's rank correlation over runs, which says whether the choice would order
the SAEs differently.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from sae_lightning.evaluation.job import PARTIAL, Job, Settings
from sae_lightning.evaluation.scoring_pass import batches, stream
from sae_lightning.evaluation.similarity import ImageEmbeddings
from sae_lightning.metrics import MonoScore, Moran, absorption, decoder_cosine, preservation, probes
from sae_lightning.metrics import monosemanticity as m5
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.cknna import cknna
from sae_lightning.metrics.part import MAIN, headlines
from sae_lightning.metrics.protocols import CHOICES, RELEASED
from sae_lightning.metrics.retrieval import image_recall
from sae_lightning.metrics.segmentation import Probing, Sets, segmentation
from sae_lightning.metrics.sparse_probing import sparse_probing
from sae_lightning.runs.run import find_runs
from sae_lightning.runs.scores import read_rows
from sae_lightning.saes import SparseCodes

CONF = Path(__file__).resolve().parents[2] / "conf"
Found = dict[tuple[str, str], float]  # (metric, how) → value; how "" is ours


def find(scores: list[Score], metric: str, setting: str = "") -> float:
    return next(s.value for s in scores if (s.metric, s.setting) == (metric, setting))


def moran_choices(run: Job) -> Iterator[tuple[str, str, float]]:
    """M1: weights, contiguity and the least number of active patches; FVU by sample."""
    store, sae = run.store(MAIN), run.sae
    changes: dict[str, dict[str, Any]] = {
        "": {}, "row-standardised weights": {"row_standardized": True}, "rook": {"contiguity": "rook"},
        "1 active patch": {"min_active": 1}, "20 active patches": {"min_active": 20},
        "at most 90 % of patches active (released)": {"max_share": 0.9},
    }  # fmt: skip
    metrics = {name: Moran(sae.d_sae, store.grid, **change) for name, change in changes.items()}
    ratios = []
    for _, read in batches(store, 0, len(store), max(1, 8192 // store.n_patches)):
        features = read.reshape(-1, sae.d_in).float()
        with torch.no_grad():
            codes = sae.encode(features)
            rebuilt = sae.decode(codes)
        for metric in metrics.values():
            metric.update(codes)
        ratios.append((features - rebuilt).var(1, correction=0) / features.var(1, correction=0))
    yield from (("M1 Moran's I", name, float(metric.compute()["moran"])) for name, metric in metrics.items())
    yield "M2 FVU", "mean over samples of var(x − x̂) / var(x) (MSAE's code)", float(torch.cat(ratios).mean())


def probe_choices(run: Job) -> Iterator[tuple[str, str, float]]:
    """M3, M4, M7 and retrieval."""
    images = run.images(MAIN)
    y, ours = images.labels, probes.split(images.labels)
    raw = preservation.fit_raw(images.raw, y, ours)
    m3 = preservation.preservation(raw, images.reconstruction, y, retrain=True)
    yield "M3 preservation", "", find(m3, "preservation")
    yield "M3 preservation", "a probe of its own for the reconstruction", find(m3, "preservation_retrained")
    means = run.images(MAIN, "mean")
    of_means = preservation.preservation(
        preservation.fit_raw(means.raw, y, ours), means.reconstruction, y, retrain=True
    )
    yield "M3 preservation", "mean-pooled (released)", find(of_means, "preservation")
    yield "M3 preservation", "mean-pooled, a probe of its own", find(of_means, "preservation_retrained")
    other = preservation.fit_raw(images.raw, y, probes.split(y, seed=0))
    yield (
        "M3 preservation",
        "another split (seed 0)",
        find(preservation.preservation(other, images.reconstruction, y), "preservation"),
    )
    m4 = sparse_probing(images.codes, y, ours, [1, 2, 4, 8, 16, 32, 64, 128])
    yield "M4 sparse probing", "", find(m4, "sparse_probing_area", "k=128")
    yield "M4 sparse probing", "ROC AUC of the probe of 128", find(m4, "sparse_probing_auc", "k=128")
    yield "M4 sparse probing", "accuracy of the probe of 128", find(m4, "sparse_probing_accuracy", "k=128")
    theirs = CHOICES[RELEASED]["sparse_probing"]["budgets"]
    for on, how in (("train", "budgets 1 to 100 (released)"), ("all", "the same, ranked on all images (released)")):
        found = sparse_probing(images.codes, y, ours, theirs, ranked_on=on)
        yield "M4 sparse probing", how, find(found, "sparse_probing_area")
    each = sparse_probing(images.codes, y, ours, [128], "per_class")
    yield (
        "M4 sparse probing",
        "ROC AUC, ranked for each class (§4.3)",
        find(each, "sparse_probing_auc", "k=128,ranking=per_class"),
    )
    groups, names = run.sibling_groups(), images.class_names
    thresholds: dict[str, dict[str, Any]] = {"": {}, "another split (seed 0)": {"split": probes.split(y, seed=0)}}
    for how, change in thresholds.items():
        tasks = absorption.absorption(images.codes, y, groups, names, **({"split": ours} | change))
        yield "M7 absorption", how, find(tasks.scores, "absorption", "alpha=0.8,beta=0.5")
        if not how:
            yield "M7 absorption", "β 0.3 instead of 0.5", find(tasks.scores, "absorption", "alpha=0.8,beta=0.3")
            some = np.array([t.f1_1 < 0.8 for t in tasks.tasks if t.f1_4 > 0.5])
            yield "M7 absorption", "of tasks with F1(4) > β alone", float(some.mean()) if len(some) else 0.0
    yield "retrieval R@1, codes", "", image_recall(images.codes, y)[1].mean()
    binary = images.codes.copy()
    binary.data[:] = 1
    yield "retrieval R@1, codes", "codes as 0 or 1", image_recall(binary, y)[1].mean()


def monosemanticity_choices(run: Job) -> Iterator[tuple[str, str, float]]:
    """M5: weights, number of images, which latents, and whose embeddings."""
    store, top, least = run.store(), run.top(32), run.metric("mono", MonoScore).minimum()
    embeddings, everything = run.embeddings("monosemanticity"), slice(0, len(store))

    def score(e: torch.Tensor, n: int = 16, seed: int = 42, latents: int = 2048) -> dict[str, float]:
        chosen = m5.choose_live(top.values[:, 0], latents, seed)
        images, strength = top.images[chosen, :n], top.values[chosen, :n]
        found = m5.monosemanticity(images, strength, least[chosen], e, store.labels)
        return m5.summarize(found, m5.baseline(e, size=n))

    judge = next(part for part in run.parts if part.name == "monosemanticity@released")
    patches = run.embeddings(judge.name)
    ours = score(embeddings)
    yield "M5 monosemanticity", "", ours["monosemanticity"]
    yield "M5 monosemanticity", "mean over all pairs, without weights", ours["monosemanticity_plain"]
    yield "M5 monosemanticity", "raw, floor not subtracted (released)", ours["monosemanticity_raw"]
    yield "M5 monosemanticity", "the judge's mean patch tokens (released)", score(patches)["monosemanticity"]
    yield "M5 monosemanticity", "1,000 latents (released)", score(embeddings, latents=1000)["monosemanticity"]
    for n in (8, 32):
        yield "M5 monosemanticity", f"top {n} images", score(embeddings, n)["monosemanticity"]
    yield "M5 monosemanticity", "512 latents", score(embeddings, latents=512)["monosemanticity"]
    mean = score(ImageEmbeddings(store).embeddings(everything, store.features(everything)))["monosemanticity"]
    yield "M5 monosemanticity", "judged by the scored features themselves", mean


def alignment_choices(run: Job) -> Iterator[tuple[str, str, float]]:
    """CKNNA and the decoder's orthogonality."""
    images = run.images(MAIN)
    features, codes = torch.from_numpy(images.raw), SparseCodes.of_csr(images.codes)
    yield "CKNNA", "", cknna(features, codes)
    yield "CKNNA", "products of samples that are not normalised (MSAE's code)", cknna(features, codes, normalize=False)
    yield (
        "CKNNA",
        "centred products (MSAE's formula for Align, above and below)",
        cknna(features, codes, form="centered"),
    )
    yield "CKNNA", "HSIC of all pairs below (as printed)", cknna(features, codes, form="hsic")
    decoder = decoder_cosine(run.sae.W_dec)
    yield "decoder orthogonality", "", decoder["decoder_orthogonality"]
    yield "decoder orthogonality", "mean squared cosine (MSAE's code)", decoder["decoder_squared_cosine"]
    yield "decoder orthogonality", "mean magnitude", decoder["decoder_cosine"]


def segmentation_choices(run: Job) -> Iterator[tuple[str, str, float]]:
    """Segmentation: how long probes are trained, and on what they are scored."""
    setting = "data=mosaic,input=codes"
    sets = Sets(run.store("mosaic/train"), run.store("mosaic/test"), *run.masks("mosaic"))
    for how, probing in {
        "": Probing(),
        "scored by patch": Probing(resolution="patch"),
        "3 epochs": Probing(epochs=3),
    }.items():
        found = segmentation(run.sae, sets, probing, name="mosaic", frame=run.frame)
        yield "segmentation mIoU, codes", how, find(found, "segmentation_miou", setting)


def protocol_choices(run: Job) -> Iterator[tuple[str, str, float]]:
    """The headlines as they are scored under both protocols."""
    rows = read_rows(run.folder, protocol=None)
    for ours, theirs in zip(headlines(), headlines(RELEASED), strict=True):
        yield ours.headline, "", ours.of(rows)
        yield ours.headline, "the released package", theirs.of(rows)


MEASURES: tuple[Callable[[Job], Iterator[tuple[str, str, float]]], ...] = (
    protocol_choices, moran_choices, probe_choices, monosemanticity_choices, alignment_choices, segmentation_choices,
)  # fmt: skip


def measure(run: Path, settings: Settings) -> Found:
    """All figures of one run."""
    job = Job(run, settings)
    passed = job.open_pass(MAIN)
    try:
        stream([passed], title=run.name)
        job.passes = {MAIN: passed}
        found = {(metric, how): value for choice in MEASURES for metric, how, value in choice(job)}
        found["M2 FVU", ""] = float(passed.metrics["reconstruction"].compute()["fvu"])
        return found
    finally:
        passed.close()
        shutil.rmtree(run / PARTIAL, ignore_errors=True)


def as_markdown(found: list[Found]) -> str:
    """The table of all runs together."""
    lines = [
        "| metric | otherwise | ours | otherwise | largest difference | rank correlation |",
        "|---|---|---|---|---|---|",
    ]
    for metric, how in found[0]:
        if how:
            ours, other = (np.array([each[metric, name] for each in found]) for name in ("", how))
            rank = spearmanr(ours, other).statistic if np.ptp(ours) and np.ptp(other) else float("nan")
            figures = f"{ours.mean():.3f} | {other.mean():.3f} | {np.abs(ours - other).max():.3f} | {rank:.2f}"
            lines.append(f"| {metric} | {how} | {figures.replace('nan', '–')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = Settings(compose("evaluate", ["metrics=visaebench", "metrics.protocol=[paper,released]"]).metrics)
    table = as_markdown([measure(run, settings) for run in tqdm(find_runs("*", args.runs), unit="run")])
    print(table)
    if args.out:
        args.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
