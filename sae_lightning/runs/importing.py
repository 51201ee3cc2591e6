"""An SAE of other hands made a run like any other: found, its place settled, looked at on pictures, written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.taps import LAYER_KINDS, Tap
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import file_sha256, write_json
from sae_lightning.interop.checkpoint import weights_at
from sae_lightning.interop.pretrained import Pretrained, pretrained
from sae_lightning.interop.releases import Release, open_release
from sae_lightning.runs.identity import identity, short_hash
from sae_lightning.runs.preflight import Preflight, Reader, Verdict, some_pictures, standard
from sae_lightning.runs.record import record
from sae_lightning.runs.run import RESULT, is_finished
from sae_lightning.saes import SAE, BatchTopK
from sae_lightning.saes.artefact import ArtefactError, download
from sae_lightning.settings.compose import CONF, compose_config

ENOUGH = 1024  # pictures that statistics and thresholds are taken from


@dataclass(frozen=True)
class Found:
    """An SAE as ``name`` finds it: its ``release``, the file ``weights``, and its entry in the registry, if any."""

    name: str
    release: Release
    weights: Path
    entry: Pretrained | None

    @property
    def stated(self) -> dict[str, float]:
        """What is said of explained variance, L0 and dead share; k stands for L0."""
        k = self.release.sae.k
        return ({} if k is None else {"l0": float(k)}) | (self.entry.stated if self.entry else {})

    @property
    def standard(self) -> bool:
        """Whether its inputs are centred and scaled by statistics that the release lacks."""
        return self.release.standard if self.entry is None else self.entry.inputs == "standard"


def find(name: str) -> Found:
    """The SAE at a path, of a name in the registry, or on the model hub; ArtefactError or ValueError in a sentence."""
    entry = pretrained(name)
    path = Path(name)
    if not path.exists():
        if entry is not None and entry.format is None:
            raise ArtefactError(f"{name} cannot be opened: {entry.note}.")
        if entry is not None and entry.path is None:
            raise ArtefactError(f"{name} is not on the model hub: {entry.note}.")
        path = download(name)
    return Found(name, open_release(path), weights_at(path), entry)


def settled(found: Found, given: Sequence[str], typed: Sequence[str] = ()) -> DictConfig:
    """The config of an SAE's run: what was ``given``, then what the release says, then what the registry says of it.

    ``given`` are ``backbone=…``, ``backbone.layer=…``, ``features=…``, ``site=…`` and the like; ``typed`` any settings.
    ValueError asks for the encoder, and for the layer, where nobody says them.
    """
    sae, place, entry = found.release.sae, found.release.place, found.entry or Pretrained("", None, None)
    known = dict(setting.split("=", 1) for setting in given)
    features = known.setdefault("features", place.get("features") or entry.features or "patch")
    known.setdefault("site", place.get("site") or entry.site)
    known.setdefault("data", "demo")
    if "backbone" not in known:
        model, choice = entry.model, entry.backbone
        if place.get("model"):
            model, choice = place["model"], choice_of(place["model"])
        if choice is None:
            raise ValueError(
                f"{found.name} does not say whose features it takes ({sae.d_in} dimensions); give --backbone, "
                "such as dinov2 or clip (docs/inputs.md lists them), and --layer."
            )
        known["backbone"] = choice
        if choice in ("transformers", "timm"):
            known["backbone.published.model"] = str(model)
        else:  # whatever the data, it was trained on the real encoder
            known.setdefault("backbone.size", "published")
    if "backbone.layer" not in known and features in LAYER_KINDS and known["site"] != "norm":
        layer = place.get("layer", entry.layer)
        if layer is None:
            raise ValueError(f"{found.name} does not say its layer; give --layer, from 0, or -1 for the last.")
        known["backbone.layer"] = str(layer)
    chosen = [f"{key}={value}" for key, value in known.items()]
    normalize = "standard" if found.standard else "none"
    cfg = compose_config([f"sae={sae.variant}", f"normalize={normalize}", *chosen, *typed])
    with open_dict(cfg):
        cfg.d_sae, cfg.sae.settings = sae.d_sae, OmegaConf.create(sae.settings())
        if "target_l0" in cfg.sae:
            cfg.sae.target_l0 = None
    return cfg


def choice_of(model: str) -> str:
    """The choice of ``conf/backbone`` that means a ``model`` of transformers or timm; one that takes any otherwise."""
    for file in sorted((CONF / "backbone").glob("*.yaml")):
        if re.search(rf"\bmodel: {re.escape(model)}$", file.read_text(encoding="utf-8"), re.MULTILINE):
            return file.stem
    return "transformers"


def import_run(found: Found, cfg: DictConfig) -> tuple[Path, Verdict | None]:
    """The folder of the run of ``found`` in ``cfg.paths.runs``, and how it stands; None where it was there before.

    Statistics and thresholds that the release lacks are taken from pictures of the train split. Nothing is left behind
    where something fails. ArtefactError where the encoder's features have another width.
    """
    start = time.perf_counter()
    made = identity(cfg) | {"weights": file_sha256(found.weights)}
    slug = re.sub(r"[^\w.-]+", "--", found.name.strip("/")).strip(".-")
    name = f"{slug[-120:]}-{short_hash(made)}"
    folder = Path(cfg.paths.runs) / name
    if is_finished(folder):
        return folder, None
    source, sae = Source.of(cfg), found.release.sae
    verdict, facts = look(found, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name[:40]}-") as beside:
        held = Path(beside) / name
        imported = {"from": found.name, "format": found.release.format, "file": found.weights.name, **facts["imported"]}
        known = {key: value for key, value in facts.items() if key != "imported"}
        sae.save(
            held, **record(cfg, name, made, sae.d_in, known), figures=verdict.figures, stated=verdict.stated,
            imported=imported,
        )  # fmt: skip
        result = {"status": "finished", "imported": True, "seconds": time.perf_counter() - start, "steps": 0}
        write_json(held / RESULT, result | {"samples_per_second": 0.0, "val": verdict.figures})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(held, folder)
    return folder, verdict


def look(found: Found, source: Source) -> tuple[Verdict, dict[str, Any]]:
    """Let the SAE have the statistics and the threshold that it lacks; how it stands, and the facts of its features."""
    sae, backbone = found.release.sae, load_backbone(source.backbone)
    tap = backbone.check(source.tap)
    width = width_of(backbone, tap)
    if width != sae.d_in:
        raise ArtefactError(
            f"{found.name} takes features of {sae.d_in} dimensions, and {tap} of {backbone.title} has {width}; name "
            "its own encoder and place (--backbone, --layer, --features, --site)."
        )
    filled: dict[str, str] = {}
    if found.standard or (isinstance(sae, BatchTopK) and found.release.uncut):
        images, said = some_pictures(source.data, "train", ENOUGH)
        filled = dict.fromkeys(complete(found, Reader(backbone, images).features(tap)), said)
    images, shown = some_pictures(source.data, "val")
    reader = Reader(backbone, images)
    verdict, seen = Preflight(sae, reader, tap, found.stated, shown).verdict(), reader.features(tap)
    prints = {} if source.given else {split: source.fingerprint(split) for split in ("train", "val")}
    looked_at = {"pictures": shown, "fingerprint": images.fingerprint}
    return verdict, {
        "backbone": backbone.title, "layer": tap.layer, "features": tap.kind, "site": tap.site, "store": prints,
        "data": source.data["name"] if source.given else source.images("train").name,
        "severity": float(seen.mean(0).norm() / seen.std(0).norm()), "imported": {"looked_at": looked_at, **filled},
    }  # fmt: skip


def run_on(sae: SAE, store: FeatureStore, folder: Path) -> Path:
    """A run below ``folder`` with an SAE that is in memory, whose data of every split are ``store``, a whole one.

    ValueError where the store's features have another width.
    """
    if store.d_in != sae.d_in:
        raise ValueError(f"The SAE takes features of {sae.d_in} dimensions, and {store!r} has {store.d_in}.")
    choice = sae.variant if (CONF / "sae" / f"{sae.variant}.yaml").is_file() else "batchtopk"
    place = {f"data.{split}": str(store.folder) for split in ("train", "val", "test")}
    values = {"sae.name": sae.variant, "sae.settings": sae.settings(), "sae.target_l0": None, "features": store.kind}
    cfg = compose_config(
        ["data=features", f"sae={choice}"], values=values | place | {"d_sae": sae.d_sae, "loss.sparsity": 0.0}
    )
    facts = {
        "backbone": store.backbone, "layer": store.layer, "data": store.data, "features": store.kind,
        "site": store.site, "severity": store.manifest.severity,
        "store": dict.fromkeys(("train", "val"), store.fingerprint),
    }  # fmt: skip
    run = folder / sae.variant
    sae.save(run, **record(cfg, run.name, identity(cfg), sae.d_in, facts), figures={})
    write_json(run / RESULT, {"status": "finished", "seconds": 0.0, "steps": 0, "samples_per_second": 0.0, "val": {}})
    return run


def complete(found: Found, features: torch.Tensor) -> list[str]:
    """Give the SAE what its release lacks, from ``features`` [N, d_in], and say what that was."""
    sae, done = found.release.sae, []
    if found.standard:
        sae.normalizer = standard(features)
        done.append("normalizer")
    if isinstance(sae, BatchTopK) and found.release.uncut:
        sae.calibrate([features], len(features))
        done.append("threshold")
    return done


def width_of(backbone: Any, tap: Tap) -> int:
    """Dimensions of the features at ``tap``."""
    if tap.layer is not None or tap.site != "block":
        return backbone.shape_at(tap).width
    black = torch.zeros(1, 3, backbone.image_size, backbone.image_size)
    return backbone.forward_features(black, [tap])[tap].shape[-1]
