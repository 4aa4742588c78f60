"""What no implementation can beat on this machine: the floors of a decoding step."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from commfuse import _extension, ops
from commfuse.models.llama import Llama

READ_BYTES = 256 << 20  # several times a last-level cache
GEMM_ROWS, GEMM_N, GEMM_K = 48, 512, 512  # weights of 512 KiB stay in the L2 cache
REPEATS = 7


@dataclass(frozen=True)
class Floors:
    """Milliseconds of one decoding step of one request, and the rates they follow from.

    Attributes:
        arithmetic_ms: multiplications and additions at the rate of a GEMM out of the cache.
        memory_ms: this rank's weights at the rate at which all ranks together read memory.
        communication_ms: the step's all-reduces at the speed of one that finds its peers waiting.
        flops_per_second, read_bytes_per_second: of this rank, measured.
        all_reduce_us: one all-reduce of a hidden state, measured.
        weight_bytes: that this rank reads in a step.
    """

    arithmetic_ms: float
    memory_ms: float
    communication_ms: float
    flops_per_second: float
    read_bytes_per_second: float
    all_reduce_us: float
    weight_bytes: int

    def items(self) -> list[tuple[str, float]]:
        """(name, milliseconds) of each floor."""
        return [
            ("arithmetic", self.arithmetic_ms),
            ("memory bandwidth", self.memory_ms),
            ("communication", self.communication_ms),
        ]


def _median_seconds(call, comm) -> float:
    times = []
    for _ in range(REPEATS):
        comm.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _read_seconds(comm) -> float:
    native = _extension.require()
    buffer = native.huge_empty(READ_BYTES).zero_()
    return _median_seconds(lambda: native.read_memory(buffer), comm)


@torch.inference_mode()
def measure_floors(model: Llama) -> Floors:
    """Measures the floors on all ranks of a model at once; takes about a second.

    Example:
        >>> measure_floors(model).memory_ms
        5.4
    """
    comm, dtype = model.comm, model.dtype
    read = _read_seconds(comm)
    x = torch.randn(GEMM_ROWS, GEMM_K).to(dtype)
    weight = ops.pack_weight(torch.randn(GEMM_N, GEMM_K).to(dtype))
    gemm = _median_seconds(lambda: ops.matmul(x, weight), comm)

    hidden = torch.zeros(1, model.config.hidden_size, dtype=dtype)
    calls = 200
    exchange = _median_seconds(lambda: [ops.all_reduce(hidden, comm) for _ in range(calls)], comm)

    bytes_per_second = READ_BYTES / read
    flops_per_second = 2 * GEMM_ROWS * GEMM_N * GEMM_K / gemm
    all_reduce_seconds = exchange / calls
    weight_bytes = model.weight_bytes_per_step()
    all_reduces = 2 * model.config.num_layers + 2  # embedding and choice of the token included
    return Floors(
        arithmetic_ms=2 * weight_bytes / dtype.itemsize / flops_per_second * 1e3,
        memory_ms=weight_bytes / bytes_per_second * 1e3,
        communication_ms=all_reduces * all_reduce_seconds * 1e3 if comm.world_size > 1 else 0.0,
        flops_per_second=flops_per_second,
        read_bytes_per_second=bytes_per_second,
        all_reduce_us=all_reduce_seconds * 1e6,
        weight_bytes=weight_bytes,
    )
