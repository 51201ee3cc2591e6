"""The grid's workspace and report in W&B, as code: ``python -m experiments.wandb.workspace --entity NAME [--report]``.

Needs the package wandb-workspaces. ``--json FILE`` writes what would be saved, without login or network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import wandb_workspaces.expr as ex
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from sae_lightning.metrics.part import headlines
from sae_lightning.report.publish import GOALS
from sae_lightning.training.wandb_run import STEP

TITLE = "ViSAEBench grid"
AXES = ("backbone", "expansion", "k")
CURVES = ("train/explained_variance", "train/loss", "train/l0", "train/dead_share", "val/explained_variance", "val/fvu")
M = {f"test/{column.headline}": column.title for column in headlines()}
SPEED = ("speed/samples_per_second", "speed/wait_share")


def training() -> list[Any]:
    """Curves of single runs, in the colour of their backbone's group."""
    return [wr.LinePlot(title=name, x=STEP, y=[name], max_runs_to_show=100) for name in (*CURVES, *SPEED)]


def by_axis(axis: str) -> list[Any]:
    """M1–M7, means and deviations over the runs that share a value of ``axis``."""
    return [
        wr.BarPlot(
            title=f"{title} by {axis} ({GOALS[name]})", metrics=[wr.SummaryMetric(name)], groupby=wr.Config(axis),
            groupby_aggfunc="mean", groupby_rangefunc="stddev", orientation="v",
        )
        for name, title in M.items()
    ]  # fmt: skip


def plane() -> list[Any]:
    """M1–M7 over expansion and k, a point each run."""
    return [
        wr.ScatterPlot(title=title, x=wr.Config("k"), y=wr.SummaryMetric(name), z=wr.Config("expansion"))
        for name, title in M.items()
    ] + [wr.ScatterPlot(title="FVU and preservation", x=wr.SummaryMetric("test/M2"), y=wr.SummaryMetric("test/M3"))]


def parallel() -> list[Any]:
    """All of a run on one line; where less is better the axis is turned, so that up is better."""
    column = wr.ParallelCoordinatesPlotColumn
    settings = [column(metric=wr.Config(axis), display_name=axis) for axis in AXES]
    scores = [
        column(metric=wr.SummaryMetric(name), display_name=title, inverted=GOALS[name] == "minimize")
        for name, title in M.items()
    ]
    important = [wr.ParameterImportancePlot(with_respect_to=name) for name in M]
    return [wr.ParallelCoordinatesPlot(title="All settings and scores", columns=settings + scores), *important]


def tables() -> list[Any]:
    """Top images of latents, and all scores, of the chosen runs."""
    wide = wr.Layout(w=24, h=18)
    return [wr.WeavePanelSummaryTable(table_name=name, layout=wide) for name in ("latents", "scores")]


def sections() -> dict[str, list[Any]]:
    """All panels by the title of their section."""
    return {
        "M1–M7 by backbone": by_axis("backbone"),
        "M1–M7 by expansion": by_axis("expansion"),
        "M1–M7 by k": by_axis("k"),
        "M1–M7 over k and expansion": plane(),
        "Parallel coordinates": parallel(),
        "Training": training(),
        "Top images and scores": tables(),
    }


def workspace(entity: str, project: str, group: str | None = None) -> ws.Workspace:
    """The workspace of a project's runs, or of those of one sweep, ``group``."""
    return ws.Workspace(
        entity=entity, project=project, name=TITLE,
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections().items()],
        settings=ws.WorkspaceSettings(x_axis=STEP, sort_panels_alphabetically=False),
        runset_settings=ws.RunsetSettings(
            filters=[ex.Metric("Group") == group] if group else "",
            groupby=[ex.Config("backbone")],
            order=[ex.Ordering(ex.Summary("test/M4"), ascending=False)],
            pinned_columns=[*(f"config:{axis}" for axis in AXES), *(f"summary:{name}" for name in M)],
        ),
    )  # fmt: skip


def report(entity: str, project: str, group: str | None = None) -> wr.Report:
    """The same panels as a report, a grid below each heading."""
    filters = [ex.Metric("Group") == group] if group else ""
    blocks: list[Any] = [wr.TableOfContents()]
    for title, panels in sections().items():
        runset = wr.Runset(entity=entity, project=project, name=group or project, filters=filters)
        blocks += [wr.H1(text=title), wr.PanelGrid(runsets=[runset], panels=panels)]
    return wr.Report(entity=entity, project=project, title=TITLE, width="fluid", blocks=blocks)


def as_json(made: Any) -> dict[str, Any]:
    """What the service would be sent."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entity", required=True)
    parser.add_argument("--project", default="sae-lightning")
    parser.add_argument("--group", help="only the runs of this sweep")
    parser.add_argument("--report", action="store_true", help="a report, not a workspace")
    parser.add_argument("--json", type=Path, help="write it to this file and save nothing")
    args = parser.parse_args()
    if args.report and args.json:
        parser.error("--json writes the workspace; a report holds ids of the project that only the service knows.")
    made = (report if args.report else workspace)(args.entity, args.project, args.group)
    if args.json:
        args.json.write_text(json.dumps(as_json(made), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Wrote {args.json}.")
    else:
        made.save()
        print(f"Saved {made.url}")


if __name__ == "__main__":
    main()
