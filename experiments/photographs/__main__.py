"""The tables and figures of docs/photographs.md, from runs of ``experiment=photographs`` that are trained and scored.

    python -m experiments.photographs scores 'runs/photographs/*'
    python -m experiments.photographs latents RUN church 'English springer' parachute
    python -m experiments.photographs monoloss WITHOUT WITH church …
    python -m experiments.photographs moran RUN

``scores`` writes scores.csv beside this file and prints the table; the others draw figures into docs/photographs.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sae_lightning.evaluation.by_latent import strongest, top_purity
from sae_lightning.evaluation.core import activation_maps
from sae_lightning.evaluation.scoring_pass import batches
from sae_lightning.metrics.core import SHOWN
from sae_lightning.metrics.moran import Moran
from sae_lightning.metrics.part import TopImages, headlines
from sae_lightning.rendering.pictures import heat
from sae_lightning.rendering.table import Head, Table
from sae_lightning.runs.run import Run
from sae_lightning.runs.scores import read_rows

HERE, DOCS = Path(__file__).parent, Path(__file__).parents[2] / "docs" / "photographs"
SIDE, SHOWN_IMAGES, GAP, TEXT = 136, 6, 3, 18  # pixels; pictures a latent


@dataclass
class Seen:
    """A run over its test photographs."""

    run: Run

    @cached_property
    def top(self) -> TopImages:
        """The nine strongest photographs of each latent."""
        self.moran = Moran(self.run.sae.d_sae, self.store.grid)
        return strongest(self._codes(), self.run.sae.d_sae, 9)

    @cached_property
    def store(self):
        """Its test features."""
        return self.run.source.store("test")

    @torch.no_grad()
    def _codes(self) -> Iterator:
        for _, read in batches(self.store, 0, len(self.store), 16, self.run.name):
            codes = self.run.sae.encode(read.flatten(0, 1).float())
            self.moran.update(codes)
            yield codes.pool(self.store.n_patches, "max")

    def of_class(self, name: str) -> int:
        """The purest latent of a class among those that fire on ten photographs or more, of equals the rarest."""
        label, share = top_purity(self.top.images, self.store.labels)
        fits = (label == self.store.class_names.index(name)) & (self.top.fired >= 10)
        if not bool(fits.any()):
            raise ValueError(f"No latent of {self.run.name} is mostly of {name}.")
        order = share - self.top.fired / self.top.fired.max() / 100
        return int(torch.where(fits, order, -1).argmax())

    @torch.no_grad()
    def row(self, latent: int, tinted: bool = False) -> list[Image.Image]:
        """The latent's strongest photographs, lit (or ``tinted``) where it fires."""
        rows = self.top.images[latent, :SHOWN_IMAGES]
        rows = rows[rows >= 0]
        maps = activation_maps(self.run.sae, self.store, torch.tensor([latent]), rows[None])[0].numpy()
        images, height = self.run.images("test"), self.store.grid[0]
        ids = images.index_of([self.store.image_ids[i] for i in rows.tolist()])
        pictures = [images[i].resize((SIDE, SIDE), Image.Resampling.LANCZOS) for i in ids.tolist()]
        show = heat if tinted else lit
        return [show(picture, each.reshape(height, -1)) for picture, each in zip(pictures, maps, strict=True)]


def lit(picture: Image.Image, activation: np.ndarray) -> Image.Image:
    """The picture, grey and dark where a latent is silent, with full colour where it is strongest in it."""
    strength = (activation / max(activation.max(), 1e-12) * 255).astype(np.uint8)
    mask = np.asarray(Image.fromarray(strength).resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = np.asarray(picture, dtype=np.float32)
    dark = 0.5 * pixels.mean(-1, keepdims=True)
    shown = dark + (pixels - dark) * np.sqrt(mask)[..., None]
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


def sheet(rows: Sequence[tuple[str, list[Image.Image]]], columns: int = 1) -> Image.Image:
    """Rows of pictures, each below its title, in ``columns``."""
    wide, high = SHOWN_IMAGES * (SIDE + GAP) + 4 * GAP, SIDE + TEXT + 2 * GAP
    made = Image.new("RGB", (columns * wide, -(-len(rows) // columns) * high), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(13)
    for i, (title, pictures) in enumerate(rows):
        left, upper = i % columns * wide, i // columns * high
        draw.text((left, upper + 1), title, "black", font)
        for j, picture in enumerate(pictures):
            made.paste(picture, (left + j * (SIDE + GAP), upper + TEXT))
    return made


def save(made: Image.Image, name: str) -> None:
    """Write a figure as WebP, for docs."""
    DOCS.mkdir(exist_ok=True)
    made.save(DOCS / f"{name}.webp", quality=72, method=6)
    print(DOCS / f"{name}.webp", f"{(DOCS / f'{name}.webp').stat().st_size / 1024:.0f} kB")


def scores(runs: Sequence[Run]) -> Table:
    """Core metrics and headlines of the runs on their test photographs."""
    columns = [*SHOWN, *headlines()]
    heads = [Head("run"), Head("encoder"), Head("layer", ".0f"), Head("d_sae", ",.0f"), Head("k", "g"),
             Head("seed", "g"), *(column.head for column in columns)]  # fmt: skip
    rows = []
    for run in runs:
        found = [row for row in read_rows(run.folder) if row["split"] == "test"]
        made = [run.cfg[name] for name in ("layer", "d_sae", "k")]
        about = [run.name.rpartition("-")[0], run.config["backbone"]["name"], *made, run.config["seed"]]
        rows.append([*about, *(column.cell(found) for column in columns)])
    return Table("scores", "", heads, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scores", "latents", "monoloss", "moran"))
    parser.add_argument("runs", nargs="+", help="folders of runs, and classes")
    given = parser.parse_args(arguments)
    if given.what == "scores":
        folders = sorted(Path(each) for pattern in given.runs for each in glob.glob(pattern))
        table = scores([Run(folder) for folder in folders if (folder / "scores.parquet").is_file()])
        (HERE / "scores.csv").write_text(table.csv(), encoding="utf-8")
        print(table.markdown())
        return
    number = 2 if given.what == "monoloss" else 1
    seen, classes = [Seen(Run(Path(folder))) for folder in given.runs[:number]], given.runs[number:]
    name = seen[0].run.config["backbone"]["name"]
    if given.what == "moran":
        shown = seen[0].top and seen[0].moran.shown(4)
        values: Tensor = seen[0].moran.scores()
        save(sheet([(f"{kind.split()[0]}: latent {int(j)}, I = {values[j]:.2f}", seen[0].row(int(j), True))
                    for kind, some in shown.items() for j in some]), f"moran-{name}")  # fmt: skip
    elif given.what == "latents":
        rows = [(c, seen[0].of_class(c)) for c in classes]
        save(sheet([(f"{c}: latent {j}", seen[0].row(j)) for c, j in rows]), f"latents-{name}")
    else:
        sides = zip(("without", "with MonoLoss"), seen, strict=True)
        both = [(title, each) for title, each in sides]
        save(sheet([(f"{c}, {title}: latent {each.of_class(c)}", each.row(each.of_class(c)))
                    for c in classes for title, each in both], 2), f"monoloss-{name}")  # fmt: skip


if __name__ == "__main__":
    main()
