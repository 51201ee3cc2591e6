import sys

import pytest

from sae_lightning.registry import Registry, discover, one_of


class OwnError(ValueError):
    pass


def test_a_choice_is_given_back_or_refused_in_a_sentence():
    assert one_of("b", ("a", "b"), "group.letter") == "b"
    with pytest.raises(OwnError, match=r"^Unknown group\.letter=c; choose one of a, 2\.$"):
        one_of("c", ["a", 2], "group.letter", OwnError)


def test_a_registry_takes_each_name_once_and_says_which_there_are():
    kinds = Registry("group.kind", OwnError)

    @kinds("one")
    def first():
        return 1

    assert kinds["one"] is first
    assert "two" not in kinds
    assert kinds.get("two") is None
    with pytest.raises(OwnError, match=r"Unknown group\.kind=two; choose one of one\."):
        kinds["two"]
    with pytest.raises(OwnError, match=r"group\.kind=one is taken by .*test_registry\..*first; choose another name"):
        kinds("one")(OwnError)
    assert kinds.add("one", first) is first  # the same again, as where a module is imported anew


def test_every_module_of_a_folder_is_imported(tmp_path, monkeypatch):
    (tmp_path / "folder_of_kinds").mkdir()
    (tmp_path / "folder_of_kinds" / "__init__.py").write_text("FOUND = []\n")
    for name in ("one", "two"):
        (tmp_path / "folder_of_kinds" / f"{name}.py").write_text(
            f"from folder_of_kinds import FOUND\nFOUND.append({name!r})\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    discover("folder_of_kinds")
    assert sys.modules["folder_of_kinds"].FOUND == ["one", "two"]
    for name in ("", ".one", ".two"):
        del sys.modules[f"folder_of_kinds{name}"]
