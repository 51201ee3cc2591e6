"""What the captioner says of unseen pictures: ``python -m experiments.tiny_captioner.measure --data test.parquet``.

Every share beside that of a blind captioner, which is shown another picture than the one it is judged by. Writes
``results.json`` next to this file and prints a table and a few captions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from statsmodels.stats.proportion import proportion_confint
from tqdm import tqdm

from experiments.tiny_captioner.data import Pictures, pictures
from experiments.tiny_captioner.pixels import COLOURS
from sae_lightning.data.bundled import CIFAR10_CLASSES
from sae_lightning.vlms import load_vlm
from sae_lightning.vlms.words import CLASS_WORDS, concepts_in, mentions

OUT = Path(__file__).with_name("results.json")
NOUNS = {word for words in CLASS_WORDS.values() for word in words} | {"animal", "vehicle"}


def judged(captions: Sequence[str], of: Pictures) -> dict[str, np.ndarray]:
    """For each statement that captions make, whether it holds of their picture; those that make none do not count."""
    found: dict[str, list[bool]] = {
        "class": [],
        "colour of the object": [],
        "other colours": [],
        "dark": [],
        "bright": [],
    }
    for caption, label, m in zip(captions, of.labels, of.measured, strict=True):
        found["class"].append(concepts_in(caption, CIFAR10_CLASSES) == [CIFAR10_CLASSES[label]])
        own, others = colours_said(caption)
        if own:
            found["colour of the object"].append(own[0] in m.colours)
        found["other colours"] += [colour in (m.background, m.above, m.below) for colour in others]
        for tone in ("dark", "bright"):
            if mentions(caption, tone):
                found[tone].append(m.tone == tone)
    return {name: np.array(hits) for name, hits in found.items()}


def colours_said(caption: str) -> tuple[list[str], list[str]]:
    """The colour words right before the object's noun, and all others."""
    words = caption.split()
    noun = next((i for i, word in enumerate(words) if word in NOUNS), 0)
    start = noun
    while start > 0 and words[start - 1] in (*COLOURS, "and"):
        start -= 1
    own = [word for word in words[start:noun] if word in COLOURS]
    return own, [word for word in words[:start] + words[noun:] if word in COLOURS]


def table(captions: Sequence[str], of: Pictures, seed: int = 0) -> dict[str, dict[str, object]]:
    """Share and 95 % Wilson interval of every statement of ``judged``, beside the blind captioner's share."""
    order = np.random.default_rng(seed).permutation(len(captions))
    blind = judged([captions[i] for i in order], of)
    rows: dict[str, dict[str, object]] = {}
    for name, hits in judged(captions, of).items():
        interval = proportion_confint(int(hits.sum()), len(hits), method="wilson")
        rows[name] = {
            "statements": len(hits), "share": round(float(hits.mean()), 4),
            "interval": [round(float(bound), 4) for bound in interval],
            "blind": round(float(blind[name].mean()), 4),
        }  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's test split (parquet, image + label)")
    parser.add_argument("--model", default="bundled", help="the model's folder; by default the bundled captioner")
    parser.add_argument("--images", type=int, default=5000, help="how many, from the first")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    of = pictures(args.data, args.images)
    vlm = load_vlm({"title": "captioner", "model": "captioner", "weights": args.model, "prompt": "<image>",
                    "max_new_tokens": 28, "dtype": "float32"})  # fmt: skip
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in of.images]
    captions: list[str] = []
    for at in tqdm(range(0, len(images), 100), "Captioning", unit="batch"):
        captions += vlm.captions(images[at : at + 100], batch_size=100)
    rows = table(captions, of)
    counts = {
        "images": len(images),
        "distinct_captions": len(set(captions)),
        "distinct_words": len({word for caption in captions for word in caption.split()}),
        "words_a_caption": round(float(np.mean([len(caption.split()) for caption in captions])), 1),
    }
    args.out.write_text(json.dumps({**counts, "true": rows, "first": captions[:16]}, indent=2) + "\n", encoding="utf-8")
    print("| statement | captions | true | 95 % | blind |\n|---|---|---|---|---|")
    for name, row in rows.items():
        low, high = row["interval"]  # type: ignore[misc]
        print(f"| {name} | {row['statements']} | {row['share']:.3f} | {low:.3f} to {high:.3f} | {row['blind']:.3f} |")
    print(counts, *captions[:16], sep="\n")


if __name__ == "__main__":
    main()
