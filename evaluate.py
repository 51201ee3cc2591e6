"""Score finished runs on the held-out test split: ``python evaluate.py [runs=PATTERN]``."""

from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sae_lightning.benchmark.evaluate import evaluate_run, finished_runs, stored_scores
from sae_lightning.saes.artefact import read_cfg

COLUMNS = {
    "explained_variance": "expl. var.", "fvu": "FVU", "l0": "L0", "dead_share": "dead", "cosine": "cosine",
    "decoder_cosine": "|cos| dec.", "decoder_nearest_cosine": "nearest dec.", "top_purity": "top-9 purity",
}  # fmt: skip


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    table = Table(title=f"Scores on the {cfg.split} split")
    for column in ("run", "backbone", "k of d_in", *COLUMNS.values()):
        table.add_column(column, justify="left" if column in ("run", "backbone") else "right", no_wrap=True)
    for run in finished_runs(cfg.runs, Path(cfg.paths.runs)):
        made = read_cfg(run)
        scores = None if cfg.again else stored_scores(run, cfg.split, COLUMNS)
        if scores is None:
            scores = evaluate_run(run, cfg.split, cfg.batch_tokens, cfg.latents_shown)
        k = "–" if made["k"] is None else f"{made['k']:g}"
        values = [f"{scores['metrics'][name]:.3f}" for name in COLUMNS]
        table.add_row(run.name, made["backbone"], f"{k} of {made['d_in']}", *values)
    Console(width=max(170, Console().width)).print(table)


if __name__ == "__main__":
    main()
