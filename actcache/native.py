"""The native core: which of its modules serve, chosen once per process by what is installed. Knows no tensors.

``ACTCACHE_ENGINE=torch`` leaves it out everywhere: torch and NumPy then do its work, with the same bits, but for packed
attention and linear layers, which differ by rounding.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from actcache.errors import InputError, KernelError

MODULES = {"cpu": "actcache._core", "cuda": "actcache._cuda"}


@cache
def native(kind: str) -> tuple[ModuleType | None, str]:
    """The native module of a device kind (``cpu``, ``cuda``, ...) and what it is, or None and the reason why not.

    Raises:
        InputError: ACTCACHE_ENGINE holds another word than ``torch``.
        KernelError: the native module is there but does not load.
    """
    wanted = os.environ.get("ACTCACHE_ENGINE", "")
    if wanted not in ("", "torch"):
        raise InputError(f"ACTCACHE_ENGINE is {wanted!r}, expected torch, or unset it to use the native core")
    if wanted == "torch":
        return None, "ACTCACHE_ENGINE=torch"
    if kind not in MODULES:
        return None, f"no native core for {kind}"
    name = MODULES[kind]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return None, f"{name} is not built: {error}"
    except ImportError as error:
        raise KernelError(
            f"{name} does not load ({error}): reinstall actcache, or set ACTCACHE_ENGINE=torch"
        ) from error
    return module, f"{name} {module.version()}"
