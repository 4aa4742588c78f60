"""On every rank: the vocabulary-parallel ops, against tokens chosen here by plain Python."""

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.nn.sharding import shard_vocabulary
from commfuse.runtime.communicator import Communicator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def greedy(batch: int) -> tuple[ops.Sampling, torch.Tensor]:
    return ops.Sampling.of(batch), torch.zeros(batch, dtype=torch.int64)


def _shard(logits: torch.Tensor, comm: Communicator) -> tuple[torch.Tensor, int]:
    span = shard_vocabulary(logits.shape[1], comm.world_size, comm.rank)
    return logits[:, span.begin : span.end].contiguous(), span.begin


def _winners(logits: torch.Tensor) -> list[int]:
    """The first of the largest in every row."""
    return [row.index(max(row)) for row in logits.float().tolist()]


def _verified(winners, drafts, lengths) -> tuple[list[list[int]], list[int]]:
    """Greedy verification as one would say it: go on as long as the draft is right."""
    tokens, accepted, longest = [], [], len(drafts[0])
    rows = iter(winners)
    for draft, length in zip(drafts, lengths, strict=True):
        own = [next(rows) for _ in range(length + 1)]
        count = 0
        while count < length and draft[count] == own[count]:
            count += 1
        tokens.append(draft[:count] + [own[count]] + [-1] * (longest - count))
        accepted.append(count)
    return tokens, accepted


def _logits(rows: int, size: int, dtype, seed: int) -> torch.Tensor:
    """Few distinct values, so that ties within and between shards are the rule."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, size), generator=generator).to(dtype) / 4


def run() -> list[str]:
    """The failures."""
    failures = []
    for payload in (4096, 1 << 20):
        with Communicator(dist.group.WORLD, payload_bytes=payload) as comm:
            for dtype in DTYPES:
                for backend in ("cpu", "torch"):
                    failures += _argmax(comm, dtype, backend) + _chains(comm, dtype, backend)
                    failures += _embedding(comm, dtype, backend)
    return failures


def _argmax(comm, dtype, backend) -> list[str]:
    failures = []
    # 1 to 128 entries: all of them on rank 0, the other shards are empty. 600 rows are more than
    # 4 KiB of payload carry at once.
    for rows, size in ((3, 1), (5, 15), (5, 128), (2, 129), (7, 257), (600, 385), (0, 300)):
        logits = _logits(rows, size, dtype, rows + size)
        shard, begin = _shard(logits, comm)
        tokens = ops.vocab_parallel_argmax(shard, begin, comm, backend)
        if tokens.dtype != torch.int64 or tokens.tolist() != _winners(logits):
            failures.append(f"argmax {backend} {dtype} {rows} rows of {size}")
    masked = torch.full((1, 300), -torch.inf, dtype=dtype)
    masked[0, 290] = -1000
    shard, begin = _shard(masked, comm)
    if ops.vocab_parallel_argmax(shard, begin, comm, backend).tolist() != [290]:
        failures.append(f"argmax {backend} {dtype}: one finite logit")
    return failures


def _chains(comm, dtype, backend) -> list[str]:
    failures = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        batch, longest = 1 + seed % 4, (0, 1, 3, 5)[seed // 3]
        lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
        size = (129, 300, 1000)[seed % 3]
        logits = _logits(int(lengths.sum()) + batch, size, dtype, seed)
        winners = _winners(logits)
        drafts, row = torch.full((batch, longest), -1), 0
        for b, length in enumerate(lengths.tolist()):
            right = int(torch.randint(0, length + 1, (1,), generator=generator))
            for i in range(length):
                drafts[b, i] = (winners[row + i] + (i >= right)) % size
            row += length + 1
        shard, begin = _shard(logits, comm)
        tokens, accepted, _ = ops.verify_chain(
            shard, drafts, lengths, *greedy(batch), begin, comm, backend=backend
        )
        got = (tokens.tolist(), accepted.tolist())
        if got != _verified(winners, drafts.tolist(), lengths.tolist()):
            failures.append(f"verify_chain {backend} {dtype} seed {seed}: {got}")
    return failures


def _embedding(comm, dtype, backend) -> list[str]:
    failures = []
    for size, hidden in ((1, 1), (129, 33), (300, 48)):
        table = torch.randn(size, hidden, generator=torch.Generator().manual_seed(size)).to(dtype)
        tokens = torch.arange(0, 3 * size, 2) % size
        span = shard_vocabulary(size, comm.world_size, comm.rank)
        shard = table[span.begin : span.end]
        packed = ops.pack_weight(shard)
        weights = [packed] if backend == "cpu" else [packed, shard]
        for w in weights:
            rows = ops.vocab_parallel_embedding(tokens, w, span.begin, comm, backend=backend)
            if not torch.equal(rows, table[tokens]):
                failures.append(f"embedding {backend} {dtype} {size} {type(w)}")
        outside = torch.tensor([size, -1])
        rows = ops.vocab_parallel_embedding(outside, packed, span.begin, comm, backend=backend)
        if rows.any():
            failures.append(f"embedding {backend} {dtype} {size}: ids that no rank holds")
    return failures


def impossible_rows() -> dict[str, tuple[str, str]]:
    """Rows from which nothing can be chosen: what every rank raises, and the call after it."""
    raised = {}
    drafts, lengths = torch.tensor([[0, 0]]), torch.tensor([2])
    with Communicator(dist.group.WORLD) as comm:

        def argmax(shard, begin, backend):
            return ops.vocab_parallel_argmax(shard, begin, comm, backend)

        def verify_chain(shard, begin, backend):
            return ops.verify_chain(
                shard, drafts, lengths, *greedy(1), begin, comm, backend=backend
            )

        def sampled(shard, begin, backend):
            options = {"temperature": [1.0, 0.7, 1.0], "top_k": [0, 7, 0], "top_p": [1, 0.9, 1]}
            return ops.vocab_parallel_sample(
                shard, ops.Sampling.of(3, **options), torch.arange(3), begin, comm, backend=backend
            )

        def residual(shard, begin, backend):
            q = torch.full((2, shard.shape[1]), 1 / 300)
            return ops.verify_chain(
                shard, drafts, lengths, ops.Sampling.of(1, temperature=1.0), torch.tensor([7]),
                begin, comm, draft_probabilities=q, backend=backend,
            )  # fmt: skip

        for backend in ("cpu", "torch"):
            for value in (torch.nan, torch.inf, -torch.inf):
                logits = torch.zeros(3, 300)
                logits[1] = -torch.inf
                # In the last of the shards alone, and in the tail of a vector.
                logits[1, 299] = value
                for call in (argmax, verify_chain, sampled, residual):
                    name = f"{backend} {call.__name__} {value}"
                    try:
                        call(*_shard(logits, comm), backend)
                        raised[name] = ("", "")
                    except RuntimeError as error:
                        raised[name] = (type(error).__name__, str(error))
            if argmax(*_shard(torch.arange(300.0)[None], comm), backend).tolist() != [299]:
                raised[f"{backend} afterwards"] = ("", "")
    return raised
