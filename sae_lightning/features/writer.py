"""Writing a feature store so that nothing unfinished can pass for whole, and finished shards survive a kill.

Shards go into ``<folder>.partial``, each with a small json of its checksum and statistics beside it. At
the end the statistics are merged, the manifest is written and the folder takes its name in one move.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lightning.features.manifest import Manifest, Shard, StoreError
from sae_lightning.features.store import file_sha256

VERSIONS = ("torch", "timm", "transformers", "safetensors")


class StoreWriter:
    """Takes the images' features in order and seals the store.

    ``about`` holds the manifest's descriptive fields (data, split, backbone, layer, grid, class_names).
    ``done`` images of an earlier, interrupted extraction are kept; go on from there.
    Raises StoreError for NaN or infinite features and when the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        about: dict,
        image_ids: list[str],
        labels: np.ndarray,
        images_per_shard: int = 4096,
    ) -> None:
        if images_per_shard < 1:
            raise StoreError(f"extract.images_per_shard={images_per_shard} must be at least 1.")
        self.folder, self.fingerprint, self.about = folder, fingerprint, about
        self.image_ids, self.labels, self.per_shard = image_ids, labels, images_per_shard
        self.partial = folder.with_name(folder.name + ".partial")
        self._records = self._resume()
        self._pending: dict[str, list[Tensor]] = {"patch": [], "pooled": []}

    @property
    def done(self) -> int:
        """Images in finished shards."""
        return sum(record["shard"]["images"] for record in self._records)

    def _resume(self) -> list[dict]:
        plan = {"fingerprint": self.fingerprint, "images_per_shard": self.per_shard, "n_images": len(self.image_ids)}
        note = self.partial / "plan.json"
        try:
            same = json.loads(note.read_text()) == plan
        except (OSError, json.JSONDecodeError):
            same = False
        if not same:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            note.write_text(json.dumps(plan))
            return []
        records: list[dict] = []
        while (path := self.partial / f"shard-{len(records):05d}.json").is_file():
            record = json.loads(path.read_text())
            shard = self.partial / record["shard"]["file"]
            if not shard.is_file() or shard.stat().st_size != record["shard"]["bytes"]:
                break
            records.append(record)
        return records

    def append(self, patch: Tensor, pooled: Tensor) -> None:
        """Add the next images: ``patch`` [n, P, d_in] and ``pooled`` [n, d_pooled], kept as fp16."""
        patch, pooled = patch.cpu(), pooled.cpu()
        half = patch.to(torch.float16)
        if not bool(half.isfinite().all()):
            at = self.done + sum(len(p) for p in self._pending["patch"])
            bad = int((~half.isfinite()).flatten(1).any(1).nonzero()[0])
            why = "NaN or infinite" if not bool(patch.isfinite().all()) else "too large for fp16 (beyond 65504)"
            raise StoreError(
                f"The features of image '{self.image_ids[at + bad]}' are {why}; check the image and "
                "extract.precision. Nothing was sealed."
            )
        self._pending["patch"].append(half)
        self._pending["pooled"].append(pooled.to(torch.float16))
        while sum(len(p) for p in self._pending["patch"]) >= self.per_shard:
            self._write_shard(self.per_shard)

    def _write_shard(self, count: int) -> None:
        whole = {name: torch.cat(parts) for name, parts in self._pending.items()}
        shard = {name: tensor[:count].contiguous() for name, tensor in whole.items()}
        self._pending = {name: [tensor[count:]] for name, tensor in whole.items()}
        name = f"shard-{len(self._records):05d}.safetensors"
        path = self.partial / name
        try:
            save_file(shard, path)
            _sync(path)
        except (OSError, Exception) as error:
            path.unlink(missing_ok=True)
            raise StoreError(
                f"Writing {path} failed ({error}). Free space or set paths.stores to another disk; the "
                f"{len(self._records)} finished shards are kept and the same command goes on from them."
            ) from error
        tokens = shard["patch"].reshape(-1, shard["patch"].shape[-1]).double()
        mean = tokens.mean(0)
        record = {
            "shard": {"file": name, "images": count, "bytes": path.stat().st_size, "sha256": file_sha256(path)},
            "tokens": len(tokens),
            "mean": mean.tolist(),
            "m2": (tokens - mean).square().sum(0).tolist(),
            "norm": float(tokens.norm(dim=1).sum()),
            "shape": [*shard["patch"].shape[1:], shard["pooled"].shape[1]],
        }
        note = path.with_suffix(".json")
        note.with_suffix(".tmp").write_text(json.dumps(record))
        os.replace(note.with_suffix(".tmp"), note)
        self._records.append(record)

    def seal(self) -> None:
        """Write what is pending, the statistics and the manifest, and give the folder its name."""
        left = sum(len(p) for p in self._pending["patch"])
        if left:
            self._write_shard(left)
        if self.done != len(self.image_ids):
            raise StoreError(f"{self.done} of {len(self.image_ids)} images were written; the store stays unsealed.")
        tokens, mean, m2 = merge([(r["tokens"], np.array(r["mean"]), np.array(r["m2"])) for r in self._records])
        deviation = np.sqrt(m2 / tokens)
        n_patches, d_in, d_pooled = self._records[0]["shape"]
        save_file(
            {"mean": torch.from_numpy(mean), "deviation": torch.from_numpy(deviation)},
            self.partial / "statistics.safetensors",
        )
        pq.write_table(pa.table({"image_id": self.image_ids, "label": self.labels}), self.partial / "images.parquet")
        manifest = Manifest(
            **self.about,
            fingerprint=self.fingerprint,
            n_images=len(self.image_ids),
            n_patches=n_patches,
            d_in=d_in,
            d_pooled=d_pooled,
            dtype="float16",
            std=float(np.sqrt(m2.sum() / (tokens * d_in))),
            mean_norm=sum(r["norm"] for r in self._records) / tokens,
            severity=float(np.linalg.norm(mean)) / max(float(np.linalg.norm(deviation)), 1e-12),
            shards=[Shard(**r["shard"]) for r in self._records],
            files={n: file_sha256(self.partial / n) for n in ("statistics.safetensors", "images.parquet")},
            versions={name: version(name) for name in VERSIONS},
        )
        manifest.write(self.partial)
        for note in [*self.partial.glob("shard-*.json"), self.partial / "plan.json"]:
            note.unlink()
        for path in self.partial.iterdir():
            _sync(path)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.partial, self.folder)


def merge(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and summed squared deviation of the union of parts, each given by its own (Chan et al. 1979)."""
    count, mean, m2 = parts[0]
    for n, other_mean, other_m2 in parts[1:]:
        delta = other_mean - mean
        m2 = m2 + other_m2 + delta**2 * count * n / (count + n)
        mean = mean + delta * n / (count + n)
        count += n
    return count, mean, m2


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
