"""Attention and gated features as they run on GPUs, in Triton's interpreter."""

from pathlib import Path

import pytest

from commfuse.testing import run_ranks

WORKER = str(Path(__file__).with_name("attention_worker.py"))


@pytest.fixture(scope="module")
def found():
    return run_ranks(f"{WORKER}:run", 1, timeout=120, env={"TRITON_INTERPRET": "1"})[0]


@pytest.mark.parametrize("check", ["prefill", "decoding", "head_shards", "gated", "devices"])
def test_attention(found, check):
    assert found[check] == []


def test_calls_that_do_not_fit_say_so(found):
    one, none, columns = found["errors"]
    assert "v_cache has 1 KV heads, and heads 0 to 3 in groups of 2 read 2" in one
    assert "heads are (0, 0, 1)" in none
    assert "qkv is torch.float32[1, 128]" in columns and "[1, 112]" in columns
