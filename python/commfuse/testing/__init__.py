"""Tools for tests and benchmarks of distributed code: functions run on several ranks."""

from commfuse.testing.gpu_lab import GpuLab
from commfuse.testing.ranks import RanksFailed, run_ranks

__all__ = ["GpuLab", "RanksFailed", "run_ranks"]
