"""``python -m actcache.cli``: the same as ``actcache``."""

from __future__ import annotations

import sys

from actcache.cli import main

sys.exit(main())
