"""Put a trained captioner into the package: ``python -m experiments.tiny_captioner.ship .work/tiny_captioner/model``.

Beside the model goes ``captioner.json``: the digest of its weights and of the backbone inside them, and what it
says of the first pictures of the demo's test split, which the tests hear again.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

from sae_lightning.backbones.tiny import weights_file
from sae_lightning.data import load_images
from sae_lightning.files import write_json
from sae_lightning.vlms import load_vlm
from sae_lightning.vlms.load import CAPTIONER
from sae_lightning.vlms.words import SPECIAL

KEPT = ("config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json")  # fmt: skip
PICTURES = 12


def ship(model: Path, target: Path = CAPTIONER) -> None:
    """Copy ``model`` to ``target`` and write ``captioner.json`` there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(model / name, target / name)
    vlm = load_vlm({"title": "captioner", "model": "captioner", "weights": str(target), "prompt": "<image>",
                    "max_new_tokens": 28, "dtype": "float32"})  # fmt: skip
    demo = load_images({"source": "demo"}, "test")
    about = {
        "made_by": "experiments/tiny_captioner",
        "sha256": hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest(),
        "backbone_sha256": hashlib.sha256(weights_file("clip").read_bytes()).hexdigest(),
        "parameters": sum(tensor.numel() for tensor in vlm.model.parameters()),
        "words": len(vlm.processor.tokenizer) - len(SPECIAL),
        "captions": vlm.captions([demo[i] for i in range(PICTURES)]),
    }
    write_json(target / "captioner.json", about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder that the training exported")
    ship(parser.parse_args().model)


if __name__ == "__main__":
    main()
