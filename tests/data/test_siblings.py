"""Sibling groups: ImageNet's from WordNet, and one's own."""

import json
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from experiments.siblings.make import ancestors, as_text, build, groups, read_nouns
from sae_lightning.data import DataError, load_images
from sae_lightning.data.siblings import SHIPPED, imagenet_groups, imagenet_wnids, released_groups, sibling_groups
from tests.data.making import class_folders, folder_cfg, write_pictures

ABOUT = json.loads(SHIPPED.read_text())
NAMES = ABOUT["names"]
SYNSETS = Path(str(files("timm.data"))) / "_info" / "imagenet_synsets.txt"
WORDNET = Path(os.environ.get("WORDNET", "/usr/share/wordnet"))
BIG_CATS = ["leopard", "snow leopard", "jaguar", "lion", "tiger", "cheetah"]

NOUNS = """\
  1 A licence that is
  2 three words  long.
00000001 03 n 01 animal 0 002 ~ 00000002 n 0000 ~ 00000003 n 0000 | a living thing | with a bar
00000002 05 n 02 cat 0 true_cat 0 004 @ 00000001 n 0000 ~ 00000010 n 0000 ~ 00000011 n 0000 ~ 00000012 n 0000 | felid
00000003 05 n 01 pet 0 001 @ 00000001 n 0000 | kept at home
00000010 05 n 01 tabby 0 002 @ 00000002 n 0000 @ 00000003 n 0000 | grey
00000011 05 n 02 Persian_cat 1 Persian 2 002 #m 00000003 n 0000 @ 00000002 n 0000 | long hair
00000012 05 n 01 Siamese 0 001 @ 00000002 n 0000 | slender
00000013 05 n 01 Garfield 0 003 @i 00000002 n 0000 @ 00000003 n 0000 + 00000002 v 0101 | orange
00000014 05 n 0a goldfish 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 00000003 n 0000 | ten words
"""


def test_a_line_of_wordnet_is_read_as_its_manual_says():
    licence, nouns = read_nouns(NOUNS)
    assert licence == ["A licence that is", "three words  long."]
    assert nouns["00000002"] == (["cat", "true cat"], ["00000001"])
    assert nouns["00000010"].hypernyms == ["00000002", "00000003"]
    assert nouns["00000011"] == (["Persian cat", "Persian"], ["00000002"])
    assert nouns["00000013"].hypernyms == ["00000003"]  # of instances and of derived words none
    assert nouns["00000014"] == (["goldfish", *"bcdefghij"], ["00000003"])
    assert nouns["00000001"].hypernyms == []


def test_groups_have_a_hypernym_in_common():
    nouns = read_nouns(NOUNS)[1]
    wnids = [f"n000000{i}" for i in (14, 12, 10, 13, 11)]
    assert groups(wnids, nouns) == {
        "n00000002": {"name": "cat", "classes": ["n00000010", "n00000011", "n00000012"]},
        "n00000003": {"name": "pet", "classes": ["n00000010", "n00000013", "n00000014"]},
    }
    assert groups(wnids[:2], nouns) == {}
    assert groups(wnids, nouns, levels=2)["n00000001"]["classes"] == sorted(wnids)
    assert ancestors("00000010", nouns, 5) == {"00000001", "00000002", "00000003"}


def test_hypernyms_of_one_name_are_told_apart():
    nouns = read_nouns(NOUNS.replace(" pet 0", " cat 0"))[1]
    found = groups([f"n000000{i}" for i in range(10, 15)], nouns)
    assert [group["name"] for group in found.values()] == ["cat (n00000002)", "cat (n00000003)"]


def test_what_ships_is_whole():
    meta = ABOUT["meta"]
    wnids = SYNSETS.read_text().split()
    assert list(NAMES) == sorted(wnids)
    members = [wnid for group in ABOUT["groups"].values() for wnid in group["classes"]]
    assert set(members) <= set(wnids)
    assert min(len(group["classes"]) for group in ABOUT["groups"].values()) == 3
    assert all(len(set(group["classes"])) == len(group["classes"]) for group in ABOUT["groups"].values())
    assert (meta["groups"], meta["tasks"], meta["classes_in_groups"]) == (95, 424, 422)
    assert (len(ABOUT["groups"]), len(members), len(set(members))) == (95, 424, 422)
    assert "Princeton University" in meta["licence"]
    assert len({group["name"] for group in ABOUT["groups"].values()}) == 95


def test_groups_that_are_known():
    found = imagenet_groups(list(NAMES.values()))
    first = {name: [str(words).split(",")[0] for words in classes] for name, classes in found.items()}
    assert first["big cat"] == BIG_CATS
    assert first["retriever"] == [
        "flat-coated retriever", "curly-coated retriever", "golden retriever", "Labrador retriever",
        "Chesapeake Bay retriever",
    ]  # fmt: skip
    assert first["swimsuit"] == ["bikini", "maillot", "swimming trunks"]
    assert len(first["terrier"]) == 18
    assert "Yorkshire terrier" in first["terrier"]
    assert "miniature schnauzer" not in first["terrier"]  # a schnauzer, which is a terrier


def spell(how: str) -> list[str]:
    """ImageNet's class names, as data sets spell them."""
    return {
        "wnids": list(NAMES),
        "words": list(NAMES.values()),
        "first word": [words.split(", ")[0] for words in NAMES.values()],
        "underscores": [words.split(", ")[0].replace(" ", "_") for words in NAMES.values()],
    }[how]


@pytest.mark.parametrize("how", ["wnids", "words", "first word", "underscores"])
def test_all_spellings_give_the_same_groups(how):
    names = spell(how)
    assert imagenet_wnids(names) == list(NAMES)
    by_wnid = {group["name"]: group["classes"] for group in ABOUT["groups"].values()}
    found = imagenet_groups(names)
    assert list(found) == list(by_wnid)
    for name, classes in found.items():
        labels = [c if isinstance(c, int) else names.index(c) for c in classes]
        assert [list(NAMES)[label] for label in labels] == by_wnid[name]
        assert all(names.count(c) == 1 for c in classes if isinstance(c, str))


def test_classes_of_one_name_are_given_by_label():
    names = spell("first word")
    cranes, maillots = ([i for i, n in enumerate(names) if n == name] for name in ("crane", "maillot"))
    found = imagenet_groups(names)
    assert found["wading bird"] == ["spoonbill", "flamingo", cranes[0], "limpkin", "bustard"]
    assert found["swimsuit"] == ["bikini", maillots[1], "swimming trunks"]


def test_a_part_of_imagenet_has_the_groups_that_are_left():
    cats = [wnid for wnid, words in NAMES.items() if words.split(",")[0] in BIG_CATS]
    assert imagenet_groups([cats[4], "n01440764", cats[0], cats[1]]) == {"big cat": [cats[0], cats[1], cats[4]]}
    assert imagenet_groups(["n01440764", *cats[:2]]) == {}
    assert imagenet_groups(cats[::-1])["big cat"] == cats


def test_a_few_strange_names_do_no_harm_but_other_data_sets_have_no_groups():
    names = spell("words")
    names[517] = "crane2"  # as ILSVRC/imagenet-1k has it
    assert len(imagenet_groups(names)) == 95
    assert imagenet_groups(["airplane", "bird", "cat", "goldfish", "lion", "tiger", "leopard"]) == {}
    assert imagenet_groups([]) == {}


@pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="WordNet is not installed (or set WORDNET)")
def test_what_ships_is_what_the_script_makes():
    assert as_text(build(WORDNET, SYNSETS)) == SHIPPED.read_text()


def own(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_groups_of_ones_own(tmp_path):
    root = class_folders(tmp_path / "pictures", 10, ("ant", "bee", "cat"))
    path = own(tmp_path / "mine.json", {"insects": ["ant", "bee"]})
    assert load_images(folder_cfg(root), "train").sibling_groups == {}
    assert load_images(folder_cfg(root, siblings=path), "train").sibling_groups == {"insects": ["ant", "bee"]}
    with pytest.raises(DataError, match=r"lacks: dog, eel.*called ant, bee, cat"):
        load_images(folder_cfg(root, siblings=own(tmp_path / "x.json", {"a": ["eel", "cat", "dog"]})), "train")


def test_a_file_of_ones_own_wins_over_the_data_sets_groups(tmp_path):
    path = own(tmp_path / "mine.json", {"wet": ["frog", "ship"]})
    assert load_images({"source": "demo", "siblings": path}, "val").sibling_groups == {"wet": ["frog", "ship"]}
    assert set(load_images({"source": "demo", "siblings": None}, "val").sibling_groups) == {"animals", "vehicles"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ([["a", "b"]], "must be an object"),
        ({"g": "a"}, "must be an object"),
        ({"g": ["a", 1]}, "must be an object"),
        ({"g": ["a", "b", "a"]}, "a class twice in its group 'g'"),
    ],
)
def test_bad_files_are_told(tmp_path, content, sentence):
    with pytest.raises(DataError, match=sentence):
        sibling_groups(["a", "b"], own(tmp_path / "mine.json", content))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        sibling_groups(["a"], str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("source", ["imagenet", "folder"])
def test_folders_of_wnids_have_imagenets_groups(tmp_path, source):
    cats = [wnid for wnid, words in NAMES.items() if words.split(",")[0] in BIG_CATS][:3]
    write_pictures(tmp_path, *(f"{s}/{wnid}/{i}.png" for s in ("train", "val") for wnid in cats for i in range(4)))
    cfg = folder_cfg(tmp_path, source=source, val_share=0.25)
    images = load_images(cfg, "train")
    assert [np.unique(images.labels).size, len(images.sibling_groups)] == [3, 1]
    assert sorted(images.sibling_groups["big cat"]) == sorted(images.class_names)


def test_the_released_packages_groups_are_those_of_its_file():
    package = pytest.importorskip("visaebench.metrics.disentanglement.absorption")
    wnids = sorted(NAMES)
    theirs = {name: group["class_indices"] for name, group in package._try_shipped_json(3).items()}
    assert len(theirs) == 139
    assert released_groups(wnids) == theirs
    some = released_groups(wnids[:960])  # a part of ImageNet in another order: absent classes by wnid
    assert {name: len(of) for name, of in some.items()} == {name: len(of) for name, of in theirs.items()}
    assert released_groups(["a", "b"]) == {}


def test_without_the_package_its_groups_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"those of the package visaebench, which is not installed"):
        released_groups(sorted(NAMES))
