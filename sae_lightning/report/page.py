"""The report: one page over evaluated runs, from what ``evaluate.py`` stored and the pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sae_lightning.analysis.lift import lift_table
from sae_lightning.files import write_text
from sae_lightning.metrics.core import SHOWN
from sae_lightning.rendering.figures import COLOURS
from sae_lightning.rendering.page import Beside, Block, Fold, Heading, Note, Picture, Section, headlines, page, plural
from sae_lightning.rendering.table import MARKED, Head, Keyed, Table
from sae_lightning.report import figures
from sae_lightning.report.benchmark import (
    Scored,
    main_columns,
    released_columns,
    scored_runs,
    scores_csv,
    table,
    topics,
)
from sae_lightning.report.grid import analyses, grid_of, tables_folder, write_tables
from sae_lightning.report.latents import audit, latent_groups, latents, pictures
from sae_lightning.report.monoloss import as_csv, as_markdown, first_of_settings, groups_of, keys, monosemanticity
from sae_lightning.report.result import first_screen, latents_table
from sae_lightning.runs.identity import monoloss_of
from sae_lightning.runs.results import PAGE, RECORD, read_result
from sae_lightning.runs.run import FILES, SCORES, TOP_IMAGES, Run
from sae_lightning.runs.scores import read_rows
from sae_lightning.saes.artefact import ArtefactError, tensor_names

Runs = Sequence[Mapping[str, Any]]


def applications(folders: Sequence[Path], out: Path) -> list[Block]:
    """The applications of the runs ``folders``, and those over several runs of the same parent folder: of each a link
    to its page, copied into a folder of ``<out>-pages`` beside the report ``out``, and its headline figures.

    Results older than their run's SAE are left out.
    """
    found: list[tuple[str, Path | None, Path]] = []
    found += [(run.name, run / "sae.safetensors", run / "apps") for run in folders]
    found += [("several runs", None, parent / "apps") for parent in dict.fromkeys(run.parent for run in folders)]
    blocks: list[Block] = []
    for name, weights, folder in found:
        for record in sorted(folder.glob(f"*/{RECORD}")):
            old = weights is not None and record.stat().st_mtime < weights.stat().st_mtime
            if old or not (record.parent / PAGE).is_file():
                continue
            result = read_result(record.parent)
            pages = out.with_name(f"{out.stem}-pages") / f"{name.replace(' ', '-')}-{result.app}"
            pages.mkdir(parents=True, exist_ok=True)
            for each in record.parent.glob("*.html"):  # its page may link to others
                shutil.copyfile(each, pages / each.name)
            blocks.append(Heading(result.title, name, f"{pages.parent.name}/{pages.name}/{PAGE}"))
            blocks += [headlines(result.headlines)] if result.headlines else []
    return blocks


def runs_table(runs: Runs) -> Table:
    """A line a run: its settings and core metrics."""
    heads = [Head("backbone"), Head("variant"), Head("exp.", "g", about="d_sae / d_in"), Head("d_sae", ".0f"),
             Head("k"), *(column.head for column in SHOWN), Head("train time, s", ".0f")]  # fmt: skip
    rows = [
        [Keyed(f"{run['cfg']['backbone']} {run['features']}", run["colour"]),
         run["cfg"]["variant"] + (f" + MonoLoss {run['weight']:g}" if run["weight"] else ""), run["cfg"]["expansion"],
         run["cfg"]["d_sae"], run["k"],
         *(column.cell(rows, run["metrics"].get(column.metric)) for column in SHOWN), run["seconds"]]
        for run in runs
        for rows in [[row for row in read_rows(run["folder"]) if row["split"] == run["split"]]]
    ]  # fmt: skip
    return Table("", "", heads, rows)


def lifted(folders: Sequence[Path], split: str) -> Section | None:
    """Scores less those of random dictionaries; None where there are none."""
    found = lift_table(folders, split)
    return None if found is None else Section(found.title, replace(found, name="", title="", note=""), Note(found.note))


def reconstruction(runs: Runs) -> Section:
    """Explained variance against L0."""
    about = ("Each mark is one SAE. Up and to the left is better: more of the features' variance from fewer active "
             "latents.")  # fmt: skip
    within = Note("Scores between backbones compare how their features are built as much as how good the SAE is; "
                  "within one backbone they compare SAEs.")  # fmt: skip
    beside = Beside([[about, within], [Picture(figures.tradeoff(runs))]], "minmax(0, 1fr) minmax(300px, 560px)")
    return Section("Sparsity and reconstruction", beside)


def benchmark(saes: Sequence[Scored], n_runs: int, latents: bool) -> Section | None:
    """M1–M7 of SAEs; None without any. ``latents`` asks for those of high, mean and low Moran's I."""
    if not saes:
        return None
    of = figures.encoding(saes)
    main = table(saes, main_columns(), of.of_backbones(), notes=True)
    by_package = [sae for sae in saes if sae.released]
    other = table(by_package, released_columns(), of.of_backbones()) if by_package else None
    some = f" {len(saes)} of the {n_runs} runs have them." if len(saes) < n_runs else ""
    between = ("; bold: the best on its features. Between backbones, most of M1, M5 and M7 is the backbone's doing, "
               "and FVU does not tell what a probe still reads [ViSAEBench §5.2, §5.7]")  # fmt: skip
    moran, made_of, key = figures.moran(saes, of), figures.monosemanticity(saes, of), of.legend()
    probing, recovery, histograms = (draw(saes, of) for draw in (figures.probing, figures.recovery, figures.histograms))
    dissociation, audited = figures.dissociation(saes, of), audit(saes) if latents else []
    return Section(
        "ViSAEBench",
        "Seven measures of an SAE, M1 to M7, which do not agree and are not summed up. An arrow shows the better "
        f"direction; hover over a heading for what it says.{some}",
        main,
        other and [Heading("By the released package", "The same SAEs as visaebench 0.1.0 scores them "
                           "(metrics.protocol=released). The two differ in what they measure, not only in details; "
                           "docs/fidelity.md lists how."), other],
        Note(f"{MARKED} Shaded: of all SAEs{between if len(main.groups) > 1 else ''}. All figures, with every setting, "
             "are in visaebench.csv beside this page; this table is in visaebench.md."),
        key,
        moran and Picture(moran, "Spatial coherence, M1",
                "Distribution over the evaluable latents, each row at its own height. Dotted: the expectation without "
                "spatial order, −1 / (P − 1). Ticks: the SAEs' means. ▽ mean of the features' own channels."),
        made_of and Picture(made_of, "What M5 is made of",
                "One line an SAE: pairs of images of two classes |, all pairs (filled), pairs of one class ○. Dotted: "
                "random images. Judges differ between backbones, and their cosines with them; M5 counts from the "
                "dotted line to 1."),
        audited and [
            Heading("Latents of high, mean and low Moran's I"),
            Note("Of one SAE a backbone: a latent drawn from the top 5 % of the distribution above, the one nearest to "
                 "its mean, and one from the lowest 5 %, on their strongest images. Violet to yellow from the weakest "
                 "to the strongest patch of an image; silent patches are darker. Connected does not mean of one "
                 "meaning."), audited],
        probing and [Heading("Sparse probing, M4", "Accuracy by the number of latents that a probe sees; M4 is the "
                             "area up to k = 128, dotted and marked. Grey: means of the others."),
                     list(map(Picture, probing))],
        (dissociation or recovery) and [
            Heading("Reconstruction and what it keeps, M2 and M3"),
            [Picture(svg) for svg in (dissociation, *recovery) if svg], key,
            recovery and Note("A recovery is the reconstruction from each token's strongest latents alone.")],
        histograms and [Heading("Activations", "Shares by size, in even bins of the logarithm; latents that never fire "
                                "are not drawn."), list(map(Picture, histograms))],
        Heading("All settings"),
        [Fold(t.title, [table(saes, t.columns, of.of_backbones())], t.about) for t in topics(saes)],
    )  # fmt: skip


def files(saes: Sequence[Scored]) -> dict[str, str]:
    """The texts of visaebench.csv and visaebench.md; none without SAEs."""
    return (
        {"visaebench.csv": scores_csv(saes), "visaebench.md": table(saes, main_columns(), {}).markdown()}
        if saes
        else {}
    )


def load_run(folder: Path) -> dict[str, Any]:
    """What the page shows of one evaluated run."""
    run = Run(folder)
    cfg, scores, result = run.cfg, run.scores, run.result
    k = "–" if cfg["k"] is None else f"{cfg['k']:g} of {cfg['d_in']}"
    kind = "" if cfg["features"] == "patch" else cfg["features"]
    features = " ".join(filter(None, (kind, "" if cfg["layer"] is None else f"L{cfg['layer']}")))
    label = f"{cfg['backbone']} {kind}".strip() + f" · {cfg['variant']} ×{cfg['expansion']}"
    label += "" if cfg["k"] is None else f" k {cfg['k']:g}"
    weight, _ = monoloss_of(cfg["config"])
    return {
        "folder": folder, "name": folder.name, "cfg": cfg, "k": k, "title": label,
        "label": label + (f" + MonoLoss {weight:g}" if weight else ""),
        "features": features, "weight": weight, "seconds": result["seconds"],
        "metrics": scores["metrics"], "split": scores["split"], "n_images": scores["n_images"],
        "n_tokens": scores["n_tokens"], "store": scores["store"], "similarity": scores["similarity"],
    }  # fmt: skip


def load_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """All runs of the page, with colours and different labels; FileNotFoundError names those that lack scores."""
    missing = [f.name for f in folders if not ((f / SCORES).is_file() and (f / TOP_IMAGES).is_file())]
    if missing:
        raise FileNotFoundError(f"These runs have no scores yet: {', '.join(missing)}. Run evaluate.py first.")
    old = [f.name for f in folders if not all((f / name).is_file() for name in FILES)]
    if old:
        raise FileNotFoundError(
            f"These runs were scored without MonoScore and purity: {', '.join(old)}. Evaluate them again: evaluate.py."
        )
    damaged = [f.name for f in folders if not all(tensor_names(f / name) for name in FILES if name != SCORES)]
    if damaged:
        raise ArtefactError(
            f"Files with latents of these runs are damaged: {', '.join(damaged)}. Evaluate them again: evaluate.py."
        )
    runs = [load_run(folder) for folder in folders]
    for i, run in enumerate(runs):
        run["colour"] = COLOURS[i % len(COLOURS)]
    tell_apart(runs)
    return runs


def tell_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Add to labels that several runs have what differs between these: the layer, the seed."""
    labels = [run["label"] for run in runs]
    for run, label in zip(runs, labels, strict=True):
        alike = [other["cfg"] for other, same in zip(runs, labels, strict=True) if same == label]
        for setting, shown in (("layer", "L{}"), ("site", "{}"), ("seed", "seed {}")):
            if len({cfg.get(setting, "block") for cfg in alike}) > 1:
                run["label"] += f", {shown.format(run['cfg'].get(setting, 'block'))}"


def build(folders: list[Path], out: Path, detailed: int = 8, detailed_seeds: int = 1, grids: int = 4) -> Path:
    """Write the page over evaluated runs to ``out``, and beside it the tables of M1–M7 and of MonoLoss, and the pages
    of applications, as there are. Where the runs make a grid its analyses follow, with their tables in a folder.

    Latents are drawn for at most ``detailed`` runs, ``detailed_seeds`` of those that differ only by seed; band grids
    for the first ``grids`` groups. FileNotFoundError when a run has no scores, StoreError when its pictures have
    changed since, ValueError when runs that belong together were judged differently.
    """
    runs = load_runs(folders)
    in_detail = first_of_settings(runs, detailed_seeds, detailed)
    for run in tqdm(runs, desc="Drawing", unit="run", leave=False):
        images = pictures(run) if run["name"] in in_detail else None
        run["groups"] = latent_groups(run, images) if images is not None else []
    groups, saes, first = groups_of(runs), scored_runs(runs), runs[0]
    lead: list[Block] = [
        Note(f"{plural(len(runs), 'run')}, scored on held-out {first['split']} images ({first['n_images']:,} images, "
             f"{first['n_tokens']:,} patch tokens each).")]  # fmt: skip
    if any("(tiny)" in run["cfg"]["backbone"] for run in runs):
        lead.append(Note(
            "Backbones marked (tiny) are small stand-ins trained on CIFAR-10 with the published models' paradigms, 128 "
            "wide; the published ViT-B are 768 wide."))  # fmt: skip
    used = applications(folders, out)
    measured = benchmark(saes, len(runs), detailed > 0)
    whole = measured is not None and len(saes) == len(runs)
    lead = [*first_screen(runs, saes), *lead]
    sections: list[Section | None] = [
        measured if whole else None,
        Section("Runs", runs_table(runs), Note(f"A click on a heading sorts. {MARKED}"), latents_table(runs) or ()),
        Section("Training", Picture(figures.training_curves(runs), wide=True), keys(runs)),
        lifted(folders, first["split"]), reconstruction(runs), monosemanticity(runs, groups, grids),
        None if whole else measured,
        Section("Applications", "What `explore.py` found with these dictionaries. A title opens its page, which "
                "lies in a folder beside this one.", used) if used else None,
        latents(runs, len(in_detail)),
    ]  # fmt: skip
    texts = {"monoloss.csv": as_csv(groups), "monoloss.md": as_markdown(groups)} if groups else {}
    grid = grid_of([sae.run["folder"] for sae in saes]) if saes else None
    if grid is not None:
        analysed = [made for made in analyses(grid) if not made.missing]
        write_tables(analysed, out)
        lead.append(
            Note(
                f"They make a grid, analysed from “{analysed[0].title}” on. The tables of its analyses are in "
                f"{tables_folder(out).name}/ beside this page, as csv with unrounded numbers and as LaTeX."
            )
        )
        sections += analysed
    heading = "Sparse autoencoders on vision features"
    if whole:
        heading = f"ViSAEBench of {plural(len(saes), 'sparse autoencoder')}"
    html = page(f"{heading}: {plural(len(runs), 'run')}" if not whole else heading, lead,
                [made for made in sections if made], tables_folder(out).name if grid else "", heading)  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, text in (texts | files(saes)).items():
        write_text(out.parent / name, text)
    write_text(out, html)
    return out
