"""A folder that stands in for the model hub."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have ``huggingface_hub`` upload to and download from ``folder``/hub, logged in; returns that."""
    root, cache = folder / "hub", folder / "cache"

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            if private:
                (root / repo_id / ".private").touch()

        def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns=None):
            copy(Path(folder_path), root / repo_id, allow_patterns or ["*"])
            return f"hub/{repo_id}"

    def download(repo_id, revision, allow_patterns):
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(repo_id)
        shutil.rmtree(cache / repo_id, ignore_errors=True)
        (cache / repo_id).mkdir(parents=True)
        copy(root / repo_id, cache / repo_id, allow_patterns)
        return str(cache / repo_id)

    def copy(source: Path, target: Path, patterns: list[str]) -> None:
        for path in source.rglob("*"):
            name = path.relative_to(source)
            if path.is_file() and any(fnmatch(name.as_posix(), pattern) for pattern in patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return root
