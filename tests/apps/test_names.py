"""One name a latent: what naming found, else a class that has most of it."""

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from sae_lightning.apps.names import TABLE, label_names, names_of

CLASSES = ["cat", "dog", "ship"]


def test_only_pure_latents_that_fire_often_enough_are_called_by_their_class():
    label, purity, images = np.array([0, 1, 2, -1]), np.array([0.9, 0.4, 0.9, 0.0]), np.array([30, 30, 3, 0])
    assert label_names(label, purity, images, CLASSES) == ["cat", "", "", ""]
    assert label_names(label, purity, images, CLASSES, pure=0.3, least=1) == ["cat", "dog", "ship", ""]
    assert label_names(label[:1], purity[:1], images[:1], ["all"]) == [""]


class Fake:
    """What names_of asks of an opened run: 40 images, latent 0 of ships, latent 1 of everything, latent 2 silent."""

    def __init__(self, folder):
        self.folder, self.sae = folder, type("", (), {"d_sae": 3})

    def results(self, app):
        return self.folder / "apps" / app

    def images(self, split):
        return type("", (), {"class_names": CLASSES, "labels": np.array([2] * 25 + [0] * 8 + [1] * 7)})

    def codes(self, split):
        return csr_matrix(np.array([[2.0, 1.0, 0.0]] * 25 + [[0.0, 3.0, 0.0]] * 15))


def test_names_are_those_of_labels_until_naming_has_been_run(tmp_path):
    run = Fake(tmp_path)
    assert names_of(run) == ["ship", "", ""]
    run.results("naming").mkdir(parents=True)
    table = pd.DataFrame({"latent": [2, 0, 1], "shown": ["", "boat", "blue"]})
    table.to_parquet(run.results("naming") / TABLE)
    assert names_of(run) == ["boat", "blue", ""]


def test_names_of_another_dictionary_do_not_count(tmp_path):
    run = Fake(tmp_path)
    run.results("naming").mkdir(parents=True)
    pd.DataFrame({"latent": [0, 1], "shown": ["boat", "blue"]}).to_parquet(run.results("naming") / TABLE)
    assert names_of(run) == ["ship", "", ""]
