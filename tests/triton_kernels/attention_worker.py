"""In Triton's interpreter: the kernels of a block that no rank waits in, against float64."""

from contextlib import contextmanager
from unittest import mock

import torch
from triton.runtime import interpreter

from commfuse import ops
from commfuse.errors import CommfuseError
from commfuse.ops.attention import reference
from commfuse.testing.numerics import digest
from commfuse.triton_kernels import attention as module
from commfuse.triton_kernels import silu_mul

EPS = 1e-5


class Sequences:
    """Random q, k and v of some sequences, over a cache of NaN: what was not written is not read.

    Args:
        heads: query heads, KV heads.
    """

    def __init__(self, dtype, heads, dim, lengths, norms):
        generator = torch.Generator().manual_seed(7)
        (self.heads, self.kv_heads), self.dim, self.lengths = heads, dim, lengths
        self.dtype, self.group = dtype, heads[0] // heads[1]
        columns = (heads[0] + 2 * heads[1]) * dim
        self.qkv = [torch.randn(n, columns, generator=generator).to(dtype) for n in lengths]
        self.max_length = -(-max(lengths) // 16) * 16
        angles = torch.randn(self.max_length, dim // 2, generator=generator) * 3
        self.rotary = angles.cos(), angles.sin()
        weights = [torch.rand(dim, generator=generator).to(dtype) + 1 for _ in range(2)]
        self.norms = tuple(weights) if norms else (None, None)

    def caches(self, kv_heads=None):
        shape = (len(self.lengths), kv_heads or self.kv_heads, self.max_length, self.dim)
        return tuple(torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2))

    def attend(self, caches, runs, span=None, heads=None, columns=None):
        """runs: (sequence, begin, end); tokens of all come in one call."""
        rows = [(s, p) for s, begin, end in runs for p in range(begin, end)]
        qkv = torch.stack([self.qkv[s][p] for s, p in rows])
        return ops.attention(
            qkv if columns is None else qkv[:, columns].contiguous(),
            caches,
            self.rotary,
            torch.tensor([s for s, _ in rows]),
            torch.tensor([p for _, p in rows]),
            heads or (self.heads, 0, self.group),
            self.norms,
            EPS,
            span=span,
            backend="triton",
        )

    def exact(self, sequence):
        sizes = [count * self.dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            x.unflatten(1, (-1, self.dim)).double() for x in self.qkv[sequence].split(sizes, dim=1)
        )
        if self.norms[0] is not None:
            q, k = (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
                for x, weight in zip((q, k), self.norms, strict=True)
            )
        tables = (table[: len(q)] for table in self.rotary)
        return reference(q, k, v, *tables, [h // self.group for h in range(self.heads)])

    def allowed(self, sequence):
        """q, k, weights and the result are rounded to the dtype: units in the last place."""
        return 8 * torch.finfo(self.dtype).eps * self.exact(sequence).abs().max()


def prefill() -> list[str]:
    """Whole, cut anywhere, and several sequences in the rows of one block."""
    failures = []
    for dtype, heads, dim, norms in (
        (torch.bfloat16, (4, 1), 32, False),
        (torch.float32, (3, 1), 48, True),
    ):
        name = f"{dtype}, heads {heads} of {dim}"
        made = Sequences(dtype, heads, dim, (1, 4, 18), norms)
        runs = [(s, 0, n) for s, n in enumerate(made.lengths)]
        whole = made.attend(made.caches(), runs)
        parts = whole.split(list(made.lengths))
        for sequence, part in enumerate(parts):
            error = (part.double() - made.exact(sequence)).abs().max()
            if not error <= made.allowed(sequence):
                failures.append(f"{name}: sequence {sequence} errs by {error:.2g}")
        caches = made.caches()
        made.attend(caches, [(2, 0, 9), (1, 0, 3)])
        mixed = made.attend(caches, [(2, 9, 18), (1, 3, 4), (0, 0, 1)])
        if digest(mixed) != digest(torch.cat((parts[2][9:], parts[1][3:], parts[0]))):
            failures.append(f"{name}: cut elsewhere, other bits")
    return failures


def decoding() -> list[str]:
    """Rows over parts of their keys, alone and in company, behind rejected drafts."""
    failures = []
    made = Sequences(torch.bfloat16, (2, 1), 16, (2, module.PART + 6), False)
    caches, last = made.caches(), made.lengths[1]
    made.attend(caches, [(0, 0, 1), (1, 0, last - 3)])
    step = [(1, last - 3, last), (0, 1, 2)]
    together = made.attend(caches, step, span=last)
    places = [*((1, position) for position in range(last - 3, last)), (0, 1)]
    for out, (sequence, position) in zip(together, places, strict=True):
        error = (out.double() - made.exact(sequence)[position]).abs().max()
        if not error <= made.allowed(sequence):
            failures.append(f"sequence {sequence} errs by {error:.2g} at {position}")
    # The same positions again, one after the other, over a larger grid.
    alone = [made.attend(caches, [(1, p, p + 1)], span=4 * last) for p in range(last - 3, last)]
    if digest(torch.cat(alone)) != digest(together[:3]):
        failures.append("a row's bits depend on its company")
    # Nothing behind the prompt, instead of what was there before.
    for cache in caches:
        cache[:, :, last - 3 :] = torch.nan
    if digest(made.attend(caches, step[:1], span=last)) != digest(together[:3]):
        failures.append("what lies behind the positions in use is read")
    # The most parts, more than are joined in one step, and behind them parts twice as long.
    most = module.MOST_PARTS * module.PART
    made = Sequences(torch.float32, (1, 1), 16, (most + 1,), False)
    caches = made.caches()
    made.attend(caches, [(0, 0, most - 1)])
    rows = made.attend(caches, [(0, most - 1, most + 1)], span=most + 1)
    if not (rows.double() - made.exact(0)[-2:]).abs().max() <= made.allowed(0):
        failures.append("many parts are joined wrongly")
    alone = made.attend(caches, [(0, most - 1, most)], span=most)
    if digest(alone) != digest(rows[:1]):
        failures.append("the parts of a row depend on its company")
    if module.most_parts(1000 * most) != module.MOST_PARTS:
        failures.append("memory for parts grows with the span")
    return failures


def head_shards() -> list[str]:
    """Ranks that hold 5 and 4 of 9 heads; the middle KV head is on both."""
    failures = []
    made = Sequences(torch.float32, (9, 3), 16, (3,), False)
    runs, dim = [(0, 0, 3)], 16
    for span in (None, 3):
        whole = made.attend(made.caches(), runs, span)
        for begin, end, kv_begin, kv_end in ((0, 5, 0, 2), (4, 5, 1, 2)):
            picked = [*range(begin, end)]
            for first in (9, 12):
                picked += range(first + kv_begin, first + kv_end)
            columns = torch.cat([torch.arange(h * dim, (h + 1) * dim) for h in picked])
            heads = (end - begin, begin, 3)
            shard = made.attend(made.caches(kv_end - kv_begin), runs, span, heads, columns)
            if digest(shard) != digest(whole[:, begin * dim : end * dim].contiguous()):
                failures.append(f"heads {begin} to {end - 1}, span {span}")
    return failures


def gated() -> list[str]:
    """silu(gate) · up behind the GEMM, over more than one block."""
    failures, silu_mul.BLOCK = [], 32
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = (torch.randn(3, 100, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
        gate, up = x.double().chunk(2, dim=1)
        exact = torch.nn.functional.silu(gate) * up
        error = (silu_mul.silu_mul(x).double() - exact).abs()
        if not (error <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all():
            failures.append(f"{dtype}: {error.max():.2g}")
    return failures


def devices() -> list[str]:
    """Kernels start on the device of their tensors, whatever the current one is."""
    current, launched = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def launch(executor, *arguments, **options):
        launched.append((executor.fn.__name__, bool(current)))

    made = Sequences(torch.float32, (1, 1), 16, (2,), False)
    with (
        mock.patch.object(torch.cuda, "device_of", device_of),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        made.attend(made.caches(), [(0, 0, 2)])
        made.attend(made.caches(), [(0, 0, 1)], span=1)
        silu_mul.silu_mul(torch.zeros(1, 2))
    names = ("append", "prefill", "append", "decode", "join", "silu_mul")
    expected = [(f"{name}_kernel", True) for name in names]
    return [] if launched == expected else [f"launched: {launched}"]


def errors() -> list[str]:
    """Messages of calls that do not fit."""
    made, found = Sequences(torch.float32, (4, 2), 16, (2,), False), []
    for heads, kv_heads in (((4, 0, 2), 1), ((0, 0, 1), 2), ((3, 0, 2), 2)):
        try:
            made.attend(made.caches(kv_heads), [(0, 0, 1)], heads=heads)
            found.append("")
        except CommfuseError as error:
            found.append(str(error))
    return found


CHECKS = (prefill, decoding, head_shards, gated, devices, errors)


def run() -> dict[str, list[str]]:
    # Small, since the interpreter is slow; the loops still go round more than once.
    module.PART, module.MOST_PARTS, module.PARTS_AT_ONCE, module.PREFILL_ROWS = 32, 3, 2, 16
    module.keys_at_once = lambda dtype: 16
    return {check.__name__: check() for check in CHECKS}
