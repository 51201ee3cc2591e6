"""Score finished runs on the held-out test split: ``python evaluate.py [runs=PATTERN] [backbone@similarity=NAME]``."""

from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sae_lightning.benchmark.evaluate import above_name, evaluate_run, finished_runs, stored_scores
from sae_lightning.benchmark.similarity import similarity_of
from sae_lightning.saes.artefact import read_cfg

COLUMNS = {
    "explained_variance": "expl. var.", "r2": "R²", "fvu": "FVU", "l0": "L0", "dead_share": "dead", "cosine": "cosine",
    "decoder_cosine": "|cos| dec.", "decoder_nearest_cosine": "nearest dec.", "monoscore": "MonoScore",
    "purity": "purity", "weighted_purity": "weighted", "top_purity": "top-9",
}  # fmt: skip
LABELLED = {"purity", "weighted_purity"}  # lacking where images have no labels


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    table = Table(title=f"Scores on the {cfg.split} split")
    for column in ("run", "backbone", "k of d_in", *COLUMNS.values()):
        table.add_column(column, justify="left" if column in ("run", "backbone") else "right", no_wrap=True)
    similarity = similarity_of(cfg)
    needed = {*COLUMNS, *map(above_name, cfg.above)} - LABELLED
    judges = {}
    for run in finished_runs(cfg.runs, Path(cfg.paths.runs)):
        made = read_cfg(run)
        scores = None if cfg.again else stored_scores(run, cfg.split, needed, similarity)
        if scores is None:
            scores = evaluate_run(
                run, cfg.split, cfg.batch_tokens, cfg.latents_shown, similarity, above=cfg.above,
                band_ranks=cfg.bands.ranks, band_images=cfg.bands.images,
            )  # fmt: skip
        k = "–" if made["k"] is None else f"{made['k']:g}"
        values = [f"{scores['metrics'][name]:.3f}" if name in scores["metrics"] else "–" for name in COLUMNS]
        table.add_row(run.name, made["backbone"], f"{k} of {made['d_in']}", *values)
        judges[scores["similarity"]["title"]] = scores["similarity"]["baseline"]
    console = Console(width=max(200, Console().width))
    console.print(table)
    for title, baseline in judges.items():
        console.print(f"MonoScore by {title}; all pairs of images: {baseline:.3f}.", highlight=False)


if __name__ == "__main__":
    main()
