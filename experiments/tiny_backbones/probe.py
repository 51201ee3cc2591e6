"""Linear probes of the tiny backbones: ``python -m experiments.tiny_backbones.probe FOLDER``.

FOLDER holds CIFAR-10's ``train.parquet`` and ``test.parquet``. For the patch tokens of each default layer,
max- and mean-pooled, against the same architecture with random weights; zero-shot accuracy of CLIP and
SigLIP beside them. Writes ``probes.json`` next to this file and prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from experiments.tiny_backbones.cifar import Cifar, load, normalise
from sae_lightning.backbones.backbone import Backbone, Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.tiny import TINY_NAMES
from sae_lightning.data.bundled import CIFAR10_CLASSES

CONF = Path(__file__).resolve().parents[2] / "conf" / "backbone"
OUT = Path(__file__).with_name("probes.json")


def features(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Max- and mean-pooled patch tokens of the default layer, and embeddings if there are some, each [N, 128]."""
    patch, embedding = Tap("patch", backbone.layer), Tap("embedding")
    taps = [patch, embedding] if embedding.kind in backbone.kinds else [patch]
    parts: dict[str, list[Tensor]] = {}
    for batch in tqdm(images.split(500), desc=backbone.title, leave=False):
        out = backbone.forward_features(normalise(batch), taps)
        found = {"max": out[patch].amax(1), "mean": out[patch].mean(1)}
        if embedding in out:
            found["embedding"] = out[embedding]
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(part) for name, part in parts.items()}


def accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return float(probe.fit(train.numpy(), train_labels.numpy()).score(test.numpy(), test_labels.numpy()))


def zero_shot(backbone: Backbone, embeddings: Tensor, labels: Tensor) -> float:
    """Accuracy of the nearest prompt "a photo of a <class>"."""
    prompts = [f"a photo of {'an' if c[0] in 'aeiou' else 'a'} {c}" for c in CIFAR10_CLASSES]
    texts = torch.nn.functional.normalize(backbone.encode_text(prompts), dim=-1)
    guess = (embeddings @ texts.T).argmax(1)
    return float((guess == labels).float().mean())


def probe(name: str, train: Cifar, test: Cifar) -> dict[str, float]:
    """All accuracies of one backbone."""
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")) | {"size": "tiny"}
    row: dict[str, float] = {}
    for kind in ("trained", "random"):
        backbone = load_backbone(cfg | {"tiny": cfg["tiny"] | {"pretrained": kind == "trained"}})
        a, b = features(backbone, train.images), features(backbone, test.images)
        for pool in ("max", "mean"):
            row[f"{kind}_{pool}"] = accuracy(a[pool], train.labels, b[pool], test.labels)
        if kind == "trained" and "embedding" in b:
            row["zero_shot"] = zero_shot(backbone, b["embedding"], test.labels)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=5_000, help="training images of the probe (first of train)")
    parser.add_argument("--test", type=int, default=5_000)
    parser.add_argument("--names", nargs="*", default=list(TINY_NAMES))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    parts = {name: load(args.folder / f"{name}.parquet") for name in ("train", "test")}
    counts = {"train": args.train, "test": args.test}
    cut = {s: Cifar(p.images[: counts[s]], p.labels[: counts[s]], p.captions[: counts[s]]) for s, p in parts.items()}
    rows = {}
    columns = ("trained_max", "random_max", "trained_mean", "random_mean", "zero_shot")
    print(f"| backbone | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in args.names:
        rows[name] = probe(name, cut["train"], cut["test"])
        cells = (f"{rows[name][c]:.3f}" if c in rows[name] else "" for c in columns)
        print(f"| {name} (tiny) | {' | '.join(cells)} |", flush=True)
    args.out.write_text(json.dumps({"images": counts, "accuracy": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
