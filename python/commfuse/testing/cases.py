"""The sizes at which every op is tested and measured: one list for tests and benchmarks.

Dimensions: ``m`` rows (tokens), ``n`` output features, ``k`` input features of each rank,
``vocabulary`` entries of all ranks together. What the numbers mean for an op, and how inputs of
these sizes are made, is in :mod:`commfuse.testing.adapters`.
"""

from __future__ import annotations

from dataclasses import dataclass

from commfuse.errors import UsageError

QUICK, MORE, EDGE = "quick", "more", "edge"


@dataclass(frozen=True)
class Case:
    """One size of one op.

    Attributes:
        op: its name.
        dimensions: (name, length) pairs.
        options: arguments that are given besides the required ones: ``bias``, ``residual``,
            ``norm``, ``gate_up``, ``logs``, ``distributions``; or ``in_place``, ``sampled``,
            ``truncated``.
        kind: ``quick``: measured by default; ``more``: measured on request; ``edge``: only tested.
    """

    op: str
    dimensions: tuple[tuple[str, int], ...]
    options: tuple[str, ...] = ()
    kind: str = MORE

    def __getitem__(self, dimension: str) -> int:
        return dict(self.dimensions)[dimension]

    @property
    def shape(self) -> dict[str, int | bool]:
        """Dimensions and options, as they stand in a row of results."""
        return {**dict(self.dimensions), **dict.fromkeys(self.options, True)}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={length}" for name, length in self.dimensions)
        return " ".join([sizes, *(f"+{option}" for option in self.options)])


def _cases(op: str, kind: str, *sizes: dict[str, int], options: tuple[str, ...] = ()):
    return tuple(Case(op, tuple(size.items()), options, kind) for size in sizes)


def _mn(*pairs: tuple[int, int]) -> list[dict[str, int]]:
    return [{"m": m, "n": n} for m, n in pairs]


def _mkn(*triples: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"m": m, "k": k, "n": n} for m, k, n in triples]


def _attention(*pairs: tuple[int, int]) -> list[dict[str, int]]:
    heads = {"heads": 9, "kv_heads": 3, "head_dim": 64}  # SmolLM2-135M
    return [{"m": m, "context": context, **heads} for m, context in pairs]


def _block(
    tokens: tuple[int, ...], hidden: int, heads: int, kv_heads: int, head_dim: int, features: int
) -> list[dict[str, int]]:
    sizes = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return [{"m": m, **sizes, "features": features} for m in tokens]


def _sampled(op: str, options: tuple[str, ...]):
    batches = (1, 8)
    if op == "verify_chain":
        quick = [{"batch": b, "drafts": 4, "vocabulary": 49152} for b in batches]
        edges = ((0, 2, 256), (1, 0, 256), (1, 1, 129), (6, 3, 300))
        edge = [dict(zip(("batch", "drafts", "vocabulary"), e, strict=True)) for e in edges]
    else:
        quick = [{"m": b, "vocabulary": 49152} for b in batches]
        edge = [{"m": m, "vocabulary": v} for m, v in ((0, 256), (1, 1), (3, 129), (20, 1000))]
    return _cases(op, QUICK, *quick, options=options) + _cases(op, EDGE, *edge, options=options)


# The down projection of SmolLM2-135M on one rank, and one of a 7B model's half-blocks on two.
_ROW_PARALLEL = [(m, k, n) for k, n in ((2048, 4096), (1536, 576)) for m in (1, 4, 16, 64)]
# One off a multiple of 16, of 2 (bfloat16 pairs) and of the GEMM's six rows and its slices.
_ODD_GEMMS = [(0, 32, 48), (1, 1, 1), (2, 17, 15), (5, 33, 17), (6, 64, 33), (7, 31, 577)]

CASES: tuple[Case, ...] = (
    # 8 KB, 64 KB, 256 KB and 1 MB of a two-byte type.
    *_cases("all_reduce", QUICK, *_mn((1, 4096), (8, 4096), (32, 4096), (128, 4096))),
    *_cases("all_reduce", MORE, *_mn((1, 576), (16, 576), (64, 4096), (512, 4096), (2048, 4096))),
    *_cases("all_reduce", EDGE, *_mn((0, 64), (1, 1), (1, 15), (1, 17), (3, 5), (1, 2047))),
    # Above the four MiB that one call over shared memory carries.
    *_cases("all_reduce", EDGE, {"m": 3, "n": 1_400_001}),
    *_cases("all_reduce", MORE, *_mn((1, 4096), (128, 4096), (2048, 4096)), options=("in_place",)),
    *_cases("all_reduce", EDGE, *_mn((0, 64), (1, 1), (3, 5), (9, 8191)), options=("in_place",)),
    # As many bytes of each rank's part.
    *_cases("reduce_scatter", QUICK, *_mn((1, 4096), (8, 4096), (32, 4096), (128, 4096))),
    *_cases("reduce_scatter", MORE, *_mn((1, 576), (16, 576), (512, 4096))),
    *_cases("reduce_scatter", EDGE, *_mn((0, 64), (1, 1), (1, 15), (1, 17), (3, 5), (1, 8191))),
    *_cases("reduce_scatter", EDGE, {"m": 1, "n": 1_050_001}),
    *_cases("all_gather", QUICK, *_mn((1, 4096), (8, 4096), (32, 4096), (128, 4096))),
    *_cases("all_gather", MORE, *_mn((1, 576), (16, 576), (512, 4096))),
    *_cases("all_gather", EDGE, *_mn((0, 64), (1, 1), (1, 15), (1, 17), (3, 5), (1, 8191))),
    *_cases("all_gather", EDGE, {"m": 3, "n": 700_001}),
    *_cases("all_reduce_rms_norm", QUICK, *_mn((1, 4096), (16, 4096)), options=("residual",)),
    *_cases(
        "all_reduce_rms_norm", MORE, *_mn((1, 576), (4, 576), (64, 4096)), options=("residual",)
    ),
    *_cases("all_reduce_rms_norm", EDGE, *_mn((0, 64), (1, 1), (3, 17), (5, 31))),
    *_cases("all_reduce_rms_norm", EDGE, *_mn((0, 64), (3, 17)), options=("residual",)),
    *_cases("matmul", QUICK, *_mkn(*_ROW_PARALLEL)),
    *_cases("matmul", MORE, *_mkn((1, 576, 1536), (6, 576, 1536), (1, 576, 24576))),
    *_cases("matmul", MORE, *_mkn((1, 576, 1536), (6, 576, 1536)), options=("gate_up",)),
    *_cases("matmul", EDGE, *_mkn(*_ODD_GEMMS)),
    *_cases("matmul", EDGE, *_mkn(*_ODD_GEMMS), options=("bias",)),
    *_cases("matmul", EDGE, *_mkn((0, 32, 48), (5, 33, 17), (7, 31, 577)), options=("gate_up",)),
    *_cases("matmul_all_reduce", QUICK, *_mkn(*_ROW_PARALLEL)),
    *_cases(
        "matmul_all_reduce",
        MORE,
        *_mkn(*(size for size in _ROW_PARALLEL if size[0] in (1, 16)), (6, 768, 576)),
        options=("residual", "norm"),
    ),
    *_cases("matmul_all_reduce", MORE, *_mkn((256, 2048, 4096), (512, 1536, 576))),
    *_cases("matmul_all_reduce", EDGE, *_mkn(*_ODD_GEMMS)),
    *_cases("matmul_all_reduce", EDGE, *_mkn(*_ODD_GEMMS), options=("bias", "residual")),
    *_cases("matmul_all_reduce", EDGE, *_mkn(*_ODD_GEMMS), options=("bias", "residual", "norm")),
    *_cases("attention", QUICK, *_attention((1, 128), (1, 1024), (6, 1024))),
    *_cases("attention", MORE, *_attention((1, 4096), (64, 512))),
    *_cases("attention", EDGE, *_attention((1, 0), (5, 0), (7, 17))),
    *_cases("transformer_blocks", QUICK, *_block((1, 6), 576, 9, 3, 64, 1536)),
    *_cases("transformer_blocks", EDGE, *_block((0, 1, 7), 48, 5, 5, 16, 33)),
    *_cases("transformer_blocks", EDGE, *_block((5,), 80, 8, 2, 32, 100)),
    *_cases(
        "vocab_parallel_argmax",
        QUICK,
        *({"m": m, "vocabulary": size} for m, size in ((1, 49152), (8, 49152), (1, 128256))),
    ),
    *_cases(
        "vocab_parallel_argmax",
        EDGE,
        *({"m": m, "vocabulary": size} for m, size in ((1, 1), (3, 129), (5, 300), (0, 256))),
    ),
    *_cases(
        "vocab_parallel_embedding",
        QUICK,
        *({"m": m, "vocabulary": 49152, "n": 576} for m in (1, 6)),
        options=("norm",),
    ),
    *_cases(
        "vocab_parallel_embedding",
        EDGE,
        *(
            {"m": m, "vocabulary": size, "n": n}
            for m, size, n in ((0, 256, 32), (1, 1, 1), (7, 300, 33))
        ),
    ),
    *(
        case
        for options in ((), ("sampled",), ("sampled", "truncated"), ("sampled", "logs"))
        for case in _sampled("vocab_parallel_sample", options)
    ),
    *(
        case
        for options in (
            (),
            ("sampled",),
            ("sampled", "truncated"),
            ("sampled", "distributions"),
            ("sampled", "truncated", "distributions", "logs"),
        )
        for case in _sampled("verify_chain", options)
    ),
)


def cases_of(op: str, kinds: tuple[str, ...] = (QUICK,)) -> list[Case]:
    """The cases of an op, in the order of this file.

    Raises:
        UsageError: the op has no cases; the message lists those that have.

    Example:
        >>> [str(case) for case in cases_of("verify_chain")]
        ['batch=1 drafts=4 vocabulary=49152', 'batch=8 drafts=4 vocabulary=49152', ...]
    """
    ops = list(dict.fromkeys(case.op for case in CASES))
    if op not in ops:
        raise UsageError(f"unknown op {op!r}: use one of {', '.join(ops)}")
    return [case for case in CASES if case.op == op and case.kind in kinds]
