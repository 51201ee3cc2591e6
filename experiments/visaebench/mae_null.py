"""Moran's I of a masked autoencoder's channels, its patches read as transformers' ViTMAE gives them and in order.

python -m experiments.visaebench.mae_null [--images 64] [--pictures FOLDER] [--json FILE]

``ViTMAEModel`` shuffles an image's patches at random even with ``mask_ratio=0``, and gives them back shuffled, with the
order in ``ids_restore``. Whoever reads its hidden states as a grid finds no spatial order in any features. This shows
it with random weights (ViT-B/16 on the demo's pictures, or those in a folder; no download) and with the trained tiny
MAE, whose own patches are put in an order that is drawn for each picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ViTMAEConfig, ViTMAEModel

from sae_lightning.backbones.registry import Tap, load_backbone
from sae_lightning.data import load_images
from sae_lightning.metrics.moran import channel_morans_i, grid_weights

SEED = 0


def mean_moran(features: Tensor) -> float:
    """Of all channels on all images of ``features`` [n, P, d], patches of a square grid in order (eq. 2)."""
    side = round(features.shape[1] ** 0.5)
    return float(channel_morans_i(features, grid_weights((side, side))).nanmean())


@torch.no_grad()
def random_weights(pixels: Tensor) -> dict[str, float]:
    """ViT-B/16 with random weights on ``pixels`` [n, 3, 224, 224]: as the hidden states lie, and by ``ids_restore``."""
    torch.manual_seed(SEED)
    model = ViTMAEModel(ViTMAEConfig(mask_ratio=0.0)).eval()
    as_read, in_order = [], []
    for batch in pixels.split(16):
        found = model(batch, output_hidden_states=True)
        patches = found.hidden_states[-1][:, 1:]  # the last block's, without the class token
        place = found.ids_restore[..., None].expand_as(patches)
        as_read.append(patches)
        in_order.append(patches.gather(1, place))
    return {"as read": mean_moran(torch.cat(as_read)), "in order": mean_moran(torch.cat(in_order))}


@torch.no_grad()
def tiny(images: Tensor) -> dict[str, float]:
    """The bundled MAE on ``images`` as it takes them: its patches in order, and shuffled for each picture."""
    backbone = load_backbone({"name": "mae", "size": "tiny", "layer": None, "tiny": {"layer": 4, "pretrained": True}})
    tap = Tap("patch", backbone.layer)
    patches = backbone.forward_features(images, [tap])[tap]
    generator = torch.Generator().manual_seed(SEED)
    order = torch.rand(patches.shape[:2], generator=generator).argsort(1)[..., None].expand_as(patches)
    return {"as read": mean_moran(patches.gather(1, order)), "in order": mean_moran(patches)}


def pixels_in(folder: Path, n: int) -> Tensor:
    """The first ``n`` pictures in and below ``folder`` as ViTMAE takes them."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    transform = create_transform((3, 224, 224))
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in found[:n]])


def measure(n: int, folder: Path | None) -> dict[str, dict[str, float]]:
    """Both, on ``n`` of the demo's test pictures, with the expectation without spatial order."""
    backbone = load_backbone({"name": "mae", "size": "tiny", "layer": None, "tiny": {"layer": 4, "pretrained": True}})
    pictures = load_images({"name": "demo", "source": "demo"}, "test").take(range(n))
    small = torch.stack([backbone.transform(pictures[i]) for i in range(n)])
    large = pixels_in(folder, n) if folder else interpolate(small, size=(224, 224), mode="bicubic")
    return {
        "ViT-B/16, random weights": random_weights(large) | {"null": -1 / 195},
        "mae (tiny), trained": tiny(small) | {"null": -1 / 63},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.images, args.pictures)
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{how} {value:.4f}" for how, value in values.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
