"""The ops: ``commfuse.ops.NAME``, one file each, and ``commfuse.explain``.

Each file holds, for one op, its schema (also registered as ``torch.ops.commfuse.NAME``), its
shape-only implementation, a float64 reference, and its table of backends.
"""

from __future__ import annotations

import importlib

import torch

from commfuse.errors import UsageError
from commfuse.ops._registry import Explanation, Op, Query
from commfuse.ops._sampling import Sampling
from commfuse.ops.all_gather import all_gather
from commfuse.ops.all_reduce import all_reduce, all_reduce_
from commfuse.ops.all_reduce_rms_norm import all_reduce_rms_norm
from commfuse.ops.attention import attention
from commfuse.ops.matmul import PackedWeight, gated_matmul, matmul, pack_gate_up, pack_weight
from commfuse.ops.matmul_all_reduce import matmul_all_reduce
from commfuse.ops.matmul_send import matmul_send
from commfuse.ops.recv import recv
from commfuse.ops.recv_matmul import recv_matmul
from commfuse.ops.reduce_scatter import reduce_scatter
from commfuse.ops.send import send
from commfuse.ops.transformer_blocks import BlockWeights, Placement, transformer_blocks
from commfuse.ops.verify_chain import Verified, verify_chain
from commfuse.ops.vocab_parallel_argmax import vocab_parallel_argmax
from commfuse.ops.vocab_parallel_embedding import vocab_parallel_embedding
from commfuse.ops.vocab_parallel_sample import vocab_parallel_sample
from commfuse.runtime.communicator import Communicator

OP_NAMES = (
    "all_reduce",
    "all_reduce_rms_norm",
    "reduce_scatter",
    "all_gather",
    "matmul",
    "matmul_all_reduce",
    "attention",
    "transformer_blocks",
    "vocab_parallel_argmax",
    "vocab_parallel_embedding",
    "vocab_parallel_sample",
    "verify_chain",
)

# Between two ranks: what they do differs, and no rank gets what all get.
CHANNEL_OP_NAMES = ("send", "recv", "matmul_send", "recv_matmul")


def op(name: str) -> Op:
    """The backend table of an op.

    Raises:
        UsageError: there is no such op; the message lists them.
    """
    known = (*OP_NAMES, *CHANNEL_OP_NAMES)
    if name not in known:
        raise UsageError(f"unknown op {name!r}: use one of {', '.join(known)}")
    return importlib.import_module(f"commfuse.ops.{name}").OP


def explain(
    name: str,
    comm: Communicator | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    packed: bool | None = None,
    shape: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend would run an op, and why the others would not.

    Args:
        name: the op.
        comm: the communicator it would run on; None for one process.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the activations.
        packed: whether the weight is packed, for ops with a weight.
        shape: of x; for ops with a weight, its output features follow: (m, k, n). The backend does
            not depend on it, but what that does may.
        backend: what the caller would ask for.

    Example:
        >>> print(explain("all_reduce", comm, shape=(8, 4096)))
        all_reduce: cpu
          cpu: chosen
          …
    """
    return op(name).explain(backend, comm, Query(device, dtype, packed, shape))


__all__ = [
    "CHANNEL_OP_NAMES",
    "OP_NAMES",
    "BlockWeights",
    "PackedWeight",
    "Placement",
    "Sampling",
    "Verified",
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "all_reduce_rms_norm",
    "attention",
    "explain",
    "gated_matmul",
    "matmul",
    "matmul_all_reduce",
    "matmul_send",
    "op",
    "pack_gate_up",
    "pack_weight",
    "recv",
    "recv_matmul",
    "reduce_scatter",
    "send",
    "transformer_blocks",
    "verify_chain",
    "vocab_parallel_argmax",
    "vocab_parallel_embedding",
    "vocab_parallel_sample",
]
