"""Counter: what searches compute, counted and timed, for the plan of another capture."""

from __future__ import annotations

import inspect
import time
import weakref
from typing import Any

import numpy as np
from torch import nn

from actcache.models.backbone import Backbone
from actcache.models.cost import ModelShape


class SearchCounter:
    """Counts and times what the searches of a capture compute: hand every backbone through :meth:`watch`.

    Attributes:
        multiply_adds: of all checkpoints, padding and drafts that led nowhere included.
    """

    def __init__(self) -> None:
        self.multiply_adds = 0.0
        self._running: tuple[float, float] | None = None  # multiply-adds and start of the forward that runs
        self._sums = np.zeros(5)  # of 1, x, y, x x and x y: multiply-adds and seconds of each forward

    def watch(self, backbone: Backbone, shape: ModelShape) -> Backbone:
        """Count the cached forwards of this backbone from now on; returns it."""
        taken = dict.fromkeys(inspect.signature(backbone.decoder.forward).parameters)
        name = "cache" if "cache" in taken else "past_key_values"
        searches: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # a cache each: tokens that it saw

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now = time.perf_counter()
            self._end_forward(now)
            if backbone.is_probed or not kwargs.get("use_cache"):  # only a search decodes with a cache
                return
            n, n_new = kwargs["input_ids"].shape
            n_seen = searches.get(kwargs[name], 0) + n_new
            searches[kwargs[name]] = n_seen
            if n_new == n_seen:
                products = shape.products(np.array([n_seen], np.float64))
            else:
                products = shape.step_products(np.arange(n_seen - n_new, n_seen, dtype=np.float64))
            products = n * (products + (1 if n_new == n_seen else n_new) * shape.head_products)
            self.multiply_adds += products
            self._running = products, now

        backbone.decoder.register_forward_pre_hook(count, with_kwargs=True)
        return backbone

    def record(self, n_searches: int, n_choices: int) -> dict[str, float]:
        """What was counted, beside what searches did (see ``Searched``); and, if anything was timed, ``search_s`` with
        the two numbers that explain it best: ``search_rate`` and ``search_call_s`` (see ``Assumptions`` of a plan)."""
        counted: dict[str, float] = {"n_searches": n_searches, "search_choices": n_choices}
        if self.multiply_adds:  # searches without a cache are not counted
            counted["search_multiply_adds"] = self.multiply_adds
        n, x, y, xx, xy = (float(total) for total in self._sums)
        if not y:
            return counted
        variance = n * xx - x * x
        per_product = (n * xy - x * y) / variance if variance else 0.0
        per_call = (y - per_product * x) / n
        if per_product <= 0 or per_call < 0:  # too few forwards, or too alike, to tell the two apart
            per_product, per_call = y / x, 0.0
        return counted | {"search_s": y, "search_rate": 1 / per_product, "search_call_s": per_call}

    def _end_forward(self, now: float) -> None:
        if self._running is not None:
            products, start = self._running
            seconds = now - start
            self._sums += np.array([1, products, seconds, products * products, products * seconds])
        self._running = None
