"""Cross-domain scores: each representation's own probe, on separate train and test images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from sae_lightning.metrics.cross_domain import Own, cross_domain, own_accuracy
from sae_lightning.metrics.part import ImageFeatures
from tests.metrics.test_probes import clusters
from tests.metrics.test_sparse_probing import best, exact_f, values


def made(n: int = 400):
    """Train and test parts of 5 classes: raw features beside labels, noisy reconstructions and codes."""
    x, y = clusters(n, 8, 5)
    rng = np.random.default_rng(1)
    reconstruction = (x + 1.5 * rng.normal(size=x.shape)).astype(np.float32)
    codes = np.maximum(np.concatenate([x, -x, rng.normal(size=(n, 4))], axis=1), 0).astype(np.float32)
    rows = slice(n // 2), slice(n // 2, n)
    return [(x[r], ImageFeatures(x[r], reconstruction[r], sparse.csr_array(codes[r]), y[r], [])) for r in rows]


def test_equals_the_definition():
    (raw, train), (raw_test, test) = made()
    own = own_accuracy(raw, train.labels, raw_test, test.labels)
    found = values(cross_domain("digits", own, train, test, k=6))

    def right(a, b):
        model = LogisticRegression(max_iter=500).fit(a.astype(np.float64), train.labels)
        return model.score(b, test.labels)

    a, b = train.codes.toarray(), test.codes.toarray()
    order = best(exact_f(a, train.labels))[:6]
    of_raw, of_reconstruction, of_codes = (
        right(raw, raw_test),
        right(*(p.reconstruction for p in (train, test))),
        right(a, b),
    )
    auc = found.pop(("cross_domain_sparse_probing_auc", "data=digits,k=6"))
    assert 0.7 < auc < 1
    assert of_reconstruction < of_raw
    assert found == pytest.approx(
        {
            ("cross_domain_preservation", "data=digits"): of_reconstruction / of_raw,
            ("cross_domain_codes_lift", "data=digits"): of_codes / of_raw,
            ("cross_domain_accuracy_raw", "data=digits"): of_raw,
            ("cross_domain_accuracy_reconstruction", "data=digits"): of_reconstruction,
            ("cross_domain_accuracy_codes", "data=digits"): of_codes,
            ("cross_domain_sparse_probing_accuracy", "data=digits,k=6"): right(a[:, order], b[:, order]),
            ("cross_domain_converged", "data=digits"): 1,
        }
    )


def test_the_probe_of_all_codes_can_be_left_out():
    (raw, train), (raw_test, test) = made()
    own = own_accuracy(raw, train.labels, raw_test, test.labels)
    whole, found = (values(cross_domain("digits", own, train, test, k=6, codes=codes)) for codes in (True, False))
    left_out = {(f"cross_domain_{name}", "data=digits") for name in ("accuracy_codes", "codes_lift")}
    assert found == {key: value for key, value in whole.items() if key not in left_out}


def test_the_features_themselves_are_preserved_exactly():
    (raw, train), (raw_test, test) = made()
    own = own_accuracy(raw, train.labels, raw_test, test.labels)
    same = [replace(part, reconstruction=x) for x, part in ((raw, train), (raw_test, test))]
    assert values(cross_domain("digits", own, *same))["cross_domain_preservation", "data=digits"] == 1


def test_a_budget_above_the_dictionary_is_left_out_and_nothing_divides_by_zero():
    (_, train), (_, test) = made()
    found = values(cross_domain("digits", Own(np.zeros(len(test.labels), bool), False), train, test))
    assert not any("k=128" in setting for _, setting in found)
    assert np.isnan(found["cross_domain_preservation", "data=digits"])
    assert np.isnan(found["cross_domain_codes_lift", "data=digits"])
    assert found["cross_domain_converged", "data=digits"] == pytest.approx(2 / 3)


def test_test_images_of_unseen_classes_count_as_wrong():
    (raw, train), (raw_test, test) = made()
    seen, y = train.labels != 4, test.labels
    own = own_accuracy(raw[seen], train.labels[seen], raw_test, y)
    among = own_accuracy(raw[seen], train.labels[seen], raw_test[y != 4], y[y != 4])
    assert own.right.mean() == pytest.approx(among.right.mean() * (y != 4).mean())


def test_labels_that_do_not_fit_are_refused():
    (raw, train), (raw_test, test) = made()
    with pytest.raises(ValueError, match="200 rows of features, but 199 labels"):
        own_accuracy(raw, train.labels[1:], raw_test, test.labels)
    with pytest.raises(ValueError, match="200 rows of features, but 199 labels"):
        own_accuracy(raw, train.labels, raw_test, test.labels[1:])
