"""On every rank, in Triton's interpreter: the kernel that draws, against the ops on the CPU."""

import importlib.util
import time
from pathlib import Path

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.errors import CommfuseError
from commfuse.nn.sharding import shard_vocabulary
from commfuse.runtime.communicator import Communicator
from commfuse.triton_kernels import drawing
from commfuse.triton_kernels import truncation as module
from commfuse.triton_kernels.protocol import OK
from commfuse.triton_kernels.vocab_parallel_sample import draw


def _load(name: str):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"draw_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


WORKER = _load("worker")
LENGTHS = (2, 0, 1)
GREEDY, DRAWN, MIXED = 0.0, 1.0, (0.7, 0.0, 1.3)
TRUNCATED = {"top_k": (5, 0, 300), "top_p": (1.0, 0.5, 0.8)}


class Requests:
    """Three requests, one of them without a draft; on the CPU alone, what becomes of them."""

    def __init__(
        self, size: int, dtype: torch.dtype, temperature, seed: int = 0, distributions=False,
        **truncation,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.size, self.lengths = size, torch.tensor(LENGTHS)
        batch, rows = len(LENGTHS), sum(LENGTHS) + len(LENGTHS)
        self.logits = (torch.randn(rows, size, generator=generator) * 3).to(dtype)
        self.logits[:, 3::16] = -torch.inf
        self.logits[1] = (self.logits[1] * 2).round() / 2  # ties, also across shards
        self.logits[2, : size // 2] = -torch.inf  # shards without mass
        seeds = [seed, -(2**62), 3]
        self.sampling = ops.Sampling.of(batch, temperature=temperature, seed=seeds, **truncation)
        self.truncated, self.q = bool(truncation), None
        self.positions = torch.tensor([5, 1 << 33, 7])
        self.drafts = torch.full((batch, 2), -1)
        first = self.verified().tokens
        self.drafts[0] = torch.tensor([first[0, 0], size])  # the second is no token
        self.drafts[2, 0] = first[2, 0]
        if distributions:
            # Of request 0 the first draft is likely, the second no token; of request 2 the target
            # has nothing above the draft's distribution.
            self.q = (self.logits[[0, 1, 4]].float() * 0.8).softmax(dim=1)
            self.q[2] = 1

    def verified(self) -> ops.Verified:
        with Communicator() as alone:
            return ops.verify_chain(
                self.logits, self.drafts, self.lengths, self.sampling, self.positions, 0, alone,
                draft_probabilities=self.q, log_probabilities=True,
            )  # fmt: skip

    def shard(self, comm) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        span = shard_vocabulary(self.size, comm.world_size, comm.rank)
        logits, q = (
            None if x is None else x[:, span.begin : span.end].contiguous()
            for x in (self.logits, self.q)
        )
        return logits, q, span.begin

    def drawn(self, comm, workspace) -> tuple[torch.Tensor, ...]:
        logits, q, begin = self.shard(comm)
        return draw(
            "verify_chain", logits, self.drafts, self.lengths, self.sampling.tensors,
            self.positions, 0, begin, True, workspace, draft_probabilities=q,
            truncated=self.truncated,
        )  # fmt: skip

    def wrong(self, out) -> bool:
        tokens, logs, accepted, status = out
        expected = self.verified()
        return not (
            torch.equal(tokens, expected.tokens)
            and torch.equal(accepted, expected.accepted)
            and torch.allclose(logs, expected.log_probabilities, atol=1e-5)
            and not status.any()
        )


def correctness(comm) -> list[str]:
    """Which of many kinds of requests come out other than on the CPU."""
    workspace, found = WORKER.make_workspace(comm), []
    some = (0.7, 1.0, 0.0)
    kinds = [(129, "bfloat16", DRAWN, True, TRUNCATED)] + {
        1: [(3000, "bfloat16", MIXED, False, {}), (300, "float32", some, False, TRUNCATED)],
        2: [
            (1, "float32", DRAWN, False, {}),
            (129, "float32", GREEDY, False, {}),
            (300, "float32", MIXED, True, {}),
        ],
        3: [(300, "float16", some, False, TRUNCATED)],
    }[comm.world_size]
    for seed, (size, dtype, temperature, distributions, truncation) in enumerate(kinds):
        made = Requests(size, WORKER.DTYPES[dtype], temperature, seed, distributions, **truncation)
        if made.wrong(made.drawn(comm, workspace)):
            found.append(f"{size} {dtype} {temperature} q={distributions} {truncation}")
    return found


def skipped_wait(*arguments):
    return OK


def stragglers(comm) -> dict[str, int]:
    """Wrong results of calls in which a rank is late, and of a kernel that does not wait."""
    found = {}
    for index, (name, wait) in enumerate((("sound", module.wait), ("skipped", skipped_wait))):
        workspace, wrong = WORKER.make_workspace(comm, 1 + index), 0
        with WORKER.replaced(module, "wait", wait):
            for call in range(2):
                made = Requests(300, torch.bfloat16, MIXED, 100 + call)
                late = 0.1 if call % comm.world_size == comm.rank else 0.0
                with WORKER.delayed(module, "signal", before=late):
                    time.sleep(late)
                    wrong += made.wrong(made.drawn(comm, workspace))
        found[name] = wrong
        comm.barrier()
    # A rank still reads what its first program was sent when its peer's second program begins.
    workspace = WORKER.make_workspace(comm, 3)
    made = Requests(129, torch.bfloat16, DRAWN, 0, True, **TRUNCATED)
    with WORKER.delayed(drawing, "_winner", before=0.1 * comm.rank):
        found["apart"] = int(made.wrong(made.drawn(comm, workspace)))
    comm.barrier()
    return found


def as_backend(comm) -> dict[str, tuple[str, str]]:
    """What ``commfuse.ops`` says of calls with backend="triton", besides their results."""
    made = Requests(300, torch.bfloat16, MIXED, 7)
    logits, _, begin = made.shard(comm)
    three = logits[:3].contiguous()
    nan = made.logits.clone()
    nan[4, 299] = torch.nan
    span = shard_vocabulary(300, comm.world_size, comm.rank)
    broken = nan[:, span.begin : span.end].contiguous()
    truncated = ops.Sampling.of(3, temperature=1.0, top_p=0.9, seed=range(3))
    q = torch.full((3, logits.shape[1]), 1 / 300)

    def verify(backend, x=logits, sampling=made.sampling, lengths=made.lengths, **options):
        return ops.verify_chain(
            x, made.drafts, lengths, sampling, made.positions, begin, comm, backend=backend,
            **options,
        )  # fmt: skip

    results = {}
    for name, call in {
        "verify_chain": lambda backend: verify(backend)[:2],
        "truncated": lambda backend: verify(backend, sampling=truncated, draft_probabilities=q)[:2],
        "vocab_parallel_sample": lambda backend: ops.vocab_parallel_sample(
            three, made.sampling, made.positions, begin, comm, draft=True, backend=backend
        )[:1],
        "vocab_parallel_argmax": lambda backend: (
            ops.vocab_parallel_argmax(three, begin, comm, backend),
        ),
    }.items():
        same = all(map(torch.equal, call("triton"), call("cpu")))
        results[name] = ("" if same else "other tokens", "")
    for name, call in {
        "q": lambda: verify("triton", draft_probabilities=q[1:]),
        "q NaN": lambda: verify("triton", sampling=truncated, draft_probabilities=q * torch.nan),
        "lengths": lambda: verify("triton", lengths=made.lengths + 1),
        "NaN": lambda: verify("triton", broken),
    }.items():
        try:
            call()
            results[name] = ("", "")
        except (CommfuseError, ValueError) as error:
            results[name] = (type(error).__name__, str(error))
    return results


def run() -> dict:
    """All of it, in one start of the ranks."""
    torch.set_num_threads(1)
    with Communicator(dist.group.WORLD, workspace_bytes=WORKER.WORKSPACE_BYTES) as comm:
        results = {"correctness": correctness(comm)}
        if comm.world_size == 2:
            if comm.rank == 0:
                with Communicator() as alone:
                    results["alone"] = correctness(alone)
            results["stragglers"] = stragglers(comm)
            results["backend"] = as_backend(comm)
    return results
