"""The made-up world keeps its own laws: rates, correlations, nesting, magnitudes, noise, and its seed."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from sae_lightning.data import DataError, load_images
from sae_lightning.data.synthetic import World

N = 20_000


def world(**changes) -> World:
    return World(
        **{"d_in": 16, "n_true": 24, "active": 4, "power": 0.5, "magnitudes": (0.5, 1.5), "noise": 0.1} | changes
    )


@pytest.mark.parametrize("changes", [{}, {"correlation": 0.6, "group": 4}, {"children": 2},
                                     {"correlation": 0.6, "group": 4, "children": 3, "power": 0}], ids=str)  # fmt: skip
def test_latents_fire_as_often_as_the_law_says(changes):
    made = world(**changes)
    law = [(i + 1.0) ** -made.power for i in range(24)]
    np.testing.assert_allclose(made.rates, [4 * p / sum(law) for p in law])
    _, codes = made.tokens("train", 0, N)
    deviation = np.sqrt(made.rates * (1 - made.rates) / N)
    assert (np.abs((codes > 0).mean(0).A1 - made.rates) < 4.5 * deviation).all()
    assert codes.data.min() >= 0.5
    assert codes.data.max() <= 1.5
    assert codes.data.mean() == pytest.approx(1, abs=0.01)


def test_tokens_are_sums_of_unit_directions_and_noise():
    made = world()
    x, codes = made.tokens("val", 0, N)
    np.testing.assert_allclose(np.linalg.norm(made.directions, axis=1), 1)
    rest = x - codes @ made.directions
    assert rest.mean() == pytest.approx(0, abs=1e-3)
    assert rest.std(0) == pytest.approx(0.1, rel=0.05)
    clean, codes = world(noise=0).tokens("val", 0, 50)
    np.testing.assert_allclose(clean, codes @ made.directions, atol=1e-5)


def test_latents_of_a_group_fire_together_and_others_do_not():
    made = world(correlation=0.6, group=4, power=0, active=6)
    fires = (made.tokens("train", 0, N)[1] > 0).toarray().astype(float)
    together = np.corrcoef(fires.T)
    same = np.arange(24)[:, None] // 4 == np.arange(24) // 4
    bound = norm.isf(1 / 4)
    both = multivariate_normal.cdf([-bound, -bound], cov=[[1, 0.6], [0.6, 1]])
    assert together[same & ~np.eye(24, dtype=bool)].mean() == pytest.approx((both - 1 / 16) / (3 / 16), abs=0.01)
    assert np.abs(together[~same]).max() < 0.04


def test_children_fire_only_with_their_parent():
    made = world(children=2)
    assert made.parents.tolist() == [-1] * 8 + [p for p in range(8) for _ in range(2)]
    fires = (made.tokens("train", 0, N)[1] > 0).toarray()
    for child, parent in enumerate(made.parents):
        if parent >= 0:
            assert fires[:, parent][fires[:, child]].all()
            assert fires[:, child].any()
    uneven = world(children=4).parents
    assert uneven.tolist()[:4] == [-1] * 4
    assert sorted(set(np.bincount(uneven[4:]).tolist())) == [5]


def test_a_seed_makes_one_world_and_another_another():
    x, codes = world(seed=3).tokens("train", 1, 100)
    again, others = world(seed=3).tokens("train", 1, 100)
    np.testing.assert_array_equal(x, again)
    assert (codes != others).nnz == 0
    for other in (world(seed=4).tokens("train", 1, 100), world(seed=3).tokens("train", 2, 100),
                  world(seed=3).tokens("test", 1, 100)):  # fmt: skip
        assert np.abs(other[0] - x).max() > 0.1
    np.testing.assert_array_equal(world(seed=3).directions, world(seed=3, children=2).directions)
    assert np.abs(world(seed=3).directions - world(seed=4).directions).max() > 0.1


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"active": 25}, r"data\.active=25 latents a token must be above 0 and at most data\.n_true=24"),
    ({"active": 0}, r"data\.active=0 .* must be above 0"),
    ({"active": 12, "power": 1}, r"lets the first of 24 latents fire with probability 3\.18; lower one of them"),
    ({"magnitudes": (2.0, 1.0)}, r"data\.magnitudes=\[2\.0, 1\.0\] must be two positive numbers that ascend"),
    ({"magnitudes": (1.0, 2.0, 3.0)}, r"must be two positive numbers"),
    ({"correlation": 1.0}, r"data\.correlation=1\.0 must be at least 0 and below 1"),
    ({"children": 24}, r"data\.children=24 must be at least 0 and below data\.n_true=24"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, sentence):
    with pytest.raises(DataError, match=sentence):
        world(**changes)


def test_there_are_no_pictures():
    with pytest.raises(DataError, match=r"data=synthetic has features and no pictures"):
        load_images({"source": "synthetic", "name": "synthetic"}, "train")
