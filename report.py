"""One self-contained HTML page over scored runs: ``python report.py [runs=PATTERN] [out=FILE]``.

``python report.py grid=PATTERN`` writes ViSAEBench's analyses over a grid of runs instead.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from sae_lightning.benchmark.evaluate import finished_runs
from sae_lightning.commands.start import started
from sae_lightning.report.grid import build_grid
from sae_lightning.report.page import build


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
def main(cfg: DictConfig) -> None:
    reports = Path(started(cfg).paths.reports)
    found = finished_runs(cfg.grid or cfg.runs, Path(cfg.paths.runs))
    if cfg.grid:
        out = build_grid(found, Path(cfg.out or reports / "grid.html"))
    else:
        out = build(found, Path(cfg.out or reports / "report.html"), cfg.detailed, cfg.detailed_seeds, cfg.grids)
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser.")


if __name__ == "__main__":
    main()
