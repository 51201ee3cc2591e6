"""One self-contained HTML page over scored runs: ``python report.py [runs=PATTERN] [out=FILE]``."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from sae_lightning.benchmark.evaluate import finished_runs
from sae_lightning.report.page import build


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
def main(cfg: DictConfig) -> None:
    found = finished_runs(cfg.runs, Path(cfg.paths.runs))
    out = build(found, Path(cfg.out), cfg.detailed, cfg.detailed_seeds, cfg.grids)
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser.")


if __name__ == "__main__":
    main()
