"""Overlap: weights by which two samples have the same means of some covariates.

For whatever asks whether two means differ by what their events are like. Knows arrays only.
"""

from __future__ import annotations

import numpy as np

from actcache.study.statistics import Floats

_RIDGE = 1e-6  # of the regression, where a covariate tells the two samples apart altogether


def overlap_weights(own: Floats, first: Floats, own_weights: Floats, first_weights: Floats) -> tuple[Floats, Floats]:
    """How much each event could have been of the other support, by a logistic regression on its covariates.

    Args:
        own, first: covariates of the events of two supports, ``[E, k]``.
        own_weights, first_weights: of the events, ``[E]``.

    Returns:
        Factors ``[E]`` of both: by them, both have the same weighted means of the covariates.
    """
    x, weights = np.concatenate([own, first]), np.concatenate([own_weights, first_weights])
    is_own = np.arange(len(x)) < len(own)
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    x = np.column_stack([np.ones(len(x)), (x - mean) / np.where(spread > 0, spread, 1.0)])
    penalty = _RIDGE * weights.sum() * np.eye(x.shape[1])
    coefficients = np.zeros(x.shape[1])

    def loss(at: Floats) -> float:
        z = x @ at
        return float(weights @ (np.logaddexp(0, z) - is_own * z) + at @ penalty @ at / 2)

    for _ in range(100):  # Newton's steps, halved until they go down
        p = 1 / (1 + np.exp(-np.clip(x @ coefficients, -500, 500)))
        gradient = x.T @ (weights * (p - is_own)) + penalty @ coefficients
        step = np.linalg.solve((x.T * (weights * p * (1 - p))) @ x + penalty, gradient)
        while loss(coefficients - step) > loss(coefficients) and np.abs(step).max() > 1e-12:
            step = step / 2
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-np.clip(x @ coefficients, -500, 500)))
    return 1 - p[: len(own)], p[len(own) :]
