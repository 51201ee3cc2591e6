"""Caches of the image sources go to a folder of the test."""

import pytest


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("SAE_LIGHTNING_CACHE", str(root / "own"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "datasets")
    return root
