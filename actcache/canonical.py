"""Canonical JSON: equal values, equal bytes; what fingerprints, keys of jobs and prompts are named by.

Knows JSON values; knows nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from actcache.errors import InputError


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values, equal bytes. InputError for what is no JSON, as NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"not a JSON value: {error}") from error


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()
