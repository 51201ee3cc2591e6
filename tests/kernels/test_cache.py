"""Where compiled kernels lie for a user without a home folder, as in many containers, and what is said without one."""

import os
import pwd
import re
from pathlib import Path

import pytest

from sae_lightning.data import tar_index
from sae_lightning.data.tar_index import Keys
from sae_lightning.files import CacheError, cache_folder, lend_cache
from sae_lightning.kernels import native
from sae_lightning.kernels.native import load_native


@pytest.fixture
def nobody(monkeypatch):
    """A user id that the machine does not know, with nothing in the environment."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "SAE_LIGHTNING_CACHE", "SAE_LIGHTNING_NATIVE"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_the_user_s_choice_is_heeded(nobody, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(cache_folder()) == "/caches/sae_lightning"
    monkeypatch.setenv("SAE_LIGHTNING_CACHE", "/chosen")
    assert str(cache_folder()) == "/chosen"


@pytest.mark.parametrize("home", [None, "/proc", "/proc/self/nowhere"])
def test_without_a_home_folder_to_write_the_run_s_is_used(home, nobody, monkeypatch, tmp_path):
    if home:
        monkeypatch.setenv("HOME", home)
    lend_cache(tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "sae_lightning"
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / ".cache")  # also for what this process starts
    assert str(Path.home()) == (home or str(tmp_path / ".cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/chosen")
    lend_cache(tmp_path)
    assert str(cache_folder()) == "/chosen/sae_lightning"


def test_a_home_folder_that_can_be_written_is_used(nobody, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    lend_cache(tmp_path / "runs")
    assert cache_folder() == tmp_path / ".cache" / "sae_lightning"


@pytest.mark.parametrize(
    ("home", "said"),
    [(None, "this user has no home folder"), ("/proc", "cannot write /proc/.cache/sae_lightning: No such file")],
)
def test_the_advice_is_to_choose_a_folder(home, said, nobody, monkeypatch):
    if home:
        monkeypatch.setenv("HOME", home)
    with pytest.warns(UserWarning, match=re.escape(said) + ".*Set SAE_LIGHTNING_CACHE to a folder that can be written"):
        assert load_native.__wrapped__() is None


def test_a_folder_in_which_nothing_can_be_executed_is_named(monkeypatch, tmp_path):
    """Also what a crash has left of a library is built anew."""
    monkeypatch.setenv("SAE_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    built = []

    def compiled(compiler: str, library) -> None:
        built.append(library)
        library.write_bytes(b"half a library")

    monkeypatch.setattr(native, "_compile", compiled)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"cannot execute what lies in {tmp_path}.*Set SAE_LIGHTNING_CACHE"):
            assert load_native.__wrapped__() is None
    assert len(built) == 2


def test_tars_are_indexed_without_a_cache(nobody, monkeypatch):
    with pytest.raises(CacheError):
        cache_folder()
    monkeypatch.setattr(tar_index, "_build", lambda *_: "table")
    monkeypatch.setattr(tar_index, "_told", lambda index: index)
    assert tar_index.index_tars([], Keys("label", "caption")).table == "table"
