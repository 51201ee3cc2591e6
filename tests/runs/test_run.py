"""A run as the applications open it: codes of whole images, kept for the next one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sae_lightning.data import DataError
from sae_lightning.runs.run import Run, shared_results
from sae_lightning.saes import TopK
from tests.conftest import D_IN, N_PATCHES, write_store


@pytest.fixture
def opened(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store", 20, seed=3)
    record = {"config": {"data": {"source": "store"}}, "backbone": "none", "features": "patch", "expansion": 2}
    TopK(D_IN, 2 * D_IN, k=3, seed=0).save(tmp_path / "run", **record)
    monkeypatch.setattr(Run, "store", lambda self, split, kind=None: store)
    return Run(tmp_path / "run")


def cached(opened):
    return sorted(opened.folder.glob("apps/*.npz"))


def test_codes_are_the_maximum_over_an_images_patches(opened):
    features = opened.store("test").features(slice(None)).float()
    each = opened.sae.encode(features).to_dense().reshape(20, N_PATCHES, -1)
    np.testing.assert_array_equal(opened.codes("test").toarray(), each.amax(1).detach().numpy())
    np.testing.assert_allclose(opened.features("test"), features.mean(1).numpy(), rtol=1e-6)


def test_codes_are_kept_until_the_sae_changes(opened, monkeypatch):
    first = opened.codes("test")
    kept = cached(opened)
    assert len(kept) == 1
    monkeypatch.setattr(Run, "encode", lambda self, features: pytest.fail("encoded again"))
    again = Run(opened.folder).codes("test")
    assert (again != first).nnz == 0


def test_another_sae_in_the_folder_is_encoded_anew(opened):
    first, kept = opened.codes("test"), cached(opened)
    TopK(D_IN, 2 * D_IN, k=3, seed=1).save(opened.folder, **{k: opened.cfg[k] for k in ("config", "features")})
    assert (Run(opened.folder).codes("test") != first).nnz > 0
    assert len(cached(opened)) == 1
    assert cached(opened) != kept


def test_a_folder_that_refuses_to_keep_them_is_no_error(opened, monkeypatch):
    monkeypatch.setattr("sae_lightning.runs.run.write_bytes", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    assert opened.codes("test").shape == (20, 2 * D_IN)
    assert cached(opened) == []


def test_pictures_of_a_given_store_are_an_error_that_says_so(opened):
    with pytest.raises(DataError, match="without pictures"):
        opened.images("test")


def test_results_of_several_runs_lie_beside_them_or_where_all_runs_do(tmp_path):
    def at(folder):
        return SimpleNamespace(folder=tmp_path / folder)

    assert shared_results([at("grid/a"), at("grid/b")], "stability", "runs") == tmp_path / "grid/apps/stability"
    assert shared_results([at("grid/a"), at("more/b")], "stability", "runs") == Path("runs/apps/stability")
