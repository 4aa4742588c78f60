"""On every rank: many draws of the vocabulary-parallel ops, counted; what must not change them."""

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.nn.sharding import shard_vocabulary
from commfuse.ops._sampling import truncated_weights
from commfuse.runtime.communicator import Communicator

BATCH = 10_000


def _own(x: torch.Tensor, comm: Communicator) -> tuple[torch.Tensor, int]:
    span = shard_vocabulary(x.shape[1], comm.world_size, comm.rank)
    return x[:, span.begin : span.end].contiguous(), span.begin


def _logits(size: int, closeness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the target at two rows, and of the drafter: the same (closeness 1) or unrelated (0)."""
    generator = torch.Generator().manual_seed(size)
    target = torch.randn(2, size, generator=generator) * 2
    other = torch.randn(1, size, generator=generator) * 2
    return target, closeness * target[:1] + (1 - closeness) * other


def counts(size: int, trials: int, closeness: float, options: dict, how: str) -> tuple:
    """How often each token came first and, behind an accepted draft, second.

    Args:
        how: the drafts: ``one-hot``: drawn, then told without their distribution; ``full``: with
            it. Biased: ``shared``: drawn by the noise that also chooses what replaces a refused
            draft; ``not renormalised``: a refused draft is replaced by a draw from the target;
            ``local``: a rank's own winner.

    Returns:
        int64 [2, size], how many drafts were accepted, and the probabilities [2, size] that are
        due.
    """
    found, accepted = torch.zeros(2, size, dtype=torch.int64), 0
    target, drafter = _logits(size, closeness)
    due = torch.stack(
        [
            truncated_weights(
                row, options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0)
            )
            for row in target
        ]
    )
    q = drafter[0].softmax(dim=0)
    with Communicator(dist.group.WORLD) as comm, Communicator() as alone:
        logits, begin = _own(target.repeat(BATCH, 1), comm)
        draft_logits, _ = _own(drafter.expand(BATCH, -1), comm)
        own_q, _ = _own(q.expand(BATCH, -1), comm)
        lengths = torch.ones(BATCH, dtype=torch.int64)
        for first in range(0, trials, BATCH):
            seeds, positions = range(first, first + BATCH), torch.full((BATCH,), 3)
            sampling = ops.Sampling.of(BATCH, seed=seeds, **options)
            plain = ops.Sampling.of(BATCH, seed=seeds, temperature=1.0)
            draft, _ = ops.vocab_parallel_sample(
                draft_logits, plain, positions, begin, comm, draft=how != "shared"
            )
            verified = ops.verify_chain(
                logits, draft[:, None], lengths, sampling, positions, begin,
                alone if how == "local" else comm,
                draft_probabilities=None if how in ("one-hot", "local") else own_q,
            )  # fmt: skip
            tokens = verified.tokens.clone()
            if how == "not renormalised":
                replacement, _ = ops.vocab_parallel_sample(
                    logits[::2].contiguous(), sampling, positions, begin, comm
                )
                refused = verified.accepted == 0
                tokens[refused, 0] = replacement[refused]
            found[0] += torch.bincount(tokens[:, 0], minlength=size)
            second = tokens[verified.accepted == 1, 1]
            found[1] += torch.bincount(second, minlength=size)
            accepted += int(verified.accepted.sum())
    return found, accepted, due


def draws(dtypes: list[str]) -> dict[str, list]:
    """By dtype: see :func:`_draws`."""
    return {dtype: _draws(dtype) for dtype in dtypes}


def _draws(dtype: str) -> list:
    """Tokens and log-probabilities of one batch with every option: the same for any world size."""
    size, batch = 1000, 24
    generator = torch.Generator().manual_seed(1)
    rows = batch * 3
    logits = (torch.randn(rows, size, generator=generator) * 3).to(getattr(torch, dtype))
    logits[:, :256] = -torch.inf  # whole shards without mass
    logits[::5] = (logits[::5] * 2).round() / 2  # ties across shards
    sampling = ops.Sampling.of(
        batch,
        temperature=[(0.0, 0.6, 1.0, 1.7)[b % 4] for b in range(batch)],
        top_k=[(0, 3, 40)[b % 3] for b in range(batch)],
        top_p=[(1.0, 0.8)[b % 2] for b in range(batch)],
        seed=[b * (1 << 40) - 5 for b in range(batch)],
    )
    q = (logits.view(batch, 3, size)[:, :2].flatten(0, 1).float() * 0.9).softmax(dim=1)
    drafts = torch.multinomial(q, 1, generator=generator).view(batch, 2)
    drafts[5] = torch.tensor([-1, size])  # no tokens
    lengths, positions = torch.full((batch,), 2), torch.arange(batch) + (1 << 33)
    results = []
    for payload in (4096, 1 << 20):
        with Communicator(dist.group.WORLD, payload_bytes=payload) as comm:
            own, begin = _own(logits, comm)
            for drafted in (None, _own(q, comm)[0]):
                out = ops.verify_chain(
                    own, drafts, lengths, sampling, positions, begin, comm,
                    draft_probabilities=drafted, log_probabilities=True,
                )  # fmt: skip
                results.append([out.tokens.tolist(), out.accepted.tolist()])
                results.append(out.log_probabilities)
            # One row alone, at another place in the batch.
            one, _ = ops.vocab_parallel_sample(
                own[3 * 7 + 1][None].contiguous(), sampling.select([7]), positions[7:8] + 1, begin,
                comm,
            )  # fmt: skip
            results.append(one.tolist())
    return results
