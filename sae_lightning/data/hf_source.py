"""Opening a Hugging Face data set: by its id on the hub, or what lies under a local path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lightning.data.errors import DataError, brief
from sae_lightning.data.scan import files_mark


@dataclass(frozen=True)
class Opened:
    """``splits`` maps the data set's own split names to Dataset or IterableDataset.

    ``mark`` changes when the data do and is the same in every process: sizes and times of local files, the commit
    on the hub. (A Dataset's own fingerprint hashes paths, so it is not used.)
    """

    name: str
    splits: Mapping[str, Any]
    mark: str


def open_source(cfg: Mapping[str, Any]) -> Opened:
    """All splits of the data set ``id``, ``config``, ``revision``; undownloaded if ``streaming``.

    ``id`` may be a path: a folder of parquet files or pictures, one parquet file, or a folder of save_to_disk.
    Raises DataError with what the library says when it cannot be loaded.
    """
    path = Path(str(cfg["id"])).expanduser()
    local = path.exists()
    streaming = bool(cfg.get("streaming"))
    if local and path.is_file() and path.suffix != ".parquet":
        raise DataError(f"{path} is no parquet file; data.id takes a parquet file, a folder or an id on the hub.")
    try:
        if local and _is_saved(path):
            splits, mark = _load_saved(path, streaming), None
        else:
            splits, mark = _load_built(path.resolve() if local else None, cfg, streaming)
    except Exception as error:
        raise DataError(
            f"The data set '{cfg['id']}' cannot be loaded: {brief(error)}. Check data.id, data.config and "
            "data.revision, or the connection; a local path works offline."
        ) from error
    if not local:
        return Opened(cfg["name"], splits, f"{cfg['id']}@{mark}")
    name = path.resolve().name if str(cfg["name"]) == str(cfg["id"]) else cfg["name"]
    return Opened(name, splits, files_mark(path))


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load_saved(path: Path, streaming: bool) -> dict[str, Any]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if streaming:
        return {s: data.to_iterable_dataset(max(1, len(data.cache_files))) for s, data in splits.items()}
    return splits


def _load_built(path: Path | None, cfg: Mapping[str, Any], streaming: bool) -> tuple[dict[str, Any], str]:
    import datasets

    if path is not None and path.is_file():
        builder = datasets.load_dataset_builder("parquet", data_files={"train": str(path)})
    elif path is not None:
        builder = datasets.load_dataset_builder(str(path), cfg.get("config"))
    else:
        builder = datasets.load_dataset_builder(cfg["id"], cfg.get("config"), revision=cfg.get("revision"))
    if streaming:
        return dict(builder.as_streaming_dataset()), builder.hash
    builder.download_and_prepare()
    return dict(builder.as_dataset()), builder.hash
