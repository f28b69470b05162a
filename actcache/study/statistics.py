"""Statistics: means with percentile bootstrap intervals over prompts, and ratios of such means.

Events of one prompt share a text and are not independent. So a draw takes *prompts* with replacement, and every event
of a drawn prompt comes along. What is compared is drawn together: all quantities of a group share its draws, and groups
with equally many prompts share theirs, so that their differences are not blurred by separate noise. Knows arrays and
columns only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actcache.errors import InputError

FEWEST_PROMPTS = 10
"""An interval needs at least as many: a percentile bootstrap over fewer prompts covers far less than it claims."""

DRAWS = 2000
SEED = 0
LEVEL = 0.95

# One pass of the bootstrap holds this many drawn prompts (three arrays of 8 bytes each: 48 MiB), so that a million
# prompts cost time and not memory.
_DRAWN_PER_PASS = 1 << 21
# Groups with equally many prompts share their draws; more at once only costs memory for the drawn totals.
_GROUPS_PER_PASS = 64

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Number: TypeAlias = dict[str, float | None]
"""``{"mean", "low", "high"}``; low and high are None where there is no interval, all three where there is no value."""


def check_bootstrap(draws: int, seed: int, level: float) -> None:
    """Raise InputError for settings that make no interval."""
    if draws < 1 or seed < 0 or not 0 < level < 1:
        raise InputError(f"draws={draws}, seed={seed}, level={level}: expected draws >= 1, seed >= 0 and 0 < level < 1")


def ranks(column: pa.ChunkedArray) -> Ints:
    """Each value's rank among the sorted distinct values, comparable where the values are: the order of the rows given
    has no part in what is computed from these."""
    encoded = column.dictionary_encode().combine_chunks()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    return rank[encoded.indices.to_numpy()]


def prompt_sums(prompt: Ints, values: Sequence[Floats]) -> Floats:
    """Sums over each prompt's events.

    Args:
        prompt: ``[E]``, which prompt each event is of, from 0 on without a gap.
        values: arrays ``[E]``.

    Returns:
        ``[P, len(values) + 1]``: the sums of each of ``values``, then the number of events.
    """
    columns = [np.bincount(prompt, weights=of) for of in values]
    return np.stack([*columns, np.bincount(prompt).astype(np.float64)], axis=1)


def resample(sums: Sequence[Floats], draws: int = DRAWS, seed: int = SEED) -> list[Floats | None]:
    """Totals over each bootstrap draw of prompts.

    Draw d picks ``rng.integers(0, P, P)``, the d-th such call on ``default_rng(seed)``, in however many passes. A draw
    enters as how often it picked each prompt, so that its totals are one matrix product.

    Args:
        sums: of each group, ``[P, q]`` (see :func:`prompt_sums`). Groups with equally many prompts share their draws.
        draws: how many.
        seed: of the random numbers.

    Returns:
        Of each group ``[draws, q]``, or None below ``FEWEST_PROMPTS`` prompts.
    """
    totals: list[Floats | None] = [None] * len(sums)
    for n_prompts in sorted({len(of_group) for of_group in sums}):
        alike = [index for index, of_group in enumerate(sums) if len(of_group) == n_prompts]
        for first in range(0, len(alike) if n_prompts >= FEWEST_PROMPTS else 0, _GROUPS_PER_PASS):
            batch = alike[first : first + _GROUPS_PER_PASS]
            for index, drawn in zip(batch, _drawn([sums[index] for index in batch], draws, seed), strict=True):
                totals[index] = drawn
    return totals


def _drawn(sums: list[Floats], draws: int, seed: int) -> list[Floats]:
    n_prompts = len(sums[0])
    rng = np.random.default_rng(seed)
    totals = [np.empty((draws, of_group.shape[1])) for of_group in sums]
    per_pass = max(1, _DRAWN_PER_PASS // n_prompts)
    for first in range(0, draws, per_pass):
        n_draws = min(per_pass, draws - first)
        picks = rng.integers(0, n_prompts, size=(n_draws, n_prompts))
        picks += n_prompts * np.arange(n_draws)[:, None]
        times = np.bincount(picks.ravel(), minlength=n_draws * n_prompts).reshape(n_draws, n_prompts).astype(np.float64)
        for of_group, into in zip(sums, totals, strict=True):
            into[first : first + n_draws] = times @ of_group
    return totals


def number(mean: float | None, drawn: Floats | None, level: float = LEVEL) -> Number:
    """A value with the percentile interval of its draws ``[draws]``; without one where there are none."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = (None, None) if drawn is None else map(float, np.quantile(drawn, tails))
    return {"mean": mean, "low": low, "high": high}


def ratio(
    numerator: float,
    denominator: float,
    drawn: tuple[Floats, Floats] | None,
    *,
    scale: float,
    level: float = LEVEL,
) -> Number:
    """A ratio of two means, numerator and denominator of each draw together.

    Args:
        numerator: its mean.
        denominator: its mean.
        drawn: both in each draw, ``[draws]``; None where there are too few prompts.
        scale: the largest of the numbers that the denominator is a difference of: below their rounding it is 0.
        level: of the interval.

    Returns:
        Nothing at all where the denominator is 0 to rounding. Without an interval where the denominator's own reaches
        0: the ratio then has no bounded one.
    """
    # A difference of means below this is what float64 leaves of an exact zero: dividing by it would print noise.
    if abs(denominator) <= 16 * np.finfo(np.float64).eps * scale:
        return number(None, None)
    values = None
    if drawn is not None:
        own = number(denominator, drawn[1], level)
        assert own["low"] is not None
        assert own["high"] is not None
        if not own["low"] <= 0 <= own["high"] and drawn[1].all():
            values = drawn[0] / drawn[1]
    return number(numerator / denominator, values, level)
