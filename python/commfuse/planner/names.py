"""Names that users type, found as they are meant, and numbers as users read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from commfuse.errors import UsageError


def choose(name: str, known: Iterable[str], given: str, kind: str, instead: str = "") -> str:
    """The known name that is meant: itself, or the only one that goes on behind it with a dash.

    An H20 is no H200, and an L40 no L40S.

    Args:
        name: normalised by the caller, lower case.
        known: names to choose from.
        given: what the user typed and where, for the error.
        kind: what is named, for the error.
        instead: what else would have worked, for the error.

    Raises:
        UsageError: none or several; the closest are offered.

    Example:
        >>> choose("rtx-pro", ["rtx-pro-6000", "h200"], "--cluster 8:rtx-pro", "device")
        'rtx-pro-6000'
    """
    known = sorted(known)
    if name in known:
        return name
    begun = [candidate for candidate in known if candidate.startswith(f"{name}-")]
    if len(begun) == 1:
        return begun[0]
    close = begun or difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known
    text = f"{given}: unknown {kind} {name!r}; did you mean {', '.join(close)}?"
    raise UsageError(text + (f" Or give {instead}." if instead else ""))


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, as people read it.

    Example:
        >>> figure(42243.2), figure(46.06), figure(0.01234)
        ('42,200', '46.1', '0.0123')
    """
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.{digits}g}" if abs(rounded) < 10**digits else f"{rounded:,.0f}"
