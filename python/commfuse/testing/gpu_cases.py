"""The sizes at which ops are measured on GPUs; dimensions and options as in ``cases.py``.

Row-parallel layers are those of a model: their K is divided by the number of ranks.
"""

from __future__ import annotations

from commfuse.errors import UsageError
from commfuse.testing.cases import MORE, QUICK, Case

HIDDEN = 8192  # of a model of 70 billion parameters
K_TOTALS = (8192, 28672)  # its attention output and its down projection
_COLUMNS = 4096  # of a message
_KIB = (8, 32, 64, 256, 1024, 8192, 65536)  # of a two-byte type
_VOCABULARY = 128256  # of Llama 3
_GEMMS = ((1024, 8192), (4096, 8192), (8192, 1280), (8192, 8192), (28672, 8192))  # k, n
_TAIL = ("residual", "norm")


def _row_parallel(
    world_size: int, rows: tuple[int, ...], options: tuple[str, ...] = (), kind: str = QUICK
) -> list[Case]:
    return [
        Case(
            "matmul_all_reduce",
            (("m", m), ("k", total // world_size), ("n", HIDDEN)),
            options,
            kind,
        )
        for total in K_TOTALS
        for m in rows
    ]


# Of verify_chain: the batches that are measured by default, for each way of drawing.
_VERIFIED = {
    ("sampled",): (1, 8, 32, 128),
    (): (1, 32),
    ("sampled", "truncated"): (1, 8, 32),
    ("sampled", "distributions"): (1, 8, 32),
    ("sampled", "logs"): (),
}


def _verified() -> list[Case]:
    """The quick ones first, then every batch with every draft length and vocabulary."""
    sizes = [
        (batch, drafts, vocabulary)
        for vocabulary in (_VOCABULARY, 32000, 151936)
        for drafts in (4, 1, 7)
        for batch in (1, 8, 32, 128)
    ]
    cases = [
        Case(
            "verify_chain",
            tuple(zip(("batch", "drafts", "vocabulary"), size, strict=True)),
            options,
            QUICK if size in [(batch, 4, _VOCABULARY) for batch in batches] else MORE,
        )
        for options, batches in _VERIFIED.items()
        for size in sizes
    ]
    return sorted(cases, key=lambda case: case.kind != QUICK)


def _cases(world_size: int) -> list[Case]:
    def messages(op: str, *kib: int) -> list[Case]:
        return [Case(op, (("m", size // 8), ("n", _COLUMNS)), kind=QUICK) for size in kib]

    return [
        *messages("all_reduce", *_KIB),
        *messages("reduce_scatter", 8, 64, 1024, 8192),  # what each rank gets
        *messages("all_gather", 8, 64, 1024, 8192),  # what each rank gives
        *(
            Case("all_reduce_rms_norm", (("m", m), ("n", HIDDEN)), ("residual",), QUICK)
            for m in (1, 4, 16, 64, 128)
        ),
        *(
            Case("matmul", (("m", m), ("k", k), ("n", n)), kind=QUICK)
            for k, n in _GEMMS
            for m in (1, 8, 16, 32, 64)
        ),
        *_verified(),
        *(
            Case(op, (("m", m), ("vocabulary", _VOCABULARY)), options, QUICK if m == 8 else MORE)
            for op, options in (
                ("vocab_parallel_sample", ("sampled",)),
                ("vocab_parallel_sample", ("sampled", "truncated")),
                ("vocab_parallel_argmax", ()),
            )
            for m in (1, 8, 128)
        ),
        *_row_parallel(world_size, (1, 8, 32, 64)),
        *_row_parallel(world_size, (1, 32, 64), _TAIL),
        *_row_parallel(world_size, (16,), kind=MORE),
        *_row_parallel(world_size, (8, 16), _TAIL, MORE),
    ]


def gpu_cases_of(op: str, world_size: int, kinds: tuple[str, ...] = (QUICK,)) -> list[Case]:
    """The cases of an op on GPUs.

    Raises:
        UsageError: the op has none; the message lists those that have.

    Example:
        >>> str(gpu_cases_of("matmul_all_reduce", 2)[0])
        'm=1 k=4096 n=8192'
    """
    cases = _cases(world_size)
    ops = list(dict.fromkeys(case.op for case in cases))
    if op not in ops:
        raise UsageError(f"{op} is not measured on GPUs: use one of {', '.join(ops)}")
    return [case for case in cases if case.op == op and case.kind in kinds]
