"""Where things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$COMMFUSE_CACHE``, or ``~/.cache/commfuse`` where it is not set."""
    given = os.environ.get("COMMFUSE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "commfuse"
