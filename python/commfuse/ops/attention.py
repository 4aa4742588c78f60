"""Attention of new tokens over a KV cache, which it extends."""

from __future__ import annotations

import torch

from commfuse.ops._registry import Backend, Op, cpu_kernel_obstacle, define
from commfuse.ops._triton import triton_local_obstacle


def _fake(
    qkv, k_cache, v_cache, cos, sin, sequences, positions, heads, head_offset, group, q_norm,
    k_norm, eps,
):  # fmt: skip
    return qkv.new_empty((qkv.shape[0], heads * v_cache.shape[3]))


_attention = define(
    "attention(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, Tensor sin,"
    " Tensor sequences, Tensor positions, int heads, int head_offset, int group, Tensor? q_norm,"
    " Tensor? k_norm, float eps) -> Tensor",
    _fake,
)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_head_of: list[int],
) -> torch.Tensor:
    """Causal attention of one whole sequence in float64.

    Args:
        q: [length, heads, dim]; k, v: [length, kv_heads, dim]; cos, sin: [length, dim / 2].
        kv_head_of: for every query head its KV head.

    Returns:
        [length, heads * dim].
    """

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.double().chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    length, _, dim = q.shape
    k, v = rotate(k)[:, kv_head_of], v.double()[:, kv_head_of]
    scores = torch.einsum("ihd,jhd->hij", rotate(q), k) / dim**0.5
    scores += torch.full((length, length), -torch.inf).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


def _cpu(qkv, caches, rotary, sequences, positions, heads, norms, eps, span):
    return _attention(qkv, *caches, *rotary, sequences, positions, *heads, *norms, eps)


def _triton(qkv, caches, rotary, sequences, positions, heads, norms, eps, span):
    from commfuse.triton_kernels.attention import attention

    return attention(qkv, *caches, *rotary, sequences, positions, *heads, *norms, eps, span)


OP = Op(
    "attention",
    (Backend("cpu", _cpu, cpu_kernel_obstacle), Backend("triton", _triton, triton_local_obstacle)),
)


def attention(
    qkv: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    sequences: torch.Tensor,
    positions: torch.Tensor,
    heads: tuple[int, int, int],
    norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    eps: float = 1e-6,
    *,
    span: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates and appends every token's K and V, then lets every token attend to its sequence.

    Tokens of several sequences, and several of one, may come together: a ragged batch, a prompt or
    a draft. A token sees positions 0 to its own. What lies behind the positions in use is ignored,
    so that taking back a rejected draft is only to use its positions again.

    On a GPU nothing is read on the host: a captured call may be replayed with other sequences and
    positions. There a row of a decoding step is spread over the GPU, and of a prefill several rows
    share what they read of the cache; a row's bits depend on which of the two it is, and on nothing
    beside it.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * dim], not yet rotated; dim a multiple of 16.
        caches: K and V, [sequences, kv_heads, max_length, dim] each, of qkv's dtype; max_length a
            multiple of 16. Written. On the CPU, K is in an order of its own.
        rotary: cos and sin, float32 [positions, dim / 2] (rotate-half; Su et al., "RoFormer").
        sequences: int64 [tokens], the cache's sequence of each token.
        positions: int64 [tokens].
        heads: (query heads of this rank, global index of the first, query heads per KV head in the
            whole model). The rank's KV heads are those its query heads read.
        norms: RMSNorm weights [dim] for the heads of Q and K before rotation (Qwen3), or None.
        eps: of these norms.
        span: of a decoding step on a GPU, a number that no position reaches, as small as is known;
            None: a prefill. The CPU makes no difference.
        backend: ``"auto"``, ``"cpu"`` or ``"triton"`` (on a GPU).

    Returns:
        [tokens, heads * dim].

    Raises:
        ValueError: shapes that do not fit; on the CPU, a position or sequence outside the cache. On
            a GPU these are not looked at.

    Example:
        >>> y = attention(qkv, (k, v), (cos, sin), sequences, positions, (9, 0, 3))
    """
    run = OP.select(backend, None, qkv)
    return run(qkv, caches, rotary, sequences, positions, heads, norms, eps, span)
