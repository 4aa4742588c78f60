"""What ops on GPUs are compared with: torch's GEMM and its all-reduces over symmetric memory, NCCL,
and the parts of an op by themselves.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench import sampling_peers
from commfuse.bench.engine_peers import VERIFY_PEERS
from commfuse.bench.peers import Peer, check_gemm, gemm_then_all_reduce
from commfuse.ops.all_reduce import reference as all_reduce_reference
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.transports import SYMMETRIC_MEMORY
from commfuse.testing.adapter import EPS, Adapter, Inputs, Outputs
from commfuse.testing.numerics import complaint


def _symmetric_obstacle(comm: Communicator, dtype: torch.dtype) -> str | None:
    if comm.transport != SYMMETRIC_MEMORY:
        return (
            f"needs symmetric memory between two ranks or more; the transport is {comm.transport}"
        )
    if dtype not in (torch.bfloat16, torch.float32):
        return f"torch's symmetric-memory ops take bfloat16 and float32, not {dtype}"
    return None


def _ranks_obstacle(comm: Communicator, dtype: torch.dtype) -> str | None:
    return None if comm.world_size > 1 else "needs two ranks or more"


def _nccl_obstacle(comm: Communicator, dtype: torch.dtype) -> str | None:
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    if comm.world_size > torch.cuda.device_count():
        return "NCCL takes one rank on each GPU; here ranks share one"
    return _ranks_obstacle(comm, dtype)


def _in_torch_buffer(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    x = inputs["x"]
    buffer = comm.torch_symmetric.buffer(x.numel(), x.dtype).zero_()
    buffer[: x.numel()] = x.view(-1)
    return {"buffer": buffer, "shape": x.shape}


def _one_shot(inputs: Inputs, comm: Communicator) -> Outputs:
    total = comm.torch_symmetric.one_shot(inputs["buffer"])
    return (total[: inputs["shape"].numel()].view(inputs["shape"]),)


def _two_shot(inputs: Inputs, comm: Communicator) -> Outputs:
    total = comm.torch_symmetric.two_shot(inputs["buffer"])
    return (total[: inputs["shape"].numel()].view(inputs["shape"]),)


def _in_symmetric_memory(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    x = inputs["x"]
    return {"x": comm.empty(x.shape, x.dtype).copy_(x)}


def _in_place(inputs: Inputs, comm: Communicator) -> Outputs:
    return (ops.all_reduce_(inputs["x"], comm, "cuda"),)


def _copy(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    return {"x": inputs["x"].clone()}


@functools.cache
def _nccl_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(dist.get_process_group_ranks(group), backend="nccl")


def _nccl(inputs: Inputs, comm: Communicator) -> Outputs:
    dist.all_reduce(inputs["x"], group=_nccl_group(comm.group))
    return (inputs["x"],)


def _all_reduce(inputs: Inputs, comm: Communicator) -> Outputs:
    return (ops.all_reduce(inputs["x"], comm, "cuda"),)


def _tail(total: torch.Tensor, inputs: Inputs, norm_weight: torch.Tensor | None) -> Outputs:
    """What follows a sum over ranks, by torch; changes ``total``."""
    if inputs["residual"] is not None:
        total += inputs["residual"]
    if norm_weight is None:
        return (total,)
    return F.rms_norm(total, norm_weight.shape, norm_weight, EPS), total


def _all_reduce_then_torch(inputs: Inputs, comm: Communicator) -> Outputs:
    return _tail(ops.all_reduce(inputs["x"], comm, "cuda"), inputs, inputs["weight"])


def _cublas(inputs: Inputs, comm: Communicator) -> Outputs:
    return (F.linear(inputs["x"], inputs["w"]),)


def _gemm(inputs: Inputs, comm: Communicator) -> Outputs:
    return (ops.matmul(inputs["x"], inputs["w"], backend="cuda"),)


@functools.cache
def _one_line(device: torch.device) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.bfloat16, device=device)


def _then_barrier(gemm: Callable[[Inputs, Communicator], Outputs]):
    """A GEMM, then our all-reduce of 8 bytes: what it costs to go in step and exchange nothing."""

    def call(inputs: Inputs, comm: Communicator) -> Outputs:
        outputs = gemm(inputs, comm)
        ops.all_reduce(_one_line(comm.device), comm, "cuda")
        return outputs

    return call


def _gemm_then_all_reduce(inputs: Inputs, comm: Communicator) -> Outputs:
    return gemm_then_all_reduce(inputs, comm, "cuda")


def _cublas_into_buffer(inputs: Inputs, comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's GEMM straight into shared memory: the whole buffer, and the product in it."""
    x, w = inputs["x"], inputs["w"]
    buffer = comm.torch_symmetric.buffer(len(x) * len(w), x.dtype)
    product = buffer[: len(x) * len(w)].view(len(x), len(w))
    torch.mm(x, w.t(), out=product)
    return buffer, product


def _cublas_then_one_shot(inputs: Inputs, comm: Communicator) -> Outputs:
    buffer, product = _cublas_into_buffer(inputs, comm)
    total = comm.torch_symmetric.one_shot(buffer)[: product.numel()].view(product.shape)
    return _tail(total, inputs, inputs["norm_weight"])


def _cublas_then_two_shot(inputs: Inputs, comm: Communicator) -> Outputs:
    buffer, product = _cublas_into_buffer(inputs, comm)
    comm.torch_symmetric.two_shot(buffer)
    return _tail(product, inputs, inputs["norm_weight"])


def _check_all_reduce(inputs: list[Inputs], rank: int, outputs: Outputs) -> str | None:
    xs = [x["x"] for x in inputs]
    return complaint(outputs[0], sum(xs[1:], start=xs[0]), all_reduce_reference(xs))


def _with_alone(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    """The inputs, and a communicator of this rank alone."""
    if "alone" not in comm.backends:
        alone = Communicator(device=comm.device)
        weakref.finalize(comm, alone.close)
        comm.backends["alone"] = alone
    return {
        **inputs,
        "widths": sampling_peers.widths(adapter, comm),
        "logs": "logs" in adapter.case.options,
        "alone": comm.backends["alone"],
    }


def _gathered(inputs: Inputs, comm: Communicator, name: str) -> torch.Tensor | None:
    if name not in inputs:
        return None
    return sampling_peers.gather(inputs[name], inputs["widths"], comm)


def _gather_then_argmax(inputs: Inputs, comm: Communicator) -> Outputs:
    logits = _gathered(inputs, comm, "logits")
    return (ops.vocab_parallel_argmax(logits, 0, inputs["alone"], "cuda"),)


def _results(outputs: tuple[torch.Tensor | None, ...]) -> Outputs:
    return tuple(x for x in outputs if x is not None)


def _gather_then_sample(inputs: Inputs, comm: Communicator) -> Outputs:
    return _results(
        ops.vocab_parallel_sample(
            _gathered(inputs, comm, "logits"), inputs["sampling"], inputs["positions"], 0,
            inputs["alone"], log_probabilities=inputs["logs"], backend="cuda",
        )
    )  # fmt: skip


def _gather_then_verify(inputs: Inputs, comm: Communicator) -> Outputs:
    return _results(
        ops.verify_chain(
            _gathered(inputs, comm, "logits"), inputs["drafts"], inputs["draft_lengths"],
            inputs["sampling"], inputs["positions"], 0, inputs["alone"],
            draft_probabilities=_gathered(inputs, comm, "draft_probabilities"),
            log_probabilities=inputs["logs"], backend="cuda",
        )
    )  # fmt: skip


def _gather_then_torch_argmax(inputs: Inputs, comm: Communicator) -> Outputs:
    return (_gathered(inputs, comm, "logits").argmax(dim=1),)


def _check_argmax(inputs: list[Inputs], rank: int, outputs: Outputs) -> str | None:
    """Of equal logits torch takes any."""
    logits = torch.cat([x["logits"] for x in inputs], dim=1)
    largest = logits.gather(1, outputs[0][:, None])[:, 0] == logits.amax(dim=1)
    return None if bool(largest.all()) else "not the largest logit"


def _peer(name: str, call, obstacle=_ranks_obstacle, **attributes) -> Peer:
    return Peer(name, call, layout="cuda", beside="cuda", obstacle=obstacle, **attributes)


def _torch_peer(name: str, call, **attributes) -> Peer:
    return _peer(name, call, _symmetric_obstacle, baseline=True, **attributes)


def _draws(ours, torchs) -> tuple[Peer, ...]:
    """What a drawing op is compared with: the logits gathered by our all_gather, then the same
    kernel on one rank, or torch's ops.
    """
    return (
        _peer("gather+cuda", ours, prepare=_with_alone),
        Peer(
            "gather+torch", torchs, layout="cuda", beside="cuda", prepare=sampling_peers.prepare,
            check=sampling_peers.check, baseline=True,
        ),
    )  # fmt: skip


GPU_PEERS: dict[str, tuple[Peer, ...]] = {
    "all_reduce": (
        _torch_peer("torch_one_shot", _one_shot, prepare=_in_torch_buffer),
        _torch_peer("torch_two_shot", _two_shot, prepare=_in_torch_buffer),
        _peer("nccl", _nccl, _nccl_obstacle, prepare=_copy),
        _peer("cuda_in_place", _in_place, prepare=_in_symmetric_memory),
    ),
    "all_reduce_rms_norm": (
        _peer("all_reduce", _all_reduce, check=_check_all_reduce, partial=True),
        _peer("all_reduce+torch", _all_reduce_then_torch, baseline=True),
    ),
    "matmul_all_reduce": (
        _peer("cublas", _cublas, check=check_gemm, partial=True),
        _peer("gemm", _gemm, check=check_gemm, partial=True),
        _peer("cublas+barrier", _then_barrier(_cublas), check=check_gemm, partial=True),
        _peer("gemm+barrier", _then_barrier(_gemm), check=check_gemm, partial=True),
        _peer("gemm+all_reduce", _gemm_then_all_reduce),
        _torch_peer("cublas+one_shot", _cublas_then_one_shot),
        _torch_peer("cublas+two_shot", _cublas_then_two_shot),
    ),
    "vocab_parallel_argmax": (
        _peer("gather+cuda", _gather_then_argmax, prepare=_with_alone),
        Peer(
            "gather+torch",
            _gather_then_torch_argmax,
            layout="cuda",
            beside="cuda",
            prepare=_with_alone,
            check=_check_argmax,
            baseline=True,
        ),
    ),
    "vocab_parallel_sample": _draws(_gather_then_sample, sampling_peers.sample),
    "verify_chain": (*_draws(_gather_then_verify, sampling_peers.verify), *VERIFY_PEERS),
}
