"""vocab_parallel_argmax, verify_chain and vocab_parallel_embedding on 1 to 4 ranks."""

from pathlib import Path

import pytest
import torch

from commfuse import ops
from commfuse.ops.verify_chain import reference
from commfuse.runtime.communicator import Communicator
from commfuse.testing import run_ranks

VOCABULARY = str(Path(__file__).parents[1] / "workers" / "vocabulary.py")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_against_plain_python(world_size):
    assert run_ranks(f"{VOCABULARY}:run", world_size, timeout=120) == [[]] * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_without_a_token_raise_on_every_rank_and_are_not_final(world_size):
    results = run_ranks(f"{VOCABULARY}:impossible_rows", world_size)
    for rank in results:
        assert len(rank) == 24
        for call, (kind, text) in rank.items():
            assert kind == "CommfuseError", (call, text)
            assert ("row 1" in text or "request 1" in text) and "no token can be chosen" in text


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_what_verification_returns(backend):
    """Three drafts accepted and the bonus token; a wrong one replaced; no draft at all."""
    winners = [5, 6, 7, 8, 5, 6, 9]
    logits = torch.nn.functional.one_hot(torch.tensor(winners), 10).float()
    drafts = torch.tensor([[5, 6, 7], [4, 6, 0], [-1, -1, -1]])
    lengths = torch.tensor([3, 1, 0])
    sampling, positions = ops.Sampling.of(3), torch.zeros(3, dtype=torch.int64)
    expected = ([[5, 6, 7, 8], [5, -1, -1, -1], [9, -1, -1, -1]], [3, 0, 0])
    with Communicator() as comm:
        tokens, accepted, logs = ops.verify_chain(
            logits, drafts, lengths, sampling, positions, 0, comm, backend=backend
        )
    assert logs is None and (tokens.tolist(), accepted.tolist()) == expected
    shards = [logits[:, :4], logits[:, 4:]]
    tokens, accepted, _ = reference(shards, drafts, lengths, sampling, positions)
    assert (tokens.tolist(), accepted.tolist()) == expected
