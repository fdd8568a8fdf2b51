"""Bases span their vectors."""

import numpy as np

from attnrobust.certify.conic.basis import away_from, norm_upper, orthonormal


def test_bases_span_their_vectors_and_know_when_they_are_complete() -> None:
    draw = np.random.default_rng(2)
    few = draw.normal(size=(2, 5))
    basis = orthonormal(np.vstack([few, few.sum(axis=0), np.zeros(5)]))
    assert basis.shape == (5, 2)
    np.testing.assert_allclose(few @ basis @ basis.T, few, atol=1e-13)
    np.testing.assert_array_equal(orthonormal(draw.normal(size=(9, 4))), np.eye(4))
    assert not away_from(np.eye(4)).any()
    assert norm_upper(np.zeros((3, 3))) == 0.0
    assert orthonormal(np.zeros((1, 3))).shape == (3, 1)
