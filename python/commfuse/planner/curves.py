"""Times over message sizes: measured points, joined by straight lines."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from commfuse.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """Seconds over bytes. Latency + bytes / bandwidth is a straight line, hence straight lines.

    Attributes:
        points: (bytes, seconds), both ascending. Below the first the time is the first's; above
            the last the last line goes on.

    Raises:
        UsageError: fewer than two points, or one that is not positive or not ascending.

    Example:
        >>> Curve(((0, 1e-6), (1000, 2e-6))).seconds(500)
        1.5e-06
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        if len(self.points) < 2:
            raise UsageError("a curve needs at least two points of [bytes, microseconds]")
        for (size, seconds), (larger, later) in zip(self.points, self.points[1:], strict=False):
            if not (0 <= size < larger and 0 < seconds <= later and math.isfinite(later)):
                raise UsageError(
                    f"the points of a curve must ascend: [{size:g} bytes, {seconds * 1e6:g} us] is "
                    f"followed by [{larger:g} bytes, {later * 1e6:g} us]"
                )

    def seconds(self, nbytes: float) -> float:
        """The time of a message."""
        points = self.points
        if nbytes <= points[0][0]:
            return points[0][1]
        upper = min(bisect.bisect_left(points, (nbytes,)), len(points) - 1)
        (x0, y0), (x1, y1) = points[upper - 1], points[upper]
        return y0 + (y1 - y0) * (nbytes - x0) / (x1 - x0)

    def faster(self, factor: float) -> Curve:
        """The same with ``factor`` times the bandwidth; latency stays."""
        first = self.points[0]
        return Curve((first, *((size * factor, time) for size, time in self.points[1:])))
