"""On every rank, with a GPU: the ops against references that are formed here, and what may go wrong
between ranks. A check returns what it has found wrong; each has a communicator of its own.
"""

import importlib.util
import itertools
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench.timing import gather
from commfuse.errors import BackendUnavailable, CommfuseError
from commfuse.ops.matmul_all_reduce import reference as matmul_all_reduce_reference
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import CASES, EDGE, MORE, QUICK
from commfuse.testing.gpu_cases import gpu_cases_of
from commfuse.testing.numerics import digest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows for which matmul_all_reduce sends tiles while it computes: set here, not by the GPU's table.
FUSED, UNFUSED = (1, 64), (1, 0)
ON_GPU = (
    "all_reduce",
    "all_reduce_rms_norm",
    "matmul",
    "matmul_all_reduce",
    "reduce_scatter",
    "all_gather",
)
# GEMMs need whole 16-byte vectors and at most 64 rows; Triton's fused kernels exchange one slot.
MAY_REFUSE = {
    "auto": (),
    "cuda": ("matmul", "matmul_all_reduce"),
    "triton": ("all_reduce_rms_norm", "matmul_all_reduce"),
}
EPS = 1e-5
MILLISECOND = 1_800_000  # cycles of an H100
OPS = torch.ops.commfuse
Raised = tuple[str, str, float]  # class, message, seconds
Found = list[str]


def _load_judge():
    path = Path(__file__).with_name("corridor.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Judge()


@contextmanager
def communicator(**options):
    """A communicator that all ranks leave together, so that no failure spoils the next."""
    comm = Communicator(dist.group.WORLD, device=launch.use_gpu(), **options)
    try:
        yield comm
    finally:
        dist.barrier()
        comm.close()
        dist.barrier()


def _generator(comm, *seeds: int) -> torch.Generator:
    seed = 0
    for part in seeds:
        seed = 1009 * seed + part
    return torch.Generator(str(comm.device)).manual_seed(seed)


def integers(comm, shape, dtype, seed: int, rank: int, bound: int = 8) -> torch.Tensor:
    """Small ones of a rank, which every rank can make."""
    source = {"generator": _generator(comm, seed, rank), "device": str(comm.device)}
    return torch.randint(-bound, bound + 1, shape, **source).to(dtype)


def reals(comm, shape, dtype, seed: int, rank: int) -> torch.Tensor:
    """Of very different magnitudes, so that the order of additions shows."""
    source = {"generator": _generator(comm, seed, rank), "device": str(comm.device)}
    scale = torch.exp2(torch.randint(-6, 7, shape, **source).float())
    return (torch.randn(shape, **source) * scale).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """float32 sums, added in rank order, not yet rounded to the parts' dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def differing(digests: dict[str, str], comm) -> Found:
    """The labels of results whose bits are not the same on all ranks."""
    everywhere = gather(digests, comm)
    return [
        f"{label}: the ranks' bits differ"
        for label in digests
        if len({rank[label] for rank in everywhere}) > 1
    ]


def tuple_of(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def backends_of(op: str, dtype: torch.dtype, triton_dtypes) -> list[str]:
    """Our backends of an op. Triton compiles a kernel for a second or two, and another one for
    every dtype, set of options and kind of size: it has fewer dtypes, and a part of the cases.
    """
    known = {backend.name for backend in ops.op(op).backends}
    names = ["auto", *(name for name in ("cuda", "triton") if name in known)]
    return names if dtype in triton_dtypes else [name for name in names if name != "triton"]


def in_turn(triton_dtypes, comm, number: int, period: int) -> set[torch.dtype]:
    """Triton's dtypes for one of many cases: of every ``period``-th, on few ranks; else none."""
    chosen = number % period == 0 and comm.world_size <= 3
    return {torch.bfloat16} & triton_dtypes if chosen else set()


# ---- results -----------------------------------------------------------------------------------


def corridor(comm, triton_dtypes) -> Found:
    """The cases that tests and benchmarks share, against float64."""
    judge, failures, served = _load_judge(), [], dict.fromkeys(ON_GPU, 0)
    cases = [
        case
        for case in CASES
        if case.op in ON_GPU and case.kind == EDGE and "gate_up" not in case.options
    ]
    sizes = list(itertools.product(cases, DTYPES))
    for op in ("all_reduce", "all_reduce_rms_norm", "matmul_all_reduce", "matmul"):
        if op != "matmul" or comm.world_size == 2:  # no communication: once is enough
            larger = gpu_cases_of(op, comm.world_size, (QUICK, MORE))
            sizes += [(case, torch.bfloat16) for case in larger]
    for number, (case, dtype) in enumerate(sizes):
        adapter = adapter_of(case, dtype, comm.world_size, str(comm.device))
        inputs = adapter.inputs(seed=3)
        plain, expected = (
            adapter.share(results, comm.rank)
            for results in (adapter.composition(inputs), adapter.reference(inputs))
        )
        backends = backends_of(case.op, dtype, in_turn(triton_dtypes, comm, number, 5))
        for backend, rows in itertools.product(backends, (FUSED, UNFUSED)):
            if rows == UNFUSED and (backend, case.op) != ("cuda", "matmul_all_reduce"):
                continue
            comm._native.set_fused_rows(*rows)
            label = f"{case.op} {case} {dtype} {backend}, fused rows {rows}"
            try:
                out = adapter.call(adapter.prepare(inputs[comm.rank], backend), comm, backend)
            except BackendUnavailable as error:
                if case.op not in MAY_REFUSE[backend]:
                    failures.append(f"{label} is refused: {error}")
                continue
            served[case.op] += backend == "cuda"
            judge.see(label, f"{case.op} {dtype} {backend}", out, plain, expected)
            if case.op != "matmul" and not adapter.scattered:
                judge.digests[label] = digest(*out)
    failures += [f"{op}: the cuda backend has served nothing" for op in served if not served[op]]
    wrong, digests = judge.verdict()
    return failures + wrong + differing(digests, comm)


# One, odd, around 16-byte vectors and warps, one past a power of two, several calls of a payload.
SIZES = (1, 2, 3, 7, 8, 9, 31, 33, 255, 1023, 4097, 32768, 65537, 524289, 3_000_001)


def sums(comm, triton_dtypes) -> Found:
    """all_reduce: exact on integers, float32 in rank order and rounded once, again the same, at any
    address, in place; inputs are left alone.
    """
    failures, digests, ranks = [], {}, range(comm.world_size)
    for (seed, size), dtype in itertools.product(enumerate(SIZES), DTYPES):
        # On odd ranks inputs do not begin at a multiple of 16 bytes.
        shift = comm.rank % 2
        for backend in backends_of("all_reduce", dtype, triton_dtypes):
            label = f"{size} {dtype} {backend}"
            for kind, make in (("integers", integers), ("reals", reals)):
                parts = [make(comm, (size,), dtype, seed, rank) for rank in ranks]
                expected = sum_in_rank_order(parts).to(dtype)
                mine = torch.empty(size + 1, dtype=dtype, device=str(comm.device))[shift:][:size]
                mine.copy_(parts[comm.rank])
                out = ops.all_reduce(mine, comm, backend)
                if not same_bits(out, expected):
                    failures.append(f"{label}: {kind} are not summed in rank order")
                if not same_bits(mine, parts[comm.rank]):
                    failures.append(f"{label}: {kind}, the input has changed")
                if not same_bits(out, ops.all_reduce(mine, comm, backend)):
                    failures.append(f"{label}: {kind}, other bits the second time")
                for memory in (mine, comm.empty((size,), dtype).copy_(mine)):
                    result = ops.all_reduce_(memory, comm, backend)
                    if result is not memory or not same_bits(memory, expected):
                        failures.append(f"{label}: {kind}, in place")
            digests[label] = digest(out)
    return failures + differing(digests, comm)


def norms(comm, triton_dtypes) -> Found:
    """all_reduce_rms_norm: the sum with its residual is exact to the bit."""
    failures, digests, ranks = [], {}, range(comm.world_size)
    shapes = [(1, 1), (1, 8192), (3, 17), (5, 1023), (32, 8192), (129, 1040), (2, 20000)]
    for (seed, shape), dtype in itertools.product(enumerate(shapes), DTYPES):
        weight = reals(comm, shape[1:], dtype, seed, 90)
        for residual in (None, reals(comm, shape, dtype, seed, 91)):
            parts = [reals(comm, shape, dtype, seed, rank) for rank in ranks]
            total = sum_in_rank_order(parts)
            total = total if residual is None else total + residual.float()
            for backend in backends_of("all_reduce_rms_norm", dtype, triton_dtypes):
                label = f"{shape} {dtype} residual {residual is not None} {backend}"
                out = ops.all_reduce_rms_norm(
                    parts[comm.rank], residual, weight, EPS, comm, backend
                )
                again = ops.all_reduce_rms_norm(
                    parts[comm.rank], residual, weight, EPS, comm, backend
                )
                if not same_bits(out[1], total.to(dtype)):
                    failures.append(f"{label}: the sum is not in rank order")
                if not all(map(same_bits, out, again)):
                    failures.append(f"{label}: other bits the second time")
                digests[label] = digest(*out)
    return failures + differing(digests, comm)


def scattered_and_gathered(comm, triton_dtypes) -> Found:
    """reduce_scatter is all_reduce's slice; all_gather keeps every bit, NaN's too."""
    failures, ranks = [], range(comm.world_size)
    for (seed, columns), dtype in itertools.product(enumerate((1, 7, 4096, 400_001)), DTYPES):
        shape = (2 * comm.world_size, columns)
        parts = [reals(comm, shape, dtype, seed, rank) for rank in ranks]
        total = sum_in_rank_order(parts).to(dtype).chunk(comm.world_size)[comm.rank]
        for backend in ("auto", "cuda"):
            if not same_bits(ops.reduce_scatter(parts[comm.rank], comm, backend), total):
                failures.append(f"reduce_scatter {columns} {dtype} {backend}")
            rows = [part[:3].clone() for part in parts]
            for row in rows:
                row.view(-1)[0] = float("nan")
            if not same_bits(ops.all_gather(rows[comm.rank], comm, backend), torch.cat(rows)):
                failures.append(f"all_gather {columns} {dtype} {backend}")
    return failures


def uneven(comm, triton_dtypes) -> Found:
    """matmul_all_reduce on ranks that hold different parts of K, with all combinations of options;
    and exact where sums are small integers.
    """
    judge, failures, ranks = _load_judge(), [], range(comm.world_size)
    names = ("bias", "residual", "norm_weight")
    choices = itertools.cycle(itertools.product((False, True), repeat=3))
    # (K of rank 0, what each following rank has more): not all multiples of 16 bytes.
    parts_of_k = ((8, 8), (64, 128), (1000, 8), (1, 7), (31, 8), (64, 1))
    sizes = itertools.product((1, 2, 9, 33, 64, 65), (1, 17, 130, 1032), parts_of_k)
    for seed, (m, n, (k, more)) in enumerate(sizes):
        dtype = DTYPES[seed % 3]
        generator = _generator(comm, seed)

        def random(*shape, scale=1.0, generator=generator, dtype=dtype):
            drawn = torch.randn(shape, generator=generator, device=str(comm.device))
            return (drawn * scale).to(dtype)

        ks = [k + more * rank for rank in ranks]
        xs, ws = [random(m, k) for k in ks], [random(n, k, scale=sum(ks) ** -0.5) for k in ks]
        options = {"bias": random(n), "residual": random(m, n), "norm_weight": random(n)}
        # RMSNorm of a single feature only keeps its sign: where that is small, errors explode.
        chosen = {
            name: options[name]
            for name, on in zip(names, next(choices), strict=True)
            if on and not (name == "norm_weight" and n == 1)
        }
        expected = tuple_of(matmul_all_reduce_reference(xs, ws, **chosen, eps=EPS))
        plain = _composition(xs, ws, **chosen)
        whole_vectors = all(k * dtype.itemsize % 16 == 0 for k in ks)
        turn = in_turn(triton_dtypes, comm, seed, 21)
        for backend in backends_of("matmul_all_reduce", dtype, turn):
            if (backend != "auto" and m > 64) or (backend == "cuda" and not whole_vectors):
                continue
            label = f"{backend} {dtype} m={m} n={n} k={ks} {sorted(chosen)}"
            out = tuple_of(
                ops.matmul_all_reduce(
                    xs[comm.rank], ws[comm.rank], comm, **chosen, eps=EPS, backend=backend
                )
            )
            pool = f"{backend} {dtype} {'norm_weight' in chosen}"
            judge.see(label, pool, out, plain, expected)
            judge.digests[label] = digest(*out)
            xi = [integers(comm, (m, k), dtype, seed, rank, 1) for rank, k in enumerate(ks)]
            wi = [integers(comm, (n, k), dtype, seed, 50 + rank, 1) for rank, k in enumerate(ks)]
            if sum(ks) <= 256:  # every partial sum is exact in bfloat16
                exact = sum(x.double() @ w.double().T for x, w in zip(xi, wi, strict=True))
                out = ops.matmul_all_reduce(xi[comm.rank], wi[comm.rank], comm, backend=backend)
                if not torch.equal(out.double(), exact):
                    failures.append(f"{label}: small integers are not exact")
    wrong, digests = judge.verdict()
    return failures + wrong + differing(digests, comm)


def _composition(xs, ws, bias=None, residual=None, norm_weight=None):
    total = F.linear(xs[0], ws[0])
    for x, w in zip(xs[1:], ws[1:], strict=True):
        total = total + F.linear(x, w)
    for addend in (bias, residual):
        total = total if addend is None else total + addend
    if norm_weight is None:
        return (total,)
    return F.rms_norm(total, norm_weight.shape, norm_weight, EPS), total


ROWS = (1, 2, 5, 7, 8, 9, 16, 17, 31, 32, 33, 48, 63, 64)


def batches(comm, triton_dtypes) -> Found:
    """A row's bits do not depend on how many rows there are."""
    failures = []
    for dtype, (n, k) in itertools.product(
        (torch.bfloat16, torch.float16), ((8192, 1024), (1280, 2048), (130, 72), (17, 8))
    ):
        x, residual = reals(comm, (64, k), dtype, 1, comm.rank), reals(comm, (64, n), dtype, 2, 0)
        w, norm = reals(comm, (n, k), dtype, 3, comm.rank), reals(comm, (n,), dtype, 4, 0)

        def fused(rows, backend, x=x, w=w, residual=residual, norm=norm):
            return ops.matmul_all_reduce(
                x[:rows], w, comm, residual=residual[:rows], norm_weight=norm, eps=EPS,
                backend=backend,
            )  # fmt: skip

        calls = {"matmul": lambda rows, x=x, w=w: (ops.matmul(x[:rows], w, backend="cuda"),)}
        whole = {torch.bfloat16} & triton_dtypes if n in (8192, 130) else set()
        for backend in backends_of("matmul_all_reduce", dtype, whole):
            calls[f"matmul_all_reduce {backend}"] = lambda rows, b=backend, f=fused: f(rows, b)
        for name, call in calls.items():
            all_rows = call(64)
            for rows in ROWS:
                if not all(same_bits(a, b[:rows]) for a, b in zip(call(rows), all_rows)):  # noqa: B905
                    failures.append(f"{name} {dtype} n={n} k={k}: {rows} rows have other bits")
    return failures


# ---- graphs ------------------------------------------------------------------------------------


def captured(calls: list[Callable], expected: list, wrong: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph that makes calls and counts in ``wrong`` how many results have unexpected bits."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call, results in zip(calls, expected, strict=True):
            for out, result in zip(tuple_of(call()), results, strict=True):
                wrong += (bits(out) != bits(result)).any()
    return graph


def replays(comm, triton_dtypes) -> Found:
    """8,192 replays of a graph, with eager calls in between and late ranks, give the eager bits."""
    dtype, calls = torch.bfloat16, []
    for seed in range(3):  # inputs change from call to call, or old data would pass
        small = reals(comm, (1, 4096), dtype, seed, comm.rank)
        middle, large = (reals(comm, (rows, 4096), dtype, seed, comm.rank) for rows in (32, 256))
        residual, norm = reals(comm, (4, 4096), dtype, seed, 90), reals(comm, (4096,), dtype, 1, 91)
        x, w = (reals(comm, (rows, 256), dtype, seed, comm.rank) for rows in (4, 4096))
        part = middle[:4].contiguous()
        calls += [
            lambda x=small: ops.all_reduce(x, comm, "cuda"),
            lambda x=middle: ops.all_reduce(x, comm, "cuda"),
            lambda x=part, r=residual, g=norm: ops.all_reduce_rms_norm(x, r, g, EPS, comm, "cuda"),
            lambda x=x, w=w, r=residual, g=norm: ops.matmul_all_reduce(
                x, w, comm, residual=r, norm_weight=g, eps=EPS, backend="cuda"
            ),
        ]
        if seed == 0:
            calls.append(lambda x=large: ops.all_reduce(x, comm, "cuda"))
            if dtype in triton_dtypes:
                calls.append(lambda x=small: ops.all_reduce(x, comm, "triton"))
    expected = [[out.clone() for out in tuple_of(call())] for call in calls]
    wrong = torch.zeros((), dtype=torch.int64, device=str(comm.device))
    graph, eager = captured(calls, expected, wrong), 0
    for number in range(8192):
        if number % 1024 == 0:
            if comm.rank == number // 1024 % comm.world_size:
                torch.cuda._sleep(5 * MILLISECOND)
            eager += not same_bits(tuple_of(calls[0]())[0], expected[0][0])
        graph.replay()
    comm.check()
    found = [f"{wrong.item()} results of 8192 replays are wrong"] if wrong.item() else []
    # The counter counts: with other results expected, it finds that.
    control = captured(calls[:1], [[-out for out in expected[0]]], wrong.zero_())
    control.replay()
    comm.check()
    found += [] if wrong.item() == 1 else ["a wrong result in a graph is not found"]
    return found + ([f"{eager} eager calls between replays are wrong"] if eager else [])


def shapes_in_turn(comm, triton_dtypes) -> Found:
    """GEMMs that cut other numbers of tiles along K, one after the other in one workspace."""
    x = reals(comm, (9, 4096), torch.bfloat16, 1, comm.rank)
    weights = [reals(comm, (64 * n, 4096), torch.bfloat16, n, comm.rank) for n in (7, 1, 40, 3, 20)]
    want = [F.linear(x.double(), w.double()) for w in weights]
    failures = []
    for i in range(4 * len(weights)):
        y = ops.matmul(x, weights[i % 5], backend="cuda")
        error = (y.double() - want[i % 5]).abs().max() / want[i % 5].abs().max()
        if not error < 0.01:
            failures.append(f"call {i}: {len(weights[i % 5])} columns are off by {error:.3g}")
    return failures


def soak(calls: int) -> Found:
    """Small all-reduces, a graph of 1,000 at a time."""
    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode(), communicator() as comm:
        parts = [
            [integers(comm, (4096,), torch.bfloat16, seed, r) for r in range(comm.world_size)]
            for seed in range(8)
        ]
        mine, totals = [part[comm.rank] for part in parts], [sum(part) for part in parts]
        chain = [lambda x=mine[i % 8]: ops.all_reduce(x, comm, "cuda") for i in range(1000)]
        expected = [[totals[i % 8]] for i in range(1000)]
        wrong = torch.zeros((), dtype=torch.int64, device=str(comm.device))
        graph = captured(chain, expected, wrong)
        for _ in range(calls // 1000):
            graph.replay()
        comm.check()
        return [f"{wrong.item()} sums are wrong"] if wrong.item() else []


# ---- ranks that are late -----------------------------------------------------------------------


def _late_calls(comm, exchange, size: int, dtype: torch.dtype) -> int:
    """How many of an exchange's results are wrong, with each rank late in turn."""
    ranks, wrong = range(comm.world_size), 0
    for late in ranks:
        parts = [[integers(comm, (size,), dtype, s, r, 4) for r in ranks] for s in range(6)]
        outs = []
        for step, inputs in enumerate(parts):
            if comm.rank == late and step in (0, 2, 3):
                torch.cuda._sleep(3 * MILLISECOND)
            outs.append(exchange(inputs[comm.rank]))
        for out, inputs in zip(outs, parts, strict=True):
            wrong += not torch.equal(out, sum(inputs[1:], start=inputs[0]))
    return wrong


# Flag-in-data in one shot and in two, and two-shot in bulk.
LATE_BYTES = (4096, 64 << 10, 256 << 10, 2 << 20)


def stragglers(comm, triton_dtypes) -> Found:
    """Exact sums of numbers that change from call to call, with each rank late in turn."""
    failures, dtype = [], torch.bfloat16
    for nbytes in LATE_BYTES:
        size = nbytes // dtype.itemsize
        w = torch.eye(8, dtype=dtype, device=str(comm.device))

        def multiplied(x, w=w):  # by one: matmul_all_reduce of eight columns
            rows = x[: 8 * 64].view(64, 8)
            return ops.matmul_all_reduce(rows, w, comm, backend="cuda").view(-1)

        exchanges = {
            "cuda": lambda x: ops.all_reduce(x, comm, "cuda"),
            "in place": lambda x: ops.all_reduce_(x.clone(), comm, "cuda"),
            "triton": lambda x: ops.all_reduce(x, comm, "triton"),
            "gathered": lambda x: ops.all_gather(x, comm).view(comm.world_size, -1).sum(0),
        }
        if dtype not in triton_dtypes or nbytes > 256 << 10:
            del exchanges["triton"]
        for name, exchange in exchanges.items():
            if wrong := _late_calls(comm, exchange, size, dtype):
                failures.append(f"{name}, {nbytes} bytes: {wrong} results are wrong")
    if wrong := _late_calls(comm, multiplied, 8 * 64, dtype):
        failures.append(f"matmul_all_reduce: {wrong} results are wrong")
    return failures


def control(comm, triton_dtypes) -> Found:
    """An exchange without signals, under the same late ranks: it must be found wrong."""
    areas = [comm.workspace(rank).view(torch.bfloat16) for rank in range(comm.world_size)]

    def exchange(x: torch.Tensor) -> torch.Tensor:
        areas[comm.rank][: x.numel()] = x
        return sum(area[: x.numel()].float() for area in areas).to(x.dtype)

    wrong = sum(gather(_late_calls(comm, exchange, 2048, torch.bfloat16), comm))
    return [] if wrong else ["an exchange without signals passes"]


# ---- registration ------------------------------------------------------------------------------


def opcheck(comm, triton_dtypes) -> Found:
    """Schemas, aliasing and shape-only implementations, on CUDA tensors."""
    failures = []
    for dtype in DTYPES:
        x, w = reals(comm, (4, 64), dtype, 1, comm.rank), reals(comm, (48, 64), dtype, 2, comm.rank)
        row, residual = reals(comm, (48,), dtype, 3, 0), reals(comm, (4, 48), dtype, 4, 0)
        own = residual.clone()
        for op, arguments in (
            (OPS.all_reduce.default, (x, comm.handle)),
            (OPS.all_reduce_.default, (own, comm.handle)),
            (OPS.all_reduce_rms_norm.default, (residual, residual, row, EPS, comm.handle)),
            (OPS.reduce_scatter.default, (reals(comm, (2 * comm.world_size, 3), dtype, 5, 0),
                                          comm.handle)),
            (OPS.all_gather.default, (x, comm.handle)),
            (OPS.matmul_all_reduce.default, (x, w, 48, comm.handle, row, residual)),
            (OPS.matmul_all_reduce.rms_norm, (x, w, 48, comm.handle, None, residual, row, EPS)),
        ):  # fmt: skip
            try:
                torch.library.opcheck(op, arguments)
            except Exception as error:
                failures.append(f"{op} {dtype}: {error}")
    return failures


def compiled(comm, triton_dtypes) -> Found:
    """A block with the ops inside, compiled whole: near the eager numbers, equal everywhere."""
    dtype, handle = torch.bfloat16, comm.handle
    gate, up, down = (
        reals(comm, shape, dtype, seed, comm.rank) * 0.01
        for seed, shape in enumerate(((256, 512), (256, 512), (512, 256)))
    )
    x, residual = reals(comm, (4, 512), dtype, 7, 0), reals(comm, (4, 512), dtype, 8, 0)
    norm = reals(comm, (512,), dtype, 9, 0)

    def block(x, residual):
        features = F.silu(F.linear(x, gate)) * F.linear(x, up)
        y, residual = OPS.matmul_all_reduce.rms_norm(
            features, down, 512, handle, None, residual, norm, EPS
        )
        total = OPS.all_reduce(y * 2, handle)
        OPS.all_reduce_(total, handle)
        return OPS.all_reduce_rms_norm(total, residual, norm, EPS, handle)

    eager = block(x, residual)
    out = torch.compile(block, fullgraph=True)(x, residual)
    comm.check()
    failures = []
    for name, a, b in zip(("y", "residual"), out, eager, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        if not error < 2e-2:
            failures.append(f"{name}: error {error:.3g}")
    return failures + differing({"compiled": digest(*out)}, comm)


# ---- all of these ------------------------------------------------------------------------------

RESULTS = (
    corridor,
    sums,
    norms,
    scattered_and_gathered,
    uneven,
    shapes_in_turn,
    batches,
    replays,
    stragglers,
    control,
)
REGISTRATION = (opcheck, compiled)


def _run(checks, triton_dtypes, **options) -> dict[str, Found]:
    found = {}
    launch.use_gpu()
    with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be captured
        for check in checks:
            begin = time.monotonic()
            try:
                with communicator(**options) as comm:
                    comm._native.set_fused_rows(*FUSED)
                    found[check.__name__] = check(comm, triton_dtypes)
            except Exception:
                found[check.__name__] = [traceback.format_exc()]
            if dist.get_rank() == 0:
                print(f"{check.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return found


def results(triton_dtypes: list[str]) -> dict[str, Found]:
    """What the checks of results have found wrong."""
    with torch.inference_mode():
        return _run(
            RESULTS,
            {getattr(torch, name) for name in triton_dtypes},
            timeout=20.0,
            workspace_bytes=64 << 20,
        )


def registration() -> dict[str, Found]:
    """The same of those that do not depend on the number of ranks."""
    return _run(REGISTRATION, set(), timeout=100.0)  # one rank may compile longer than another


# ---- failures ----------------------------------------------------------------------------------


def raised(call) -> Raised:
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except CommfuseError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def failing(comm, call) -> dict[str, Raised]:
    """A call that fails, and what comes after it; kernels fail behind the call that starts them."""
    one = torch.ones(2, device=str(comm.device))

    def called():
        call()
        comm.check()

    return {
        "first": raised(called),
        "second": raised(lambda: ops.all_reduce(one, comm)),
        "check": raised(comm.check),
    }


def alive(device: torch.device) -> bool:
    """Whether the CUDA context still works, and a new communicator too."""
    total = torch.full((1000,), 2.0, device=device).sum().item()
    with communicator() as comm:
        out = ops.all_reduce(torch.ones(3, device=str(comm.device)), comm, "cuda")
        comm.check()
        return total == 2000 and out.tolist() == [comm.world_size] * 3


def failures() -> dict[str, dict]:
    """Calls that do not belong together, a rank that leaves a call out, and a second stream."""
    device, found = launch.use_gpu(), {}
    one = torch.ones(2, 4, device=device)
    x, w = (torch.ones(rows, 8, dtype=torch.bfloat16, device=device) for rows in (2, 8))
    pairs = {
        "shapes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.view(4, 2), c)),
        "sizes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one[:0], c)),
        "dtypes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.half(), c)),
        "ops": (
            lambda c: ops.all_reduce_rms_norm(x, None, x[0], EPS, c, "cuda"),
            lambda c: ops.matmul_all_reduce(x, w, c, backend="cuda"),
        ),
        "options": (
            lambda c: ops.matmul_all_reduce(x, w, c, backend="cuda"),
            lambda c: ops.matmul_all_reduce(x, w, c, residual=x, backend="cuda"),
        ),
        # One-shot against several calls of two-shot.
        "large": (
            lambda c: ops.all_reduce(torch.ones(3_000_000, device=device), c),
            lambda c: ops.all_reduce(torch.ones(5, device=device), c),
        ),
    }
    with torch.inference_mode():
        for name, (ours, other) in pairs.items():
            with communicator() as comm:
                ops.all_reduce(one, comm)
                comm.check()
                call = other if comm.rank == comm.world_size - 1 else ours
                found[name] = failing(comm, lambda comm=comm, call=call: call(comm))
        found["alive after mismatches"] = alive(device)
        with communicator(timeout=2.0) as comm:
            ops.all_reduce(one, comm)
            comm.check()
            if comm.rank == comm.world_size - 1:
                time.sleep(4.0)
            found["absent"] = failing(comm, lambda: ops.all_reduce(x, comm))
        found["alive after time-out"] = alive(device)
        found["second stream"] = second_stream()
    return found


def second_stream() -> dict:
    """A call on another stream while one is under way; then the first stream's results."""
    with communicator() as comm:
        one = torch.ones(2, device=str(comm.device))
        other = torch.cuda.Stream()  # made before: the first one waits for the device
        ops.all_reduce(one, comm)
        torch.cuda.synchronize()
        torch.cuda._sleep(500 * MILLISECOND)
        first = ops.all_reduce(one, comm)
        with torch.cuda.stream(other):
            error = raised(lambda: ops.all_reduce(one, comm))
        torch.cuda.synchronize()
        after = ops.all_reduce(one, comm)
        comm.check()
        return {"error": error, "first": first.tolist(), "after": after.tolist()}
