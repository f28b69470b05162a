"""Families: the mean of several families' means, each of the same weight, and how they spread. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from actcache.study.statistics import Floats, Number, number


def balanced(numbers: Sequence[Number]) -> Number:
    """The mean of independent means, each of the same weight, with the interval that follows from theirs.

    Each interval stands for a normal distribution: its standard error is its width over twice the normal quantile, and
    that of the mean is the root of the sum of their squares over how many there are. The quantile cancels, so that any
    level will do that all share.

    Returns:
        Without an interval where one of the numbers has none; nothing where one has no value.
    """
    means = [one["mean"] for one in numbers]
    if not means or None in means:
        return number(None, None)
    mean = float(np.mean(means))  # type: ignore[arg-type]
    halves = [half_width(one) for one in numbers]
    if None in halves:
        return number(mean, None)
    half = math.sqrt(sum(half**2 for half in halves if half is not None)) / len(halves)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def balanced_draws(draws: Sequence[Floats | None]) -> Floats | None:
    """The mean over families in each draw, ``[draws]``, of what each family has in its own draws, which must be drawn
    independently: with another seed each. None where a family has none."""
    given = [one for one in draws if one is not None]
    return np.mean(given, axis=0) if given and len(given) == len(draws) else None


def half_width(of: Number) -> float | None:
    """Half of what an interval spans; None without one."""
    low, high = of["low"], of["high"]
    return None if low is None or high is None else (high - low) / 2


def trimmed_mean(values: Sequence[float]) -> float | None:
    """The mean without one lowest and one highest value; None of fewer than three."""
    return float(np.mean(sorted(values)[1:-1])) if len(values) > 2 else None


def leave_one_out(values: Mapping[str, float]) -> dict[str, float]:
    """By name the mean of all other values; empty of fewer than two."""
    if len(values) < 2:
        return {}
    return {name: float(np.mean([of for other, of in values.items() if other != name])) for name in values}
