"""In one process: the CPU kernels of one instruction set (COMMFUSE_CPU_ISA)."""

import torch

from commfuse import _extension, ops
from commfuse.ops.attention import reference as attention_reference
from commfuse.runtime.communicator import Communicator
from commfuse.testing.numerics import digest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROW = (torch.bfloat16, torch.float16)


def run() -> dict:
    """The instruction set that runs, and the failures of each kind."""
    return {
        "isa": _extension.require().cpu_isa(),
        "sums": _rounded_sums(),
        "products": _rounded_products(),
        "rows": _rows_of_matmul() + _rows_of_gate_up(),
        "threads": _threads(),
        "attention": _attention(),
        "argmax": _argmax(),
    }


def _every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


def _wrong(ours: torch.Tensor, exact: torch.Tensor, flushed: torch.Tensor) -> int:
    """How many results are not ``exact`` (float32) rounded to nearest even, as torch rounds.

    flushed: where an instruction may have taken or made zero of a subnormal number.
    """
    expected = exact.to(ours.dtype)
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    return int((~same & ~flushed).sum())


def _flushes(dtype: torch.dtype) -> bool:
    """Instructions for bfloat16 have no subnormal numbers (Intel SDM, VDPBF16PS, TDPBF16PS)."""
    isa = _extension.require().cpu_isa()
    return dtype == torch.bfloat16 and isa in ("avx512_bf16", "avx512_fma", "amx")


def _rounded_sums() -> list[str]:
    """x + residual in float32, rounded: every x, with addends that make ties, NaN and overflow."""
    failures = []
    comm = Communicator()
    for dtype in NARROW:
        x = _every_value(dtype)
        generator = torch.Generator().manual_seed(0)
        bits = torch.finfo(dtype).eps
        addends = [x * 0, x, -x, x * bits, x * (bits / 2), -x * (bits / 4)]
        addends += [x[torch.randperm(len(x), generator=generator)] for _ in range(8)]
        for index, addend in enumerate(addends):
            addend = addend.to(dtype)
            weight = torch.ones(256, dtype=dtype)
            shape = (-1, 256)
            _, total = ops.all_reduce_rms_norm(
                x.view(shape), addend.view(shape), weight, 1e-5, comm, "cpu"
            )
            exact = x.float() + addend.float()
            small = exact.abs() < torch.finfo(dtype).smallest_normal
            flushed = small & (total.flatten() == 0) if _flushes(dtype) else small & False
            if wrong := _wrong(total.flatten(), exact, flushed):
                failures.append(f"{dtype}, addend {index}: {wrong} of {len(x)}")
    comm.close()
    return failures


def _rounded_products() -> list[str]:
    """Outer products: exact in float32, so that every rounding shows."""
    failures = []
    for dtype in NARROW:
        values = _every_value(dtype)
        pick = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
        special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0]).to(dtype)
        x = torch.cat((values[pick[:300]], special))
        w = torch.cat((values[pick[300:600]], special))
        exact = x.float()[:, None] * w.float()[None]
        ours = ops.matmul(x[:, None].contiguous(), ops.pack_weight(w[:, None].contiguous()))
        flushed = torch.zeros_like(exact, dtype=torch.bool)
        if _flushes(dtype):
            normal = torch.finfo(dtype).smallest_normal
            for small in (x.abs()[:, None] < normal, w.abs()[None] < normal, exact.abs() < normal):
                flushed |= small
        if wrong := _wrong(ours, exact, flushed):
            failures.append(f"{dtype}: {wrong} of {exact.numel()}")
    return failures


def _rows_of_matmul() -> list[str]:
    """A row's bits do not depend on the rows beside it."""
    failures = []
    for dtype in DTYPES:
        # Around what the variants unroll: 32 k and 16 outputs of a tile, panels of 64 outputs.
        sizes = ((1, 1), (77, 129), (130, 64), (16, 4097), (65, 31), (64, 32), (33, 33), (100, 576))
        for n, k in sizes:
            generator = torch.Generator().manual_seed(n)
            rows = 300 if n == 77 else 100  # more than share a pass over the weights
            x = torch.randn(rows, k, generator=generator).to(dtype)
            # Products down to subnormal numbers, which some instructions take for zero.
            x[::7] *= torch.finfo(dtype).tiny ** 0.5
            w = torch.randn(n, k, generator=generator).to(dtype)
            w[::5] *= torch.finfo(dtype).tiny ** 0.5
            w = ops.pack_weight(w)
            bias = torch.randn(n, generator=generator).to(dtype)
            for float32_out in (False, True):
                whole = ops.matmul(x, w, bias, float32_out=float32_out)
                for m in (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 33, 64):
                    for begin in (0, rows - m):
                        part = ops.matmul(x[begin : begin + m], w, bias, float32_out=float32_out)
                        if digest(part) != digest(whole[begin : begin + m]):
                            failures.append(f"{dtype} n={n} k={k} m={m} {float32_out}")
    return failures


def _rows_of_gate_up() -> list[str]:
    """silu(gate) up with biases: against float64, and independent of the batch."""
    failures = []
    for dtype in DTYPES:
        for features, k in ((1, 3), (16, 32), (33, 65)):
            generator = torch.Generator().manual_seed(features)

            def random(*shape, generator=generator, dtype=dtype):
                return torch.randn(shape, generator=generator).to(dtype)

            x, gate, up = random(13, k), random(features, k), random(features, k)
            biases = random(features, 1), random(features, 1)
            w, bias = ops.pack_gate_up(gate, up), ops.pack_gate_up(*biases).unpack().flatten()
            whole = ops.matmul(x, w, bias)
            a, b = ((x.double() @ half.double().T) + bias.double().T
                    for half, bias in zip((gate, up), biases, strict=True))  # fmt: skip
            exact = a * a.sigmoid() * b
            # One rounding of the result, a few of float32 inside.
            allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * k * (1 + exact.abs().max())
            if ((whole.double() - exact).abs() > allowed).any():
                failures.append(f"gate_up {dtype} {features} features: wrong")
            for m in (1, 4, 5, 7):
                if digest(ops.matmul(x[-m:], w, bias)) != digest(whole[-m:]):
                    failures.append(f"gate_up {dtype} {features} features, {m} rows")
    return failures


def _threads() -> list[str]:
    """The same bits on any number of threads."""
    failures = []
    for dtype in DTYPES:
        x, w = torch.randn(7, 256).to(dtype), ops.pack_weight(torch.randn(2000, 256).to(dtype))
        one = ops.matmul(x, w)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            if digest(ops.matmul(x, w)) != digest(one):
                failures.append(f"{dtype}, {threads} threads")
        torch.set_num_threads(1)
    return failures


class _Sequences:
    """Random q, k, v of some sequences, 9 query heads that share 3 KV heads in threes."""

    heads, kv_heads, dim = 9, 3, 32
    lengths = (1, 16, 37)

    def __init__(self, dtype: torch.dtype, norms: bool):
        generator = torch.Generator().manual_seed(5)
        columns = (self.heads + 2 * self.kv_heads) * self.dim
        self.dtype = dtype
        self.qkv = [torch.randn(n, columns, generator=generator).to(dtype) for n in self.lengths]
        angles = torch.randn(48, self.dim // 2, generator=generator) * 3
        self.rotary = angles.cos(), angles.sin()
        weights = [torch.rand(self.dim, generator=generator).to(dtype) + 1 for _ in range(2)]
        self.norms = tuple(weights) if norms else (None, None)

    def caches(self, kv_heads: int | None = None):
        """Filled with NaN: what has not been written must not be read."""
        shape = (len(self.lengths), kv_heads or self.kv_heads, 48, self.dim)
        return tuple(torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2))

    def attend(self, caches, runs, heads=None, qkv=None):
        """runs: (sequence, begin, end); tokens of all come in one call."""
        rows = [(s, p) for s, begin, end in runs for p in range(begin, end)]
        source = qkv or self.qkv
        return ops.attention(
            torch.stack([source[s][p] for s, p in rows]),
            caches,
            self.rotary,
            torch.tensor([s for s, _ in rows]),
            torch.tensor([p for _, p in rows]),
            heads or (self.heads, 0, 3),
            self.norms,
            1e-5,
        )

    def exact(self, sequence: int) -> torch.Tensor:
        sizes = [count * self.dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (x.unflatten(1, (-1, self.dim)).double()
                   for x in self.qkv[sequence].split(sizes, dim=1))  # fmt: skip

        def normalise(x, weight):
            if weight is None:
                return x
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

        length = self.lengths[sequence]
        return attention_reference(
            normalise(q, self.norms[0]), normalise(k, self.norms[1]), v,
            *(table[:length] for table in self.rotary), [head // 3 for head in range(self.heads)],
        )  # fmt: skip


def _attention() -> list[str]:
    failures = []
    for dtype in DTYPES:
        for norms in (False, True):
            name = f"{dtype}, norms {norms}"
            made = _Sequences(dtype, norms)
            runs = [(s, 0, n) for s, n in enumerate(made.lengths)]
            whole = made.attend(made.caches(), runs)
            parts = whole.split(list(made.lengths))
            for sequence, part in enumerate(parts):
                # q, k and the result are rounded to the dtype: a few units in the last place.
                allowed = 6 * torch.finfo(dtype).eps * made.exact(sequence).abs().max()
                if not (part.double() - made.exact(sequence)).abs().max() <= allowed:
                    failures.append(f"{name}: sequence {sequence} is wrong")

            # Token by token, in other orders and company.
            caches = made.caches()
            alone = [made.attend(caches, [(2, p, p + 1)]) for p in range(37)]
            if digest(torch.cat(alone)) != digest(parts[2]):
                failures.append(f"{name}: token by token")
            caches = made.caches()
            made.attend(caches, [(2, 0, 20), (1, 0, 3)])
            mixed = made.attend(caches, [(1, 3, 16), (2, 20, 37), (0, 0, 1)])
            expected = torch.cat((parts[1][3:], parts[2][20:], parts[0]))
            if digest(mixed) != digest(expected):
                failures.append(f"{name}: in pieces")

            # Rejected drafts are overwritten.
            caches = made.caches()
            made.attend(caches, [(2, 0, 30)])
            made.attend(caches, [(2, 30, 37)], qkv=[-qkv for qkv in made.qkv])
            again = made.attend(caches, [(2, 30, 37)])
            if digest(again) != digest(parts[2][30:]):
                failures.append(f"{name}: rolled back")

            failures += [f"{name}: {text}" for text in _head_shards(made, whole)]
    return failures


def _head_shards(made: _Sequences, whole: torch.Tensor) -> list[str]:
    """Ranks that hold 5 and 4 of 9 heads; the middle KV head is on both."""
    failures = []
    runs = [(s, 0, n) for s, n in enumerate(made.lengths)]
    for begin, end, kv_begin, kv_end in ((0, 5, 0, 2), (5, 9, 1, 3), (4, 5, 1, 2)):
        dim = made.dim
        columns = [slice(begin * dim, end * dim)]
        for first in (made.heads, made.heads + made.kv_heads):
            columns.append(slice((first + kv_begin) * dim, (first + kv_end) * dim))
        qkv = [torch.cat([x[:, part] for part in columns], dim=1) for x in made.qkv]
        caches = made.caches(kv_end - kv_begin)
        out = made.attend(caches, runs, (end - begin, begin, 3), qkv)
        if digest(out) != digest(whole[:, begin * dim : end * dim]):
            failures.append(f"heads {begin} to {end}")
    return failures


def _argmax() -> list[str]:
    """Sizes around the vector's, the first among equals, extremes, NaN in any place."""
    failures = []
    comm = Communicator()
    for dtype in DTYPES:
        for n in (1, 2, 15, 16, 17, 31, 32, 33, 47, 129):
            rows = torch.full((n, n), -3.0, dtype=dtype)
            rows.fill_diagonal_(2.0)
            rows[:, -1] = 2.0  # a tie, but in the last row
            if ops.vocab_parallel_argmax(rows, 7, comm).tolist() != list(range(7, 7 + n)):
                failures.append(f"{dtype} {n}: the first of two")
            zeros = torch.zeros(1, n, dtype=dtype)
            zeros[0, n // 2 :] = -0.0
            if ops.vocab_parallel_argmax(zeros, 0, comm).tolist() != [0]:
                failures.append(f"{dtype} {n}: 0 and -0 are equal")
            lowest = torch.full((1, n), torch.finfo(dtype).min, dtype=dtype)
            if ops.vocab_parallel_argmax(lowest, 0, comm).tolist() != [0]:
                failures.append(f"{dtype} {n}: the lowest finite numbers")
            for place in range(n):
                row = torch.zeros(1, n, dtype=dtype)
                row[0, place] = torch.nan
                try:
                    ops.vocab_parallel_argmax(row, 0, comm)
                    failures.append(f"{dtype} {n}: NaN at {place}")
                except RuntimeError:
                    pass
    comm.close()
    return failures


def chosen() -> str:
    """The instruction set that runs."""
    return _extension.require().cpu_isa()
