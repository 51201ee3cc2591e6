"""Kills, full disks, broken files, wrong stores: nothing is lost, nothing is taken for whole, all is said in a sentence."""

from __future__ import annotations

import signal
from functools import partial
from itertools import count

import pytest

from sae_lightning.features.store import FeatureStore, StoreError
from tests.features import jobs
from tests.features.jobs import Job, content, extract_pixels, finished, litter, times


# --- kill -9 of an extraction -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The content of a store of ``noise_images()`` that was never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    extract_pixels(folder)
    assert litter(folder) == []
    return content(folder)


def test_killed_before_any_change_of_any_file_an_extraction_goes_on(undisturbed, tmp_path):
    """Between a shard and its record, in the middle of sealing, while tidying up: everywhere."""
    sealed = 0
    for n in count(1):
        folder = tmp_path / str(n) / "store"
        job = Job(tmp_path / "log", extract_pixels, folder, before=partial(jobs.die_at, tmp_path / str(n), n))
        if job.end() == 0:
            break
        assert job.process.exitcode == -signal.SIGKILL, job.said()
        if (folder / "manifest.json").exists():
            sealed += 1
            assert content(folder) == undisturbed
        else:
            with pytest.raises(StoreError, match="did not finish|There is no feature store"):
                FeatureStore.open(folder)
        kept = finished(folder)
        encoder = jobs.PixelEncoder()
        extract_pixels(folder, encoder=encoder)
        assert content(folder) == undisturbed
        assert encoder.seen == sum([4, 4, 3][int(name[6:11])] for name in set(times(folder)) - set(kept))
        assert kept.items() <= times(folder).items()
        assert litter(folder) == [], n
    assert n > 30
    assert sealed > 2
