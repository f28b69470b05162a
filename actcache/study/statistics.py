"""Statistics: means with percentile bootstrap intervals over prompts, their ratios, and the null of random signs.

Events of one prompt share a text and are not independent. So a draw takes *prompts* with replacement, and every event
of a drawn prompt comes along. What is compared is drawn together: all numbers of a :class:`Sample` share its draws, and
samples of equally many prompts share theirs, so that their differences are not blurred by separate noise. Knows arrays
and columns only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actcache.errors import InputError

FEWEST_PROMPTS = 10
"""An interval needs at least as many: a percentile bootstrap over fewer prompts covers far less than it claims."""

CAUTION_PROMPTS = 30
"""Below as many an interval gets a word of caution: a percentile bootstrap is then still too narrow."""

DRAWS = 2000
SEED = 0
LEVEL = 0.95
NULL_DRAWS = 20_000
NULL_SEED = 23

WEIGHTS = ("event", "prompt")
"""Every event weighs the same, or every prompt does, whatever its number of events."""

# One pass of the bootstrap holds this many drawn prompts (three arrays of 8 bytes each: 48 MiB), so that a million
# prompts cost time and not memory.
_DRAWN_PER_PASS = 1 << 21
# Groups with equally many prompts share their draws; more at once only costs memory for the drawn totals.
_GROUPS_PER_PASS = 64
# What float64 leaves of an exact zero, relative to the numbers that it is a difference of.
_ROUNDING = 16 * float(np.finfo(np.float64).eps)

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Number: TypeAlias = dict[str, float | None]
"""``{"mean", "low", "high"}``; low and high are None where there is no interval, all three where there is no value."""
Ids: TypeAlias = "pa.ChunkedArray | pa.Array | Sequence[Any] | npt.NDArray[Any]"
Quantity: TypeAlias = str | Callable[[Mapping[str, Floats]], Floats]
"""The name of a mean, or a function of all means by name, each an array ``[n]``, that gives an array ``[n]``."""


def check_draws(draws: int, seed: int, level: float = LEVEL) -> None:
    """Raise InputError for settings that make no interval: with fewer than one draw beyond each end there is none."""
    if draws < 1 or seed < 0 or not 0 < level < 1:
        raise InputError(f"draws={draws}, seed={seed}, level={level}: expected draws >= 1, seed >= 0 and 0 < level < 1")
    fewest = math.ceil(round(2 / (1 - level), 6))
    if draws < fewest:
        raise InputError(
            f"draws={draws}: an interval of {level:.6g} needs at least {fewest} draws, one beyond each end; the "
            f"default is {DRAWS}"
        )


def check_weights(weights: str) -> None:
    """Raise InputError for weights that are none of ``WEIGHTS``."""
    if weights not in WEIGHTS:
        raise InputError(f"weights {weights!r} are unknown; choose {' or '.join(WEIGHTS)}")


class Sample:
    """Events of one group with values, and the bootstrap draws of prompts that all numbers of the group share.

    Attributes:
        n_events: how many events.
        n_prompts: how many prompts they come from. Below ``FEWEST_PROMPTS``, numbers have no interval.
        level: of the intervals.
    """

    def __init__(
        self,
        sums: Floats,
        columns: Mapping[str, tuple[int, int]],
        n_events: int,
        scale: float,
        *,
        draws: int,
        seed: int,
        level: float,
    ) -> None:
        """Made by :meth:`of` and :meth:`paired`: ``sums`` ``[P, q]`` of each prompt, ``columns`` by name that of a sum
        and that of its divisor, ``scale`` the largest absolute value."""
        self.n_events, self.n_prompts, self.level = n_events, len(sums), level
        self._sums, self._columns, self._scale = sums, columns, scale
        self._draws, self._seed = draws, seed
        self._drawn: Floats | None = None

    @classmethod
    def of(
        cls,
        prompt_ids: Ids,
        values: Mapping[str, npt.ArrayLike],
        *,
        weights: str = "prompt",
        draws: int = DRAWS,
        seed: int = SEED,
        level: float = LEVEL,
    ) -> Sample:
        """A sample of events.

        Args:
            prompt_ids: of each event, ``[E]``: a column, or a sequence of texts or whole numbers.
            values: by name an array ``[E]`` of finite numbers.
            weights: ``prompt``: a mean is the mean of each prompt's mean. ``event``: it is over all events.
            draws: of the bootstrap, as :func:`check_draws` allows.
            seed: of the draws.
            level: of the intervals.

        Raises:
            InputError: weights, draws, seed or level are none; a value is not finite, or an array of another length.
        """
        return cls.paired({"": (prompt_ids, values)}, weights=weights, draws=draws, seed=seed, level=level)

    @classmethod
    def paired(
        cls,
        sides: Mapping[str, tuple[Ids, Mapping[str, npt.ArrayLike]]],
        *,
        weights: str = "prompt",
        draws: int = DRAWS,
        seed: int = SEED,
        level: float = LEVEL,
    ) -> Sample:
        """A sample of the prompts that several sides have, each side with events of its own.

        Args:
            sides: by name the prompt ids and the values of the events of a side, as for :meth:`of`. Value ``v`` of side
                ``s`` is called ``s.v``. Events of a prompt that one of the sides lacks are left out.
            weights, draws, seed, level: as there.

        Raises:
            InputError: as there.
        """
        check_weights(weights)
        check_draws(draws, seed, level)
        ids = {side: _column(prompt_ids) for side, (prompt_ids, _) in sides.items()}
        (first, *others) = ids.values()
        shared = pc.unique(first)
        for other in others:
            shared = shared.filter(pc.is_in(shared, value_set=pc.unique(other)))
        shared = shared.take(pc.sort_indices(shared))  # the order of the events given has no part in the draws
        parts: list[Floats] = []
        columns: dict[str, tuple[int, int]] = {}
        n_events, n_columns, scale = 0, 0, 0.0
        for side, (_, values) in sides.items():
            prompt = pc.index_in(ids[side], value_set=shared)
            known = prompt.is_valid().to_numpy(zero_copy_only=False)
            prompt = prompt.drop_null().to_numpy().astype(np.int64)
            arrays = {name: finite(name, of, len(known))[known] for name, of in values.items()}
            sums = prompt_sums(prompt, list(arrays.values()), len(shared))
            if weights == "prompt":
                sums /= sums[:, -1:]
            n_events += len(prompt)
            scale = max([scale, *(float(np.abs(of).max(initial=0.0)) for of in arrays.values())])
            for column, name in enumerate(arrays, n_columns):
                columns[f"{side}.{name}" if side else name] = (column, n_columns + len(arrays))
            n_columns += len(arrays) + 1
            parts.append(sums)
        sums = np.concatenate(parts, axis=1)
        return cls(sums, columns, n_events, scale, draws=draws, seed=seed, level=level)

    def redrawn(self, seed: int) -> Sample:
        """The same events with draws of another seed, which are independent of these."""
        how = {"draws": self._draws, "seed": seed, "level": self.level}
        return Sample(self._sums, self._columns, self.n_events, self._scale, **how)  # type: ignore[arg-type]

    def mean(self, name: str) -> Number:
        """The mean of a value."""
        return self.number(name)

    def number(self, quantity: Quantity) -> Number:
        """A mean, or a function of means, with the percentile interval of its draws.

        Nothing at all where it is not finite; without an interval where it is not finite in every draw.
        """
        return _spread(self._values(quantity), self.level)

    def numbers(self, quantities: Callable[[Mapping[str, Floats]], Floats], n: int) -> list[Number]:
        """Several functions of means at once, each as :meth:`number`: of arrays ``[m]`` they make one ``[m, n]``."""
        values = self._values(quantities)
        return [_spread(None if values is None else values[:, at], self.level) for at in range(n)]

    def ratio(self, numerator: Quantity, denominator: Quantity) -> Number:
        """A ratio of two means, or of functions of means; see :func:`ratio`."""
        above, below = self._values(numerator), self._values(denominator)
        if above is None or below is None:
            return number(None, None)
        drawn = (above[1:], below[1:]) if len(above) > 1 else None
        return ratio(float(above[0]), float(below[0]), drawn, scale=self._scale, level=self.level)

    def opposed(self, numerator: Quantity, denominator: Quantity) -> bool:
        """Whether the two differ in sign, so that their ratio is no share of anything."""
        above, below = self._values(numerator), self._values(denominator)
        return above is not None and below is not None and bool(above[0] * below[0] < 0)

    def has(self, name: str) -> bool:
        """Whether there is such a value."""
        return name in self._columns

    def draws_of(self, quantity: Quantity) -> Floats | None:
        """The quantity in each draw, ``[draws]``; None below ``FEWEST_PROMPTS``."""
        values = self._values(quantity)
        return None if values is None or len(values) == 1 else values[1:]

    def of_prompts(self, name: str) -> Floats:
        """What each prompt adds to a mean, ``[P]`` in the order of the sorted ids: their plain mean is the mean."""
        column, count = self._columns[name]
        return self._sums[:, column] * (self.n_prompts / self._sums[:, count].sum())

    def _values(self, quantity: Quantity) -> Floats | None:
        """The quantity over all events, then in each draw: ``[1 + draws]``, or ``[1]``; None without an event."""
        if not self.n_events:
            return None
        if isinstance(quantity, str):
            return self._means[quantity]
        with np.errstate(divide="ignore", invalid="ignore"):
            return quantity(self._means)

    @cached_property
    def _means(self) -> dict[str, Floats]:
        if self._drawn is None:
            draw_together([self])
        totals = self._sums.sum(axis=0, keepdims=True)
        totals = totals if self._drawn is None else np.concatenate([totals, self._drawn])
        return {name: totals[:, column] / totals[:, count] for name, (column, count) in self._columns.items()}


def draw_together(samples: Sequence[Sample]) -> None:
    """Draw for several samples of the same draws and seed at once: equal numbers, and those of equally many prompts
    cost one set of draws."""
    if samples:
        drawn = resample([sample._sums for sample in samples], samples[0]._draws, samples[0]._seed)
        for sample, of_sample in zip(samples, drawn, strict=True):
            sample._drawn = of_sample


def ranks(column: pa.ChunkedArray) -> Ints:
    """Each value's rank among the sorted distinct values, comparable where the values are: the order of the rows given
    has no part in what is computed from these."""
    encoded = column.dictionary_encode().combine_chunks()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    return rank[encoded.indices.to_numpy()]


def prompt_sums(prompt: Ints, values: Sequence[Floats], n_prompts: int) -> Floats:
    """Sums over each prompt's events.

    Args:
        prompt: ``[E]``, which prompt each event is of, from 0 on.
        values: arrays ``[E]``.
        n_prompts: P.

    Returns:
        ``[P, len(values) + 1]``: the sums of each of ``values``, then the number of events.
    """
    columns = [np.bincount(prompt, weights=of, minlength=n_prompts) for of in values]
    return np.stack([*columns, np.bincount(prompt, minlength=n_prompts).astype(np.float64)], axis=1)


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


def _spread(values: Floats | None, level: float) -> Number:
    """A value and its draws, ``[1 + draws]`` or ``[1]``, as a number."""
    if values is None or not np.isfinite(values[0]):
        return number(None, None)
    return number(float(values[0]), values[1:] if len(values) > 1 and np.isfinite(values).all() else None, level)


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
    # Dividing by what rounding leaves of a zero would print noise.
    if abs(denominator) <= _ROUNDING * scale:
        return number(None, None)
    values = None
    if drawn is not None:
        own = number(denominator, drawn[1], level)
        assert own["low"] is not None
        assert own["high"] is not None
        if not own["low"] <= 0 <= own["high"] and drawn[1].all():
            values = drawn[0] / drawn[1]
    return number(numerator / denominator, values, level)


def sign_flip_null(
    prompt_means: npt.ArrayLike | Mapping[str, npt.ArrayLike], draws: int = NULL_DRAWS, seed: int = NULL_SEED
) -> dict[str, float]:
    """How a mean is spread where the sign of each prompt's part is random: the label-swap null of an interaction.

    Swapping the two late labels of a prompt turns the sign of its interaction. Each draw turns each prompt's with
    probability 1/2, for every prompt of every family on its own.

    Args:
        prompt_means: ``[P]``, of each prompt; or that of each family by name, whose means then weigh equally.
        draws: how many.
        seed: of the signs.

    Returns:
        ``observed``; ``p``, one-sided: (1 + draws that reach it) / (draws + 1); and ``null_mean``, ``null_sd``,
        ``null_q99.9`` and ``null_max`` of the draws.

    Raises:
        InputError: there is no prompt, or a value is not finite.
    """
    families = prompt_means if isinstance(prompt_means, Mapping) else {"": prompt_means}
    rng = np.random.default_rng(seed)
    parts = [finite(family or "prompt means", values) for family, values in sorted(families.items())]
    if not parts:
        raise InputError("a null needs at least one prompt per family")
    return _compared(parts, [_flipped([values], draws, rng)[0] for values in parts])


def sign_flip_nulls(
    groups: Sequence[npt.ArrayLike], draws: int = NULL_DRAWS, seed: int = NULL_SEED
) -> list[dict[str, float]]:
    """What :func:`sign_flip_null` gives of each group of prompts on its own; those of equally many prompts share their
    signs, which saves most of the time."""
    given = [finite("prompt means", values) for values in groups]
    found: list[dict[str, float]] = [{}] * len(given)
    for n_prompts in {len(values) for values in given}:
        alike = [index for index, values in enumerate(given) if len(values) == n_prompts]
        nulls = _flipped([given[index] for index in alike], draws, np.random.default_rng(seed))
        for index, null in zip(alike, nulls, strict=True):
            found[index] = _compared([given[index]], [null])
    return found


def _compared(parts: Sequence[Floats], nulls: Sequence[Floats]) -> dict[str, float]:
    """The mean over families of their means, beside that of their draws."""
    null = np.mean(nulls, axis=0)
    observed = float(np.mean([values.mean() for values in parts]))
    # The draw that turns no sign is the observed mean but for the order of additions: it reaches it.
    slack = 1e-12 * float(np.mean([np.abs(values).mean() for values in parts]))
    return {
        "observed": observed,
        "p": (1 + int((null >= observed - slack).sum())) / (len(null) + 1),
        "null_mean": float(null.mean()),
        "null_sd": float(null.std()),
        "null_q99.9": float(np.quantile(null, 0.999)),
        "null_max": float(null.max()),
    }


def _flipped(groups: Sequence[Floats], draws: int, rng: np.random.Generator) -> list[Floats]:
    """Means ``[draws]`` of each of several ``[P]`` under the same random signs: bit p of draw d is set where value p
    keeps its sign. Each draw takes its own 64-bit words, so that passes of any size give the same."""
    n_prompts = len(groups[0])
    if not n_prompts:
        raise InputError("a null needs at least one prompt per family")
    found = [np.empty(draws) for _ in groups]
    per_pass = max(1, _DRAWN_PER_PASS // n_prompts)
    for first in range(0, draws, per_pass):
        n = min(per_pass, draws - first)
        words = rng.integers(0, 2**64, size=(n, -(-n_prompts // 64)), dtype=np.uint64)
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, count=n_prompts).astype(np.float64)
        for values, into in zip(groups, found, strict=True):
            into[first : first + n] = (bits @ (2 * values) - values.sum()) / n_prompts
    return found


def _column(ids: Ids) -> pa.ChunkedArray:
    """Ids as one column of plain values."""
    if not isinstance(ids, pa.ChunkedArray):
        ids = pa.chunked_array([ids if isinstance(ids, pa.Array) else pa.array(ids)])
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if ids.null_count:
        raise InputError(f"{ids.null_count} of {len(ids)} prompt ids are null; every event needs one")
    return ids.cast(pa.string()) if pa.types.is_null(ids.type) else ids  # of no event


def finite(name: str, given: npt.ArrayLike, n_events: int | None = None) -> Floats:
    """Values as float64 ``[E]``; InputError for one that is not finite."""
    values = np.asarray(given, np.float64)
    if values.ndim != 1 or n_events not in (None, len(values)):
        expected = "a list of numbers" if n_events is None else f"{n_events} numbers, one per event"
        raise InputError(f"{name} has shape {values.shape}; expected {expected}")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"value {bad} of {name} is {values[bad]}; leave out the events that have none")
    return values
