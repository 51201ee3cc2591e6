"""Recovery of known latents against plain loops, scikit-learn and SAELens; and from the command line to the scores."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, hstack
from sklearn.metrics import f1_score

from sae_lightning.apps.app import OURS, explore
from sae_lightning.evaluation.suite import evaluate
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.features.synthetic import TRUTH, truth_of
from sae_lightning.metrics.truth import firing_f1, matched
from sae_lightning.runs.identity import identity
from sae_lightning.runs.scores import read_rows
from sae_lightning.saes import SAE
from tests.configs import composed


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(("n_true", "d_sae"), [(4, 6), (5, 3)])
def test_matches_are_the_best_of_all_that_share_no_row(n_true, d_sae):
    g = torch.Generator().manual_seed(0)
    true, rows = torch.randn(n_true, 5, generator=g), 3 * torch.randn(d_sae, 5, generator=g)
    best, own, latent = matched(true, rows)
    table = [[cosine(t, r) for r in rows] for t in true]
    np.testing.assert_allclose(best, [max(row) for row in table], rtol=1e-5)
    ways = [dict(zip(some, range(d_sae), strict=True)) for some in permutations(range(n_true), d_sae)] if (
        d_sae < n_true) else [dict(enumerate(some)) for some in permutations(range(d_sae), n_true)]  # fmt: skip
    way = max(ways, key=lambda way: sum(table[t][r] for t, r in way.items()))
    assert latent.tolist() == [way.get(t, -1) for t in range(n_true)]
    np.testing.assert_allclose(own, [table[t][way[t]] if t in way else 0 for t in range(n_true)], rtol=1e-5)


def test_f1_is_scikit_learns_and_zero_without_a_latent():
    rng = np.random.default_rng(0)
    true, found = (rng.random((200, n)) * (rng.random((200, n)) < share) for n, share in ((4, 0.3), (6, 0.4)))
    true[:, 3], found[:, 5] = 0, 0
    latent = np.array([2, 5, -1, 0])
    f1 = firing_f1(csr_matrix(found), csr_matrix(true), latent)
    assert f1[0] == pytest.approx(f1_score(true[:, 0] > 0, found[:, 2] > 0))
    assert f1[1:3].tolist() == [0, 0]
    assert np.isnan(f1[3])


def test_the_one_to_one_cosine_is_saelens():
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    g = torch.Generator().manual_seed(1)  # all directions in one orthant, as SAELens takes absolute cosines
    true, rows = torch.rand(20, 8, generator=g), torch.rand(30, 8, generator=g)
    assert matched(true, rows)[1].mean() == pytest.approx(evals.mean_correlation_coefficient(true, rows), abs=1e-6)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")

    def make(*overrides: str):
        return composed(
            "config", "data=synthetic_nested", "data.sizes={train: 9000, val: 300, test: 500}", "data.d_in=12",
            "data.n_true=16", "data.active=2", "data.noise=0.01", "k=2", "d_sae=24", "batch_size=256", "sae=topk",
            "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
            f"paths.stores={folder / 'stores'}", f"paths.runs={folder / 'runs'}", *overrides,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def run(config):
    from sae_lightning.training.fit import train

    return train(config())


def scoring(cfg, *overrides: str):
    return composed("evaluate", "metrics=truth", f"paths.runs={cfg.paths.runs}", *overrides)


def test_from_training_to_scores(config, run):
    assert run.name.startswith("topk-synthetic_nested-pooled-d24-k2-s42-")
    evaluate(scoring(config()))
    rows = {(r["metric"], r["setting"]): r["value"] for r in read_rows(run) if r["metric"].startswith("truth")}
    names = ["truth_cosine", "truth_matched_cosine", "truth_recovered", "truth_f1", "truth_f1_parents"]
    assert sorted(rows) == sorted((name, setting) for name in names for setting in ("", "dictionary=random"))
    store = Source.of(config()).store("test")
    truth, sae = truth_of(store), SAE.load(run)
    x = store.features(slice(None))[:, 0].float()
    torch.testing.assert_close(x, torch.from_numpy(truth.codes @ truth.directions.numpy()), atol=0.06, rtol=0)
    table = torch.tensor([[cosine(t, r) for r in sae.W_dec.detach()] for t in truth.directions])
    assert rows["truth_cosine", ""] == pytest.approx(float(table.amax(1).mean()), abs=1e-5)
    assert rows["truth_recovered", ""] == pytest.approx(float((table.amax(1) > 0.9).float().mean()))
    fires, found = truth.codes.toarray() > 0, sae.encode(x).to_dense().detach().numpy() > 0
    f1 = [f1_score(fires[:, t], found[:, r]) for t, r in enumerate(matched(truth.directions, sae.W_dec.detach())[2])]
    assert rows["truth_f1", ""] == pytest.approx(np.mean(f1), abs=1e-6)
    assert rows["truth_f1_parents", ""] == pytest.approx(np.mean(f1[:4]), abs=1e-6)
    assert rows["truth_cosine", "dictionary=random"] < rows["truth_cosine", ""]


def test_the_true_dictionary_has_found_all(config, run):
    store = Source.of(config()).store("test")
    truth = truth_of(store)
    best, own, latent = matched(truth.directions, torch.cat([torch.randn(8, 12), truth.directions]))
    assert latent.tolist() == list(range(8, 24))
    assert min(best.min(), own.min()) > 0.999
    silent = csr_matrix((500, 8), dtype=np.float32)
    assert firing_f1(hstack([silent, truth.codes], format="csr"), truth.codes, latent).tolist() == [1] * 16


def test_a_run_is_of_its_world_and_the_truth_is_sealed(config, run, tmp_path):
    ours = identity(config())
    assert identity(config()) == ours
    assert identity(config("data.name=other", f"paths.stores={tmp_path}")) == ours
    for other in ("data.noise=0.1", "data.children=1", "data.seed=1", "extract.dtype=bfloat16"):
        assert identity(config(other))["data.train"] != ours["data.train"]
    assert not any(tmp_path.iterdir())  # a name needs no store
    source = Source.of(config(f"paths.stores={tmp_path}"))
    store = source.store("val")
    assert store.fingerprint == Source.of(config()).store("val").fingerprint == source.fingerprint("val")
    part = store.select(np.array([3, 7, 200]))
    assert (truth_of(part).codes != truth_of(store).codes[[3, 7, 200]]).nnz == 0
    whole = (store.folder / TRUTH).read_bytes()
    (store.folder / TRUTH).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=TRUTH):
        source.open(store.folder)
    assert source.store("val").fingerprint == store.fingerprint  # what is damaged is made anew
    assert (store.folder / TRUTH).read_bytes() == whole


def test_other_features_have_no_truth(stores):
    assert truth_of(stores["test"]) is None


@pytest.mark.parametrize("app", OURS)
def test_applications_want_pictures_and_say_so(config, run, app):
    cfg = composed("explore", f"app={app}", f"run={run.name}", f"paths.runs={config().paths.runs}")
    says = {"bias": "has 1 classes", "stability": "give several"}.get(app, "on features alone, without pictures")
    with pytest.raises(ValueError, match=says):
        explore(cfg)
