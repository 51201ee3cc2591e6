"""One self-contained HTML page over scored runs: ``python report.py [runs=PATTERN] [out=FILE]``.

``python report.py grid=PATTERN`` writes ViSAEBench's analyses over a grid of runs instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_lightning.commands.entry import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@command("report")
def main(cfg: DictConfig) -> None:
    from sae_lightning.report.grid import build_grid
    from sae_lightning.report.page import build
    from sae_lightning.runs.run import find_runs
    from sae_lightning.settings.places import check_file

    out = Path(cfg.out or Path(cfg.paths.reports) / ("grid.html" if cfg.grid else "report.html"))
    check_file(out, "out")
    found = find_runs(cfg.grid or cfg.runs, Path(cfg.paths.runs))
    if cfg.grid:
        build_grid(found, out)
    else:
        build(found, out, cfg.detailed, cfg.detailed_seeds, cfg.grids)
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser.")
