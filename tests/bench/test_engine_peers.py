"""What vLLM's and FlashInfer's kernels are given, by stand-ins that verify greedily as those do."""

import sys
from types import ModuleType

import pytest
import torch

from commfuse.bench.engine_peers import VERIFY_PEERS
from commfuse.bench.gpu_peers import GPU_PEERS
from commfuse.errors import BackendUnavailable
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import Case

VLLM, FLASHINFER = VERIFY_PEERS


def accept(chosen: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """Tokens [batch, drafts + 1]: the drafts that were chosen and the choice behind them, or -1."""
    right = (chosen[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1)
    places = torch.arange(chosen.shape[1])
    return chosen.masked_fill(places > right[:, None], -1)


def rejection_sample(
    target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping,
    expanded_idx_mapping, expanded_local_pos, temperature, seed, num_speculative_steps,
):  # fmt: skip
    batch, rows = len(idx_mapping), num_speculative_steps + 1
    assert cu_num_logits.tolist() == [rows * b for b in range(batch + 1)]
    assert expanded_idx_mapping.tolist() == [b for b in range(batch) for _ in range(rows)]
    assert expanded_local_pos.tolist() == list(range(rows)) * batch
    assert pos.view(batch, rows)[:, 0].tolist() == [5 + b for b in range(batch)]
    assert temperature.shape == seed.shape == (batch,)
    if draft_logits is not None:
        assert draft_logits.shape == (batch, rows - 1, target_logits.shape[1])
        ones = torch.ones(batch, rows - 1)
        torch.testing.assert_close(draft_logits.exp().sum(dim=2), ones)
    tokens = accept(
        target_logits.argmax(dim=1).view(batch, rows), draft_sampled.view(batch, -1)[:, 1:]
    )
    return tokens, (tokens >= 0).sum(dim=1)


def chain_speculative_sampling(draft_probs, draft_token_ids, target_probs, *, seed, offset):
    batch, drafts, _ = draft_probs.shape
    for probabilities in (draft_probs, target_probs):
        ones = torch.ones(probabilities.shape[:2])
        torch.testing.assert_close(probabilities.sum(dim=2), ones)
    assert draft_token_ids.dtype == torch.int32 and draft_token_ids.shape == (batch, drafts)
    assert target_probs.shape[1] == drafts + 1 and seed.shape == offset.shape == (1,)
    tokens = accept(target_probs.argmax(dim=2), draft_token_ids.long()).int()
    return tokens, None, (tokens >= 0).sum(dim=1) - 1


@pytest.fixture
def installed(monkeypatch):
    """Both engines, as far as they are looked at."""
    for path, function in (
        ("vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils", rejection_sample),
        ("flashinfer.sampling", chain_speculative_sampling),
    ):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, function.__name__, function)


@pytest.mark.parametrize("peer", VERIFY_PEERS, ids=lambda peer: peer.name)
def test_what_an_engine_is_given(installed, peer):
    def made(*options):
        case = Case("verify_chain", (("batch", 3), ("drafts", 2), ("vocabulary", 300)), options)
        adapter = adapter_of(case, torch.float32, 1)
        return adapter, adapter.inputs()

    with Communicator() as comm:
        assert peer.obstacle(comm, torch.float32) is None
        adapter, inputs = made()
        outputs = peer.call(peer.prepare(adapter, inputs[0], comm), comm)
        assert torch.equal(outputs[0].long(), adapter.call(inputs[0], comm, "cpu")[0])
        assert peer.check(inputs, 0, outputs) is None
        wrong = ((outputs[0] + 1).clamp(max=299), *outputs[1:])
        assert "largest logit" in peer.check(inputs, 0, wrong)
        adapter, inputs = made("sampled", "distributions")
        peer.call(peer.prepare(adapter, inputs[0], comm), comm)
        for options in (("sampled", "truncated"), ("sampled", "logs")):
            adapter, inputs = made(*options)
            with pytest.raises(BackendUnavailable, match="no top-k, top-p or log-probabilities"):
                peer.call(peer.prepare(adapter, inputs[0], comm), comm)


def test_engines_that_are_not_installed_say_so(monkeypatch):
    for name in ("vllm", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "vLLM's rejection_sample cannot be imported: " in VLLM.obstacle(None, torch.float32)
    text = FLASHINFER.obstacle(None, torch.float32)
    assert "FlashInfer's chain_speculative_sampling cannot be imported: " in text
    assert set(VERIFY_PEERS) <= set(GPU_PEERS["verify_chain"])
