"""Where one way of doing a call on GPUs becomes faster than another: measured tables.

A table is made by ``commfuse tune`` on the user's machine and kept in the user's cache. Tables of
some GPUs come with the package. Rank 0 of a communicator reads one and hands it to all others:
what runs must not depend on what a rank finds on its disk (R4 in ``docs/protocol.md``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from commfuse.errors import UsageError
from commfuse.runtime.cache import cache_directory

_SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Table:
    """Crossovers on one kind of GPU, for one number of ranks.

    Attributes:
        one_shot_bytes: the largest message of an all-reduce that goes in one shot, its flags among
            the data.
        lines_bytes: the largest that goes in two shots with flags among the data; above, in bulk.
        fused_from_rows: the fewest rows for which ``matmul_all_reduce`` sends tiles while it
            computes.
        fused_to_rows: the most; below ``fused_from_rows``: never.
        claimed_percent: of the tiles of the GEMM of ``matmul_all_reduce``, how many at least its
            blocks claim as they become free; they are dealt the others in equal numbers. 0: all.

    Raises:
        UsageError: a value is negative or no integer, ``lines_bytes`` is below
            ``one_shot_bytes``, or ``claimed_percent`` above 100.
    """

    one_shot_bytes: int = 64 << 10
    lines_bytes: int = 1 << 20
    fused_from_rows: int = 1
    fused_to_rows: int = 64
    claimed_percent: int = 0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(f"{field.name} is {value!r}; it must be an integer, 0 or more")
        if self.lines_bytes < self.one_shot_bytes:
            raise UsageError(
                f"lines_bytes is {self.lines_bytes}, below one_shot_bytes {self.one_shot_bytes}"
            )
        if self.claimed_percent > 100:
            raise UsageError(f"claimed_percent is {self.claimed_percent}; it is at most 100")


def user_path(device_name: str) -> Path:
    """Where the user's table of a kind of GPU is kept.

    Example:
        >>> user_path("NVIDIA H100 80GB HBM3").name
        'tune-nvidia-h100-80gb-hbm3.json'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache_directory() / f"tune-{slug}.json"


def load(device_name: str, world_size: int) -> tuple[Table, str]:
    """The table for a GPU and a number of ranks, and where it comes from, in words.

    The user's own comes first, then one that comes with the package, then one of fixed values. Of
    the numbers of ranks that were measured, the next larger one counts, else the largest.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says it.
        world_size: ranks.

    Raises:
        UsageError: the user's file cannot be used; the message says why, and how to replace it.

    Example:
        >>> table, source = load("NVIDIA H100 80GB HBM3", 2)
    """
    path = user_path(device_name)
    if path.is_file():
        try:
            measured = _read(path)["tables"]
            return _nearest(measured, world_size, str(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"the tuning table {path} cannot be used ({error}): make a new one with "
                "`commfuse tune`, or remove it"
            ) from None
    for path in sorted(_SHIPPED.glob("*.json")):
        if path.stem in device_name.lower():
            return _nearest(_read(path)["tables"], world_size, f"the package's {path.stem} table")
    return Table(), f"fixed values: nothing was measured on {device_name} (commfuse tune)"


def save(device_name: str, tables: Mapping[int, Table], origin: Mapping[str, Any]) -> Path:
    """Writes the user's table of a kind of GPU; other numbers of ranks that it had are kept.

    Args:
        device_name: see :func:`load`.
        tables: by number of ranks.
        origin: where and with what they were measured, kept beside them.

    Returns:
        The file.

    Raises:
        UsageError: it cannot be written.
    """
    path = user_path(device_name)
    try:
        known = _read(path)["tables"] if path.is_file() else {}
    except (OSError, ValueError, TypeError, KeyError):
        known = {}  # it could not be used anyway
    for ranks, table in tables.items():
        known[str(ranks)] = {**asdict(table), **origin}
    content = {"device": device_name, "tables": dict(sorted(known.items(), key=_ranks))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write the tuning table {path}: {error}") from None
    return path


def _ranks(entry: tuple[str, Any]) -> int:
    return int(entry[0])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _nearest(measured: dict[str, dict], world_size: int, source: str) -> tuple[Table, str]:
    counts = sorted(map(int, measured))
    if not counts:
        raise ValueError("it holds no table")
    ranks = next((count for count in counts if count >= world_size), counts[-1])
    names = [field.name for field in fields(Table)]
    table = Table(**{name: measured[str(ranks)][name] for name in names})
    return table, f"{source}, measured with {ranks} ranks"
