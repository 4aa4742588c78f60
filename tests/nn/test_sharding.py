"""Which part of a layer a rank holds: properties for any sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commfuse.errors import UsageError
from commfuse.nn.sharding import Span, shard_heads, shard_vocabulary, split

WORLDS = st.integers(1, 16)


def covers(spans: list[Span], count: int) -> bool:
    """Whether the spans lie side by side from 0 to ``count``."""
    begins = [0, *(span.end for span in spans)]
    return begins[-1] == count and all(
        span.begin == begin <= span.end for span, begin in zip(spans, begins, strict=False)
    )


@given(st.integers(0, 10_000), WORLDS)
def test_split_is_contiguous_even_and_complete(count, world_size):
    spans = [split(count, world_size, rank) for rank in range(world_size)]
    assert covers(spans, count)
    lengths = [len(span) for span in spans]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 8), st.integers(1, 12), st.data())
def test_every_query_head_finds_its_kv_head(kv_heads, group, data):
    heads = kv_heads * group
    world_size = data.draw(st.integers(1, heads))
    shards = [shard_heads(heads, kv_heads, world_size, rank) for rank in range(world_size)]
    assert covers([shard.query for shard in shards], heads)
    for shard in shards:
        assert shard.group == group
        read = {head // group for head in range(shard.query.begin, shard.query.end)}
        assert read == set(range(shard.kv.begin, shard.kv.end))
    held = {head for shard in shards for head in range(shard.kv.begin, shard.kv.end)}
    assert held == set(range(kv_heads))


@given(st.integers(1, 20), st.integers(1, 20))
def test_more_ranks_than_heads(heads, more):
    with pytest.raises(UsageError, match=f"{heads} attention heads.*use 1 to {heads}"):
        shard_heads(heads, 1, heads + more, 0)


@given(st.integers(1, 300_000), WORLDS)
def test_vocabularies_are_cut_at_multiples_of_128(size, world_size):
    spans = [shard_vocabulary(size, world_size, rank) for rank in range(world_size)]
    assert covers(spans, size)
    assert all(span.begin % 128 == 0 or len(span) == 0 for span in spans)
    assert all(span.end % 128 == 0 or span.end == size for span in spans)
    blocks = [-(-len(span) // 128) for span in spans]
    assert max(blocks) - min(blocks) <= 1


def test_rows_of_a_span():
    assert Span(2, 5).scaled(64) == slice(128, 320)
    assert len(Span(3, 3)) == 0
