"""Build the bundled demo images from CIFAR-10: ``python -m experiments.demo_data.build FOLDER``.

FOLDER holds CIFAR-10's ``train.parquet`` and ``test.parquet``. The train part comes from CIFAR's train
split, val and test from its test split, which the tiny backbones never saw. The result is the same,
byte for byte, for the same library versions.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from experiments.demo_data.captions import caption
from sae_lightning.data.bundled import CIFAR10_CLASSES, CIFAR10_GROUPS, DEMO

PARTS = {"train": ("train", 5000), "val": ("test", 1000), "test": ("test", 2000)}
SEED = 42


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def build(folder: Path, out: Path) -> None:
    """Write ``demo.parquet`` and ``demo.json`` into ``out``."""
    rng = np.random.default_rng(SEED)
    sources = {name: pq.read_table(folder / f"{name}.parquet") for name in ("train", "test")}
    used: set[str] = set()  # digests of pixels: no picture in two parts, none twice
    taken: dict[str, set[int]] = {"train": set(), "test": set()}
    rows: dict[str, list] = {"image": [], "label": [], "split": [], "image_id": [], "caption": []}
    for part, (source, count) in PARTS.items():
        labels = sources[source]["label"].to_numpy()
        bytes_ = sources[source]["image"].combine_chunks().field("bytes")
        chosen: list[int] = []
        for label in range(len(CIFAR10_CLASSES)):
            wanted = count // len(CIFAR10_CLASSES)
            for index in rng.permutation(np.flatnonzero(labels == label)):
                if not wanted:
                    break
                digest = hashlib.sha256(pixels(bytes_[index].as_py()).tobytes()).hexdigest()
                if index in taken[source] or digest in used:
                    continue
                used.add(digest)
                taken[source].add(int(index))
                chosen.append(int(index))
                wanted -= 1
        for index in sorted(chosen):
            data = bytes_[index].as_py()
            name = f"{source}-{index:05d}"
            rows["image"].append({"bytes": data, "path": f"{name}.png"})
            rows["label"].append(int(labels[index]))
            rows["split"].append(part)
            rows["image_id"].append(name)
            rows["caption"].append(caption(pixels(data), CIFAR10_CLASSES[labels[index]], rng))
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": CIFAR10_CLASSES},
        **{c: {"_type": "Value", "dtype": "string"} for c in ("split", "image_id", "caption")},
    }
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image_type), ("label", pa.int64()), ("split", pa.string()), ("image_id", pa.string()),
         ("caption", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=schema), out / "demo.parquet", compression="none", row_group_size=500)
    about = {
        "source": "CIFAR-10 (Krizhevsky 2009), Hugging Face parquet files with image and label",
        "parts": {part: {"from": source, "images": count} for part, (source, count) in PARTS.items()},
        "source_sha256": {n: hashlib.sha256((folder / f"{n}.parquet").read_bytes()).hexdigest() for n in sources},
        "sha256": hashlib.sha256((out / "demo.parquet").read_bytes()).hexdigest(),
        "seed": SEED,
        "class_names": CIFAR10_CLASSES,
        "sibling_groups": CIFAR10_GROUPS,
    }
    (out / "demo.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{len(rows['label'])} images, {(out / 'demo.parquet').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=DEMO)
    args = parser.parse_args()
    build(args.folder, args.out)
