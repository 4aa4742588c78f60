"""Tools for tests and benchmarks of distributed code: functions run on several ranks."""

from commfuse.testing.ranks import RanksFailed, run_ranks

__all__ = ["RanksFailed", "run_ranks"]
