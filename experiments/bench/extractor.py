"""Extraction against a plain loop over transformers, in one process: the same pictures, encoder and patch tokens.

    python -m experiments.bench.extractor [--quick] [--json FILE] [--encoder FOLDER] [--pictures N] [--repeats 5]

``plain`` is what a script does: PIL, the same preprocessing, batches of 32, tokens kept as float16 and saved.
``ours`` writes a store with statistics, checksums and labels. Both are given the loaded encoder, a ViT-S/14 at 224
pixels with random weights unless ``--encoder`` names a folder. bf16, which wants AMX, is not measured here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import save_file

from experiments.bench.feature_peers.extraction import make_pictures
from experiments.bench.timing import Row, interleaved, print_table, shared_parser, write_json
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.commands.help import CONF
from sae_lightning.commands.paths import located
from sae_lightning.features.extraction import extract
from sae_lightning.features.source import Source, writer

BATCH, LAYER = 32, 10


def contenders(pictures: Path, out: Path, encoder: str | None) -> dict[str, Callable[[], None]]:
    """Both ways of writing the patch tokens after a layer for all pictures below ``out``."""
    weights = f"backbone.published.weights={encoder}" if encoder else "backbone.published.pretrained=false"
    asked = ["backbone=dinov2_s", weights, f"backbone.layer={LAYER}", "data=folder", f"data.path={pictures}",
             "data.shares={train:1,val:0,test:0}", f"paths.stores={out}"]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        source = Source.of(located(compose("extract", asked)))
    backbone, images = load_backbone(source.backbone), source.images("train")
    paths = sorted(pictures.glob("*.jpg"))

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        extract(images, backbone, {source.tap: writer(source, images, backbone, source.tap, out / "ours")})

    @torch.inference_mode()
    def plain() -> None:
        out.mkdir(exist_ok=True)
        found = []
        for first in range(0, len(paths), BATCH):
            pixels = torch.stack([backbone.transform(Image.open(path).convert("RGB"))
                                  for path in paths[first : first + BATCH]])  # fmt: skip
            states = backbone.model(pixels, output_hidden_states=True).hidden_states
            found.append(states[LAYER + 1][:, 1:].half())
        save_file({"features": torch.cat(found)}, out / "plain.safetensors")

    return {"ours": ours, "plain": plain}


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both and print pictures a second."""
    parser = shared_parser(__doc__, "32 pictures, one repeat", repeats=5, memory=False)
    parser.add_argument("--encoder", help="a folder that transformers reads")
    parser.add_argument("--pictures", type=int, default=96)
    args = parser.parse_args(arguments)
    count, repeats = (BATCH, 1) if args.quick else (args.pictures, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder) / "pictures", count)
        seconds = interleaved(contenders(Path(folder) / "pictures", Path(folder) / "out", args.encoder), repeats)
    rows = [Row.of(f"{count} pictures", name, taken) for name, taken in seconds.items()]
    print_table(rows)
    for row in rows:
        print(f"{row.contender}: {count / row.median_s:.2f} pictures a second")
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
