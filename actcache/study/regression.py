"""Regression: least squares with categorical controls, and intervals over the prompts that the events come from.

Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from actcache.errors import InputError
from actcache.study.statistics import DRAWS, LEVEL, SEED, Floats, Ids, Number, Sample, finite

# A column of a regression that is this near to a combination of others tells nothing of its own; and how near to 1 the
# diagonal of the projection on what the columns span must be where they tell a coefficient.
_DEPENDENT, _TOLD = 1e-10, 1e-6


def regress(
    prompt_ids: Ids,
    y: npt.ArrayLike,
    controls: Mapping[str, npt.ArrayLike],
    *,
    weights: str = "prompt",
    draws: int = DRAWS,
    seed: int = SEED,
    level: float = LEVEL,
) -> dict[str, Number]:
    """Coefficients of a least-squares regression, with intervals of the bootstrap over prompts.

    Args:
        prompt_ids: of each event, as for :meth:`Sample.of`.
        y: ``[E]``.
        controls: as for :func:`ols`.
        weights, draws, seed, level: as for :meth:`Sample.of`; with ``prompt``, an event of a prompt that has n weighs
            1/n.

    Returns:
        By the names of :func:`ols`: nothing where the events do not tell the coefficient; without an interval where
        those of a draw do not, as for a level that few prompts have.

    Raises:
        InputError: as there, and as :meth:`Sample.of`.
    """
    y = np.asarray(y, np.float64)
    names, x, length = _design(controls, len(y))
    k = len(names)
    columns = [*(x / length).T, y]
    products = {f"{i} {j}": columns[i] * columns[j] for i in range(k) for j in range(i, k + 1)}
    sample = Sample.of(prompt_ids, products, weights=weights, draws=draws, seed=seed, level=level)

    def solved(means: Mapping[str, Floats]) -> Floats:
        """The coefficients of each draw, ``[n, k]``, by the normal equations; NaN where its events do not tell one."""
        gram = np.stack([np.stack([means[f"{min(i, j)} {max(i, j)}"] for j in range(k)], -1) for i in range(k)], -2)
        inverse = np.linalg.pinv(gram, rcond=_DEPENDENT, hermitian=True)
        found = (inverse @ np.stack([means[f"{i} {k}"] for i in range(k)], -1)[..., None])[..., 0]
        told = np.abs(np.diagonal(inverse @ gram, axis1=-2, axis2=-1) - 1) < _TOLD
        return np.where(told, found / length, np.nan)

    return dict(zip(names, sample.numbers(solved, k), strict=True))


def ols(y: npt.ArrayLike, controls: Mapping[str, npt.ArrayLike]) -> dict[str, float | None]:
    """Coefficients of an ordinary least-squares regression with an intercept.

    Args:
        y: ``[E]``.
        controls: by name an array ``[E]``. Numbers and truth values have one coefficient. Texts are levels of a
            category: each but the first in sorted order has one, called ``name=level``.

    Returns:
        By name, ``intercept`` first. None where the events do not tell it from others.

    Raises:
        InputError: a control is not finite, or of another length.
    """
    y = np.asarray(y, np.float64)
    names, x, length = _design(controls, len(y))
    inverse = np.linalg.pinv(x / length, rcond=_DEPENDENT)
    told = np.abs(np.diagonal(inverse @ (x / length)) - 1) < _TOLD
    found = inverse @ y / length
    return {name: float(value) if known else None for name, value, known in zip(names, found, told, strict=True)}


def _design(controls: Mapping[str, npt.ArrayLike], n_events: int) -> tuple[list[str], Floats, Floats]:
    """Names, columns ``[E, k]`` and their lengths (1 of a column of zeros) of a regression, the intercept first."""
    names, columns = ["intercept"], [np.ones(n_events)]
    for name, given in controls.items():
        values = np.asarray(given)
        if values.shape != (n_events,):
            raise InputError(f"control {name} has shape {values.shape}; expected {n_events} values, one per event")
        if values.dtype.kind in "biuf":
            names.append(name)
            columns.append(finite(name, values))
        else:
            levels = sorted(set(values.tolist()))
            names += [f"{name}={level}" for level in levels[1:]]
            columns += [(values == level).astype(np.float64) for level in levels[1:]]
    x = np.stack(columns, axis=1)
    length = np.linalg.norm(x, axis=0)
    return names, x, np.where(length > 0, length, 1.0)
