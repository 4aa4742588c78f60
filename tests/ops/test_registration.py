"""Schemas and fakes (opcheck), the backend tables, packing, and input that does not fit."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commfuse
from commfuse import ops
from commfuse.errors import BackendUnavailable, CommunicatorClosed, UsageError
from commfuse.ops._registry import Backend, Op
from commfuse.runtime.communicator import Communicator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = torch.ops.commfuse


@pytest.fixture(scope="module")
def comm():
    with Communicator() as made:
        yield made


def block_arguments(dtype: torch.dtype, handle: int) -> tuple:
    """Two blocks: two heads of 16 that share a KV head, 24 features, all that is optional."""

    def random(*shape):
        return torch.randn(shape).to(dtype)

    def two(make):
        return [make(), make()]

    def packed(*shape):
        return two(lambda: ops.pack_weight(random(*shape)).data)

    def rows(count):
        return two(lambda: random(count))

    caches = [two(lambda: torch.zeros(1, 1, 16, 16, dtype=dtype)) for _ in range(2)]
    rotary, positions = [torch.randn(16, 8) for _ in range(2)], torch.arange(3)
    gate_up = two(lambda: ops.pack_gate_up(random(24, 32), random(24, 32)).data)
    head = ops.pack_weight(random(33, 32)).data
    return (
        random(3, 32), random(3, 32), *caches, *rotary, positions * 0, positions,
        packed(64, 32), rows(64), packed(32, 32), rows(32), rows(32), gate_up, rows(64),
        packed(32, 24), rows(32), rows(32), rows(16), rows(16), head, 2, 0, 2, 24, 1e-5, handle,
    )  # fmt: skip


def arguments(name: str, dtype: torch.dtype, handle: int) -> list[tuple]:
    """(op, its arguments) for an op and each of its overloads."""
    x, w = torch.randn(3, 5).to(dtype), torch.randn(17, 5).to(dtype)
    row = torch.randn(17).to(dtype)
    packed = ops.pack_weight(w)
    residual = torch.randn(3, 17).to(dtype)
    tokens = torch.tensor([0, 16, 3])
    caches = [torch.zeros(1, 1, 16, 16, dtype=dtype) for _ in range(2)]
    rotary = [torch.randn(16, 8) for _ in range(2)]
    qkv = torch.randn(3, 4 * 16).to(dtype)
    positions = torch.arange(3)
    norm = torch.randn(16).to(dtype)
    logits = torch.randn(5, 33).to(dtype)

    def options(batch):
        return ops.Sampling.of(batch, temperature=0.7, top_k=9, top_p=0.9).tensors

    return {
        "pack_weight": [(OPS.pack_weight.default, (w,))],
        "matmul": [
            (OPS.matmul.default, (x, packed.data, 17, None, False, 17, False)),
            (OPS.matmul.default, (x, packed.data, 17, row, False, 17, True)),
            (OPS.matmul.default, (x, ops.pack_gate_up(w, w).data, 64, None, True, 17, False)),
        ],
        "all_reduce": [
            (OPS.all_reduce.default, (x, handle)),
            (OPS.all_reduce_.default, (x, handle)),
        ],
        "reduce_scatter": [(OPS.reduce_scatter.default, (x, handle))],
        "all_gather": [(OPS.all_gather.default, (x, handle))],
        "all_reduce_rms_norm": [
            (OPS.all_reduce_rms_norm.default, (residual, None, row, 1e-5, handle)),
            (OPS.all_reduce_rms_norm.default, (residual, residual, row, 1e-5, handle)),
        ],
        "matmul_all_reduce": [
            (OPS.matmul_all_reduce.default, (x, packed.data, 17, handle, row, residual)),
            (OPS.matmul_all_reduce.rms_norm,
             (x, packed.data, 17, handle, None, residual, row, 1e-5)),
        ],
        "attention": [
            (OPS.attention.default, (qkv, *caches, *rotary, positions * 0, positions, 2, 0, 2,
                                     norms, norms, 1e-6)) for norms in (None, norm)
        ],
        "transformer_blocks": [(OPS.transformer_blocks.default, block_arguments(dtype, handle))],
        "vocab_parallel_argmax": [(OPS.vocab_parallel_argmax.default, (logits, 7, handle))],
        "verify_chain": [
            (OPS.verify_chain.default,
             (logits, torch.tensor([[1, 2], [3, -1]]), torch.tensor([2, 1]), q, *options(2),
              torch.tensor([5, 9]), logs, 0, handle))
            for q, logs in ((None, False), (torch.full((3, 33), 1 / 33), True))
        ],
        "vocab_parallel_sample": [
            (OPS.vocab_parallel_sample.default,
             (logits, *options(5), torch.arange(5), draft, draft, 0, handle))
            for draft in (False, True)
        ],
        "embedding_shard": [
            (OPS.embedding_shard.default, (tokens, packed.data, 17, 5, 0)),
        ],
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [*(name for name in ops.OP_NAMES if name != "vocab_parallel_embedding"), "pack_weight",
     "embedding_shard"],
)  # fmt: skip
def test_opcheck(name, comm):
    for dtype in DTYPES:
        for op, args in arguments(name, dtype, comm.handle):
            torch.library.opcheck(op, args)


def test_compiled_without_a_graph_break(comm):
    def layer(x):
        y = 2 * x
        same = ops.all_reduce_(y, comm)
        return same + 1, ops.reduce_scatter(y, comm), ops.all_gather(y, comm)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (2, 6, 4):  # one shape, then any
        x = torch.randn(rows, 5)
        before = x.clone()
        for ours, plain in zip(compiled(x), layer(x), strict=True):
            assert torch.equal(ours, plain)
        assert torch.equal(x, before)


# ---- backends ----------------------------------------------------------------------------------


def test_explanations_say_what_runs_and_why(comm):
    assert commfuse.explain("all_reduce", comm).backend == "cpu"
    asked = commfuse.explain("all_reduce", comm, backend="torch")
    assert asked.backend == "torch" and "not the one asked for" in asked.reasons["cpu"]
    unpacked = commfuse.explain("matmul_all_reduce", comm, packed=False)
    assert unpacked.backend == "torch" and "pack_weight" in unpacked.reasons["cpu"]
    on_gpu = commfuse.explain("matmul_all_reduce", comm, device="cuda", packed=False)
    assert on_gpu.backend == "torch" and "not on cuda" in on_gpu.reasons["cpu"]
    for name in ops.OP_NAMES:
        text = str(commfuse.explain(name, comm, dtype=torch.float32, packed=True))
        assert text.startswith(f"{name}: cpu\n") and "cpu: chosen" in text
    with pytest.raises(UsageError, match="unknown op 'all_reduced': use one of all_reduce, "):
        commfuse.explain("all_reduced", comm)


def test_explanations_may_know_the_shape_and_calls_do_not_ask_again_for_another(comm, monkeypatch):
    seen = []
    probe = Op("probe", (Backend("cpu", len, lambda comm, query: seen.append(query.shape)),))
    monkeypatch.setattr(importlib.import_module("commfuse.ops.all_reduce"), "OP", probe)
    commfuse.explain("all_reduce", comm, shape=(8, 4096))
    commfuse.explain("all_reduce", comm)
    assert probe.select("auto", comm, one(2)) is probe.select("auto", comm, one(3, 4)) is len
    assert seen == [(8, 4096), None, None]


@pytest.mark.parametrize("backend", ["cpu", "nccl", "triton"])
def test_a_backend_that_cannot_serve_lists_what_can(backend, comm):
    with pytest.raises(BackendUnavailable) as raised:
        ops.all_reduce(torch.ones(2, dtype=torch.float64), comm, backend)
    text = str(raised.value)
    assert f"backend '{backend}' cannot serve all_reduce on cpu in torch.float64" in text
    assert "torch: available" in text and "cpu: takes bfloat16, float16 and float32" in text


def test_auto_falls_back_to_torch_where_it_says_so(comm):
    x = torch.ones(2, dtype=torch.float64)
    assert commfuse.explain("all_reduce", comm, dtype=torch.float64).backend == "torch"
    assert torch.equal(ops.all_reduce(x, comm), x)


def test_no_backend_for_attention_without_our_kernels():
    with pytest.raises(BackendUnavailable, match="no backend can serve attention"):
        ops.attention(torch.ones(1, 48, dtype=torch.float64), None, None, None, None, (1, 0, 1))


# ---- packing -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 200), st.integers(0, 40), st.booleans())
def test_packing_keeps_every_element(dtype, n, k, strided):
    w = torch.randn(n, k + strided).to(dtype)[:, :k]
    packed = ops.pack_weight(w)
    assert torch.equal(packed.unpack(), w)
    assert (packed.n, packed.k, packed.out_features, packed.dtype) == (n, k, n, dtype)
    identity = torch.eye(k).to(dtype)
    assert torch.equal(ops.matmul(identity, packed).T, w)  # each element once, times one


@pytest.mark.parametrize("features", [1, 16, 17, 33])
def test_gate_and_up_alternate_in_groups_of_16(features):
    gate, up = torch.randn(2, features, 3)
    packed = ops.pack_gate_up(gate, up)
    rows = packed.unpack().view(-1, 2, 16, 3)
    for index, half in enumerate((gate, up)):
        whole = rows[:, index].reshape(-1, 3)
        assert torch.equal(whole[:features], half)
        assert not whole[features:].any()
    assert (packed.out_features, packed.gate_up) == (features, True)


# ---- input that does not fit -------------------------------------------------------------------


def one(*shape, **options):
    return torch.ones(*shape, **options)


def verify(comm, logits, drafts, lengths, sampling=None, begin=0, **options):
    sampling = sampling or ops.Sampling.of(len(drafts), temperature=1.0)
    positions = torch.zeros(len(drafts), dtype=torch.int64)
    return ops.verify_chain(logits, drafts, lengths, sampling, positions, begin, comm, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: ops.all_reduce(one(4, 4).T[1:], c), "x is not contiguous"),
        (lambda c: ops.all_reduce_(one(4, 4).T[1:], c), "x is not contiguous"),
        (lambda c: ops.reduce_scatter(one(4, 4).T[1:], c), "x is not contiguous"),
        (lambda c: ops.reduce_scatter(one(()), c), "x has 0 dimensions; the ranks sh"),
        (lambda c: ops.reduce_scatter(one(()), c, "torch"), "x has 0 dimensions; the ranks sh"),
        (lambda c: ops.all_gather(one(4, 4).T[1:], c), "x is not contiguous"),
        (lambda c: ops.all_gather(one(()), c), "the ranks' are joined along"),
        (lambda c: ops.all_gather(one(()), c, "torch"), "the ranks' are joined along"),
        (lambda c: ops.all_reduce_rms_norm(one(4), None, one(4), 1e-5, c), "1 dimensions"),
        (lambda c: ops.all_reduce_rms_norm(one(2, 4), None, one(3), 1e-5, c), "weight has shape"),
        (lambda c: ops.all_reduce_rms_norm(one(2, 4), one(1, 4), one(4), 1e-5, c), "residual has"),
        (lambda c: ops.matmul(one(2, 3), ops.pack_weight(one(4, 5))), "packed weight has shape"),
        (lambda c: ops.matmul(one(2, 3), ops.pack_weight(one(4, 3)), one(5)), "bias has shape"),
        (lambda c: ops.matmul(one(2, 3).half(), ops.pack_weight(one(4, 3))), "packed weight is"),
        (lambda c: ops.matmul(one(3), ops.pack_weight(one(4, 3))), "1 dimensions"),
        (lambda c: ops.pack_weight(one(3)), "1 dimensions"),
        (lambda c: ops.pack_weight(one(3, 3).T), "rows of w are not contiguous"),
        (lambda c: ops.pack_weight(one(3, 3).double()), "w is Double"),
        (lambda c: ops.matmul_all_reduce(one(2, 3), ops.pack_weight(one(4, 3)), c,
                                         residual=one(2, 3)), "residual has shape"),
        (lambda c: ops.matmul_all_reduce(one(2, 3), ops.pack_weight(one(4, 3)), c,
                                         norm_weight=one(3)), "norm_weight has shape"),
        (lambda c: verify(c, one(2, 8), one(1, 2).long(), one(1).long() * 3),
         r"draft_lengths\[0\] is 3, not in 0..2"),
        (lambda c: verify(c, one(2, 8), one(1, 2).long(), one(1).long() * 2),
         "logits has 2 rows, not 3"),
        (lambda c: verify(c, one(3, 8), one(1, 2).long(), one(1).long() * 2,
                          draft_probabilities=one(3, 8)),
         r"draft_probabilities is not a contiguous float32 \[2, 8\]"),
        (lambda c: verify(c, one(3, 8), one(1, 2).long(), one(1).long() * 2, begin=64),
         "vocab_begin is 64: shards must be cut at multiples of 128"),
        (lambda c: verify(c, one(3, 8), one(1, 2).long(), one(1).long() * 2,
                          sampling=ops.Sampling.of(2)), r"temperature is not a contiguous Double"),
        (lambda c: ops.Sampling.of(2, temperature=[1.0, -1.0]), "request 1: temperature is -1"),
        (lambda c: ops.Sampling.of(2, temperature=float("nan")), "request 0: temperature is nan"),
        (lambda c: ops.Sampling.of(2, top_k=-1), "request 0: top_k is -1; use 0 for all"),
        (lambda c: ops.Sampling.of(2, top_p=0), "request 0: top_p is 0; use more than 0"),
        (lambda c: ops.Sampling.of(2, seed=[1]), "seed has 1 values for 2 requests"),
    ],
)  # fmt: skip
def test_shapes_and_dtypes_that_do_not_fit(call, message, comm):
    with pytest.raises(ValueError, match=message):
        call(comm)


def attend(tokens=2, heads=(3, 0, 1), dim=16, kv=3, positions=(0, 1), sequences=(0, 0), length=16):
    return ops.attention(
        one(tokens, (heads[0] + 2 * kv) * dim),
        tuple(torch.zeros(2, kv, length, dim) for _ in range(2)),
        (one(32, dim // 2), one(32, dim // 2)),
        torch.tensor(sequences, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        heads,
    )


def test_attention_of_no_tokens():
    assert attend(tokens=0, positions=(), sequences=()).shape == (0, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": (0, 16)}, r"positions\[1\] is 16; the cache holds 16"),
        ({"positions": (-1, 0)}, r"positions\[0\] is -1"),
        ({"sequences": (0, 2)}, r"sequences\[1\] is 2; the cache holds 2"),
        ({"positions": (0,)}, "must be contiguous int64"),
        ({"dim": 24}, "head_dim is 24; it must be a multiple of 16"),
        ({"length": 17}, "max_length is 17; it must be a multiple of 16"),
        ({"heads": (3, 0, 0)}, "heads are"),
        ({"heads": (3, 0, 3)}, "3 KV heads, and heads 0 to 2 in groups of 3 read 1"),
        ({"heads": (5, 1, 3)}, "3 KV heads, and heads 1 to 5 in groups of 3 read 2"),
    ],
)
def test_attention_outside_its_cache(options, message):
    with pytest.raises(ValueError, match=message):
        attend(**options)


def test_a_closed_communicator_is_named():
    comm = Communicator()
    handle = comm.handle
    comm.close()
    with pytest.raises(CommunicatorClosed, match="closed"):
        ops.all_reduce(torch.ones(2), comm)
    with pytest.raises(CommunicatorClosed, match="closed"):
        OPS.all_reduce(torch.ones(2), handle)
    with pytest.raises(CommunicatorClosed, match="no communicator has the handle 1000000"):
        OPS.all_reduce(torch.ones(2), 1000000)
