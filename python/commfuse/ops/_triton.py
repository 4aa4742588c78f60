"""The triton backend: kernels of ``commfuse.triton_kernels`` on a communicator's workspaces."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from commfuse.errors import CommfuseError, UsageError
from commfuse.ops._registry import DTYPES, Query
from commfuse.ops._sampling import BLOCK, TARGET, Sampling
from commfuse.runtime.communicator import Communicator


def triton_local_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why Triton kernels that need no communicator cannot serve a query, or None."""
    if importlib.util.find_spec("triton") is None:  # importing it takes a second
        return "Triton is not installed"
    if query.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, not {query.dtype}"
    if query.packed:
        return "takes plain weights [n, k]; this one is packed for the CPU"
    if query.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CPU tensors only in Triton's interpreter; start with TRITON_INTERPRET=1"
    return None


def triton_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why Triton kernels that exchange messages cannot serve a query, or None."""
    if comm is None or comm.world_size < 2:
        return "needs two ranks or more"
    if why := triton_local_obstacle(comm, query):
        return why
    if comm.device.type != query.device:
        return f"the communicator's workspaces are in {comm.device.type} memory"
    if comm.workspace_bytes == 0:
        return f"needs memory that all ranks map; the transport is {comm.transport}"
    return None


def triton_draw_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """As :func:`triton_obstacle`, of the ops that draw from vocabulary shards."""
    if query.device != "cpu":
        return f"looks at options and rows on the host: for the CPU, not for {query.device}"
    return triton_obstacle(comm, query)


def _most_blocks(comm: Communicator) -> int:
    """The largest grid whose blocks run together on every rank's GPU: one on a multiprocessor.

    A power of two, as layouts want it. Collective, and the same on all ranks.
    """
    mine = torch.cuda.get_device_properties(comm.device).multi_processor_count
    counts = [None] * comm.world_size
    dist.all_gather_object(counts, mine, group=comm.group)
    return 1 << (min(counts).bit_length() - 1)


def _workspace(comm: Communicator):
    from commfuse.triton_kernels.workspace import Workspace

    workspace = comm.backends.get("triton workspace")
    if workspace is None:
        buffers = [comm.workspace(rank) for rank in range(comm.world_size)]
        grid = {"max_blocks": _most_blocks(comm)} if comm.device.type == "cuda" else {}
        workspace = Workspace.create(comm.rank, buffers, timeout=comm.timeout, **grid)
        comm.backends["triton workspace"] = workspace
        comm.further_checks.append(workspace.check)
    return workspace


def all_reduce_triton(x: torch.Tensor, comm: Communicator, in_place: bool) -> torch.Tensor:
    """The one-shot all-reduce kernel; the result is ``x`` itself or a new tensor."""
    from commfuse.triton_kernels.all_reduce import all_reduce

    comm.check_host()
    out = x if in_place else torch.empty_like(x)
    all_reduce(x, out, _workspace(comm))
    return out


def all_reduce_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    comm: Communicator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The one-shot all-reduce kernel with its tail: (normalised, residual')."""
    from commfuse.triton_kernels.all_reduce_rms_norm import all_reduce_rms_norm

    comm.check_host()
    normalised, summed = torch.empty_like(x), torch.empty_like(x)
    all_reduce_rms_norm(x, residual, weight, eps, summed, normalised, _workspace(comm))
    return normalised, summed


def matmul_all_reduce_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    comm: Communicator,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The decode GEMM with its all-reduce; with ``norm_weight`` (normalised, residual')."""
    from commfuse.triton_kernels.matmul_all_reduce import matmul_all_reduce

    comm.check_host()
    summed = x.new_empty((x.shape[0], w.shape[0]))
    normalised = None if norm_weight is None else torch.empty_like(summed)
    matmul_all_reduce(
        x,
        w,
        summed,
        _workspace(comm),
        bias=bias,
        residual=residual,
        norm_weight=norm_weight,
        eps=eps,
        normalised=normalised,
    )
    return summed if normalised is None else (normalised, summed)


def draw_triton(
    op: str,
    logits: torch.Tensor,
    drafts: torch.Tensor,
    lengths: torch.Tensor,
    sampling: Sampling,
    positions: torch.Tensor,
    vocab_begin: int,
    comm: Communicator,
    log_probabilities: bool,
    place: Callable[[int, int], str],
    stream: int = TARGET,
    draft_probabilities: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, accepted, log-probabilities).

    Looks at options and results on the host. ``place`` names a request's row in errors.

    Raises:
        BackendUnavailable: the communicator's memory is too small for the rows.
        UsageError: draft lengths or probabilities do not fit; or the shard is not cut at a multiple
            of 128.
        CommfuseError: a row has no token.
    """
    from commfuse.triton_kernels.vocab_parallel_sample import DRAFT_NAN, STATUS, draw

    drawn = sampling.temperature != 0
    truncated = bool((drawn & ((sampling.top_k > 0) | (sampling.top_p < 1))).any())
    if logits.shape[1] and vocab_begin % BLOCK and bool(drawn.any()):
        raise UsageError(
            f"vocab_begin is {vocab_begin}: shards must be cut at multiples of {BLOCK}"
        )
    batch, longest = drafts.shape
    counts = lengths.tolist()
    for request, length in enumerate(counts):
        if not 0 <= length <= longest:
            raise UsageError(f"draft_lengths[{request}] is {length}, not in 0..{longest}")
    if len(logits) != sum(counts) + batch:
        raise UsageError(
            f"logits has {len(logits)} rows, not {sum(counts) + batch} (each request's draft "
            "length + 1)"
        )
    q, due = draft_probabilities, (sum(counts), logits.shape[1])
    if q is not None and not (q.dtype == torch.float32 and q.shape == due and q.is_contiguous()):
        raise UsageError(
            f"draft_probabilities is not a contiguous float32 [{due[0]}, {due[1]}] (a row for each "
            "draft token, this rank's columns)"
        )
    comm.check_host()
    tokens, logs, accepted, status = draw(
        op, logits, drafts, lengths, sampling.tensors, positions, stream, vocab_begin,
        log_probabilities, _workspace(comm), draft_probabilities=q, truncated=truncated,
    )  # fmt: skip
    comm.check()
    rows = [(b, j) for b, length in enumerate(counts) for j in range(length + 1)]
    for row, kind in zip(rows, status.tolist(), strict=True):
        if kind == DRAFT_NAN:
            raise CommfuseError(f"the draft probabilities of {place(*row)} are NaN")
        if kind:
            raise CommfuseError(
                f"the logits of {place(*row)} are {STATUS[kind]}: no token can be chosen"
            )
    return tokens, accepted, logs
